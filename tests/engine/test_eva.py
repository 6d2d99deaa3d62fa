"""EVA: start values and ranks from what the layers read."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lora_lightning import LoraCallback, LoraConfig, LoraError, adapter_state_dict, inject_adapter
from lora_lightning.engine.eva import EvaConfig, PrincipalComponents, eva_start
from lora_lightning.engine.injection import adapters_named
from lora_lightning.layers.traversal import named_adapted_layers
from tests.helpers.lightning_modules import Data, Net, make_trainer
from tests.helpers.tensors import bit_equal


def rows(n: int, features: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5, 0.2], dtype=torch.float64)[:features]
    turn, _ = torch.linalg.qr(
        torch.randn(features, features, generator=generator, dtype=torch.float64)
    )
    return torch.randn(n, features, generator=generator, dtype=torch.float64) * spread @ turn + 3


def test_components_in_batches_are_those_of_all_rows() -> None:
    x = rows(300)
    found = PrincipalComponents(6)  # all of them: then nothing is lost between the batches
    for batch in x.split(70):
        found.update(batch, 0.99)
    _, values, vectors = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    torch.testing.assert_close(found.singular_values, values)
    torch.testing.assert_close((found.components @ vectors.t()).abs(), torch.eye(6).double())
    torch.testing.assert_close(found.explained(), values**2 / values.square().sum())
    torch.testing.assert_close(found.mean, x.mean(0))


class Tower(nn.Module):
    """q and k read the same; low reads something of one dimension only."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.low = (nn.Linear(6, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        thin = x[..., :1] * torch.ones(6, dtype=x.dtype)
        return self.q(x) + self.k(x) + self.low(thin)


def batches() -> list[Tensor]:
    return list(rows(400).float().split(50))


def test_ranks_follow_the_variance_and_the_scaling_stays() -> None:
    model = Tower()
    config, start = eva_start(
        model, LoraConfig(r=2, init_lora_weights="eva"), batches(), model.forward
    )
    inject_adapter(model, config, start=start)
    ranks = {path: a.r for path, a in adapters_named(model, "default").items()}
    assert sum(ranks.values()) == 6
    assert ranks["low"] == 1  # one direction explains all there is
    assert {a.scaling for a in adapters_named(model, "default").values()} == {4.0}
    for path, tensor in start.items():
        state = adapter_state_dict(model)
        assert bit_equal(state[f"{path}.lora_A"], tensor)
        assert not state[f"{path}.lora_B"].any()
    x = torch.cat(batches())
    _, _, vectors = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    cosine = (start["q"] * vectors[: len(start["q"])]).sum(1).abs()
    assert (cosine > 0.99).all()


