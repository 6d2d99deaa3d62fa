"""How tasks build their networks: each option against transformers or torch doing it alone."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import HalfPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lora_lightning import LoraCallback, LoraConfig, inject_adapter
from lora_lightning.errors import ConfigError, ModelError
from lora_lightning.layers.traversal import named_adapted_layers
from lora_lightning.tasks import SequenceClassification
from lora_lightning.tasks.model_options import ModelOptions
from lora_lightning.tasks.network import build_network
from lora_lightning.tasks.pretrained_task import PretrainedTask
from lora_lightning.tasks.sharding import repeated_layers
from tests.helpers.lightning_modules import make_trainer
from tests.helpers.tiny_bert import save_tiny_bert
from tests.helpers.tiny_lm import tiny_llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning"),  # bitsandbytes
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
    # torchao, which transformers looks for, at its first import
    pytest.mark.filterwarnings("ignore:Calling register_constant"),
]


class LanguageModel(PretrainedTask):
    auto_class = "AutoModelForCausalLM"

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.network(input_ids=batch, labels=batch).loss


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("llama")))


def ids(rows: int = 2, length: int = 12) -> Tensor:
    return torch.randint(0, 200, (rows, length), generator=torch.Generator().manual_seed(3))


def data() -> DataLoader:
    return DataLoader(ids(8), batch_size=4)


def built(folder: str, **options: Any) -> Any:
    module = LanguageModel(folder, **options)
    module.configure_model()
    return module.network


def fit(folder: Path, module: Any, *callbacks: Any, **options: Any) -> Any:
    make_trainer(folder, *callbacks, max_epochs=1, **options).fit(module, data())
    return module


# -- dtype, attention ------------------------------------------------------------------------------


def test_dtype(tmp_path: Path, llama: str) -> None:
    from transformers import AutoModelForCausalLM

    half = str(tmp_path / "half")
    AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).save_pretrained(half)
    for options, wanted in (
        ({}, torch.float32),
        ({"dtype": "auto"}, torch.bfloat16),
        ({"dtype": "float16"}, torch.float16),
        ({"dtype": "auto", "pretrained": False}, torch.bfloat16),
    ):
        assert {p.dtype for p in built(half, **options).parameters()} == {wanted}, options


def test_a_bf16_base_carries_float32_adapters(tmp_path: Path, llama: str) -> None:
    module = fit(tmp_path, LanguageModel(llama, dtype="bfloat16"), LoraCallback(r=2))
    found = {p.dtype: p.requires_grad for p in module.parameters()}
    assert found == {torch.bfloat16: False, torch.float32: True}


def test_a_dtype_that_the_precision_undoes(tmp_path: Path, llama: str) -> None:
    with pytest.raises(ConfigError) as error:
        fit(tmp_path, LanguageModel(llama, dtype="float32"), precision="bf16-true")
    assert str(error.value) == (
        "dtype='float32' would have no effect: trainer.precision='bf16-true' turns all weights "
        "into bfloat16. Leave one of the two out. (model.dtype, trainer.precision)"
    )
    module = fit(tmp_path, LanguageModel(llama, dtype="bfloat16"), precision="bf16-true")
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}


def test_attn_implementation(llama: str) -> None:
    eager, sdpa = built(llama, attn_implementation="eager"), built(llama)
    assert eager.config._attn_implementation == "eager"
    assert sdpa.config._attn_implementation == "sdpa"
    assert torch.allclose(eager(ids()).logits, sdpa(ids()).logits, atol=1e-5)


@pytest.mark.parametrize("name", ["flash_attention_2", "egaer"])
def test_an_attention_that_is_not_there(llama: str, name: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"='{name}' cannot be had: .*\(model.attn_implementation\)"
    ):
        built(llama, attn_implementation=name)


# -- random weights, hub ---------------------------------------------------------------------------


def test_pretraining_needs_a_config_only(tmp_path: Path, llama: str) -> None:
    shutil.copy(Path(llama, "config.json"), tmp_path)
    torch.manual_seed(1)
    first = built(str(tmp_path), pretrained=False)
    torch.manual_seed(1)
    second = built(str(tmp_path), pretrained=False)
    third = built(str(tmp_path), pretrained=False)
    weight = first.lm_head.weight
    assert torch.equal(weight, second.lm_head.weight)
    assert not torch.equal(weight, third.lm_head.weight)
    assert first.training
    module = LanguageModel(str(tmp_path), pretrained=False)
    fit(tmp_path, module)
    assert all(p.requires_grad for p in module.parameters())

    bert = save_tiny_bert(tmp_path / "bert")
    task = SequenceClassification(str(bert), label_names=["a", "b", "c"], pretrained=False)
    task.configure_model()
    assert task.network.classifier.out_features == 3
    assert len(task.parameter_groups()) == 1  # no head that is newer than the rest


def test_adapters_on_random_weights_are_refused(tmp_path: Path, llama: str) -> None:
    with pytest.raises(ConfigError, match=r"pretrained=false gives random weights, and adapters"):
        fit(tmp_path, LanguageModel(llama, pretrained=False), LoraCallback(r=2))


def test_a_folder_has_no_revision(llama: str) -> None:
    with pytest.raises(ConfigError) as error:
        built(llama, revision="v2")
    assert str(error.value) == (
        f"revision='v2' names a state of a model on the hub, but {llama!r} is a local folder, "
        "which has one state only. Leave it out. (model.revision)"
    )


@pytest.mark.parametrize("pretrained", [True, False])
def test_what_the_hub_is_asked_for(monkeypatch: Any, pretrained: bool) -> None:
    asked = {}

    def load(auto_class: str, name: str, key: str = "", **options: Any) -> Any:
        asked.update(options, auto_class=auto_class)
        raise InterruptedError

    monkeypatch.setattr("lora_lightning.tasks.network.load_pretrained", load)
    with pytest.raises(InterruptedError):
        built("org/model", revision="v2", trust_remote_code=True, pretrained=pretrained)
    assert asked["auto_class"] == ("AutoModelForCausalLM" if pretrained else "AutoConfig")
    assert (asked["revision"], asked["trust_remote_code"]) == ("v2", True)


def test_code_of_the_model_runs_where_it_is_trusted(tmp_path: Path, monkeypatch: Any) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "own_model"
    tiny_llama(folder)
    Path(folder, "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n\n\n"
        "class Own(LlamaForCausalLM):\n    config: OwnConfig\n    own = 1\n"
    )
    config = json.loads(Path(folder, "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.Own",
    }
    config["model_type"] = "own-model"
    Path(folder, "config.json").write_text(json.dumps(config))
    Path(folder, "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n"
        '    model_type = "own-model"\n'
    )
    with pytest.raises(ModelError) as error:
        built(str(folder))
    assert str(error.value) == (
        f"AutoModelForCausalLM cannot load {str(folder)!r} without running Python code that comes "
        "with it. Read that code; if you trust it, set trust_remote_code: true. "
        "(model.trust_remote_code)"
    )
    assert built(str(folder), trust_remote_code=True).own == 1


# -- quantisation ----------------------------------------------------------------------------------


def quantised(name: str, precision: str) -> Any:
    """transformers' own words for it."""
    from transformers import BitsAndBytesConfig

    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=name,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32 if precision == "32-true" else torch.bfloat16,
    )


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("nf4", "32-true"),
        ("nf4", "bf16-mixed"),
        ("nf4", "bf16-true"),
        ("fp4", "32-true"),
        ("int8", "bf16-true"),
    ],
)
def test_quantize(tmp_path: Path, llama: str, name: str, precision: str) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import AutoModelForCausalLM

    module = LanguageModel(llama, quantize=name)
    trainer = make_trainer(tmp_path, LoraCallback(r=2), max_epochs=2, precision=precision)
    trainer.fit(module, data())
    alone = AutoModelForCausalLM.from_pretrained(
        llama,
        quantization_config=quantised(name, precision),
        dtype=torch.bfloat16 if precision == "bf16-true" else torch.float32,
        device_map="cpu",
    )
    found = dict(module.network.named_modules())
    for path, layer in alone.named_modules():
        if hasattr(layer, "weight"):
            assert torch.equal(layer.weight, found[path].weight), path
        if "4bit" in type(layer).__name__:
            assert found[path].compute_dtype == layer.compute_dtype
    kinds = Counter(type(layer).__bases__[-1].__name__ for layer in found.values())
    linears = [path for path, layer in alone.named_modules() if "bit" in type(layer).__name__]
    assert len(linears) == 14, kinds
    assert type(found["lm_head"]) is nn.Linear
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    assert len(trained) == 28
    assert all(p.dtype == torch.float32 and p.any() for p in trained.values())


