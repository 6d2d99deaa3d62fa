"""Folders and checkpoints are untrusted input: one clear error, and the model is as it was before.

Every refusal here is checked against all that can be seen of the model (`untouched.py`).
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_lightning import (
    LoraCallback,
    LoraConfig,
    LoraError,
    adapter_names,
    adapter_state_dict,
    delete_adapter,
    disable_adapter,
    inject_adapter,
    load_adapter,
    merge_adapter,
    save_adapter,
    set_adapter,
)
from lora_lightning.adapters.registry import config_types
from lora_lightning.errors import AdapterMismatchError, AdapterStateError, CheckpointError
from tests.helpers.lightning_modules import Data, Net, make_trainer
from tests.helpers.tensors import bit_equal, randomize
from tests.helpers.torch_models import OneLayerNet
from tests.helpers.unchanged import unchanged_check

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
A = "base_model.model.layers.0.proj.lora_A.weight"
PATIENCE = 5.0  # seconds, on a busy machine; what this is about would take hours


def base() -> nn.Module:
    """With another adapter on it, and with state that a refusal might disturb."""
    torch.manual_seed(0)
    model = OneLayerNet("linear")
    inject_adapter(model, LoraConfig(r=1, target_modules=["layers.0.proj"], bias="all"), "other")
    model.layers[1].eval()
    model.head.weight.requires_grad_(True)
    return model


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that can be loaded."""
    torch.manual_seed(0)
    model = OneLayerNet("linear")
    options = {"target_modules": ["proj"], "modules_to_save": ["head"], "lora_alpha": 3}
    inject_adapter(model, LoraConfig(r=2, **options))
    randomize([p for p in model.parameters() if p.requires_grad])
    folder = tmp_path_factory.mktemp("good")
    save_adapter(model, folder)
    return folder


class Folder:
    """A copy of the good folder, to be spoilt."""

    def __init__(self, good: Path, path: Path) -> None:
        self.path = path
        path.mkdir(exist_ok=True)
        self.config = json.loads((good / CONFIG).read_text())
        self.tensors = load_file(good / TENSORS)
        for name in (CONFIG, TENSORS):
            (path / name).write_bytes((good / name).read_bytes())

    def options(self, **changes: Any) -> Folder:
        (self.path / CONFIG).write_text(json.dumps({**self.config, **changes}))
        return self

    def values(self, **changes: Any) -> Folder:
        return self.with_tensors({**self.tensors, **changes})

    def with_tensors(self, tensors: dict[str, Any]) -> Folder:
        save_file({k: t for k, t in tensors.items() if t is not None}, self.path / TENSORS)
        return self

    def raw(self, content: bytes, name: str = TENSORS) -> Folder:
        (self.path / name).write_bytes(content)
        return self


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Folder:
    return Folder(good, tmp_path / "folder")


def refused(path: Any, words: str = "", error: type[LoraError] = LoraError, **options: Any) -> str:
    """The text of the refusal; nothing about the model has changed."""
    model = base()
    before = unchanged_check(model)
    began = time.monotonic()
    with pytest.raises(error, match=words or None) as caught:
        load_adapter(model, path, **options)
    assert time.monotonic() - began < PATIENCE
    before()
    assert len(str(caught.value)) < 4000
    return str(caught.value)


def test_the_good_one_loads(folder: Folder) -> None:
    model = base()
    before = unchanged_check(model)
    load_adapter(model, folder.path)
    assert adapter_names(model) == ["other", "default"]
    delete_adapter(model, "default")
    before()


def test_a_refusal_of_the_first_adapter_leaves_a_plain_model(folder: Folder) -> None:
    model = OneLayerNet("linear")
    model.norm.eval()
    before = unchanged_check(model)
    folder.values(**{A: folder.tensors[A] * float("nan")})
    with pytest.raises(LoraError):
        load_adapter(model, folder.path)
    before()
    assert not any("Adapted" in type(module).__name__ for module in model.modules())


# -- the folder --------------------------------------------------------------------------------


