"""Which modules a config selects: peft's rules to the letter, and an error where peft is silent."""

from __future__ import annotations

import itertools

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import (
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.other import get_pattern_key
from torch import nn

from lora_lightning import LoraConfig, inject_adapter
from lora_lightning.adapters.config import pattern_value
from lora_lightning.engine.targets.matching import is_excluded, matches_target
from lora_lightning.engine.targets.selection import select_modules
from lora_lightning.errors import ConfigError, LoraError, RankError, TargetError
from tests.helpers.torch_models import Transformer

# -- names against peft ------------------------------------------------------------------------

PREFIXES = ["", "model.", "base.encoder.", "v_"]
STACKS = [
    "",
    "layers.0.",
    "layers.1.",
    "layers.11.",
    "h.1.",
    "layers.1.experts.0.",
    "0.",
    "layer.0.1.",
]
LEAVES = [
    "q",
    "attn.q",
    "q_proj",
    "proj",
    "vq",
    "q.lora",
    "head",
    "overhead",
    "head.dense",
    "mlp.0",
]
PATHS = [a + b + c for a, b, c in itertools.product(PREFIXES, STACKS, LEAVES)]

LISTS = [
    ["q"], ["attn.q"], ["q", "proj"], ["q_proj"], ["head"], ["0"], ["dense"], ["layers.1.q"],
    ["model.layers.1.attn.q", "proj"], ["h.1.q"], ["1.attn.q"], ["attn"], [".q"], ["odel.q"],
]  # fmt: skip
REGEXES = ["q", r".*\.q", r".*q", r".*layers\.[01]\..*", r"(model\.)?.*(q|proj)$", ".*head"]
EXCLUDES = [
    None,
    ["q"],
    ["attn.q", "head"],
    ["model.layers.1.attn.q"],
    r".*\.1\..*",
    "q",
    r".*proj",
]
SAVES = [None, ["head"], ["layers"], ["attn", "dense"], ["h.1"]]
LAYERS = [None, 0, 1, [1], [0, 11], []]
LAYER_PATTERNS = [None, "layers", ["h", "layers"], "layers.1.experts", "layer", []]


def configs():
    for targets, exclude, save in itertools.product(LISTS + REGEXES, EXCLUDES, SAVES):
        yield {"target_modules": targets, "exclude_modules": exclude, "modules_to_save": save}
    for targets, layers, pattern in itertools.product(LISTS, LAYERS, LAYER_PATTERNS):
        if layers is not None or pattern is None:
            yield {
                "target_modules": targets,
                "layers_to_transform": layers,
                "layers_pattern": pattern,
            }


def both_select(options: dict, path: str) -> tuple[bool, bool]:
    ours = LoraConfig(**options)
    return (
        bool(check_target_module_exists(peft.LoraConfig(**options), path)),
        not is_excluded(ours, path) and matches_target(ours, path),
    )


def test_every_name_is_matched_as_in_peft():
    different, selected = [], 0
    for options in configs():
        theirs, ours = peft.LoraConfig(**options), LoraConfig(**options)
        for path in PATHS:
            expected = bool(check_target_module_exists(theirs, path))
            selected += expected
            if (not is_excluded(ours, path) and matches_target(ours, path)) != expected:
                different.append((options, path, expected))
    assert not different
    assert selected > 5_000  # the table is not all misses


segment = st.sampled_from(["q", "qq", "a", "layers", "h", "0", "1", "10", "q_0", "x1"])
dotted = st.lists(segment, min_size=1, max_size=5).map(".".join)


@settings(max_examples=300, deadline=None)
@given(
    path=dotted,
    options=st.fixed_dictionaries(
        {
            "target_modules": st.lists(dotted, min_size=1, max_size=3),
            "exclude_modules": st.none() | st.lists(dotted, min_size=1, max_size=2) | dotted,
            "modules_to_save": st.none() | st.lists(dotted, min_size=1, max_size=2),
            "layers_to_transform": st.sampled_from([0, 1, [0, 10], []]),
            "layers_pattern": st.none() | segment | st.lists(dotted, min_size=1, max_size=2),
        }
    ),
)
def test_random_names_are_matched_as_in_peft(path, options):
    expected, found = both_select(options, path)
    assert found == expected


KEYS = [
    "q",
    "attn.q",
    r"layers\.1\..*",
    ".*q",
    "layers.1.attn.q",
    "q|proj",
    "proj$",
    "^model.q",
    ".",
]


@pytest.mark.parametrize("keys", list(itertools.permutations(KEYS, 2)), ids=str)
def test_patterns_apply_as_in_peft(keys):
    """The first key that fits wins."""
    pattern = dict(zip(keys, (3, 4), strict=True))
    different = [
        path
        for path in PATHS
        if pattern_value(pattern, path, 2) != pattern.get(get_pattern_key(pattern.keys(), path), 2)
    ]
    assert not different


# -- all-linear against peft -------------------------------------------------------------------


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(**sizes, intermediate_size=8, vocab_size=20))


