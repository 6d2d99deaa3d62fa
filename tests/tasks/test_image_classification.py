"""Image classification: vision models of four kinds learn, resume, and refuse what is wrong."""

import itertools

import pytest
import torch
from lightning.pytorch import seed_everything

import lora_lightning.training.resume.resumable_loader as resumable_loader
from lora_lightning import LoraCallback
from lora_lightning.data.images import ImageDataModule
from lora_lightning.errors import ConfigError
from lora_lightning.layers.traversal import named_parameters
from lora_lightning.tasks.image_classification import ImageClassification
from tests.helpers.lightning_modules import make_trainer
from tests.helpers.resumable_run import ResumableRun
from tests.helpers.tiny_vision import save_images, save_tiny_vision

# What is adapted, and how the head is called where it is new.
KINDS = {
    "vit": ("all-linear", "classifier"),
    "swin": ("all-linear", "classifier"),
    "convnext": ("all-linear", "classifier"),  # its convolutions of width 1 are Linears
    "resnet": (["convolution"], "classifier.1"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: save_tiny_vision(kind, folder / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Images of the same classes that the runs do not train on."""
    return save_images(tmp_path_factory.mktemp("others"), each=5, first=1000)


def data_of(folder, others, **options):
    return ImageDataModule(
        **{"train": folder, "val": others, "test": others, "predict": others, "batch_size": 8,
           "random_horizontal_flip": 0.5, "random_crop": 0.5, **options}
    )  # fmt: skip


def lora(kind, **options):
    targets, head = KINDS[kind]
    return LoraCallback(**{"r": 2, "target_modules": targets, "modules_to_save": [head], **options})


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_learns(tmp_path, models, folder, others, kind):
    seed_everything(0, verbose=False)
    module = ImageClassification(models[kind], learning_rate=1e-2)
    trainer = make_trainer(tmp_path, lora(kind), max_epochs=6)
    data = data_of(folder, others)
    untrained = trainer.validate(module, data, verbose=False)[0]
    trainer.fit(module, data)
    metrics = {**trainer.callback_metrics}
    assert {"train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_f1"} <= set(metrics)
    assert metrics["val_accuracy"] > 0.9  # of three classes
    assert metrics["val_loss"] < 0.7 * untrained["val_loss"]
    head = KINDS[kind][1]
    assert module.new_parameters == {f"network.{head}.weight", f"network.{head}.bias"}
    assert module.network.config.id2label == {0: "blue", 1: "green", 2: "red"}
    trained = {name for name, p in named_parameters(module) if p.requires_grad}
    assert trained
    assert all(".adapters.default." in name for name in trained)

    tested = trainer.test(module, data, verbose=False)[0]
    assert tested["test_accuracy"] == metrics["val_accuracy"]
    predicted = trainer.predict(module, data)
    labels = list(itertools.chain.from_iterable(batch["labels"] for batch in predicted))
    where = list(itertools.chain.from_iterable(batch["where"] for batch in predicted))
    right = [label in place for label, place in zip(labels, where, strict=True)]
    assert sum(right) / len(right) == pytest.approx(tested["test_accuracy"])
    probabilities = torch.cat([batch["probabilities"] for batch in predicted])
    assert probabilities.shape == (15, 3)
    assert torch.allclose(probabilities.sum(dim=1), torch.ones(15))


def test_metrics_are_those_of_the_whole_set(tmp_path, models, folder, others):
    module, data = ImageClassification(models["vit"]), data_of(folder, others, batch_size=4)
    logged = make_trainer(tmp_path).validate(module, data, verbose=False)[0]
    module.eval()
    batches = list(data.val_dataloader())
    with torch.no_grad():
        scores = torch.cat([module.network(b["pixel_values"]).logits for b in batches]).double()
    labels = torch.cat([batch["labels"] for batch in batches])
    losses = [(row.exp().sum().log() - row[label]).item() for row, label in zip(scores, labels, strict=True)]  # fmt: skip
    assert logged["val_loss"] == pytest.approx(sum(losses) / 15, rel=1e-5)
    of_batches = [sum(losses[i : i + 4]) / len(losses[i : i + 4]) for i in range(0, 15, 4)]
    assert logged["val_loss"] != pytest.approx(sum(of_batches) / 4, rel=1e-5)  # 4, 4, 4 and 3
    hits = (scores.argmax(dim=1) == labels).double().mean().item()
    assert logged["val_accuracy"] == pytest.approx(hits)


def test_the_new_head_trains_unasked(tmp_path, models, folder, others):
    for kind, (targets, head) in KINDS.items():
        module = ImageClassification(models[kind])
        callback = LoraCallback(r=2, target_modules=targets, exclude_modules=[head])
        make_trainer(tmp_path, callback, max_steps=1).fit(module, data_of(folder, others))
        trained = {name for name, p in named_parameters(module) if p.requires_grad}
        assert any(".classifier." in name for name in trained), trained


def resumed(models_folder, folder, others, kind="vit", workers=0):
    # A head that is in the file: a new one's frozen original, which nothing reads, is drawn anew.
    model = save_tiny_vision(kind, models_folder / kind, head_labels=3)
    return ResumableRun(
        module=lambda: ImageClassification(model),
        data=lambda: data_of(folder, others, num_workers=workers),
        lora=lambda: [lora(kind, lora_dropout=0.2)],
        options=lambda: {"max_epochs": 2, "log_every_n_steps": 1000},
        spots=("batch2", "batch8"),
    )


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_it_resumes_in_mid_epoch(tmp_path, folder, others, workers):
    """Crops and flips go on as they would have."""
    resumed(tmp_path, folder, others, workers=workers).check(tmp_path)


@pytest.mark.slow
def test_a_frozen_batchnorm_resumes(tmp_path, folder, others):
    resumed(tmp_path, folder, others, kind="resnet").check(tmp_path)


def test_negative_control_with_other_random_numbers_differs(tmp_path, folder, others, monkeypatch):
    monkeypatch.setattr(resumable_loader, "set_randomness", lambda *args: None)
    with pytest.raises(AssertionError):
        resumed(tmp_path, folder, others).check(tmp_path)


def test_another_order_of_classes_is_refused(tmp_path, models, folder, others):
    trainer = make_trainer(tmp_path, lora("vit"))
    trainer.fit(ImageClassification(models["vit"]), data_of(folder, others))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["label_names"] == [
        "blue", "green", "red",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="the same names in another order"):
        make_trainer(tmp_path, lora("vit")).validate(
            ImageClassification(models["vit"]),
            data_of(folder, others, label_names=["red", "green", "blue"]),
            ckpt_path=tmp_path / "a.ckpt",
        )


def test_pixels_take_the_precision_of_the_run(tmp_path, models, folder, others):
    module = ImageClassification(models["vit"])
    make_trainer(tmp_path, precision="bf16-true").validate(
        module, data_of(folder, others), verbose=False
    )
    assert next(module.network.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_take_the_dtype_of_the_weights(tmp_path, models, folder, others, kind):
    module = ImageClassification(models[kind], dtype="bfloat16")
    trainer = make_trainer(tmp_path, lora(kind), max_epochs=1)
    trainer.fit(module, data_of(folder, others))
    assert trainer.callback_metrics["val_loss"].isfinite()


def test_the_image_processor_is_the_models_own(tmp_path, models, folder, others):
    for kind in KINDS:
        data = data_of(folder, others)
        make_trainer(tmp_path).validate(ImageClassification(models[kind]), data, verbose=False)
        expected = "ViTImageProcessor" if kind in ("vit", "swin") else "ConvNextImageProcessor"
        assert type(data.image_processor).__name__.startswith(expected)