def test_paths(folder: Folder, tmp_path: Path) -> None:
    refused(tmp_path / "missing", "no folder or file .*missing", CheckpointError)
    refused("hub/name", "Nothing is fetched from a hub", CheckpointError)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no file adapter_config.json. It holds nothing", CheckpointError)
    (tmp_path / "a.txt").write_text("text")
    refused(tmp_path / "a.txt", "cannot be read as a checkpoint", CheckpointError)
    (folder.path / "lora.safetensors").write_bytes((folder.path / TENSORS).read_bytes())
    refused(folder.path / "lora.safetensors", "does not say how they act", CheckpointError)
    (folder.path / TENSORS).unlink()
    refused(folder.path, "adapter_model.safetensors' is missing", CheckpointError)
    (folder.path / TENSORS).mkdir()
    refused(folder.path, "is missing", CheckpointError)
    (folder.path / CONFIG).unlink()
    (folder.path / CONFIG).mkdir()
    refused(folder.path, "no file adapter_config.json", CheckpointError)


def test_a_pickle_is_not_read(folder: Folder) -> None:
    (folder.path / TENSORS).unlink()
    bomb(folder.path / "adapter_model.bin", folder.path / "ran")
    text = refused(folder.path, "is a pickle, which can run any code", CheckpointError)
    assert "safe_serialization=True" in text
    assert not (folder.path / "ran").exists()


def bomb(path: Path, trace: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {trace}",)

    path.write_bytes(pickle.dumps(Bomb()))


def test_links(folder: Folder, tmp_path: Path) -> None:
    """As in the hub's cache, a folder may consist of links; a broken one is a missing file."""
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in (CONFIG, TENSORS):
        (linked / name).symlink_to(folder.path / name)
    load_adapter(base(), linked)
    (folder.path / TENSORS).unlink()
    refused(linked, "is missing", CheckpointError)
    (folder.path / CONFIG).unlink()
    refused(linked, "no file adapter_config.json", CheckpointError)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(tmp_path / "loop", "", CheckpointError)


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_file_that_cannot_be_read(
    name: str, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder.path / name).chmod(0)
    if os.access(folder.path / name, os.R_OK):  # root may read everything
        denied = PermissionError(errno.EACCES, "Permission denied")

        def refuse(*_: Any, **__: Any) -> None:
            raise denied

        place = "lora_lightning.checkpoint.peft.reading.safe_open"
        if name == CONFIG:
            monkeypatch.setattr(Path, "read_bytes", refuse)
        else:
            monkeypatch.setattr(place, refuse)
    refused(folder.path, "Permission denied", CheckpointError)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["../good"], "not folders beside it"),
        (["/etc"], "not folders beside it"),
        (["a\\..\\b"], "not folders beside it"),
        ([".."], "not folders beside it"),
        ([""], "not folders beside it"),
        (["a\0b"], "not folders beside it"),
        ([], "not folders beside it"),
        ("inner", "does not list the adapters"),
        ([1], "does not list the adapters"),
        (None, "does not list the adapters"),
        (["nothing"], "no folder or file"),
        (["inner", "inner"], "already has an adapter 'inner'"),
        (["inner", "nothing"], "no folder or file"),
        (["inner", "spoilt"], "is no valid JSON"),
        (["inner", "nested"], "Unknown adapter type"),
        (["a.b"], "cannot be used"),
    ],
)
def test_folders_of_folders(names: Any, words: str, good: Path, tmp_path: Path) -> None:
    for name in ("inner", "spoilt", "nested", "a.b"):
        Folder(good, tmp_path / name)
    (tmp_path / "spoilt" / CONFIG).write_text("{")
    mix = {"peft_type": "LORA_LIGHTNING_MIX", "adapters": ["inner"]}
    (tmp_path / "nested" / CONFIG).write_text(json.dumps(mix))
    (tmp_path / CONFIG).write_text(json.dumps({**mix, "adapters": names}))
    refused(tmp_path, words)


@pytest.mark.parametrize("name", ["", "a.b", "keys", "other"])
def test_names(name: str, folder: Folder) -> None:
    refused(folder.path, "cannot be used|already has", adapter_name=name)


def test_states_in_which_nothing_can_be_loaded(folder: Folder) -> None:
    model = base()
    with disable_adapter(model):
        before = unchanged_check(model)
        with pytest.raises(AdapterStateError, match="disabled at present"):
            load_adapter(model, folder.path)
        before()
    merge_adapter(model)
    before = unchanged_check(model)
    with pytest.raises(AdapterStateError, match="merged"):
        load_adapter(model, folder.path)
    before()


