"""A forward on the meta device, which says shapes and dtypes, works with adapters too."""

from __future__ import annotations

import pytest
import torch

from tests.engine.test_parity import TYPES, adapted_by_us, cells, example, net

CELLS = [cell for letter in "pfgdo" for cell in cells(letter)]


@pytest.mark.parametrize(("name", "kind"), CELLS)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_forward_on_meta(name: str, kind: str, autocast: bool) -> None:
    assert name in TYPES
    model = adapted_by_us(net(kind, torch.float32), name).train()
    x = example(kind, torch.float32)
    y = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):  # which meta ignores
        z = model.to("meta")(x.to("meta"))
    assert (z.shape, z.dtype, z.is_meta) == (y.shape, y.dtype, True)
    z.sum().backward()
