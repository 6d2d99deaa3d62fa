"""`merge` of a causal LM's run: what is in the folder, and every way in which it is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lora_lightning
from lora_lightning.checkpoint.integrity import with_hashes
from lora_lightning.errors import (
    AdapterMismatchError,
    CheckpointError,
    ConfigError,
    ModelError,
)
from lora_lightning.runs.build import trained_module
from lora_lightning.runs.run import find_run
from tests.helpers.command import run_command
from tests.helpers.merged_runs import chat_run, plain_logits, unmerged_logits
from tests.helpers.paths import ROOT
from tests.helpers.tiny_lm import tiny_llama

merge = lora_lightning.merge
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run `runs/lm`, of its base and its data."""
    folder = tmp_path_factory.mktemp("trained")
    tiny_llama(folder / "base", "chatml")
    chat_run(folder, {})
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of all of it, to be worked in and spoilt."""
    place = tmp_path / "run"
    shutil.copytree(trained, place)
    monkeypatch.chdir(place)
    _repoint(place)
    return place


def _repoint(place: Path) -> None:
    """Have the checkpoints name the base in the copy."""
    for file in place.glob("runs/lm/checkpoints/*.ckpt"):
        content = torch.load(file, weights_only=True)
        content["module_options"]["model"] = content["tokenizer"] = str(place / "base")
        torch.save(with_hashes(content), file)


def nothing_left(place: Path) -> bool:
    """Neither a folder nor a part of one."""
    return not [p for p in place.iterdir() if "merged" in p.name]


# -- what is written -----------------------------------------------------------------------------


def test_plain_transformers_gives_the_logits_of_the_unmerged_model(folder: Path) -> None:
    result = merge("runs/lm", "merged", check=4)
    wanted, base = unmerged_logits("runs/lm")
    found = plain_logits(folder / "merged")
    assert (found - wanted).abs().max() < 1e-5
    assert (base - wanted).abs().max() > 1e-2  # the adapter does something, and the test can fail
    assert result.saved is not None
    assert result.merged is not None
    assert max(result.saved.largest, result.merged.largest) < 1e-5
    assert result.rows == 4


def test_a_merge_that_leaves_one_matrix_out_is_noticed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_lightning.verbs.merge.skeleton import Skeleton

    whole = Skeleton.value

    def broken(self: Any, name: str) -> Any:
        if name == "model.layers.1.mlp.down_proj.weight":
            return self.as_trained_on(name, self.layout.read(self.layout.group_of[name])[name])
        return whole(self, name)

    monkeypatch.setattr(Skeleton, "value", broken)
    with pytest.raises(lora_lightning.AdapterStateError, match="saved as float32 answers other"):
        merge("runs/lm", "merged")
    assert nothing_left(folder)
    merge("runs/lm", "merged", check=0)
    wanted, _ = unmerged_logits("runs/lm")
    assert (plain_logits(folder / "merged") - wanted).abs().max() > 1e-3


def test_all_but_adapted_weights_are_those_of_the_base_byte_for_byte(folder: Path) -> None:
    merge("runs/lm", "merged", check=0)
    base, merged = (load_file(folder / p / "model.safetensors") for p in ("base", "merged"))
    assert base.keys() == merged.keys()
    same = {key for key in base if torch.equal(base[key], merged[key])}
    assert same == {key for key in base if "norm" in key or "embed" in key or "lm_head" in key}


def test_shards_and_their_index(folder: Path) -> None:
    result = merge("runs/lm", "merged", max_shard_size="60KB", check=0)
    index = json.loads((folder / "merged/model.safetensors.index.json").read_text())
    files = sorted((folder / "merged").glob("*.safetensors"))
    assert {*index["weight_map"].values()} == {file.name for file in files}
    assert len(files) > 2
    assert f"{len(files)} shards of at most 60KB" in result.how
    total = 0
    for file in files:
        with safe_open(file, "pt") as opened:
            assert {k for k, v in index["weight_map"].items() if v == file.name} == {*opened.keys()}
            sizes = [opened.get_tensor(key).nbytes for key in opened.keys()]  # noqa: SIM118
            assert sum(sizes) <= 60_000 or len(sizes) == 1
            total += sum(sizes)
    assert index["metadata"]["total_size"] == total
    wanted, _ = unmerged_logits("runs/lm")
    assert (plain_logits(folder / "merged") - wanted).abs().max() < 1e-5


def test_tokenizer_template_and_config(folder: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    merge("runs/lm", "merged", check=0)
    ours, theirs = (AutoTokenizer.from_pretrained(p) for p in ("merged", "base"))
    assert ours.chat_template == theirs.chat_template is not None
    assert ours.get_vocab() == theirs.get_vocab()
    config = AutoConfig.from_pretrained("merged")
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.dtype == torch.float32
    assert config.use_cache  # off while training


def test_the_chat_template_that_was_trained_with(folder: Path) -> None:
    from transformers import AutoTokenizer

    run = find_run("runs/lm")
    text = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    run.config["data"]["init_args"]["chat_template"] = text
    import yaml

    (folder / "runs/lm/config.yaml").write_text(yaml.safe_dump(run.config))
    merge("runs/lm", "merged", check=0)
    assert AutoTokenizer.from_pretrained("merged").chat_template == text


@pytest.mark.parametrize("given", [None, 0, [0, 5]])
def test_generation_ends_where_turns_were_taught_to_end(folder: Path, given: Any) -> None:
    from transformers import GenerationConfig

    generation = GenerationConfig.from_pretrained("base")
    generation.eos_token_id = given
    generation.save_pretrained("base")
    file = folder / "runs/lm/checkpoints/best.ckpt"
    content = torch.load(file, weights_only=True)
    torch.save(with_hashes({**content, "end_tokens": [7, 0]}), file)
    result = merge("runs/lm", "merged", check=0)
    known = [] if given is None else [given] if isinstance(given, int) else given
    wanted = [*dict.fromkeys([*known, 7, 0])]
    assert GenerationConfig.from_pretrained("merged").eos_token_id == wanted
    assert f"generation ends at the tokens {wanted}" in str(result)


def test_without_learned_end_tokens_generation_is_as_in_the_base(folder: Path) -> None:
    from transformers import GenerationConfig

    before = GenerationConfig.from_pretrained("base").eos_token_id
    file = folder / "runs/lm/checkpoints/best.ckpt"
    content = torch.load(file, weights_only=True)
    content.pop("end_tokens", None)
    torch.save(with_hashes(content), file)
    merge("runs/lm", "merged", check=0)
    assert GenerationConfig.from_pretrained("merged").eos_token_id == before


@pytest.mark.slow
def test_a_narrower_dtype_is_rounded_once(folder: Path) -> None:
    exact = trained_module(find_run("runs/lm")).network
    lora_lightning.merge_and_unload(exact)
    wanted = exact.state_dict()
    result = merge("runs/lm", "merged", dtype="bfloat16", check=4)
    found = load_file("merged/model.safetensors")
    assert all(torch.equal(found[key], wanted[key].bfloat16()) for key in found)
    assert result.merged is not None
    assert result.saved is not None
    assert result.merged.largest < 1e-5 < result.saved.largest
    assert json.loads(Path("merged/config.json").read_text())["dtype"] == "bfloat16"


def test_the_command(folder: Path, monkeypatch: Any, capfd: Any) -> None:
    shown = run_command(folder, monkeypatch, capfd, "merge", "runs/lm", "merged", "--check", "4")
    assert "merged default of runs/lm/checkpoints/best.ckpt: shard by shard" in shown
    assert "4 validation rows" in shown
    assert "as saved (float32)" in shown
    assert "to use it:\n  transformers.AutoModelForCausalLM.from_pretrained('merged')" in shown
    assert "%|" not in shown  # no bars where there is no terminal
    shown = run_command(
        folder, monkeypatch, capfd, "merge", "runs/lm", "merged", "--force", "--check", "0"
    )
    assert "not compared with the unmerged model: --check 0" in shown


def test_where_it_does_not_fit_into_memory_that_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_lightning.verbs.merge.comparison.free_memory", lambda: 10_000)
    result = merge("runs/lm", "merged")
    assert result.saved is None
    assert "0.0 GB are free" in str(result)
    wanted, _ = unmerged_logits("runs/lm")
    assert (plain_logits(folder / "merged") - wanted).abs().max() < 1e-5


def test_one_adapter_by_name(folder: Path) -> None:
    merge("runs/lm", "merged", adapter="default", check=0)
    with pytest.raises(ConfigError, match=r"no adapter 'defualt'\. Did you mean 'default'\?"):
        merge("runs/lm", "merged2", adapter="defualt")


def test_without_data_and_config_the_checkpoint_is_enough(folder: Path) -> None:
    alone = shutil.copy("runs/lm/checkpoints/best.ckpt", "alone.ckpt")
    result = merge(alone, "merged")
    assert "not compared with the unmerged model: the run's config names no data" in str(result)
    wanted, _ = unmerged_logits("runs/lm")
    assert (plain_logits(folder / "merged") - wanted).abs().max() < 1e-5


def test_a_base_without_safetensors_is_merged_in_memory(folder: Path) -> None:
    state = load_file("base/model.safetensors")
    torch.save(state, "base/pytorch_model.bin")
    Path("base/model.safetensors").unlink()
    result = merge("runs/lm", "merged", max_shard_size="60KB")
    assert "in memory as a whole, because its base has no safetensors files" in result.how
    wanted, _ = unmerged_logits("runs/lm")
    assert (plain_logits(folder / "merged") - wanted).abs().max() < 1e-5
    assert len([*(folder / "merged").glob("*.safetensors")]) > 1


def test_files_that_transformers_rules_do_not_match_are_merged_in_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise AttributeError("of another version")

    from transformers import conversion_mapping

    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", broken)
    result = merge("runs/lm", "merged", check=0)
    assert "cannot be matched" in result.how
    assert "of another version" in result.how
    wanted, _ = unmerged_logits("runs/lm")
    assert (plain_logits(folder / "merged") - wanted).abs().max() < 1e-5


# -- what is refused -----------------------------------------------------------------------------


def test_another_base(folder: Path) -> None:
    state = load_file("base/model.safetensors")
    state["model.norm.weight"][3] += 1
    save_file(state, "base/model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterMismatchError, match=r"another base: 'model\.norm\.weight' has oth"):
        merge("runs/lm", "merged")
    assert nothing_left(folder)


def test_a_base_that_lacks_a_tensor(folder: Path) -> None:
    state = load_file("base/model.safetensors")
    del state["model.layers.0.self_attn.k_proj.weight"]
    save_file(state, "base/model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterMismatchError, match=r"another base model"):
        merge("runs/lm", "merged")
    assert nothing_left(folder)


def test_a_base_that_is_gone_or_damaged(folder: Path) -> None:
    Path("base/model.safetensors").write_bytes(b"\x08" * 100)
    with pytest.raises(ModelError, match=r"model\.safetensors' cannot be read"):
        merge("runs/lm", "merged")
    shutil.rmtree("base")
    with pytest.raises(ModelError, match="is no existing folder"):
        merge("runs/lm", "merged")
    assert nothing_left(folder)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd"])
def test_an_index_that_leads_out_of_the_folder(folder: Path, name: str) -> None:
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    Path("base/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="not in the model's own folder"):
        merge("runs/lm", "merged")
    Path("base/model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelError, match="does not say which files"):
        merge("runs/lm", "merged")


def test_an_incomplete_model(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    Path("base/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="which is not there: the model is not complete"):
        merge("runs/lm", "merged")


def test_an_existing_output(folder: Path) -> None:
    Path("merged").mkdir()
    (folder / "merged/mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"'merged' is there already.*\(out\)"):
        merge("runs/lm", "merged", check=0)
    assert [p.name for p in Path("merged").iterdir()] == ["mine.txt"]
    merge("runs/lm", "merged", check=0, force=True)
    assert not Path("merged/mine.txt").exists()
    assert Path("merged/config.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_shard_size": "many"}, r"no size of a file; write 5GB.*\(max_shard_size\)"),
        ({"dtype": "bf16"}, r"dtype='bf16' is not known\. .*Known are float32, .*\(dtype\)"),
        ({"check": -1}, r"check must be 0 or more.*\(check\)"),
        ({"dequantize": True}, r"is not quantized: there is nothing to dequantize.*\(dequantize\)"),
        ({"adapter": []}, r"No adapter is named.*\(adapter\)"),
    ],
)
def test_options_that_cannot_work(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        merge("runs/lm", "merged", **options)
    assert nothing_left(folder)


@pytest.mark.parametrize("tokens", ["<end>", [10**9], [1.5]])
def test_end_tokens_that_are_none(folder: Path, tokens: Any) -> None:
    file = folder / "runs/lm/checkpoints/best.ckpt"
    content = torch.load(file, weights_only=True)
    torch.save(with_hashes({**content, "end_tokens": tokens}), file)
    with pytest.raises(CheckpointError, match="'end_tokens' is no list of tokens of the model"):
        merge("runs/lm", "merged", check=0)
    assert nothing_left(folder)


def test_adapters_that_have_diverged(folder: Path) -> None:
    file = folder / "runs/lm/checkpoints/best.ckpt"
    content = torch.load(file, weights_only=True)
    key = next(key for key in content["state_dict"] if key.endswith("lora_B"))
    content["state_dict"][key][0, 0] = torch.inf
    torch.save(with_hashes(content), file)
    with pytest.raises(lora_lightning.LoraError, match="not finite"):
        merge("runs/lm", "merged", check=0)
    assert nothing_left(folder)


def test_a_run_without_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        Path("base", name).unlink()
    result = merge("runs/lm", "merged", check=0)
    lines = [line for line in str(result).splitlines() if line.startswith("no tokenizer")]
    assert len(lines) == 1
    wanted, _ = unmerged_logits("runs/lm")
    assert (plain_logits(folder / "merged") - wanted).abs().max() < 1e-5


# -- as a process --------------------------------------------------------------------------------

LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
"""
COMMAND = """
import sys
import lora_lightning.cli.main
sys.argv = ["lora-lightning", *sys.argv[1:]]
lora_lightning.cli.main.main()
"""


@pytest.mark.slow
def test_failures_of_a_process(folder: Path) -> None:
    """A full disk (no file may grow beyond 50 kB), an existing output, no run, another base."""

    def call(*arguments: str, start: str = "") -> str:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        done = subprocess.run(
            [sys.executable, "-c", start + COMMAND, *arguments],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        return done.stderr

    free = "--check", "0"
    full = call("merge", "runs/lm", "merged", *free, start=LIMITED)
    assert "cannot be written: " in full
    assert "Nothing was left there. (out)" in full
    assert nothing_left(folder)
    assert "no run 'runs/ml'" in call("merge", "runs/ml", "merged")
    Path("merged").mkdir()
    assert "'merged' is there already" in call("merge", "runs/lm", "merged", *free)
    Path("merged").rmdir()
    state = load_file("base/model.safetensors")
    state["lm_head.weight"] += 1
    save_file(state, "base/model.safetensors", {"format": "pt"})
    assert "trained on another base" in call("merge", "runs/lm", "merged", *free)
    assert nothing_left(folder)