def llama(kind: str = "LlamaForCausalLM"):
    import transformers

    return getattr(transformers, kind)(
        transformers.LlamaConfig(
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=8,
            vocab_size=20,
        )
    )


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=20, n_positions=8))


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, vocab_size=20))


MODELS = {  # model, peft's task type, output head
    "bert": (bert, "SEQ_CLS", "classifier"),
    "llama": (llama, "CAUSAL_LM", "lm_head"),
    "llama-classifier": (lambda: llama("LlamaForSequenceClassification"), "SEQ_CLS", "score"),
    "llama-base": (lambda: llama("LlamaModel"), None, None),
    "gpt2": (gpt2, "CAUSAL_LM", "lm_head"),
    "t5": (t5, "SEQ_2_SEQ_LM", "lm_head"),
    "plain": (Transformer, None, None),
}


@pytest.mark.parametrize(("build", "task", "head"), MODELS.values(), ids=MODELS)
def test_all_linear_selects_what_peft_selects(build, task, head):
    model = build()
    config = peft.LoraConfig(target_modules="all-linear", task_type=task)
    expected = _maybe_include_all_linear_layers(config, model).target_modules
    selection = select_modules(model, LoraConfig(r=1))
    assert set(selection.targets) == set(expected)
    assert selection.left_out == ([head] if head else [])

    inside = select_modules(
        nn.ModuleDict({"model": model}), LoraConfig(r=1)
    )  # as in a LightningModule
    assert set(inside.targets) == {f"model.{path}" for path in expected}


def test_all_linear_a_second_time_selects_the_same():
    model = llama()
    first = inject_adapter(model, LoraConfig(r=1))
    second = inject_adapter(model, LoraConfig(r=1), "second")
    assert list(first.targets) == list(second.targets)
    assert first.left_out == second.left_out == ["lm_head"]


def test_all_linear_leaves_embeddings_and_input_projections_of_attentions_alone():
    model = nn.ModuleDict(
        {"e": nn.Embedding(3, 4), "a": nn.MultiheadAttention(4, 2), "l": nn.Linear(4, 4)}
    )
    assert list(select_modules(model, LoraConfig(r=1)).targets) == ["a.out_proj", "l"]


class Pretrained(Transformer):
    """Looks like a transformers model whose head is an MLP."""

    base_model_prefix = "model"

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))

    def get_output_embeddings(self) -> None:
        return None


@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        ({}, ["classifier.0", "classifier.1"]),
        ({"modules_to_save": ["classifier"]}, []),
        (
            {"target_modules": "all-linear", "target_parameters": ["classifier.0.weight"]},
            ["classifier.1"],
        ),
        ({"target_parameters": ["classifier.0.weight"]}, []),
    ],
)
def test_a_head_that_trains_is_not_said_to_be_frozen(options, left_out):
    assert select_modules(Pretrained(), LoraConfig(r=1, **options)).left_out == left_out


def test_saved_modules_are_exactly_those_named():
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("head", "overhead", "subhead", "q")})
    selection = select_modules(
        model, LoraConfig(r=1, target_modules=["q"], modules_to_save=["head"])
    )
    assert list(selection.saved) == ["head"]


# -- every message -----------------------------------------------------------------------------

