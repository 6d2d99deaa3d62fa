"""Objects told by the name of their class, whose package then need not be imported."""

from __future__ import annotations


def is_a(value: object, *names: str, module: str | None = None) -> bool:
    """True if the class of `value`, or one that it derives from, has one of these names.

    Lightning's classes are found so in both of its packages, `lightning` and `pytorch_lightning`.
    Where a `module` is given, the class must be defined there.
    """
    return any(
        base.__name__ in names and module in (None, base.__module__) for base in type(value).__mro__
    )
