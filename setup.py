"""Installs mgd_det with its configs. Detectron2 itself is installed beside it: see README.md."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def version():
    text = (ROOT / "mgd_det" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


# The folder configs/ is installed as mgd_det/configs, where mgd_det.model_zoo finds it by name.
config_folders = ["configs"] + [
    str(path.relative_to(ROOT)) for path in sorted((ROOT / "configs").rglob("*")) if path.is_dir()
]
config_packages = {"mgd_det." + folder.replace("/", "."): folder for folder in config_folders}

setup(
    name="mgd_det",
    version=version(),
    description="Matching Guided Distillation (ECCV 2020) of light detectors for Detectron2",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.9",
    packages=find_packages(include=["mgd_det", "mgd_det.*"]) + list(config_packages),
    package_dir=config_packages,
    package_data={package: ["*.yaml", "*.py"] for package in config_packages},
    # detectron2 has no release under its own name on the registry, so it cannot be declared here.
    install_requires=[
        "torch>=2.3",
        "torchvision>=0.18",
        "fvcore>=0.1.5.post20221221",
        "iopath>=0.1.9,<0.1.11",
        "scipy>=1.6",
        "numpy",
        "pycocotools>=2.0.6",
        "safetensors",
        "matplotlib>=3.7",
        "opencv-python-headless",
        "tabulate",
        "tqdm",
        "setuptools<81",  # Detectron2 imports pkg_resources
    ],
    extras_require={
        "timm": ["timm>=1.0"],
        "dev": [
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
            "types-tabulate",
            "types-PyYAML",
            "timm>=1.0",
        ],
    },
)
