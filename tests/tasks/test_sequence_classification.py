import json

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import nn

from lora_lightning import LoraConfig, inject_adapter, set_adapter
from lora_lightning.data.text_classification import TextClassificationDataModule
from lora_lightning.errors import ConfigError
from lora_lightning.layers.traversal import named_parameters
from lora_lightning.tasks.sequence_classification import SequenceClassification
from tests.helpers.processes import on_processes
from tests.helpers.tiny_bert import save_tiny_bert
from tests.helpers.tiny_lm import tiny_llama

# Lightning's advice on worker counts, logging intervals and devices is not about this code.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]
WORDS = {"pos": ["good", "fine"], "neg": ["bad", "awful"], "none": ["red", "green"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_bert(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "reviews.jsonl"
    rows = [
        {"text": f"the {thing} was {very} {word}", "label": label}
        for label, words in WORDS.items()
        for word in words
        for thing in ("film", "book", "a film", "a book")
        for very in ("very", "not", "a")
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def data_of(file, **options):
    return TextClassificationDataModule(
        **{"train": file, "val": file, "test": file, "predict": file, "batch_size": 8, **options},
        max_length=16,
    )


def trainer_in(tmp_path, **options):
    return Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, "max_epochs": 1, **options},
    )


def built(model, **options):
    module = SequenceClassification(model, **{"label_names": ["a", "b", "c"], **options})
    module.configure_model()
    return module


def test_it_learns_and_logs(tmp_path, model, file):
    seed_everything(0, verbose=False)
    module = SequenceClassification(model)
    trainer, data = trainer_in(tmp_path, max_epochs=15), data_of(file)
    trainer.fit(module, data)
    progress = {"lr", "lr_2", "samples_per_second", "peak_memory_gb"}  # of TrainingProgress
    shown = {"train_loss", "train_accuracy", "val_loss", "val_accuracy"}
    assert set(trainer.callback_metrics) - progress == {*shown, "val_f1"}
    assert set(trainer.progress_bar_metrics) == {*shown, "lr", "samples/s", "peak memory"}
    assert trainer.callback_metrics["val_accuracy"] > 0.9
    tested = trainer.test(module, data, verbose=False)[0]
    assert set(tested) == {"test_loss", "test_accuracy", "test_f1"}
    assert tested["test_accuracy"] == trainer.callback_metrics["test_accuracy"] > 0.9

    predicted = trainer.predict(module, data)
    labels = [label for batch in predicted for label in batch["labels"]]
    truth = [record.label for record in data.records("predict")]
    assert truth == [None] * 72
    truth = [record.label for record in data.records("test")]
    right = sum(a == b for a, b in zip(labels, truth, strict=True))
    assert right / len(labels) == pytest.approx(tested["test_accuracy"])
    probabilities = torch.cat([batch["probabilities"] for batch in predicted])
    assert probabilities.shape == (72, 3)
    assert torch.allclose(probabilities.sum(dim=1), torch.ones(72))


def test_validation_metrics_are_those_of_the_whole_set(tmp_path, model, file):
    module, data = SequenceClassification(model), data_of(file)
    logged = trainer_in(tmp_path).validate(module, data, verbose=False)[0]
    module.eval()
    batches = list(data.val_dataloader())
    with torch.no_grad():
        scores = torch.cat([module(batch) for batch in batches])
    labels = torch.cat([batch["labels"] for batch in batches])
    assert logged["val_loss"] == pytest.approx(
        nn.functional.cross_entropy(scores, labels).item(), rel=1e-5
    )
    hits = scores.argmax(dim=1) == labels
    assert logged["val_accuracy"] == pytest.approx(hits.float().mean().item())
    f1 = []
    for label in range(3):
        right = (hits & (labels == label)).sum()
        said = (scores.argmax(dim=1) == label).sum() + (labels == label).sum()
        f1.append((2 * right / said).item())
    assert logged["val_f1"] == pytest.approx(sum(f1) / 3)


def test_the_tokenizer_and_the_classes_come_from_each_other(tmp_path, model, file):
    module, data = SequenceClassification(model), data_of(file)
    trainer_in(tmp_path).validate(module, data, verbose=False)
    assert module.label_names == ["neg", "none", "pos"]
    assert module.network.config.id2label == {0: "neg", 1: "none", 2: "pos"}


def test_configure_model_builds_once_and_in_train_mode(model):
    module = built(model)
    network = module.network
    module.configure_model()
    assert module.network is network
    assert all(part.training for part in network.modules())
    assert next(network.parameters()).dtype == torch.float32
    assert module.new_parameters == {"network.classifier.weight", "network.classifier.bias"}


def test_metrics_add_nothing_to_the_state_dict(tmp_path, model, file):
    module = SequenceClassification(model)
    trainer_in(tmp_path).validate(module, data_of(file), verbose=False)
    assert {key.split(".")[0] for key in module.state_dict()} == {"network"}


def test_the_networks_precision_is_the_trainers(tmp_path, model, file):
    module = SequenceClassification(model)
    trainer_in(tmp_path, precision="bf16-true").validate(module, data_of(file), verbose=False)
    assert next(module.network.parameters()).dtype == torch.bfloat16


def test_the_learning_rate_warms_up_and_falls_to_zero(tmp_path, model, file):
    class Watched(SequenceClassification):
        def on_train_batch_start(self, batch, batch_idx):
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    rates = []
    module = Watched(model, learning_rate=1.0, warmup_fraction=1 / 3)
    trainer = trainer_in(tmp_path)
    trainer.fit(module, data_of(file))  # 9 steps
    assert rates == pytest.approx([0, 1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0
    assert trainer.optimizers[0].defaults["fused"]


def learning_rates(module):
    names = {id(parameter): name for name, parameter in named_parameters(module)}
    return {names[id(p)]: g["lr"] for g in module.parameter_groups() for p in g["params"]}


def test_new_weights_have_a_learning_rate_of_their_own(model):
    module = built(model, learning_rate=0.1, head_learning_rate=0.2)
    rates = learning_rates(module)
    assert rates.keys() == dict(module.named_parameters()).keys()
    assert {name for name, rate in rates.items() if rate == 0.2} == module.new_parameters

    options = {"target_modules": ["pooler.dense"], "modules_to_save": ["classifier"]}
    inject_adapter(module, LoraConfig(r=2, **options))
    assert learning_rates(module) == {
        "network.bert.pooler.dense.adapters.default.lora_A": 0.1,
        "network.bert.pooler.dense.adapters.default.lora_B": 0.1,
        "network.classifier.adapters.default.module.weight": 0.2,
        "network.classifier.adapters.default.module.bias": 0.2,
    }


def test_a_run_without_end_has_no_schedule(tmp_path, model, file):
    with pytest.raises(ConfigError, match=r"the run has none: set trainer.max_steps"):
        trainer_in(tmp_path, max_epochs=-1).fit(SequenceClassification(model), data_of(file))


def test_a_new_head_that_is_frozen_is_refused(tmp_path, model, file):
    class Frozen(SequenceClassification):
        def configure_model(self):
            super().configure_model()
            self.network.classifier.requires_grad_(False)

    with pytest.raises(ConfigError) as error:
        trainer_in(tmp_path).fit(Frozen(model), data_of(file))
    assert str(error.value) == (
        "network.classifier.bias, network.classifier.weight: newly initialised, because "
        f"{model!r} has no such weights, and frozen, so they would stay random. "
        "Train them: set lora.modules_to_save: [classifier]"
    )


@pytest.mark.parametrize(
    ("saved", "fine"),
    [("classifier", True), ("network", True), ("pooler", False)],
    ids=["its own copy", "a copy of what encloses it", "a neighbour's copy"],
)
def test_a_frozen_new_head_with_a_trained_copy_is_fine(model, saved, fine):
    module = built(model)
    module.probe = nn.Linear(2, 2)  # a target that every case has
    inject_adapter(module, LoraConfig(r=2, target_modules=["probe"], modules_to_save=[saved]))
    if fine:
        module.on_fit_start()
        set_adapter(module, [])  # nothing trains any more
    with pytest.raises(ConfigError, match="stay random"):
        module.on_fit_start()


def test_a_trained_head_may_be_frozen(tmp_path):
    module = built(str(save_tiny_bert(tmp_path, head_labels=3)))
    assert module.new_parameters == set()
    module.requires_grad_(False)
    module.on_fit_start()


def test_a_head_of_other_classes_is_replaced_by_a_new_one(tmp_path):
    module = built(str(save_tiny_bert(tmp_path, head_labels=5)))
    assert module.network.classifier.out_features == 3
    assert module.new_parameters == {"network.classifier.weight", "network.classifier.bias"}


def named_head(folder, names):
    """A model with a trained head for classes that it names."""
    save_tiny_bert(folder, head_labels=len(names))
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {str(number): name for number, name in enumerate(names)}
    config["label2id"] = {name: number for number, name in enumerate(names)}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_a_trained_head_keeps_the_order_of_its_classes(tmp_path):
    model = named_head(tmp_path, ["a", "b", "c"])
    assert built(model).network.config.id2label == {0: "a", 1: "b", 2: "c"}
    with pytest.raises(ConfigError) as error:
        built(model, label_names=["c", "b", "a"])
    assert str(error.value) == (
        f"the head of {model!r} was trained for these classes in another order, ['a', 'b', 'c']; "
        "found ['c', 'b', 'a']. Name them in the head's order. (data.label_names)"
    )
    built(model, label_names=["c", "b", "a"], pretrained=False)
    built(model, label_names=["b", "a"])  # another number of classes: a new head


def test_a_head_of_as_many_other_classes_is_said_to_be_taken_over(tmp_path):
    model = named_head(tmp_path, ["x", "y", "c"])
    with pytest.warns(UserWarning, match=r"trained for other classes, x, y, c: .* a, b, c\."):
        built(model)


def test_checkpoints_keep_the_order_of_the_classes(tmp_path, model, file):
    trainer = trainer_in(tmp_path)
    trainer.fit(SequenceClassification(model), data_of(file))
    path = tmp_path / "model.ckpt"
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    assert saved["label_names"] == ["neg", "none", "pos"]

    trainer_in(tmp_path).validate(
        SequenceClassification(model), data_of(file), ckpt_path=path, verbose=False
    )
    loaded = SequenceClassification.load_from_checkpoint(
        path, model=model, label_names=["neg", "none", "pos"]
    )
    assert torch.equal(
        loaded.network.classifier.weight, saved["state_dict"]["network.classifier.weight"]
    )

    other_order = ["pos", "none", "neg"]
    with pytest.raises(ConfigError) as error:
        trainer_in(tmp_path).validate(
            SequenceClassification(model), data_of(file, label_names=other_order), ckpt_path=path
        )
    assert str(error.value) == (
        "the checkpoint's classes are not this run's: the same names in another order, "
        "['neg', 'none', 'pos'] and ['pos', 'none', 'neg']. (model.label_names)"
    )
    with pytest.raises(ConfigError) as error:
        SequenceClassification.load_from_checkpoint(path, model=model, label_names=["neg", "rest"])
    assert str(error.value) == (
        "the checkpoint's classes are not this run's: 3 and 2 names; only in the first: none, "
        "pos; only in the second: rest. (model.label_names)"
    )


def test_classes_of_model_and_data_must_agree(tmp_path, model, file):
    module = SequenceClassification(model, label_names=["neg", "none", "pos", "more"])
    with pytest.raises(ConfigError) as error:
        trainer_in(tmp_path).validate(module, data_of(file))
    assert str(error.value) == (
        "the model's classes are not the data's: 4 and 3 names; only in the first: more; only in "
        "the second: nothing. (model.label_names, data.label_names)"
    )


def test_the_model_may_name_the_classes_of_what_is_predicted(tmp_path, model, file):
    module = SequenceClassification(model, label_names=["neg", "none", "pos"])
    data = data_of(file, train=None, val=0, test=None)
    batches = trainer_in(tmp_path).predict(module, data)
    assert sum(len(batch["labels"]) for batch in batches) == 72
    with pytest.raises(ConfigError, match=r"the classes are not known: give data\.train"):
        trainer_in(tmp_path).predict(SequenceClassification(model), data)


def test_classes_must_be_known(model):
    with pytest.raises(ConfigError) as error:
        SequenceClassification(model).configure_model()
    assert str(error.value) == (
        "the classes are not known: the Trainer has no data module with `label_names`, so name "
        "them in order. (model.label_names)"
    )


@pytest.mark.parametrize("names", [["a"], ["a", "a", "b"]])
def test_classes_must_be_several_and_different(model, names):
    with pytest.raises(ConfigError) as error:
        built(model, label_names=names)
    assert str(error.value) == (
        f"label_names must be at least 2 different names, found {names}. (model.label_names)"
    )


def loss_by_formula(scores, labels, smoothing, weights):
    """The weighted mean of smoothed cross-entropies, in float64 and one by one."""
    total = norm = 0.0
    for row, label in zip(scores.double(), labels.tolist(), strict=True):
        if label == -100:
            continue
        log_p = row - row.exp().sum().log()
        share = [(1 - smoothing) * (c == label) + smoothing / len(row) for c in range(len(row))]
        total += sum(-s * w * p for s, w, p in zip(share, weights, log_p.tolist(), strict=True))
        norm += weights[label]
    return total / norm


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [{}, {"b": 4.0}])
def test_the_training_loss_is_smoothed_and_weighted(model, smoothing, weights):
    module = built(model, label_smoothing=smoothing, class_weights=weights).eval()
    module.log = lambda *args, **kwargs: None
    torch.manual_seed(0)
    batch = {"input_ids": torch.randint(4, 17, (5, 6)), "labels": torch.tensor([0, 1, 2, -100, 1])}
    scores = module(batch).detach() * 3  # of a network that has an opinion
    module.forward = lambda batch: scores
    expected = [1.0, weights.get("b", 1.0), 1.0]
    loss = module.training_step(batch, 0).item()
    truth = loss_by_formula(scores, batch["labels"], smoothing, expected)
    assert loss == pytest.approx(truth, rel=1e-6)
    plain = loss_by_formula(scores, batch["labels"], 0.0, [1.0] * 3)
    assert module.validation_step(batch, 0)["loss"].item() == pytest.approx(plain, rel=1e-6)
    if smoothing or weights:  # the comparison can fail
        assert truth != pytest.approx(plain, rel=1e-3)


def test_a_batch_without_labels_adds_nothing(model):
    module = built(model)
    module.log = lambda *args, **kwargs: None
    batch = {"input_ids": torch.full((2, 3), 5), "labels": torch.full((2,), -100)}
    loss = module.training_step(batch, 0)
    loss.backward()
    assert loss == 0
    assert all(not p.grad.any() for p in module.parameters() if p.grad is not None)


def test_weights_are_for_classes_that_there_are(model):
    with pytest.raises(ConfigError) as error:
        SequenceClassification(
            model, label_names=["good", "bad"], class_weights={"god": 2.0}
        ).configure_model()
    assert str(error.value) == (
        "class_weights: there is no class 'god'. The classes are good, bad. Did you mean 'good'? "
        "(model.class_weights)"
    )
    with pytest.raises(ConfigError, match=r"'a' must be positive and finite, found -1\."):
        built(model, class_weights={"a": -1.0})


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_a_smoothing_out_of_range(smoothing):
    with pytest.raises(ConfigError) as error:
        SequenceClassification("any", label_smoothing=smoothing)
    assert str(error.value) == (
        f"label_smoothing must be at least 0 and below 1, found {smoothing}. "
        "(model.label_smoothing)"
    )


@pytest.mark.parametrize("fraction", [-0.1, 1.1])
def test_a_warmup_out_of_range(fraction):
    with pytest.raises(ConfigError) as error:
        SequenceClassification("any", warmup_fraction=fraction)
    assert str(error.value) == (
        f"warmup_fraction must be from 0 to 1, found {fraction}. (model.warmup_fraction)"
    )


@pytest.mark.parametrize("other", [None, 9], ids=["none", "another"])
def test_a_decoder_finds_the_end_of_padded_texts(tmp_path, file, other):
    """By the token that the data pad with, whatever the model's config says."""
    folder = tiny_llama(tmp_path / "llama", pad_token_id=other)
    module, data = SequenceClassification(str(folder)), data_of(file)
    whole = trainer_in(tmp_path).predict(module, data)
    alone = trainer_in(tmp_path).predict(module, data_of(file, batch_size=1))
    found, wanted = (torch.cat([b["probabilities"] for b in batches]) for batches in (whole, alone))
    torch.testing.assert_close(found, wanted)


class Unfilled(TextClassificationDataModule):
    """The negative control: Lightning shares out, and repeats a row where they do not go round."""

    def order(self, lengths, *, shuffle, group):
        return None


def trained_and_validated(folder, model, path, devices, kind=TextClassificationDataModule):
    """Metrics before and after training, and what has been trained."""
    seed_everything(0, verbose=False)
    module = SequenceClassification(model, learning_rate=1e-3)
    data = kind(path, val=path, batch_size=8 // devices, max_length=16)
    options = {"devices": devices, "strategy": "ddp"} if devices > 1 else {}
    trainer = trainer_in(folder, max_epochs=2, **options)
    before = trainer.validate(module, data, verbose=False)[0]
    module.network.eval()  # dropout would draw for each process anew
    trainer.fit(module, data)
    after = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return before, after, module.network.classifier.weight.detach().clone()


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path, model):
    """Of 21 texts one process has 11 and the other 10: none counts twice, in loss and metrics."""
    path = tmp_path / "odd.jsonl"
    rows = [
        {"text": " ".join(["film", *["very"] * (n % 5), *words]), "label": label}
        for label, words in WORDS.items()
        for n in range(7)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    before, after, weight = trained_and_validated(tmp_path, model, str(path), 1)
    both = on_processes(2, trained_and_validated, str(tmp_path), model, str(path), 2)
    for found in both:
        assert found[0] == pytest.approx(before, rel=1e-5)
        names = ("train_loss", "val_loss", "val_accuracy", "val_f1")
        assert [found[1][n] for n in names] == pytest.approx([after[n] for n in names], rel=1e-4)
        assert (found[2] - weight).norm() < 1e-4 * weight.norm()
    broken = on_processes(2, trained_and_validated, str(tmp_path), model, str(path), 2, Unfilled)
    assert broken[0][0] != pytest.approx(before, rel=1e-3)
    assert (broken[0][2] - weight).norm() > 1e-3 * weight.norm()
