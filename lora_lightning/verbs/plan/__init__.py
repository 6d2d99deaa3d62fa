"""`plan`: what a run needs, before any weight is loaded."""
