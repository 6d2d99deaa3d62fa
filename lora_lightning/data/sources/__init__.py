"""Rows, words and images of files, folders and datasets, and where each came from."""
