"""`preview`: the data as the model will see them, before anything is trained."""
