"""Ready LightningDataModules for users who bring only a file."""