ERRORS = {  # options, error type, sentences in order
    "a typo among good names": (
        {"target_modules": ["attn.q", "vv", "mlpp.2"]},
        TargetError,
        [
            "target_modules ['attn.q', 'vv', 'mlpp.2']: 2 of 3 names matched nothing.",
            "'vv'",
            "'mlpp.2'",
            "Adaptable names in this model: embed x1, q x2, k x2, v x2, out x2, "
            "mlp.0 x2, mlp.2 x2, "
            "head x1",
            "Use 'all-linear' for every Linear except the output head, or list names.",
            "(lora.target_modules)",
        ],
    ),
    "did you mean": (
        {"target_modules": ["heads"]},
        TargetError,
        [
            "target_modules ['heads']: 1 of 1 name matched nothing.",
            "'heads' -> did you mean 'head' (1 module)?",
            "Adaptable names in this model:",
            "(lora.target_modules)",
        ],
    ),
    "did you mean several": (
        {"target_modules": ["outs"]},
        TargetError,
        ["'outs' -> did you mean 'out' (2 modules)?"],
    ),
    "nothing near": (
        {"target_modules": ["xyzzy"]},
        TargetError,
        ["'xyzzy' is unlike every name in this model."],
    ),
    "all names excluded": (
        {"target_modules": ["q", "k"], "exclude_modules": ["q", "k"]},
        TargetError,
        [
            "exclude_modules=['q', 'k'] takes out all that target_modules=['q', 'k'] selects: ",
            "layers.0.attn.q",
            "(lora.exclude_modules)",
        ],
    ),
    "all excluded": (
        {"exclude_modules": ".*"},
        TargetError,
        [
            "exclude_modules='.*' takes out all that target_modules='all-linear' selects: ",
            "layers.0.attn.q",
            "Name fewer modules there, or other targets. (lora.exclude_modules)",
        ],
    ),
    "all that an expression selects excluded": (
        {"target_modules": r".*\.q", "exclude_modules": ["q"]},
        TargetError,
        ["exclude_modules=['q'] takes out all that", "selects: layers.0.attn.q, layers.1.attn.q."],
    ),
    "all saved": (
        {"target_modules": "head", "modules_to_save": ["head"]},
        TargetError,
        ["modules_to_save=['head'] takes out all that target_modules='head' selects: head."],
    ),
    "layers_pattern fits nothing": (
        {"target_modules": ["q"], "layers_to_transform": 0, "layers_pattern": "layer"},
        TargetError,
        [
            "but not in a list of modules called 'layer'; lists of modules there: layers "
            "(lora.layers_pattern)"
        ],
    ),
    "all targets in other layers": (
        {"target_modules": ["q"], "layers_to_transform": [7], "layers_pattern": "layers"},
        TargetError,
        ["but in layers [0, 1]; layers_to_transform is [7] (lora.layers_to_transform)"],
    ),
    "saved and targeted": (
        {"target_modules": ["q", "head"], "modules_to_save": ["head"]},
        TargetError,
        ["'head' is in modules_to_save already (head)", "(lora.target_modules)"],
    ),
    "regex without match": (
        {"target_modules": "layers.9.*"},
        TargetError,
        [
            "target_modules 'layers.9.*', a regular expression over whole paths, matched nothing.",
            "Adaptable names in this model: embed x1",
            "Use 'all-linear' for every Linear except the output head.",
            "(lora.target_modules)",
        ],
    ),
    "a name given as regex": (
        {"target_modules": "q"},
        TargetError,
        [
            "target_modules 'q', a regular expression over whole paths, matched nothing.",
            "As a name it would match 2 modules: write it as a list, ['q'].",
            "(lora.target_modules)",
        ],
    ),
    "a norm": (
        {"target_modules": ["norm"]},
        TargetError,
        [
            "target_modules selects 'layers.0.norm', a LayerNorm, which cannot carry an adapter.",
            "Adaptable kinds: Linear, Conv1D (transformers), Embedding, ",
            "To train it in full, list it in modules_to_save instead.",
            "Adaptable names in this model:",
            "(lora.target_modules)",
        ],
    ),
    "exclusion of nothing": (
        {"exclude_modules": ["heat"]},
        TargetError,
        [
            "exclude_modules 'heat' excludes nothing.",
            "did you mean 'head' (1 module)?",
            "Correct it or take it out.",
            "(lora.exclude_modules)",
        ],
    ),
    "exclusion regex of nothing": (
        {"exclude_modules": "zzz.*"},
        TargetError,
        ["exclude_modules 'zzz.*' excludes nothing.", "(lora.exclude_modules)"],
    ),
    "no such layer": (
        {"target_modules": ["q"], "layers_to_transform": [1, 7], "layers_pattern": "layers"},
        TargetError,
        [
            "layers_to_transform [1, 7]: no target in layer 7; targets were found in layers [1].",
            "Indices count from 0.",
            "(lora.layers_to_transform)",
        ],
    ),
    "rank_pattern of nothing": (
        {"target_modules": ["q"], "rank_pattern": {"qq": 2}},
        TargetError,
        [
            "rank_pattern 'qq' fits none of the 2 targets.",
            "did you mean 'q' (2 modules)?",
            "Correct it or take it out.",
            "(lora.rank_pattern)",
        ],
    ),
    "alpha_pattern of nothing": (
        {"target_modules": ["q"], "alpha_pattern": {"k": 2}},
        TargetError,
        ["alpha_pattern 'k' fits none of the 2 targets.", "(lora.alpha_pattern)"],
    ),
    "saved nothing": (
        {"modules_to_save": ["haed"]},
        TargetError,
        [
            "modules_to_save 'haed' matched nothing.",
            "did you mean 'head' (1 module)?",
            "Names at the top of this model: embed, layers, layers.0, layers.1, norm, head.",
            "(lora.modules_to_save)",
        ],
    ),
    "saved list": (
        {"target_modules": ["head"], "modules_to_save": ["layers"]},
        TargetError,
        [
            "modules_to_save 'layers' selects 'layers', a ModuleList: it is never called itself",
            "Name the modules inside.",
            "(lora.modules_to_save)",
        ],
    ),
    "rank too large": (
        {"r": 9, "target_modules": ["q"]},
        RankError,
        [
            "r=9 is larger than 'layers.0.attn.q' (weight (8, 8)) allows: at most 8.",
            "Lower r",
            "rank_pattern: {q: 8}",
            "exclude_modules: [q]",
            "modules_to_save: [q]",
            "(lora.r)",
        ],
    ),
    "rank_pattern too large": (
        {"r": 2, "target_modules": ["q", "head"], "rank_pattern": {"head": 4}},
        RankError,
        ["r=4 is larger than 'head' (weight (3, 8)) allows: at most 3.", "(lora.rank_pattern)"],
    ),
}


