"""Checks before a run and during it, which refuse what would go wrong."""
