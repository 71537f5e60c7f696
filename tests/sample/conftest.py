"""Diffusions of pictures with random weights, in run folders, for tests that sample from them."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from cli.config import to_json
from configs.scenes import ddpm_uvit
from data.records import dataset_folder
from sample.samplers import create_sampler
from weights.checkpoint import CheckpointStore
from weights.run import CHECKPOINTS, CONFIG, TOKENIZER


@pytest.fixture(scope="session")
def diffusion_run(scenes_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`diffusion_run("captions")`, "classes" (0 to 3, and 4 for none) or "nothing": a run folder of what it reads.

    The network is that of `configs/scenes/ddpm_uvit.py:debug`, narrower; large random weights stand for training, so
    that what it is told shows in its pictures.
    """

    @functools.cache
    def folder(reads: str) -> Path:
        workdir = tmp_path_factory.mktemp("diffusions") / reads
        config = ddpm_uvit.get_config("debug")
        with config.unlocked():
            config.data.data_dir = str(scenes_dir)
            config.models.denoiser.update({"width": 16, "patch_size": 8, "context_width": 16})
            config.models.text.width = 16
            if reads != "captions":
                del config.models.text
                config.data.text_length = 0
                config.models.denoiser.update({"context_length": 0, "context_width": 0})
            if reads == "classes":
                config.models.denoiser.num_classes = 5
            if reads == "nothing":
                config.sample.guidance = 1.0
        sampler = create_sampler(config)
        networks = {"denoiser": sampler.model, **({"text": sampler.text.model} if sampler.text else {})}
        params = {}
        for name, network in networks.items():
            inputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), network.example_inputs(1))
            params[name] = jax.jit(network.init)(jax.random.key(0), *inputs)["params"]
        leaves, structure = jax.tree.flatten(params)
        shift = jax.jit(lambda leaf, key: leaf + 0.2 * jax.random.normal(key, leaf.shape))
        keys = jax.random.split(jax.random.key(1), len(leaves))
        params = jax.tree.unflatten(structure, [shift(leaf, key) for leaf, key in zip(leaves, keys, strict=True)])
        store = CheckpointStore(workdir / CHECKPOINTS)
        store.save(4, {"params": params, "variables": {}})
        store.close()
        (workdir / CONFIG).write_text(to_json(config))
        if reads == "captions":
            shutil.copy(dataset_folder(config.data.dataset, str(scenes_dir)) / TOKENIZER, workdir / TOKENIZER)
        return workdir

    return folder
