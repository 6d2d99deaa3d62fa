"""LoRA and DoRA, on each kind of weight."""
