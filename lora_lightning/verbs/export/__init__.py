"""`export`: an adapter out of a run, in the files that others load."""
