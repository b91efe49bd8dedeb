"""The packages of mgd_det; all the rest is in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

# The folder configs/ is installed as mgd_det/configs, where mgd_det.model_zoo finds it by name.
folders = ["configs"] + [str(path.relative_to(ROOT)) for path in sorted((ROOT / "configs").rglob("*")) if path.is_dir()]
configs = {"mgd_det." + folder.replace("/", "."): folder for folder in folders}

setup(
    packages=find_packages(include=["mgd_det", "mgd_det.*"]) + list(configs),
    package_dir=configs,
    package_data={
        "mgd_det": ["py.typed", "visualization/templates/*"],
        **{package: ["*.yaml", "*.py"] for package in configs},
    },
)
