"""Kinds of modules that can carry adapters, one file each."""
