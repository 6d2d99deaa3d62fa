"""Examples as batches: which share one, in which order, and how they are laid out."""