# -- the config --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no valid JSON"),
        (b"{", "no valid JSON"),
        (b"[]", "holds a list"),
        (b"null", "holds a NoneType"),
        (b'"text"', "holds a str"),
        (b"\x00\x01\xff\xfe", "no valid JSON"),
        (b"[" * 100_000, "no valid JSON"),
        (b'{"a":' * 100_000, "no valid JSON"),
        (b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}", "no valid JSON"),
        (b"{}", "names no peft_type"),
        (b'{"peft_type": "\\ud800"}', "Unknown adapter type"),
        (b'{"peft_type": "PROMPT_TUNING"}', "Unknown adapter type 'PROMPT_TUNING'"),
        (b'{"peft_type": "LORAA"}', "Did you mean 'LORA'"),
        (b'{"peft_type": 5}', "names no peft_type"),
        (b'{"a": "' + b" " * 10_000_000 + b'"}', "too large"),
    ],
    ids=lambda value: repr(value[:20]) if isinstance(value, bytes) else "",
)
def test_no_config(content: bytes, words: str, folder: Folder) -> None:
    refused(folder.raw(content, CONFIG).path, words)


HUGE: list[Any] = [10**9, 10**18, 10**30, 10**400, 1e308, float("nan"), float("inf"), -1, 0]
WRONG: dict[str, list[Any]] = {
    "r": [*HUGE, True, "2", 2.0, [2]],
    "lora_alpha": [*(v for v in HUGE if v != 10**9), True, "2", [2], {}],
    "lora_dropout": [1, 1.5, -0.1, "x", True, float("nan"), [0]],
    "bias": ["x", 1, True, [], "all", "lora_only"],
    "use_rslora": ["false", 1, 2.5, []],
    "use_dora": ["false", 1, True],
    "lora_bias": ["false", 0.5, True],
    "init_lora_weights": [5, [], {}, "pissa_niter_4", "corda", "lora_ga"],
    "rank_pattern": [[], 5, "x", {"(": 2}, {"proj": 0}, {"proj": "2"}, {"proj": True}, {"proj": 3},
                     {"proj": 10**18}, {"proj": 10**30}, {"proj": [True]}, {"a{99999999999}": 1},
                     {"(" * 900: 1}],
    "alpha_pattern": [[], 5, {"proj": 0}, {"proj": "x"}, {"proj": float("nan")}, {"proj": 1e300},
                      {"proj": 10**400}],
    "modules_to_save": ["head", 5, [5], [None], {"head": 1}],
    "trainable_token_indices": [5, "x", [1], [None], [[1]], [10**30], {"head": [1]}, {"a": 1}, True],
    "target_parameters": ["head.weight", [5], ["nothing"], ["layers.0.proj.weight"], 5],
    # options that would compute something else
    "alora_invocation_tokens": [[1]],
    "layer_replication": [[[0, 1]]],
    "use_qalora": [True],
    "arrow_config": [{"top_k": 3}],
    "an option of tomorrow": [1, "yes", [0]],
}  # fmt: skip


@pytest.mark.parametrize("key", WRONG)
def test_wrong_values(key: str, folder: Folder) -> None:
    for value in WRONG[key]:
        text = refused(folder.options(**{key: value}).path)
        shown = str(value)[:12]
        assert str(folder.path) in text or "(lora." in text, (value, text)
        assert key.split("_")[0] in text or "checkpoint" in text or shown in text, (value, text)


CATASTROPHES = [
    "(a+)+$",
    r"(.*.*.*.*.*.*)*x",
    "(.|.)" * 40 + "x",
    ".?" * 60 + "x",
    "(.*)*(.*)*x",
    "a" * 9999,
]


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("expression", CATASTROPHES, ids=lambda value: value[:12])
def test_expressions_that_take_for_ever(expression: str, key: str, folder: Folder) -> None:
    refused(
        folder.options(**{key: {expression: 2}}).path, "could take for ever", AdapterMismatchError
    )


@pytest.mark.parametrize("expression", [".*.*.*x", ".{1,99}.{1,99}.{1,99}x", "(.|.)" * 16 + "x"])
def test_what_is_let_through_does_not_take_long(expression: str, folder: Folder) -> None:
    model = nn.Sequential()
    inner = model
    for _ in range(30):
        inner.add_module("a" * 4, nn.Sequential())
        inner = inner[-1]
    inner.add_module("proj", nn.Linear(6, 8))
    path = "aaaa." * 30 + "proj"
    tensors = {f"base_model.model.{path}.{k.rpartition('proj.')[2]}": t.clone()
               for k, t in folder.tensors.items() if "layers.0" in k}  # fmt: skip
    folder.options(alpha_pattern={expression: 2}).with_tensors(tensors)
    began = time.monotonic()
    load_adapter(model, folder.path)
    assert time.monotonic() - began < 4 * PATIENCE


