"""The packages: `configs/` of the repository travels as `lora_lightning/configs`."""

from setuptools import find_packages, setup

CONFIGS = ["", ".overlays", ".launch", ".coming_from"]

setup(
    packages=[
        *find_packages(include=["lora_lightning*"]),
        *(f"lora_lightning.configs{part}" for part in CONFIGS),
    ],
    package_dir={"lora_lightning.configs": "configs"},
    package_data={
        "lora_lightning": ["py.typed", "cli/snapshot.json"],
        "": ["*.yaml", "*.sh", "*.sbatch"],
        "lora_lightning.configs": ["README.md"],
        "lora_lightning.configs.coming_from": ["README.md"],
    },
)
