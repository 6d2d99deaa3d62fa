"""What this library promises, examined on a user's own LightningModule by a few steps of it."""
