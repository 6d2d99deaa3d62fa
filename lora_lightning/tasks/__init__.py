"""Ready LightningModules for users who bring only the name of a model."""