def test_same_directions_as_peft() -> None:
    base = Tower()
    _, start = eva_start(base, LoraConfig(r=2, init_lora_weights="eva"), batches(), base.forward)
    options = {"r": 2, "init_lora_weights": "eva", "target_modules": ["q", "k", "low"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(
            copy.deepcopy(base), peft.LoraConfig(**options, eva_config=peft.EvaConfig())
        )
        peft.initialize_lora_eva_weights(
            theirs,
            batches(),
            forward_fn=lambda model, x: model(x),
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=None,
            show_progress_bar=False,
        )
    found = peft.get_peft_model_state_dict(theirs)
    for path in ("q", "k", "low"):
        a = found[f"base_model.model.{path}.lora_A.weight"]
        assert a.shape == start[path].shape
        assert ((a * start[path]).sum(1).abs() > 0.98).all()


def test_a_layer_that_gets_no_rank_gets_no_adapter() -> None:
    """Also where its path ends with that of one that does; and inputs may be given by name."""
    inner, outer = nn.Linear(6, 6), nn.Linear(6, 6)
    model = nn.ModuleDict({"proj": outer, "deep": nn.ModuleDict({"proj": inner})})

    def forward(x: Tensor) -> None:
        outer(input=x @ torch.eye(2, 6))
        inner(torch.randn(200, 6))

    config = LoraConfig(
        r=1, target_modules=["proj"], init_lora_weights="eva", eva_config=EvaConfig(rho=2)
    )
    changed, start = eva_start(model, config, [torch.randn(200, 2)], forward)
    assert list(start) == ["proj"]
    assert list(inject_adapter(model, changed, start=start).targets) == ["proj"]


def test_masked_positions_do_not_count() -> None:
    model = nn.ModuleDict({"lin": nn.Linear(6, 4)})
    x = rows(120).float().view(4, 30, 6)
    labels = torch.zeros(4, 30, dtype=torch.long)
    labels[:, 20:] = -100
    noisy = x.clone()
    noisy[:, 20:] = 1e3 * torch.randn(4, 10, 6)
    for batch in ({"x": noisy, "labels": labels}, {"x": noisy, "attention_mask": labels == 0}):
        _, start = eva_start(
            model,
            LoraConfig(r=2, init_lora_weights="eva"),
            [batch, batch],
            lambda b: model["lin"](b["x"]),
        )
        clean = [{"x": x[:, :20]}] * 2
        _, expected = eva_start(
            model,
            LoraConfig(r=2, init_lora_weights="eva"),
            clean,
            lambda b: model["lin"](b["x"]),
        )
        torch.testing.assert_close(start["lin"], expected["lin"])


def test_a_run_starts_from_its_data_and_resumes_exactly(tmp_path: Path) -> None:
    def callback() -> LoraCallback:
        return LoraCallback(r=2, init_lora_weights="eva", eva_config=EvaConfig(rho=2))

    def module() -> Net:
        torch.manual_seed(0)
        return Net()

    def fit(folder: str, epochs: int, ckpt: object = None) -> Net:
        model = module()
        torch.manual_seed(3)
        saver = ModelCheckpoint(save_last=True)
        make_trainer(tmp_path / folder, callback(), saver, max_epochs=epochs).fit(
            model, Data(), ckpt_path=ckpt
        )
        return model

    whole = fit("whole", 2)
    fit("half", 1)
    resumed = fit("rest", 2, next((tmp_path / "half").rglob("last.ckpt")))
    one, two = adapter_state_dict(whole), adapter_state_dict(resumed)
    assert one.keys() == two.keys()
    assert all(bit_equal(tensor, two[key]) for key, tensor in one.items())
    ranks = {key: t.shape[0] for key, t in one.items() if key.endswith("lora_A")}
    assert sum(ranks.values()) == 6

    again = module()  # a checkpoint of other ranks than these data would give
    saved = next((tmp_path / "half").rglob("last.ckpt"))
    results = make_trainer(tmp_path, callback()).validate(
        again, Data(), ckpt_path=saved, verbose=False
    )
    assert results
    assert {k: t.shape for k, t in adapter_state_dict(again).items()} == {
        k: t.shape for k, t in one.items()
    }


def test_one_trainer_trains_and_evaluates(tmp_path: Path) -> None:
    """In any order: what was found stays, and evaluation beforehand does not replace it."""

    def callback(r: int = 2) -> LoraCallback:
        return LoraCallback(r=r, init_lora_weights="eva", eva_config=EvaConfig(rho=2))

    def module() -> Net:
        torch.manual_seed(0)
        return Net()

    def shapes(model: Net) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in adapter_state_dict(model).items()}

    expected = module()
    make_trainer(tmp_path, callback()).fit(expected, Data())

    model, lora = module(), callback()
    trainer = make_trainer(tmp_path, lora)
    trainer.validate(model, Data(), verbose=False)  # as it is before fine-tuning
    torch.manual_seed(0)
    trainer.fit(model, Data())
    assert shapes(model) == shapes(expected)
    trained = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
    trainer.validate(model, Data(), verbose=False)
    trainer.predict(model, Data())
    assert all(bit_equal(t, trained[name]) for name, t in adapter_state_dict(model).items())
    make_trainer(tmp_path, callback(), max_epochs=2).fit(
        model, Data()
    )  # goes on with the same ranks
    assert shapes(model) == shapes(expected)
    make_trainer(tmp_path, lora).fit(
        other := module(), Data()
    )  # looks at the data for another module
    assert shapes(other) == shapes(expected)
    with pytest.raises(LoraError, match="r: 2 there, 1 here"):
        make_trainer(tmp_path, callback(r=1)).validate(model, Data(), verbose=False)


def test_ranks_of_a_checkpoint_leave_the_other_adapters_as_they_were(tmp_path: Path) -> None:
    def callbacks(**ranks: dict) -> list[LoraCallback]:
        found = LoraCallback(r=2, init_lora_weights="eva", **ranks)
        frozen = LoraCallback(r=1, adapter_name="frozen", trainable=False)
        return [found, frozen]

    trainer = make_trainer(tmp_path, *callbacks(rank_pattern={"embed": 3}))
    trainer.fit(Net(), Data())
    trainer.save_checkpoint(tmp_path / "both.ckpt")
    saved = torch.load(tmp_path / "both.ckpt", weights_only=True)["lora_lightning"]["adapters"]
    assert saved["default"]["config"]["rank_pattern"]
    module = Net()
    make_trainer(tmp_path, *callbacks()).validate(
        module, Data(), ckpt_path=tmp_path / "both.ckpt", verbose=False
    )
    for _, layer in named_adapted_layers(module):
        assert [*layer.adapters] == [n for n in ("default", "frozen") if n in layer.adapters]
    trains = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trains
    assert all(".adapters.default." in name for name in trains)


def test_random_state_is_left_alone(tmp_path: Path) -> None:
    orders = []
    for start in (True, "eva"):
        torch.manual_seed(5)
        model, seen = Net(), []
        step = model.training_step
        model.training_step = lambda batch, i, step=step, seen=seen: (
            seen.append(batch[0].clone()) if torch.is_grad_enabled() else None,
            step(batch, i),
        )[1]
        torch.manual_seed(5)
        make_trainer(tmp_path, LoraCallback(r=2, init_lora_weights=start)).fit(model, Data())
        orders.append(torch.cat(seen))
    assert bit_equal(*orders)


@pytest.mark.parametrize("start", [{"0": torch.zeros(3, 4)}, {"1": torch.zeros(2, 4)}])
def test_a_start_that_does_not_fit_changes_nothing(start: dict[str, Tensor]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="eva")
    with pytest.raises(LoraError, match="start has values of shape"):
        inject_adapter(model, config, start=start)
    assert [type(module) for module in model] == [nn.Linear, nn.BatchNorm1d]
    assert model.train()[1].training
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (lambda: inject_adapter(Tower(), LoraConfig(r=2, init_lora_weights="eva")), "by hand"),
        (lambda: LoraConfig(eva_config=EvaConfig(), init_lora_weights="pissa"), "eva_config"),
        (lambda: LoraConfig(eva_config=EvaConfig()), "init_lora_weights is True"),
        (lambda: EvaConfig(rho=0.5), "rho"),
        (
            lambda: eva_start(
                m := Tower(), LoraConfig(r=2, init_lora_weights="eva"), [rows(2).float()], m.forward
            ),
            "larger batches",
        ),
    ],
    ids=["by hand", "other init", "no init", "rho", "small batches"],
)
def test_refused(action, words: str) -> None:
    with pytest.raises(LoraError, match=words):
        action()
