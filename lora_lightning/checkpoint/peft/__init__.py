"""PEFT's folders and key names."""