def test_very_many_patterns(folder: Folder) -> None:
    pattern = {f"layers.{i}.proj": 1 for i in range(2, 20_000)}
    began = time.monotonic()
    load_adapter(base(), folder.options(alpha_pattern=pattern).path)
    assert time.monotonic() - began < 6 * PATIENCE


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-3, 9) | st.floats() | st.text(max_size=8)
    | st.sampled_from(["all-linear", "none", "all", "pissa", "(", "proj", 10**18, 10**400, 1e300]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=4) | st.sampled_from(["proj", "layers.0.proj"]), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip

SMALL: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 2, "target_r": 1}, "LOHA": {"r": 2}, "LOKR": {"r": 2}, "SHIRA": {"r": 1},
    "OFT": {"oft_block_size": 2}, "IA3": {"feedforward_modules": []}, "VERA": {"r": 2},
    "LORA": {"r": 2},
}  # fmt: skip


@pytest.fixture(
    scope="module",
    params=[
        "LORA",
        *(pytest.param(n, marks=pytest.mark.slow) for n in sorted(config_types()) if n != "LORA"),
    ],
)
def any_type(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = OneLayerNet("linear")
    config = config_types()[request.param](target_modules=["proj"], **SMALL[request.param])
    inject_adapter(model, config)
    path = tmp_path_factory.mktemp(request.param)
    save_adapter(model, path)
    return path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:oft_block_size")
@settings(
    max_examples=60, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(data=st.data())
def test_any_value_for_any_key(any_type: Path, data: st.DataObject) -> None:
    """Either it loads, or there is one LoraError; the model is then as before in both cases."""
    config = json.loads((any_type / CONFIG).read_text())
    keys = data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=2, unique=True))
    changed = {**config, **{key: data.draw(JSON, label=key) for key in keys}}
    place = any_type.parent / f"{any_type.name}-changed"
    place.mkdir(exist_ok=True)
    (place / CONFIG).write_text(json.dumps(changed))
    (place / TENSORS).write_bytes((any_type / TENSORS).read_bytes())
    model = base()
    before = unchanged_check(model)
    try:
        load_adapter(model, place)
    except LoraError:
        pass
    else:
        assert all(t.isfinite().all() for t in adapter_state_dict(model).values())
        delete_adapter(model, "default")
    before()


# -- the tensors -------------------------------------------------------------------------------


def test_truncated_at_every_length(folder: Folder) -> None:
    content = (folder.path / TENSORS).read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for length in (0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(content) - 1):
        text = refused(folder.raw(content[:length]).path, error=CheckpointError)
        assert "is damaged or no safetensors file" in text
    refused(folder.raw(content + b"x").path, "is damaged", CheckpointError)
    for size in (0, 1, 10**8, 10**9, 2**63, 2**64 - 1):
        changed = struct.pack("<Q", size) + content[8:]
        refused(folder.raw(changed).path, "is damaged", CheckpointError)


def test_flipped_bits_in_the_header(folder: Folder) -> None:
    """What still loads is the very adapter: only the remark {"format": "pt"} may be anything."""
    content = (folder.path / TENSORS).read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    model = base()
    before = unchanged_check(model)
    outcomes = set()
    for place in range(0, header, 3):
        spoilt = bytearray(content)
        spoilt[place] ^= 1 << place % 8
        folder.raw(bytes(spoilt))
        try:
            load_adapter(model, folder.path)
        except LoraError as error:
            outcomes.add(type(error))
        else:
            loaded = adapter_state_dict(model)
            for key, tensor in folder.tensors.items():
                short = key.removeprefix("base_model.model.").replace("A.weight", "A")
                assert bit_equal(loaded[short.replace("B.weight", "B")], tensor)
            delete_adapter(model, "default")
    before()
    assert outcomes == {CheckpointError, AdapterMismatchError}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_floats_load(dtype: torch.dtype, folder: Folder) -> None:
    folder.with_tensors({key: tensor.to(dtype) for key, tensor in folder.tensors.items()})
    model = base()
    load_adapter(model, folder.path)
    found = adapter_state_dict(model)["layers.0.proj.lora_A"]
    assert found.dtype == torch.float32
    assert bit_equal(found, folder.tensors[A].to(dtype).float())