@pytest.fixture
def as_in_a_new_process() -> Iterator[Callable[[], None]]:
    """Lets bitsandbytes forget the table that it rounds by."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from bitsandbytes.backends.default.ops import _get_4bit_quantize_bounds
    from bitsandbytes.backends.utils import _code_4bit_cache

    def forget() -> None:
        _code_4bit_cache.clear()
        _get_4bit_quantize_bounds.cache_clear()

    yield forget
    forget()


def indices_after(module: Any) -> Tensor:
    """How a weight is rounded to NF4 once `module` has been loaded as `bf16-true` loads it."""
    from bitsandbytes.functional import quantize_4bit

    with HalfPrecision("bf16-true").module_init_context():
        module.configure_model()
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    return quantize_4bit(weight, quant_type="nf4")[0]


def test_rounding_is_that_of_any_process(
    llama: str, as_in_a_new_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not another one after a model under `bf16-true`, as on a module that lets things be."""
    as_in_a_new_process()
    wanted = indices_after(LanguageModel(llama))
    as_in_a_new_process()
    assert torch.equal(indices_after(LanguageModel(llama, quantize="nf4")), wanted)

    monkeypatch.setattr("lora_lightning.tasks.network.settle_rounding_table", lambda kind: None)
    as_in_a_new_process()
    broken = indices_after(LanguageModel(llama, quantize="nf4"))
    assert not torch.equal(broken, wanted)


