"""`merge`: the adapter made part of the model, in files that need no library of ours."""
