"""Packaging of megatron_tspin."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
README = HERE / "README.md"
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "megatron_tspin" / "__init__.py").read_text(), re.MULTILINE)[1]

setup(
    name="megatron_tspin",
    version=VERSION,
    description="T-SPIN: triplet-based self-play fine-tuning of language models on megatron-core",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_tspin", "megatron_tspin.*"]),
    package_data={"megatron_tspin": ["py.typed"], "megatron_tspin.report": ["templates/*"]},
    install_requires=[
        "torch>=2.11",
        "megatron-core>=0.16.1",
        "transformers>=5.17",
        "tokenizers>=0.22",
        "safetensors>=0.6",
        "sentencepiece>=0.2",
        "numpy>=1.26",
        "pydantic>=2.11",
        "PyYAML>=6.0",
        "tqdm>=4.66",
        "rich>=13.9",
        "plotly>=6.0",
        "Jinja2>=3.1",
        "tensorboard>=2.18",
    ],
    extras_require={
        "bench": ["trl>=1.16", "accelerate>=1.15", "datasets>=5.2"],
        "parquet": ["pyarrow>=17"],
        "zstd": ["zstandard>=0.22"],
        # Others' writer and reader of Megatron's indexed files, which the tests hold ours to.
        "oracles": ["datatrove==0.10.1", "megatron-tokenizer-lite==0.0.2", "datasets>=5.2"],
        "te": ["transformer-engine[pytorch]"],
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff",
            "mypy",
            "types-PyYAML",
            "types-tqdm",
            "pyarrow>=17",
            "zstandard>=0.22",
        ],  # fmt: skip
    },
    entry_points={"console_scripts": ["tspin = megatron_tspin.cli.main:main"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