@pytest.mark.parametrize(
    "dtype",
    [torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn,
     torch.float8_e5m2],
    ids=str,
)  # fmt: skip
def test_other_numbers_do_not(dtype: torch.dtype, folder: Folder) -> None:
    folder.values(**{A: folder.tensors[A].to(dtype)})
    refused(folder.path, f"{dtype}, which cannot be loaded as torch.float32", AdapterMismatchError)


@pytest.mark.parametrize("name", ["F4", "F8_E8M0", "BF8", "I128", "f32", ""])
def test_dtypes_that_nobody_knows(name: str, folder: Folder) -> None:
    content = (folder.path / TENSORS).read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    header[A]["dtype"] = name
    text = json.dumps(header).encode()
    refused(folder.raw(struct.pack("<Q", len(text)) + text + content[8 + size :]).path)


def test_values(folder: Folder) -> None:
    a = folder.tensors[A]
    head = "base_model.model.head.bias"
    for key, value, words in (
        (A, a * float("nan"), "not finite"),
        (A, a.clone().index_fill(0, torch.tensor([0]), float("inf")), "not finite"),
        (A, torch.full_like(a, 1e300, dtype=torch.float64), "not finite"),  # in float32
        (head, folder.tensors[head] * float("-inf"), "not finite .*'base_model.model.head.bias'"),
        (A, a.t().contiguous(), r"\[6, 2\] in the checkpoint, \[2, 6\] here"),
        (A, torch.tensor(1.0), r"\[\] in the checkpoint"),
        (A, torch.zeros(0, 6), r"\[0, 6\] in the checkpoint"),
        (A, torch.zeros(2, 6, 1), r"\[2, 6, 1\] in the checkpoint"),
        (A, None, "missing in the checkpoint: .*layers.0.proj.lora_A"),
        (head, None, "missing in the checkpoint: .*head.bias"),
        (A.replace("_A", "_C"), a.clone(), "only in the checkpoint: .*lora_C"),
        (A.replace("lora_A", "lora_A.default"), a.clone(), "does not have.*lora_A.default"),
        (A.replace("layers.0.proj", "norm"), a.clone(), "only in the checkpoint: .*norm.lora_A"),
        (A.replace("layers.0.proj", "head"), a.clone(), "only in the checkpoint: .*head.lora_A"),
        (
            A.replace("layers.0.proj", "layers"),
            a.clone(),
            "only in the checkpoint: .*layers.lora_A",
        ),
        (
            A.replace("layers.0", "layers.7"),
            a.clone(),
            "layers.7.*Nearest module: 'layers.[01].proj'",
        ),
        ("lora_A.weight", a.clone(), "does not have"),
        ("", a.clone(), "does not have"),
        ("base_model.model.", a.clone(), "does not have"),
        ("base_model.model.head", a.clone(), "does not have"),
        ("base_model.model.norm.weight", torch.zeros(8), "comes with 'norm.weight'"),
        ("base_model.model.norm.what", torch.zeros(8), "only in the checkpoint"),
    ):
        refused(folder.values(**{key: value}).path, words, AdapterMismatchError)


def test_tensors_for_another_model(folder: Folder) -> None:
    others = {
        key.replace("model.model.", "model.model.net.1."): t for key, t in folder.tensors.items()
    }
    refused(folder.with_tensors(others).path, r"begin with 'net.1.', which is in the way")
    others = {key.replace("proj", "norm.proj"): t for key, t in folder.tensors.items()}
    refused(folder.with_tensors(others).path, "Is it an adapter of another model")
    refused(folder.with_tensors({}).path, "holds no tensors of an adapter")
    head = {key: t for key, t in folder.tensors.items() if "head" in key}
    refused(folder.with_tensors(head).path, "holds no tensors of an adapter")


def test_base_tensors_that_are_the_bases_own_do_no_harm(folder: Folder) -> None:
    model = base()
    folder.values(**{"base_model.model.norm.weight": model.norm.weight.detach().clone()})
    load_adapter(model, folder.path)
    assert not any("norm" in key for key in adapter_state_dict(model))


# -- writing -----------------------------------------------------------------------------------


def adapted(lora_alpha: int = 8) -> nn.Module:
    model = OneLayerNet("linear")
    inject_adapter(model, LoraConfig(r=2, lora_alpha=lora_alpha, target_modules=["proj"]))
    return model


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


