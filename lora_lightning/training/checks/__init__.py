"""What is refused before a run, and during it."""
