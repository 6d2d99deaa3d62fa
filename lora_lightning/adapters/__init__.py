"""Adapter types, one file each."""
