"""Samples as token ids, and which of them are learned."""
