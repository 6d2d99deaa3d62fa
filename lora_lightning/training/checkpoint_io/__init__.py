"""Lightning checkpoints: what they say of themselves, as files, and without a Trainer."""