class FullDisk:
    """`open` for writing that fails in the middle of the n-th file."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = open(path, mode, *args, **kwargs)  # noqa: SIM115
        if "x" in mode:
            self.left -= 1
            if self.left < 0:
                file.write(b"half of")
                file.close()
                raise OSError(errno.ENOSPC, "No space left on device")
        return file


@pytest.mark.parametrize("after", [0, 1])
def test_a_full_disk(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_adapter(adapted(), tmp_path)
    before = contents(tmp_path)
    monkeypatch.setattr(
        "lora_lightning.utilities.atomic_write.open", FullDisk(after), raising=False
    )
    model = adapted(lora_alpha=4)  # both files change
    randomize(model.parameters())
    with pytest.raises(CheckpointError, match=r"cannot be written to .*: No space left"):
        save_adapter(model, tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("existing", [True, False], ids=["over", "fresh"])
@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_interrupted_between_the_files(
    at: int, existing: bool, links: bool, error: BaseException, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Tensors of one adapter beside the config of another would be a third one."""
    if existing:
        save_adapter(adapted(), tmp_path)
    before = contents(tmp_path)
    replace, calls = os.replace, []

    def fails(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == at + 1:
            raise error
        replace(source, target)

    def no_links(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(os, "replace", fails)
    model = adapted(lora_alpha=4)  # both files change
    randomize(model.parameters())
    with pytest.raises((CheckpointError, KeyboardInterrupt)):
        save_adapter(model, tmp_path)
    assert contents(tmp_path) == before
    monkeypatch.undo()
    save_adapter(model, tmp_path)
    assert sorted(contents(tmp_path)) == [CONFIG, TENSORS]
    assert contents(tmp_path) != before


def test_places_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(CheckpointError, match="cannot be written to"):
        save_adapter(adapted(), tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot be written to"):
        save_adapter(adapted(), tmp_path / "file" / "below")
    (tmp_path / "folder" / CONFIG).mkdir(parents=True)
    (tmp_path / "folder" / TENSORS).write_text("old")
    with pytest.raises(CheckpointError, match="cannot be written to"):
        save_adapter(adapted(), tmp_path / "folder")
    assert (tmp_path / "folder" / TENSORS).read_text() == "old"
    assert len(list((tmp_path / "folder").iterdir())) == 2

    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(CheckpointError, match="Read-only file system"):
        save_adapter(adapted(), tmp_path / "new")


# -- checkpoints of Lightning ------------------------------------------------------------------

ONE = {"r": 2, "target_modules": ["embed", "body.2"], "modules_to_save": ["head"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Net]]:
    folder = tmp_path_factory.mktemp("runs")
    callbacks = {
        "one": [LoraCallback(**ONE)],
        "two": [
            LoraCallback(r=2, target_modules=["embed"]),
            LoraCallback(r=2, target_modules=["body.2"], adapter_name="inner", use_dora=True),
        ],
        "below": [LoraCallback(r=2, module="body", target_modules=["2"], rank_pattern={"2": 1})],
        "bias": [LoraCallback(r=2, target_modules=["embed"], bias="all")],
        "pissa": [LoraCallback(r=2, target_modules=["embed"], init_lora_weights="pissa")],
        "expression": [LoraCallback(r=2, target_modules=r"body\.2")],
        "full": [],
    }
    found = {}
    for name, chosen in callbacks.items():
        torch.manual_seed(0)
        module = Net()
        trainer = make_trainer(folder, *chosen, max_steps=3, max_epochs=-1)
        trainer.fit(module, Data())
        trainer.save_checkpoint(folder / f"{name}.ckpt")
        found[name] = (folder / f"{name}.ckpt", module.eval())
    return found


def x() -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", ["one", "two", "below", "bias", "pissa", "expression"])
def test_checkpoints_load(name: str, runs: dict[str, tuple[Path, Net]]) -> None:
    path, trained = runs[name]
    module = Net().eval()
    names = load_adapter(module, path)
    assert names == adapter_names(trained)
    with disable_adapter(module):
        assert bit_equal(module(x()), Net().eval()(x()))
    set_adapter(module, names)
    set_adapter(trained, names)
    assert bit_equal(module(x()), trained(x()))


def test_checkpoints_under_another_name(runs: dict[str, tuple[Path, Net]]) -> None:
    path, trained = runs["one"]
    module = Net()
    assert load_adapter(module, path, "mine") == ["mine"]
    of_module, of_trained = adapter_state_dict(module, "mine"), adapter_state_dict(trained)
    assert of_module.keys() == of_trained.keys()
    assert all(bit_equal(t, of_trained[key]) for key, t in of_module.items())
    module = Net()
    assert load_adapter(module, runs["two"][0], "inner") == ["inner"]
    with pytest.raises(AdapterStateError, match=r"holds the adapters .* but no 'mine'"):
        load_adapter(module, runs["two"][0], "mine")
    assert adapter_names(module) == ["inner"]


@pytest.mark.parametrize(
    ("name", "adapter"), [("below", None), ("two", "inner"), ("expression", None)]
)
def test_checkpoints_onto_a_part(
    name: str, adapter: str | None, runs: dict[str, tuple[Path, Net]]
) -> None:
    """The part that holds all that was adapted, whatever the options called it."""
    path, trained = runs[name]
    module = Net()
    (loaded,) = load_adapter(module.body, path, adapter)
    expected = adapter_state_dict(trained.body, loaded)
    found = adapter_state_dict(module.body, loaded)
    assert found.keys() == expected.keys()
    assert all(bit_equal(t, expected[key]) for key, t in found.items())
    with torch.no_grad():
        other = Net()
        other.body[2].weight += 1e-3
    before = unchanged_check(other)
    with pytest.raises(AdapterMismatchError, match=r"another base model.*\n.*2.weight: other val"):
        load_adapter(other.body, path, adapter)
    before()
    if adapter is not None:
        with pytest.raises(AdapterMismatchError, match="give the model that was trained"):
            load_adapter(Net().body, path)


def test_checkpoints_of_another_base(runs: dict[str, tuple[Path, Net]]) -> None:
    path, _ = runs["one"]
    for model in (nn.Sequential(nn.Linear(3, 3)), nn.ModuleDict({"net": Net()})):
        before = unchanged_check(model)
        with pytest.raises(AdapterMismatchError, match="give the model that was trained"):
            load_adapter(model, path)
        before()
    wrong = Net()
    with torch.no_grad():
        wrong.norm.weight[3] += 1e-6
    before = unchanged_check(wrong)
    with pytest.raises(AdapterMismatchError, match=r"norm.weight: other values"):
        load_adapter(wrong, path)
    before()
    wider = Net(width=12)
    before = unchanged_check(wider)
    with pytest.raises(AdapterMismatchError, match=r"\[2, 16\] in the checkpoint, \[2, 12\] here"):
        load_adapter(wider, path)
    before()
    taken = Net()
    load_adapter(taken, path)
    before = unchanged_check(taken)
    with pytest.raises(AdapterStateError, match="already has an adapter 'default'"):
        load_adapter(taken, path)
    before()


def not_loaded(path: Path, words: str, error: type[LoraError] = LoraError) -> None:
    module = Net()
    before = unchanged_check(module)
    with pytest.raises(error, match=words) as caught:
        load_adapter(module, path)
    before()
    assert "\n\n" not in str(caught.value)


def test_files_that_are_no_adapter_checkpoints(
    runs: dict[str, tuple[Path, Net]], tmp_path: Path
) -> None:
    not_loaded(runs["full"][0], "no adapter checkpoint: it was not written by", CheckpointError)
    content = runs["one"][0].read_bytes()
    for length in (0, 1, 10, 100, len(content) // 2, len(content) - 1):
        (tmp_path / "short.ckpt").write_bytes(content[:length])
        not_loaded(tmp_path / "short.ckpt", "cannot be read as a checkpoint", CheckpointError)
    bomb(tmp_path / "bomb.ckpt", tmp_path / "ran")
    not_loaded(tmp_path / "bomb.ckpt", "cannot be read as a checkpoint", CheckpointError)

    class Bomb:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"lora_lightning": Bomb(), "state_dict": {}}, tmp_path / "bomb.ckpt")
    not_loaded(tmp_path / "bomb.ckpt", "cannot be read as a checkpoint", CheckpointError)
    assert not (tmp_path / "ran").exists()


def entry(content: dict[str, Any]) -> dict[str, Any]:
    return content["lora_lightning"]["adapters"]["default"]


LORA_A = "embed.adapters.default.lora_A"
SPOILT: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no metadata": (lambda c: c.update(lora_lightning=None), "is damaged"),
    "a list": (lambda c: c.update(lora_lightning=[]), "is damaged"),
    "empty": (lambda c: c.update(lora_lightning={}), "is damaged"),
    "newer": (lambda c: c["lora_lightning"].update(format=99), "Update lora_lightning"),
    "format": (lambda c: c["lora_lightning"].update(format="1"), "is damaged"),
    "adapters": (lambda c: c["lora_lightning"].update(adapters=[1]), "is damaged"),
    "no adapters": (lambda c: c["lora_lightning"].update(adapters={}), "is damaged"),
    "base": (lambda c: c["lora_lightning"].update(base=None), "is damaged"),
    "empty base": (lambda c: c["lora_lightning"].update(base={}), "is damaged"),
    "odd base": (lambda c: c["lora_lightning"].update(base={"embed.weight": 5}), "is damaged"),
    "other base": (lambda c: c["lora_lightning"].update(base={"z": [[1], "x", "y"]}), "another base"),
    "config": (lambda c: entry(c).update(config=None), "is damaged"),
    "rank": (lambda c: entry(c)["config"].update(r="x"), "r is 'x', but it must be"),
    "huge rank": (lambda c: entry(c)["config"].update(r=10**9), "r=1000000000 is larger"),
    "absurd rank": (lambda c: entry(c)["config"].update(r=10**30), "r is 1000"),
    "other rank": (lambda c: entry(c)["config"].update(r=3), r"\[2, 16\] in the checkpoint, \[3, 16"),
    "alpha": (lambda c: entry(c)["config"].update(lora_alpha=1e300), "lora_alpha is 1e"),
    "option": (lambda c: entry(c)["config"].update(zzz=1), "Unknown LoraConfig option 'zzz'"),
    "targets": (lambda c: entry(c)["config"].update(target_modules=5), "target_modules is 5"),
    "fewer": (lambda c: entry(c)["config"].update(target_modules=["embed"]), "only in the checkp"),
    "type": (lambda c: entry(c).update(peft_type="X"), "Unknown adapter type"),
    "odd type": (lambda c: entry(c).update(peft_type=[]), "is damaged"),
    "tensors": (lambda c: entry(c).update(tensors=None), "is damaged"),
    "no tensors": (lambda c: entry(c).update(tensors={}), "is damaged"),
    "more tensors": (lambda c: entry(c)["tensors"].update(zzz=[1]), "is damaged"),
    "module": (lambda c: entry(c).update(module="nope"), "is damaged"),
    "odd module": (lambda c: entry(c).update(module=5), "is damaged"),
    "name": (
        lambda c: c["lora_lightning"].update(adapters={"a.b": entry(c)}), "give the model that was",
    ),
    "odd name": (lambda c: c["lora_lightning"].update(adapters={5: entry(c)}), "is damaged"),
    "no state": (lambda c: c.pop("state_dict"), "is damaged"),
    "odd state": (lambda c: c.update(state_dict=5), "is damaged"),
    "text": (lambda c: c["state_dict"].update({LORA_A: "x"}), "is damaged"),
    "missing": (lambda c: c["state_dict"].pop(LORA_A), "is damaged"),
    "shape": (lambda c: c["state_dict"].update({LORA_A: torch.zeros(3, 3)}), r"\[3, 3\] in the"),
    "integers": (lambda c: c["state_dict"].update({LORA_A: torch.zeros(2, 8).long()}), "int64"),
    "nan": (lambda c: c["state_dict"][LORA_A].fill_(float("nan")), "not finite"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_spoilt_checkpoints(name: str, runs: dict[str, tuple[Path, Net]], tmp_path: Path) -> None:
    spoil, words = SPOILT[name]
    content = torch.load(runs["one"][0], weights_only=True)
    del content["lora_lightning"]["content"]  # the hashes, which would notice all that follows
    torch.save(content, tmp_path / "whole.ckpt")
    load_adapter(Net(), tmp_path / "whole.ckpt")
    spoil(content)
    torch.save(content, tmp_path / "spoilt.ckpt")
    not_loaded(tmp_path / "spoilt.ckpt", words)


def test_the_watch_can_fail() -> None:
    """`untouched` sees every kind of change."""
    for change in (
        lambda m: m.head.weight.data.add_(1),
        lambda m: m.norm.weight.requires_grad_(True),
        lambda m: m.layers[0].train(False),
        lambda m: setattr(m.layers[0].proj, "active_adapters", []),
        lambda m: m.layers[0].proj.adapters["other"].set_scaling(3.0),
        lambda m: merge_adapter(m),
        lambda m: delete_adapter(m, "other"),
        lambda m: inject_adapter(m, LoraConfig(r=1), "new"),
        lambda m: setattr(m.head, "weight", nn.Parameter(m.head.weight.detach().clone())),
        lambda m: setattr(m.head, "note", 1),
    ):
        model = base()
        before = unchanged_check(model)
        before()
        change(model)
        with pytest.raises(AssertionError):
            before()
