"""ddp_fork, ddp_spawn, ddp_notebook: what child processes trained is on the main process's module."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import child_environment

SCRIPT = """
import pickle
import sys
import torch
from tests.helpers.lightning_modules import *
from lora_lightning import LoraCallback, LoraConfig, inject_adapter
from lora_lightning.layers.traversal import named_adapted_layers, named_parameters
from lora_lightning.training.strategies import launchers

OPTIONS = dict(r=2, target_modules=["embed", "body.2"], modules_to_save=["head"])


def trainer_for(folder, strategy, epochs=1, **options):
    saver = ModelCheckpoint(folder, save_last=True, filename="best", monitor="val_loss")
    callback = LoraCallback(**{**OPTIONS, **options})
    return make_trainer(folder, callback, saver, devices=2, strategy=strategy, max_epochs=epochs)


def go(folder, strategy, kind, prepare=lambda module: None, **options):
    torch.manual_seed(0)
    module = kind()
    prepare(module)
    trainer = trainer_for(folder, strategy, **options)
    trainer.fit(module, Data())
    assert trainer.checkpoint_callback.best_model_path == f"{folder}/best.ckpt"
    check_launcher_is_its_own(trainer)
    return module


def adapters(state):
    return {k: v for k, v in state.items() if ".adapters." in k}


def check_trained(module, folder):
    saved = torch.load(f"{folder}/last.ckpt", weights_only=True)["state_dict"]
    state = module.state_dict()
    assert adapters(state).keys() == saved.keys() and saved
    assert all(torch.equal(state[k], saved[k]) for k in saved)
    assert saved["embed.adapters.default.lora_B"].any()
    for name, tensor in Net().state_dict().items():
        assert torch.equal(state[name], tensor), name  # the base, bit for bit
    assert all(p.requires_grad == (".adapters." in n) for n, p in named_parameters(module))
    assert all(layer.active_adapters == ["default"] for _, layer in named_adapted_layers(module))


def check_launcher_is_its_own(trainer):
    # Nothing is left on it, which would be pickled for the next call.
    cls = type(trainer.strategy.launcher)
    assert not vars(trainer.strategy.launcher).keys() & vars(cls).keys()
    pickle.loads(pickle.dumps(trainer.strategy.launcher))


def test_loss(trainer, module, **options):
    return trainer.test(module, Data(), verbose=False, **options)[0]["test_loss"]


def main(folder, strategy, kind):
    module = go(folder, strategy, kind)
    if kind is Net:
        check_trained(module, folder)
    # Forks start faster than spawned processes, and the question is what the module carries.
    trained = test_loss(trainer_for(folder, "ddp_fork"), module)
    restored = test_loss(trainer_for(folder, "ddp_fork"), kind(), ckpt_path=f"{folder}/last.ckpt")
    untrained = test_loss(trainer_for(folder, "ddp_fork"), kind())
    assert trained == restored != untrained, (trained, restored, untrained)
    if kind is not Net:  # its layers are there only once a run in this process has built them
        test_loss(make_trainer(folder, LoraCallback(**OPTIONS)), module)
        check_trained(module, folder)
    return module


def train_on(folder, module):
    trainer = trainer_for(folder, "ddp_fork", epochs=2)
    trainer.fit(module, Data(), ckpt_path=f"{folder}/last.ckpt")
    check_trained(module, folder)


def eva(folder):  # finds its ranks in the child processes
    module = go(folder, "ddp_fork", Net, r=3, init_lora_weights="eva", eva_config={"rho": 3.0})
    check_trained(module, folder)
    ranks = [v.shape[0] for k, v in module.state_dict().items() if k.endswith("lora_A")]
    assert len(set(ranks)) > 1, ranks
"""


def execute(folder: Path, code: str) -> str:
    script = folder / "train.py"
    script.write_text(SCRIPT + '\nif __name__ == "__main__":\n    folder = sys.argv[1]\n' + code)
    done = subprocess.run(
        [sys.executable, str(script), str(folder)],
        env=child_environment(),
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def indented(code: str) -> str:
    return "".join(f"    {line}\n" for line in code.strip().splitlines())


@pytest.mark.slow
def test_adapters_come_back_from_forks(tmp_path: Path) -> None:
    code = """
train_on(folder + "/1", main(folder + "/1", "ddp_notebook", Net))
main(folder + "/2", "ddp_fork", BuiltInSetup)
main(folder + "/3", "ddp_fork", BuiltInConfigureModel)
eva(folder + "/4")
"""
    said = execute(tmp_path, indented(code))
    assert "BuiltInConfigureModel builds its layers in configure_model or setup" in said
    assert " Net builds its layers" not in said


@pytest.mark.slow
def test_what_the_module_moves_comes_back_too(tmp_path: Path) -> None:
    """And the base stays that of the first run: a fresh module goes on from the second's file."""
    code = """
from tests.helpers.moving_modules import InPlace, data, trainer
module = InPlace()
for run in ("1", "2"):
    trainer(folder + "/" + run, devices=1, strategy="ddp_fork").fit(module, data())
    file = folder + "/" + run + "/step=8.ckpt"
    saved = torch.load(file, weights_only=True)
    assert torch.equal(module.slow.weight.detach(), saved["state_dict"]["slow.weight"])
    weight = module.slow.weight.clone()
    (seen,) = trainer(folder + "/test").test(InPlace(), data(), ckpt_path=file, verbose=False)
    (here,) = trainer(folder + "/test").test(module, data(), ckpt_path=file, verbose=False)
    assert seen == here and torch.equal(module.slow.weight, weight)
"""
    execute(tmp_path, indented(code))


@pytest.mark.slow
def test_adapters_that_do_not_fit_a_pipe(tmp_path: Path) -> None:
    """More than 64 kB, which the main process takes up only once its children have ended."""
    code = """
module = Net(width=512)
trainer = make_trainer(folder, LoraCallback(r=64, target_modules=["2"]), devices=2, strategy="ddp_fork")
trainer.fit(module, Data())
state = adapters(module.state_dict())
assert sum(t.numel() for t in state.values()) * 4 > 200_000
assert state["body.2.adapters.default.lora_B"].any()
"""
    execute(tmp_path, indented(code))


@pytest.mark.slow
def test_adapters_come_back_from_spawned_processes(tmp_path: Path) -> None:
    execute(tmp_path, indented('main(folder, "ddp_spawn", Net)'))


@pytest.mark.slow
def test_without_the_way_back(tmp_path: Path) -> None:
    """The negative control: refused with the way out, which works; unrefused, the adapters are lost."""
    code = """
launchers._METHODS += ("a_method_that_no_launcher_has",)
try:
    go(folder + "/refused", "ddp_fork", Net)
except Exception as error:
    assert "ConfigError" in str(error) and "inject_adapter(module, config, 'default')" in str(error)
else:
    raise AssertionError("not refused")
ready = go(folder + "/ready", "ddp_fork", Net, lambda m: inject_adapter(m, LoraConfig(**OPTIONS)))
check_trained(ready, folder + "/ready")
import lora_lightning.callback
lora_lightning.callback.hand_back_adapters = lambda *_: None
lost = go(folder + "/lost", "ddp_fork", Net)
assert not adapters(lost.state_dict())
"""
    execute(tmp_path, indented(code))
