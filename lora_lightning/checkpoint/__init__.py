"""Adapter tensors in files, ours and PEFT's."""