def test_a_head_stays_as_precise_as_it_is(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    bert = str(save_tiny_bert(tmp_path))
    task = SequenceClassification(bert, label_names=["a", "b", "c"], quantize="nf4")
    task.configure_model()
    assert type(task.network.classifier) is nn.Linear
    assert type(task.network.bert.pooler.dense).__name__ == "Linear4bit"


def test_a_quantised_network_is_not_trained_in_full(tmp_path: Path, llama: str) -> None:
    with pytest.raises(ConfigError, match=r"quantize='nf4' leaves .* cannot be trained"):
        fit(tmp_path, LanguageModel(llama, quantize="nf4"))


def test_quantize_without_bitsandbytes(llama: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as error:
        LanguageModel(llama, quantize="nf4")
    assert str(error.value) == (
        "quantize='nf4' needs bitsandbytes, which is not installed. Install it with: "
        'pip install "lora_lightning[quant]" (model.quantize)'
    )


def test_unknown_choices(llama: str) -> None:
    with pytest.raises(ConfigError, match=r"quantize='nf5' is not known. Did you mean 'nf4'\?"):
        LanguageModel(llama, quantize="nf5")
    with pytest.raises(
        ConfigError, match=r"Known are auto, float32, bfloat16, float16, float64. \(model"
    ):
        LanguageModel(llama, dtype="int4")


# -- gradient checkpointing ------------------------------------------------------------------------


def step(network: Any, lora: bool = True) -> dict[str, Any]:
    """One forward and backward pass: calls of a layer, bytes kept, gradients."""
    if lora:
        inject_adapter(network, LoraConfig(r=2, init_lora_weights=False))
    calls = []
    attention = network.model.layers[0].self_attn
    attention.register_forward_hook(lambda *_: calls.append(1))
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = network(input_ids=ids(4, 64), labels=ids(4, 64)).loss
    loss.backward()
    return {
        "calls": len(calls),
        "bytes": sum(size for place, size in kept.items() if place not in weights),
        "gradients": {n: p.grad for n, p in network.named_parameters() if p.grad is not None},
    }


@pytest.mark.parametrize("lora", [True, False], ids=["adapters", "all"])
def test_gradient_checkpointing(llama: str, lora: bool) -> None:
    without = step(built(llama), lora)
    found = step(built(llama, gradient_checkpointing=True), lora)
    assert (without["calls"], found["calls"]) == (1, 2)
    assert len(found["gradients"]) == (28 if lora else 21)
    assert found["gradients"].keys() == without["gradients"].keys()
    for name, gradient in without["gradients"].items():
        assert torch.equal(found["gradients"][name], gradient), name
    # Two layers of hidden 32 below 4 x 64 x 200 logits: what layers keep is most of it.
    assert found["bytes"] < 0.5 * without["bytes"]


def test_negative_control_in_eval_mode(llama: str) -> None:
    """As `from_pretrained` leaves it: nothing is checkpointed, and nothing says so."""
    assert step(built(llama, gradient_checkpointing=True).eval())["calls"] == 1


def test_gradient_checkpointing_in_training(tmp_path: Path, llama: str) -> None:
    calls = []

    def count(*_: Any) -> None:
        calls.append(1)

    class Counted(LanguageModel):
        def on_train_start(self) -> None:
            super().on_train_start()
            self.network.model.layers[1].self_attn.register_forward_hook(count)

    def trained(**options: Any) -> dict[str, Tensor]:
        module = fit(tmp_path, Counted(llama, **options), LoraCallback(r=2))
        return {k: v for k, v in module.state_dict().items() if ".adapters." in k}

    without, straight = trained(), len(calls)
    found = trained(gradient_checkpointing=True)
    assert (straight, len(calls) - straight) == (2, 4)
    assert all(torch.equal(found[name], tensor) for name, tensor in without.items())


SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "AutoModelForTokenClassification", {**SIZES, "num_attention_heads": 2}),
    "gpt2": ("GPT2Config", "AutoModelForCausalLM", {"n_embd": 16, "n_layer": 2, "n_head": 2}),
    "t5": (
        "T5Config",
        "AutoModelForSeq2SeqLM",
        {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
        | {"decoder_start_token_id": 0, "pad_token_id": 0},
    ),
    "vit": (
        "ViTConfig",
        "AutoModelForImageClassification",
        {**SIZES, "num_attention_heads": 2, "image_size": 16, "patch_size": 8},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_of_other_kinds(tmp_path: Path, kind: str) -> None:
    """Every layer of every stack runs twice, and every adapter has a gradient."""
    import transformers

    config, auto_class, sizes = KINDS[kind]
    options = {} if kind == "vit" else {"vocab_size": 200}
    getattr(transformers, config)(**sizes, **options).save_pretrained(tmp_path)
    checkpointed = ModelOptions(pretrained=False, gradient_checkpointing=True)
    network, _ = build_network(auto_class, str(tmp_path), checkpointed)
    inject_adapter(network, LoraConfig(r=2, target_modules="all-linear"))
    layers = repeated_layers(network)
    calls = [0] * len(layers)
    for place, layer in enumerate(layers):
        _, first = next(named_adapted_layers(layer))
        first.register_forward_hook(
            lambda *_, place=place: calls.__setitem__(place, calls[place] + 1)
        )
    inputs = {"pixel_values": torch.ones(2, 3, 16, 16)} if kind == "vit" else {"input_ids": ids()}
    extra = {"labels": ids()} if kind == "t5" else {}
    network(**inputs, **extra).logits.sum().backward()
    assert calls == [2, 2]
    trained = [p for p in network.parameters() if p.requires_grad]
    assert len(trained) > 10
    assert all(p.grad is not None for p in trained)


def test_a_network_without_layers_to_checkpoint(llama: str, monkeypatch: Any) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(ConfigError) as error:
        built(llama, gradient_checkpointing=True)
    assert str(error.value) == (
        f"{llama!r} is a LlamaForCausalLM, which does not support gradient checkpointing. "
        "(model.gradient_checkpointing)"
    )


# -- torch.compile ---------------------------------------------------------------------------------


class Counting:
    """A backend that runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, _: Any) -> Any:
        self.graphs += 1
        return graph


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_graph_for_all_lengths(llama: str, checkpointing: bool) -> None:
    torch._dynamo.reset()
    backend = Counting()
    options = {"backend": backend, "fullgraph": True}
    network = built(llama, compile=options, gradient_checkpointing=checkpointing)
    plain = built(llama)
    assert network.state_dict().keys() == plain.state_dict().keys()
    for model in (network, plain):  # after it was compiled, as the callback does
        inject_adapter(model, LoraConfig(r=2, init_lora_weights=False))
    for rows, length in ((2, 12), (2, 7), (3, 30)):
        batch = ids(rows, length)
        positions = torch.arange(length).expand(rows, -1)
        for model in (network, plain):
            model.zero_grad()
            hidden = model.model(input_ids=batch, position_ids=positions, use_cache=False)[0]
            model.lm_head(hidden).logsumexp(-1).sum().backward()
        for (name, one), two in zip(network.named_parameters(), plain.parameters(), strict=True):
            assert (one.grad is None) == (two.grad is None)
            if two.grad is not None:
                assert torch.allclose(one.grad, two.grad, atol=1e-4), name
    assert backend.graphs == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo
def test_heads_are_not_part_of_the_graph(tmp_path: Path) -> None:
    """A loss may take them in pieces, also where the base is not one module: T5's two stacks."""
    import transformers

    torch._dynamo.reset()
    config, auto_class, sizes = KINDS["t5"]
    getattr(transformers, config)(**sizes, vocab_size=200).save_pretrained(tmp_path)
    backend = Counting()
    options = ModelOptions(pretrained=False, compile={"backend": backend, "fullgraph": True})
    network, _ = build_network(auto_class, str(tmp_path), options)
    seen = []
    network.lm_head.register_forward_pre_hook(lambda _, args: seen.append(type(args[0])))
    for length in (7, 12):
        network(input_ids=ids(2, length), labels=ids(2, length + 3)).loss.backward()
    assert backend.graphs == 2
    assert seen == [Tensor, Tensor]  # not once, while a graph was made


@pytest.mark.slow
def test_negative_control_that_is_compiled_for_each_length(llama: str) -> None:
    torch._dynamo.reset()
    backend = Counting()
    network = built(llama, compile={"backend": backend, "dynamic": False})
    for length in (12, 7, 30):
        network(input_ids=ids(2, length))
    assert backend.graphs == 3


@pytest.mark.slow
def test_a_compiled_task_trains_as_it_does_without(tmp_path: Path, llama: str) -> None:
    torch._dynamo.reset()

    def trained(**options: Any) -> dict[str, Tensor]:
        module = fit(tmp_path, LanguageModel(llama, **options), LoraCallback(r=2))
        return {k: v for k, v in module.state_dict().items() if ".adapters." in k}

    backend = Counting()
    found, wanted = trained(compile={"backend": backend}), trained()
    assert backend.graphs == 1
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], tensor, atol=1e-6) for name, tensor in wanted.items())


@pytest.mark.slow
def test_the_default_backend(tmp_path: Path, llama: str) -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("inductor needs a C++ compiler on the CPU, and there is none")
    torch._dynamo.reset()
    network, plain = built(llama, compile=True), built(llama)
    with torch.no_grad():  # a backward graph takes it 20 s more
        assert torch.allclose(network(ids()).logits, plain(ids()).logits, atol=1e-5)


@pytest.mark.parametrize("options", [{"mod": 1}, {"mode": "max"}, {"backend": "inducto"}])
def test_options_that_torch_does_not_know(llama: str, options: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"torch.compile cannot be given that: .*\(model.compile\)"
    ):
        built(llama, compile=options)


def test_no_options_are_the_defaults(llama: str) -> None:
    assert built(llama, compile={}).model._compiled_call_impl is not None
    assert built(llama).model._compiled_call_impl is None
