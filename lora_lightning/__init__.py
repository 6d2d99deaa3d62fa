"""LoRA fine-tuning for PyTorch Lightning."""
