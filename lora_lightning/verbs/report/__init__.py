"""What came of a run, or of several: a page of curves, comparison, samples and updates."""
