"""Public names: they stay those that they are, and load when they are used."""

from __future__ import annotations

import importlib
import pickle

import pytest

NAMES = {
    "lora_lightning": """
        AdaLoraConfig Adapter AdapterConfig AdapterMismatchError AdapterSpec
        AdapterStateError BaseWeight CausalLM CheckpointError ConfigError DeltaAdapter
        EvaConfig Examination IA3Config Ia3Config ImageClassification ImageDataModule
        Inspection LoHaConfig LoKrConfig LoftQConfig LoftqConfig LohaConfig LokrConfig
        LoraCallback LoraConfig LoraError ModelError NonfiniteError OFTConfig OftConfig
        OptimizerError Plan RankError RecordError Selection Seq2SeqLM SequenceClassification
        ShiraConfig StdlibDocstrings TargetError TerminalProgress
        TextClassificationDataModule TextDataModule TextSamples TokenClassification
        TokenClassificationDataModule TrainingProgress VeraConfig active_adapters
        adapter_names adapter_state_dict adapter_status adapters_per_row
        add_weighted_adapter compare_with_base delete_adapter disable_adapter eva_start
        examine export generate hotswap_adapter inject_adapter inspect load_adapter
        load_adapter_state_dict load_from_checkpoint merge merge_adapter merge_and_unload
        plan preview register_adapter report save_adapter scale_adapter set_adapter unload
        unmerge_adapter
    """,
    "lora_lightning.tasks": """
        CausalLM ImageClassification Seq2SeqLM SequenceClassification TokenClassification
    """,
    "lora_lightning.data": """
        ImageDataModule StdlibDocstrings TextClassificationDataModule TextDataModule
        TokenClassificationDataModule
    """,
    "lora_lightning.callbacks": """
        Comparison TerminalProgress TextSamples TrainingProgress compare_with_base
    """,
}


@pytest.mark.parametrize("package", NAMES)
def test_the_names_of_a_package_stay(package: str) -> None:
    module = importlib.import_module(package)
    assert sorted(module.__all__) == sorted(NAMES[package].split())
    assert {*module.__all__} <= {*dir(module)}
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        module.nothing


@pytest.mark.parametrize("package", NAMES)
def test_a_name_is_what_its_module_defines(package: str) -> None:
    module = importlib.import_module(package)
    for name in module.__all__:
        value = getattr(module, name)
        assert vars(module)[name] is value  # found without `__getattr__` the next time
        assert pickle.loads(pickle.dumps(value)) is value
