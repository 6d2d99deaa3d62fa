"""What an error says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def message_of(error: type[Exception], function: Callable[..., Any], *args: Any, **kw: Any) -> str:
    """The text of the `error` that `function(*args, **kw)` raises."""
    with pytest.raises(error) as raised:
        function(*args, **kw)
    return str(raised.value)
