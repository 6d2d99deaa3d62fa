"""Token classification: what is learned, logged and predicted, and resumed."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import nn

from lora_lightning import LoraCallback
from lora_lightning.data.token_classification import TokenClassificationDataModule
from lora_lightning.errors import ConfigError
from lora_lightning.layers.traversal import named_parameters
from lora_lightning.tasks.token_classification import TokenClassification
from tests.helpers.lightning_modules import make_trainer
from tests.helpers.processes import on_processes
from tests.helpers.resumable_run import ResumableRun
from tests.helpers.tiny_bert import save_tiny_bert

TAGS = {
    "good": "POS",
    "fine": "POS",
    "bad": "NEG",
    "awful": "NEG",
    "film": "THING",
    "book": "THING",
}


def sentence(*words):
    """Each word's tag, but what stands behind "not" is turned round: that takes the neighbour."""
    turned = {"POS": "NEG", "NEG": "POS"}
    tags = [TAGS.get(word, "O") for word in words]
    for place in range(1, len(words)):
        if words[place - 1] == "not":
            tags[place] = turned.get(tags[place], tags[place])
    return {"tokens": words, "labels": tags}


ROWS = [
    sentence("the", thing, "was", *how, word)
    for thing in ("film", "book", "a-film")
    for how in ((), ("very",), ("not",), ("not", "very"))
    for word in ("good", "fine", "bad", "awful")
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_bert(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "words.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return str(path)


def data_of(file, **options):
    return TokenClassificationDataModule(
        **{
            "train": file, "val": file, "test": file, "predict": file,
            "max_length": 16, "batch_size": 7, **options,
        }
    )  # fmt: skip


def lora():
    return LoraCallback(r=4, lora_dropout=0.1, modules_to_save=["classifier"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model, file):
    seed_everything(0, verbose=False)
    module = TokenClassification(model, learning_rate=2e-2, weight_decay=0.0)
    data = data_of(file)
    trainer = make_trainer(tmp_path_factory.mktemp("run"), lora(), max_epochs=12)
    trainer.fit(module, data)
    return trainer, module, data


def test_it_learns_and_logs(trained):
    trainer, module, data = trained
    metrics = {**trainer.callback_metrics}
    assert {"train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_f1"} <= set(metrics)
    # Always saying the most frequent tag gives less than 0.5.
    assert metrics["val_accuracy"] > 0.9
    assert trainer.test(module, data, verbose=False)[0]["test_accuracy"] == metrics["val_accuracy"]
    assert module.label_names == ["NEG", "O", "POS", "THING"]


def test_metrics_are_means_over_labelled_words(trained):
    """Batches hold unequal numbers of words: the mean over all is not that of the batches."""
    trainer, module, data = trained
    logged = trainer.validate(module, data, verbose=False)[0]
    module.eval()
    total = right = count = 0
    of_batches = []
    hits = {name: [0, 0, 0] for name in range(4)}  # right, said, true
    with torch.no_grad():
        for batch in data.val_dataloader():
            logits = module.network(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits
            rows = [
                (scores.double(), label)
                for scores, label in zip(
                    logits.flatten(0, 1), batch["labels"].flatten(), strict=True
                )
                if label != -100
            ]
            losses = [(s.exp().sum().log() - s[label]).item() for s, label in rows]
            of_batches.append(sum(losses) / len(losses))
            total, count = total + sum(losses), count + len(losses)
            for scores, label in rows:
                said = scores.argmax().item()
                label = label.item()
                right += said == label
                hits[label][0] += said == label
                hits[said][1] += 1
                hits[label][2] += 1
    assert count == sum(len(row["tokens"]) for row in ROWS)
    assert logged["val_loss"] == pytest.approx(total / count, rel=1e-5)
    assert logged["val_loss"] != pytest.approx(sum(of_batches) / len(of_batches), rel=1e-3)
    assert logged["val_accuracy"] == pytest.approx(right / count)
    f1 = sum(2 * r / (said + true) for r, said, true in hits.values()) / 4
    assert logged["val_f1"] == pytest.approx(f1, rel=1e-5)


def test_words_are_predicted_with_probabilities(trained):
    trainer, module, data = trained
    batches = trainer.predict(module, data)
    labels = list(itertools.chain.from_iterable(batch["labels"] for batch in batches))
    probabilities = [p for batch in batches for p in batch["probabilities"]]
    assert [len(names) for names in labels] == [len(row["tokens"]) for row in ROWS]
    pairs = [p for row, names in zip(ROWS, labels, strict=True) for p in zip(row["labels"], names, strict=True)]  # fmt: skip
    accuracy = sum(a == b for a, b in pairs) / len(pairs)
    assert accuracy == pytest.approx(trainer.test(module, data, verbose=False)[0]["test_accuracy"])
    for names, p in zip(labels, probabilities, strict=True):
        assert p.shape == (len(names), 4)
        assert torch.allclose(p.sum(dim=1), torch.ones(len(names)))
        assert [module.label_names[i] for i in p.argmax(dim=1)] == names


def test_entities_are_measured_where_classes_write_them(tmp_path, model, trained):
    assert "val_entity_f1" not in trained[0].callback_metrics
    rows = [
        {"tokens": ["the", "good", "book", "was", "a", "film"], "tags": ["O", "B", "I", "O", "O", "B"]},
        {"tokens": ["bad", "film"], "tags": ["B", "I"]},
    ]  # fmt: skip
    for row in rows:
        row["tags"] = [tag if tag == "O" else f"{tag}-WORK" for tag in row["tags"]]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    seed_everything(0, verbose=False)
    module = TokenClassification(model, learning_rate=2e-2)
    trainer = make_trainer(tmp_path, lora(), max_epochs=30)
    trainer.fit(module, data_of(str(path)))
    assert trainer.callback_metrics["val_accuracy"] == 1
    assert trainer.callback_metrics["val_entity_f1"] == 1
    assert trainer.test(module, data_of(str(path)), verbose=False)[0]["test_entity_f1"] == 1
    other = tmp_path / "b.jsonl"  # as the model would say, but for the end of one entity
    rows[0]["tags"][2] = "O"
    other.write_text("\n".join(map(json.dumps, rows)))
    tested = trainer.test(module, data_of(str(path), test=str(other)), verbose=False)[0]
    assert tested["test_entity_f1"] == pytest.approx(2 / 3)  # 2 * 2 / (3 + 3)
    assert tested["test_accuracy"] == pytest.approx(7 / 8)


def test_words_that_were_cut_off_are_not_predicted(trained, file):
    trainer, module, _ = trained
    data = data_of(file, max_length=5)
    first = trainer.predict(module, data)[0]
    assert first["labels"][0][3] is None
    assert None not in first["labels"][0][:3]
    assert first["probabilities"][0].isnan().all(dim=1).tolist() == [False] * 3 + [True]


def test_adapters_and_the_new_head_are_what_trains(model, file, tmp_path):
    module = TokenClassification(model)
    make_trainer(tmp_path, lora()).fit(module, data_of(file))
    assert module.new_parameters == {"network.classifier.weight", "network.classifier.bias"}
    trained = {name for name, p in named_parameters(module) if p.requires_grad}
    assert all(".adapters.default." in name for name in trained)
    assert any(name.startswith("network.classifier.adapters") for name in trained)
    unasked = TokenClassification(model)
    callback = LoraCallback(r=4, target_modules=["query"])
    make_trainer(tmp_path, callback, max_steps=1).fit(unasked, data_of(file))
    trained = {name for name, p in unasked.named_parameters() if p.requires_grad}
    assert any(name.startswith("network.classifier.") for name in trained)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_it_resumes_in_mid_epoch(tmp_path, file, workers):
    # A head that is in the file: a new one's frozen original, which nothing reads, is drawn anew.
    model = str(save_tiny_bert(tmp_path / "model", head_labels=4))
    ResumableRun(
        module=lambda: TokenClassification(model),
        data=lambda: data_of(file, num_workers=workers),
        lora=lambda: [lora()],
        options=lambda: {"max_epochs": 2, "log_every_n_steps": 1000},
        spots=("batch3", "batch9"),
    ).check(tmp_path)


def test_another_order_of_classes_is_refused(trained, tmp_path, model, file):
    trainer, _, _ = trained
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    names = ["O", "NEG", "POS", "THING"]
    with pytest.raises(ConfigError, match="the same names in another order"):
        make_trainer(tmp_path, lora()).validate(
            TokenClassification(model),
            data_of(file, label_names=names),
            ckpt_path=tmp_path / "a.ckpt",
        )


def test_unlabelled_subtokens_get_no_gradient(model, file):
    """Loss and gradient are those of the labelled positions, picked by hand."""
    module = TokenClassification(model, label_names=["NEG", "O", "POS", "THING"])
    module.configure_model()
    module.eval()
    module.log = lambda *args, **kwargs: None
    data = data_of(file, tokenizer=model)
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    gradients = []
    for by_hand in (False, True):
        module.zero_grad()
        if by_hand:
            kept = batch["labels"] != -100
            scores = module.network(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits[kept]
            loss = nn.functional.cross_entropy(scores, batch["labels"][kept])
        else:
            loss = module.training_step(batch, 0)
        loss.backward()
        gradients.append([p.grad.clone() for p in module.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*gradients, strict=True))


def sgd_update(folder, model, path, batch_size, accumulate, kind=TokenClassification):
    """What one update of plain SGD does to the head, in float64."""

    class Sgd(kind):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Sgd(model)
    data = data_of(path, batch_size=batch_size)
    data.train_dataloader = lambda: data._loader("train")  # in order of length
    options = {"accumulate_grad_batches": accumulate, "max_steps": 1, "limit_val_batches": 0}
    start = {}

    def on_train_start():
        module.network.eval()  # dropout would draw for each batch anew
        start["weight"] = module.network.classifier.weight.clone()

    module.on_train_start = on_train_start
    make_trainer(folder, **options).fit(module, data)
    return (module.network.classifier.weight - start["weight"]).detach().double()


class MeanOfMeans(TokenClassification):
    """The negative control: what Lightning's accumulation makes of mean losses."""

    def batch_weight(self, batch):
        return (batch["labels"] != -100).any().float()

    def _loss_sum(self, scores, labels, training):
        return super()._loss_sum(scores, labels, training) / (labels != -100).sum()


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Sentences of 1 to 8 words."""
    path = tmp_path_factory.mktemp("uneven") / "words.jsonl"
    rows = [sentence(*["good", "film", "was", "bad"][n % 4 :], *["not", "good"] * (n // 4)) for n in range(8)]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_accumulation_weights_words_not_batches(tmp_path, uneven):
    model = str(save_tiny_bert(tmp_path / "model", head_labels=4))
    whole = sgd_update(tmp_path, model, uneven, 8, 1)
    parts = sgd_update(tmp_path, model, uneven, 1, 8)
    assert (parts - whole).norm() / whole.norm() < 1e-5
    broken = sgd_update(tmp_path, model, uneven, 1, 8, MeanOfMeans)
    assert (broken - whole).norm() / whole.norm() > 1e-2


def validated(folder, model, path, devices):
    options = {"devices": devices, "strategy": "ddp"} if devices > 1 else {}
    module = TokenClassification(model)
    trainer = make_trainer(Path(folder), num_nodes=1, **options)
    logged = trainer.validate(module, data_of(path, batch_size=3), verbose=False)[0]
    own = {}
    if devices > 1:  # this process's part alone
        loader = trainer.validate_loop._combined_loader.flattened[0]
        batches = list(loader)
        with torch.no_grad():
            scores = torch.cat([module(batch).flatten(0, 1) for batch in batches])
        labels = torch.cat([batch["labels"].flatten() for batch in batches])
        own = {"val_loss": nn.functional.cross_entropy(scores, labels).item()}
    return logged, own


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path, uneven):
    model = str(save_tiny_bert(tmp_path / "model", head_labels=4))
    alone, _ = validated(tmp_path, model, uneven, 1)
    for logged, own in on_processes(2, validated, str(tmp_path), model, uneven, 2):
        assert logged == pytest.approx(alone, rel=1e-5)
        assert own["val_loss"] != pytest.approx(alone["val_loss"], rel=1e-3)