@pytest.mark.parametrize(("options", "kind", "sentences"), ERRORS.values(), ids=ERRORS)
def test_message(options, kind, sentences):
    model = Transformer()
    before = [(name, type(module)) for name, module in model.named_modules()]
    gradients = [p.requires_grad for p in model.parameters()]
    with pytest.raises(LoraError) as caught:
        inject_adapter(model, LoraConfig(**{"r": 2, **options}))
    assert type(caught.value) is kind
    text, position = str(caught.value), 0
    for sentence in sentences:
        assert sentence in text[position:], text
        position = text.index(sentence, position)
    # Everything is checked before anything is touched.
    assert before == [(name, type(module)) for name, module in model.named_modules()]
    assert gradients == [p.requires_grad for p in model.parameters()]


def test_advice_for_a_layer_that_is_called_by_a_number():
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))})
    with pytest.raises(RankError, match=r"rank_pattern: \{'body.1': 1\}.*\['body.1'\]"):
        inject_adapter(model, LoraConfig(r=8, target_modules=["0", "1"]))
    inject_adapter(model, LoraConfig(r=8, target_modules=["0", "1"], rank_pattern={"body.1": 1}))


def test_all_linear_without_a_linear():
    with pytest.raises(TargetError) as caught:
        inject_adapter(nn.Sequential(nn.LayerNorm(3), nn.Embedding(4, 3)), LoraConfig())
    assert "target_modules 'all-linear' matched nothing" in str(caught.value)
    assert "LayerNorm x1, Embedding x1" in str(caught.value)
    assert "Adaptable kinds: Linear, Conv1D (transformers), Embedding" in str(caught.value)
    assert "name modules explicitly. (lora.target_modules)" in str(caught.value)
    with pytest.raises(TargetError, match="the model has no parameters yet"):
        inject_adapter(nn.ModuleDict(), LoraConfig())


@pytest.mark.parametrize("name", ["", "a.b", "keys", "items", "training", "forward"])
def test_adapter_names_that_cannot_be(name):
    with pytest.raises(ConfigError) as caught:
        inject_adapter(Transformer(), LoraConfig(r=1), name)
    assert f"adapter_name {name!r} cannot be used" in str(caught.value)
    assert "(lora.adapter_name)" in str(caught.value)


def test_layer_filter_without_numbered_parent_says_what_to_do():
    """peft's rule: without layers_pattern the number needs two names before it."""
    with pytest.raises(TargetError) as caught:
        inject_adapter(Transformer(), LoraConfig(r=1, target_modules=["q"], layers_to_transform=1))
    assert "layers_pattern" in str(caught.value)
    nested = nn.ModuleDict({"model": Transformer()})
    selection = inject_adapter(nested, LoraConfig(r=1, target_modules=["q"], layers_to_transform=1))
    assert list(selection.targets) == ["model.layers.1.attn.q"]


def test_rank_equal_to_the_smaller_side_is_allowed():
    model = nn.Sequential(nn.Linear(3, 9))
    inject_adapter(model, LoraConfig(r=3))
    assert model(torch.zeros(1, 3)).shape == (1, 9)


@pytest.mark.parametrize("targets", ["all-linear", ["0"], ["base_layer"], ["lora_A.default"]])
def test_adapters_of_peft_get_no_adapters(targets):
    """They would be frozen, and their factors adapted in turn."""
    base = nn.Sequential(nn.Linear(3, 9), nn.Linear(9, 3))
    model = nn.ModuleDict({"net": peft.get_peft_model(base, peft.LoraConfig(target_modules=["0"]))})
    with pytest.raises(TargetError) as caught:
        inject_adapter(model, LoraConfig(r=1, target_modules=targets))
    assert "is a peft." in str(caught.value)
    assert "the model carries adapters of peft already" in str(caught.value)
    model["net"] = model["net"].unload()  # as it advises
    inject_adapter(model, LoraConfig(r=1, target_modules=["0"]))
