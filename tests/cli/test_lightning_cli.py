"""LoraCallback under a plain LightningCLI, without this package's command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.cli import LightningCLI

from lora_lightning import (
    AdapterConfig,
    IA3Config,
    LohaConfig,
    LoraCallback,
    LoraConfig,
    adapter_names,
)
from lora_lightning.errors import AdapterMismatchError
from tests.helpers.lightning_modules import (
    BuiltInConfigureModel,
    Data,
    Net,
    NetWithoutOptimizer,
    WithHparams,
)

QUIET = [
    "--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false", "--trainer.max_epochs=1",
]  # fmt: skip


SHORT = ["--trainer.callbacks+=LoraCallback", "--trainer.callbacks.r=2"]


def cli(verb: str, *arguments: str, model: type = Net, **options: Any) -> LightningCLI:
    """LightningCLI as it is, with no section for LoRA."""
    return LightningCLI(
        model, Data, args=[verb, *QUIET, *arguments], save_config_callback=None,
        seed_everything_default=0, **options,
    )  # fmt: skip


def lora(made: LightningCLI) -> LoraCallback:
    return next(c for c in made.trainer.callbacks if isinstance(c, LoraCallback))  # type: ignore[attr-defined]


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: Any) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["fit"])  # LightningCLI objects to pytest's own arguments
    return tmp_path


def test_plain_cli_with_a_yaml_entry(in_folder: Path) -> None:
    (in_folder / "a.yaml").write_text(
        "trainer:\n  callbacks:\n    - class_path: lora_lightning.LoraCallback\n"
        "      init_args: {r: 2, target_modules: [embed, body.2], nonfinite: skip}\n"
    )
    made = cli("fit", "--config", "a.yaml")
    assert lora(made).config.target_modules == ["embed", "body.2"]
    assert lora(made)._nonfinite_guard.policy == "skip"
    assert adapter_names(made.model) == ["default"]


def test_plain_cli_with_short_names(in_folder: Path) -> None:
    assert lora(cli("fit", *SHORT)).config.r == 2
    nested = ["--trainer.callbacks+=LoraCallback", "--trainer.callbacks.config=LoraConfig"]
    assert lora(cli("fit", *nested, "--trainer.callbacks.config.r=3")).config.r == 3


CONFIGS: dict[str, tuple[str, AdapterConfig]] = {
    "another type": (
        "{class_path: lora_lightning.LohaConfig, init_args: {r: 3, target_modules: [embed]}}",
        LohaConfig(r=3, target_modules=["embed"]),
    ),
    "PEFT's name": ("{class_path: lora_lightning.IA3Config}", IA3Config()),
    "short name": ("{class_path: LohaConfig, init_args: {alpha: 4}}", LohaConfig(alpha=4)),
    "LoRA": ("{class_path: lora_lightning.LoraConfig, init_args: {r: 3}}", LoraConfig(r=3)),
    "LoRA's options alone": ("{r: 3, use_rslora: true}", LoraConfig(r=3, use_rslora=True)),
}


@pytest.mark.slow
@pytest.mark.parametrize(("text", "config"), CONFIGS.values(), ids=CONFIGS)
def test_plain_cli_takes_any_config(in_folder: Path, text: str, config: AdapterConfig) -> None:
    """Without settings of its own for jsonargparse; what it saves gives the same again."""
    entry = f"{{class_path: lora_lightning.LoraCallback, init_args: {{config: {text}}}}}"
    (in_folder / "a.yaml").write_text(f"trainer: {{callbacks: [{entry}]}}\n")
    made = cli("fit", "--config", "a.yaml", "--trainer.fast_dev_run=true")
    assert lora(made).config == config
    assert type(lora(made).config) is type(config)
    logger = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs"]
    arguments = ["fit", "--config", "a.yaml", *QUIET, *logger]
    LightningCLI(Net, Data, args=arguments, seed_everything_default=0)
    (path,) = in_folder.rglob("config.yaml")
    assert lora(cli("fit", "--config", str(path), *QUIET)).config == config


def test_plain_cli_names_a_wrong_option_of_a_config(in_folder: Path, capsys: Any) -> None:
    text = "{class_path: lora_lightning.LohaConfig, init_args: {alhpa: 3}}"
    entry = f"{{class_path: lora_lightning.LoraCallback, init_args: {{config: {text}}}}}"
    (in_folder / "a.yaml").write_text(f"trainer: {{callbacks: [{entry}]}}\n")
    with pytest.raises(SystemExit):
        cli("fit", "--config", "a.yaml")
    assert "Option 'alhpa' is not accepted" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*will be overridden by .LightningCLI")
@pytest.mark.parametrize("kind", [Net, NetWithoutOptimizer])
def test_plain_cli_builds_the_optimizer_before_the_trainer(in_folder: Path, kind: type) -> None:
    """`--optimizer` is made from the base's parameters, when no adapter exists yet."""
    made = cli(
        "fit", *SHORT, "--optimizer=torch.optim.Adam", "--optimizer.lr=0.01", "--lr_scheduler=ExponentialLR",
        "--lr_scheduler.gamma=0.5", model=kind,
    )  # fmt: skip
    (optimizer,) = made.trainer.optimizers
    names = {id(p): name for name, p in made.model.named_parameters()}
    held = [names[id(p)] for p in optimizer.param_groups[0]["params"]]
    assert len(held) == 6
    assert all(".adapters." in name for name in held)
    assert optimizer.param_groups[0]["lr"] == 0.005
    assert all(made.model.state_dict()[name].any() for name in held)


@pytest.mark.filterwarnings("ignore:.*will be overridden by .LightningCLI")
def test_plain_cli_with_a_model_that_is_not_built_yet(in_folder: Path) -> None:
    """The CLI's own limit (pytorch-lightning#19110): leave --optimizer out, LoraCallback has one."""
    with pytest.raises(ValueError, match="empty parameter list"):
        cli("fit", *SHORT, "--optimizer=torch.optim.Adam", model=BuiltInConfigureModel)
    cli("fit", *SHORT, model=BuiltInConfigureModel)


@pytest.mark.slow
def test_plain_cli_resumes_and_evaluates(in_folder: Path) -> None:
    """It reads the file with weights_only=True whatever one says, and takes hparams out of it."""
    cli("fit", *SHORT, model=WithHparams)
    (path,) = in_folder.rglob("*.ckpt")
    made = cli("fit", *SHORT, "--ckpt_path", str(path), "--trainer.max_epochs=2", model=WithHparams)
    assert made.trainer.global_step == 8
    cli("test", *SHORT, "--ckpt_path", str(path), model=WithHparams)
    other = ["--trainer.callbacks+=LoraCallback", "--trainer.callbacks.r=3"]
    with pytest.raises(AdapterMismatchError, match=r"r: 2 in the checkpoint, 3 here \(lora\.r\)"):
        cli("validate", *other, "--ckpt_path", str(path), model=WithHparams)


def test_the_config_that_the_cli_saves_can_be_read(in_folder: Path) -> None:
    """SaveConfigCallback dumps every option; what is no plain value breaks the run."""
    logger = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs"]
    LightningCLI(Net, Data, args=["fit", *QUIET, *SHORT, *logger], seed_everything_default=0)
    (path,) = in_folder.rglob("config.yaml")
    made = cli("fit", "--config", str(path), *QUIET)
    assert lora(made).config == LoraConfig(r=2)
