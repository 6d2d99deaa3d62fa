"""The command `lora-lightning`."""
