"""What a benchmark counts: batches that a step can take, FLOPs of the mathematics, errors in one line."""

from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from cli.config import load_config
from cli.errors import UserError
from cost import measured
from cost.chips import Peak
from cost.timing import Spread
from models.layers import attention
from scripts.describe import describe
from train.distributed.mesh import make_mesh
from train.program import create_program

ROOT = Path(__file__).resolve().parents[2]


def config_of(name: str, **overrides):
    return load_config(
        [f"--config={ROOT}/configs/{name}:debug", *(f"--config.{key}={value}" for key, value in overrides.items())]
    )


def test_figures_of_a_step():
    figures = measured.step_figures(
        Spread(median=2.0, low=1.0, high=4.0), batch_size=8, tokens=10, flops=4000, devices=5, peak=Peak(1e3, "a table")
    )
    assert figures["seconds"] == {"median": 2.0, "low": 1.0, "high": 4.0}
    assert figures["examples_per_second"] == {"median": 4.0, "low": 2.0, "high": 8.0}
    assert figures["tokens_per_second"] == {"median": 40.0, "low": 20.0, "high": 80.0}
    assert figures["flops_per_second"] == {"median": 2000.0, "low": 1000.0, "high": 4000.0}
    assert figures["mfu"] == {"median": 0.4, "low": 0.2, "high": 0.8}
    assert figures["peak_flops_per_second"] == 5e3 and figures["peak_source"] == "a table, times 5"


def test_a_made_up_batch_is_what_the_step_takes():
    config = measured.without_sources(config_of("scenes/dalle.py", **{"models.dalle.text_vocab_size": 3}))
    program = create_program(config, make_mesh(config.mesh))
    batch = jax.device_get(measured.made_up_batch(program, config))
    assert {name: (value.shape, value.dtype) for name, value in batch.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in program.abstract_batch.items()
    }
    assert set(np.unique(batch["text"])) == {0, 1, 2}
    assert batch["index"].tolist() == list(range(8))
    assert batch["image"].min() < 10 and batch["image"].max() > 245


def test_made_up_texts_end_as_those_of_their_networks_do():
    """CLIP's features of a text without its end token are NaN."""
    config = measured.without_sources(config_of("scenes/clip.py"))
    program = create_program(config, make_mesh(config.mesh))
    text = jax.device_get(measured.made_up_batch(program, config))["text"]
    assert set(text[:, -1]) == {config.models.clip.text_end_id} and len(set(text[:, -2])) > 1


def test_no_other_run_is_needed_and_the_config_stays():
    config = config_of("scenes/dalle.py", **{"frozen.dvae.source": "runs/nowhere"})
    assert measured.without_sources(config).frozen.dvae.source == "random"
    assert config.frozen.dvae.source == "runs/nowhere"


def test_flops_of_a_kernel_that_is_chosen_are_counted(monkeypatch):
    """As on a GPU, where products are out of sight in it."""
    configs = [config_of("scenes/dalle.py"), config_of("scenes/ddpm_uvit.py")]
    flops = [measured.model_flops(config) for config in configs]
    monkeypatch.setattr(attention, "choose_attention", lambda *facts: "cudnn")
    monkeypatch.setattr(attention, "_attend_cudnn", lambda q, k, v, mask: q)
    assert [measured.model_flops(config) for config in configs] == flops


def test_flops_are_those_of_the_mathematics():
    without_products = {"optimizer.rules": "({'pattern': '.*'},)"}  # of the optimizer, which a batch does not multiply
    flops = measured.model_flops(config_of("scenes/dalle.py", **without_products))
    again = {"models.dalle.remat": "full", "models.dalle.scan": "true", "mesh.microbatches": 2, **without_products}
    assert measured.model_flops(config_of("scenes/dalle.py", **again)) == flops
    assert measured.model_flops(config_of("scenes/dalle.py", batch_size=16, **without_products)) == 2 * flops
    clip = measured.model_flops(config_of("scenes/clip.py"))
    assert measured.model_flops(config_of("scenes/clip.py", **{"mesh.microbatches": 2})) == clip
    # More than three times the forward products of the dense layers: 12 D^2 a position and layer, D = 32.
    assert flops > 3 * 8 * 76 * 3 * 2 * 10 * 32**2


