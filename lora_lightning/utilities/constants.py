"""Numbers that several packages must agree on."""

IGNORE_INDEX = -100
"""Label of a position that is not learned: the `ignore_index` of torch's cross-entropy."""