@pytest.mark.parametrize("name", ["scenes/dalle.py", "scenes/autoencoder.py"])
def test_a_description_counts_a_step_as_a_benchmark_does(name):
    """The optimizer's products too, and none of the folding that one CPU does of convolutions."""
    config = config_of(name)
    described = describe(config, depth=1)
    assert described["matrix_flops_per_step"] == measured.model_flops(config)
    assert described["matrix_flops_optimizer"] > 0


def test_tokens_and_dtype_are_the_trained_networks():
    dalle = config_of("scenes/dalle.py", **{"models.dalle.dtype": "bfloat16"})
    assert measured.tokens_of(dalle) == 12 + 64 and measured.dtype_of(dalle) == "bfloat16"
    clip = config_of("scenes/clip.py", **{"data.text_length": 16})
    assert measured.tokens_of(clip) == 16  # of a context of 24
    dvae = config_of("scenes/dvae.py")
    assert measured.tokens_of(dvae) == 0 and measured.dtype_of(dvae) == "float32"


def test_memory_counts_donated_arguments_once_and_temporary_buffers_on_every_backend():
    def planned(peak, temp):
        names = ("argument", "output", "alias", "temp")
        sizes = dict(zip((f"{name}_size_in_bytes" for name in names), (10, 9, 8, temp), strict=True))
        return SimpleNamespace(peak_memory_in_bytes=peak, **sizes)

    assert measured.program_bytes(planned(peak=11, temp=100)) == 111  # as a CPU reports
    assert measured.program_bytes(planned(peak=75, temp=0)) == 75  # as a TPU may
    assert measured.program_bytes(None) is None


def test_what_does_not_fit_is_a_line_that_says_what_to_do(monkeypatch):
    def load(*arguments):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(measured, "load_frozen", load)
    monkeypatch.setattr(measured, "made_up_batch", lambda program, config: {})
    message = "RESOURCE_EXHAUSTED: Out of memory allocating 12345 bytes"
    config = config_of("scenes/dvae.py")
    with pytest.raises(UserError, match="batch_size=8 does not fit 1 x cpu; lower config.batch_size"):
        measured.measure_step(config, windows=1, steps=1, warmup=0)
    with pytest.raises(UserError, match="drawing 64 pictures at once does not fit"):
        measured.measure_sample(config, windows=1)
    message = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        measured.measure_sample(config, windows=1)


def test_two_steps_are_timed_in_turn(monkeypatch):
    turns, now, configs = [], [0.0], [ConfigDict({"seconds": seconds}) for seconds in (3.0, 2.0)]

    def prepare(config, clock):
        def run(count):
            turns.append((config.seconds, count))
            now[0] += count * config.seconds

        planned = SimpleNamespace(
            **{f"{kind}_size_in_bytes": 1 for kind in ("argument", "output", "alias", "temp")}, peak_memory_in_bytes=7
        )
        return SimpleNamespace(run=run, compiled=SimpleNamespace(memory_analysis=lambda: planned))

    monkeypatch.setattr(measured, "prepare_step", prepare)
    monkeypatch.setattr(measured, "without_sources", lambda config: config)
    report = measured.compare_steps(*configs, windows=2, steps=4, warmup=1, clock=lambda: now[0])
    assert turns == [(3.0, 1), (2.0, 1), *[(3.0, 4), (2.0, 4)] * 2]
    assert report["seconds"]["median"] == 2 and report["ratio"] == {"median": 1.5, "low": 1.5, "high": 1.5}
    assert report["program_peak_bytes"] == [7, 7] and report["processor_ratio"]["median"] > 0
