"""Networks of which a part is trained: what is held costs no gradient, keeps nothing, and does not move by a bit."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from cli.config import load_config
from cli.errors import EXIT_OK, UserError
from cost.flops import matrix_flops
from cost.measured import made_up_batch
from sample.trained import TrainedSampler
from scripts.describe import describe, format_description
from train.distributed.mesh import make_mesh
from train.distributed.sharding import path_name
from train.loop import train
from train.optimizer import create_optimizer
from train.program import create_program
from train.trainable import trained_params
from weights.checkpoint import CheckpointStore
from weights.run import Run, overlay

ROOT = Path(__file__).resolve().parents[2]
TRAINABLE = "--config.trainable=('/(up|out)',)"


def points(*overrides):
    """A network of five layers, with all that moves parameters but a gradient: weight decay, bounds, an average."""
    settings = ("optimizer.weight_decay=0.1", "optimizer.bounds=(('', -0.2, 0.2),)", "ema.decay=0.9")
    values = [f"--config.{setting}" for setting in settings]
    return load_config([f"--config={ROOT}/configs/toy/swiss_roll.py:debug", *values, *overrides])


def scenes(name, *overrides):
    return load_config([f"--config={ROOT}/configs/scenes/{name}", "--config.batch_size=8", *overrides])


def program_of(config):
    return create_program(config, make_mesh(config.mesh, jax.devices()[:1]))


def one_step(config):
    """(state before, state after, health) of the first update, on the host."""
    program = program_of(config)
    with program.in_mesh():
        batch = made_up_batch(program, config)
        state = program.init(batch)
        before = jax.device_get(state)
        after, _, health = program.train_step(state, {}, batch)
    return before, jax.device_get(after), jax.device_get(health)


def trees(workdir):
    store = CheckpointStore(workdir / "checkpoints")
    loaded = store.load(store.steps()[0], ("params", "ema_params", "opt_state"))
    return {
        name: {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for name, tree in loaded.items()
    }


def is_trained(path: str) -> bool:
    return "/up" in path or "/out" in path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of four steps."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    assert train(points(TRAINABLE), workdir) == EXIT_OK
    return workdir


def test_what_is_held_is_the_same_bits_at_the_end_and_all_else_has_moved(whole):
    config = points(TRAINABLE)
    program = program_of(config)
    with program.in_mesh():
        start = flatten_dict(jax.device_get(program.init(made_up_batch(program, config)).params), sep="/")
    end = trees(whole)["params"]
    assert end.keys() == start.keys() and {is_trained(path) for path in end} == {True, False}
    for path, leaf in end.items():
        assert np.array_equal(leaf, start[path]) != is_trained(path), path


def test_a_checkpoint_has_no_average_and_no_optimizer_state_of_what_is_held(whole):
    stored = trees(whole)
    assert stored["ema_params"].keys() == {path for path in stored["params"] if is_trained(path)}
    moments = [path for path in stored["opt_state"] if "/mu/" in path or "/nu/" in path]
    assert len(moments) == 2 * len(stored["ema_params"]) and all(is_trained(path) for path in moments)


@pytest.mark.parametrize("ema", [True, False])
def test_a_run_folder_still_gives_the_whole_network(whole, ema):
    stored = trees(whole)
    weights = Run.open(whole).load(ema=ema)
    loaded = flatten_dict(weights.params, sep="/")
    assert weights.ema == ema and loaded.keys() == stored["params"].keys()
    for path, leaf in loaded.items():
        source = stored["ema_params"] if ema and is_trained(path) else stored["params"]
        np.testing.assert_array_equal(leaf, source[path])
    assert any(not np.array_equal(stored["ema_params"][path], stored["params"][path]) for path in stored["ema_params"])
    assert TrainedSampler.open(whole, ema=ema, chunk=2)({}, seed=0, indices=range(2))["point"].shape == (2, 2)


def test_a_run_that_was_interrupted_ends_as_the_uninterrupted_one(whole, tmp_path):
    train(points(TRAINABLE, "--config.steps=2"), tmp_path / "run")
    train(points(TRAINABLE), tmp_path / "run")
    expected, resumed = trees(whole), trees(tmp_path / "run")
    assert jax.tree.structure(expected) == jax.tree.structure(resumed)
    jax.tree.map(np.testing.assert_array_equal, resumed, expected)


def test_a_run_goes_on_with_what_it_began_to_train(whole):
    with pytest.raises(UserError, match=r"started with another config \(trainable: \['/\(up\|out\)'\] -> \['.\*'\]\)"):
        train(points("--config.steps=5"), whole)


def test_a_run_says_what_it_trains(tmp_path, capsys):
    train(points(TRAINABLE, "--config.steps=2"), tmp_path / "run")
    output = capsys.readouterr().out
    assert "training 306 of 898 parameters (config.trainable)" in output
    assert "warning: config.initialize.denoiser names no source, so what is held of denoiser is random" in output
    train(points("--config.steps=2"), tmp_path / "all")
    assert "config.trainable" not in capsys.readouterr().out


@pytest.mark.parametrize("microbatches", [1, 2])
def test_the_gradient_is_that_of_the_whole_network_where_it_is_trained(microbatches):
    settings = ("--config.optimizer.transform=sgd", f"--config.mesh.microbatches={microbatches}")
    settings += ("--config.optimizer.clip_norm=0.0", "--config.optimizer.bounds=()")
    before, everything, all_norms = one_step(points(*settings))
    same, part, norms = one_step(points(*settings, TRAINABLE))
    jax.tree.map(np.testing.assert_array_equal, same.params, before.params)
    paths = list(flatten_dict(before.params, sep="/"))
    assert len(norms.leaf_norms) == sum(is_trained(path) for path in paths)
    expected = [norm for path, norm in zip(sorted(paths), all_norms.leaf_norms, strict=True) if is_trained(path)]
    np.testing.assert_allclose(norms.leaf_norms, expected, rtol=1e-6)
    start, wanted = (flatten_dict(state.params, sep="/") for state in (before, everything))
    for path, leaf in flatten_dict(part.params, sep="/").items():
        if is_trained(path):
            np.testing.assert_allclose(leaf, wanted[path], rtol=1e-6, atol=1e-8)
        else:
            np.testing.assert_array_equal(leaf, start[path])


def test_what_the_trained_part_does_not_need_is_not_computed():
    small = ("--config.models.dvae.encoder_hidden=32", "--config.models.dvae.decoder_hidden=32")
    flops, memory = {}, {}
    for name, pattern in {"all": ".*", "decoder": "^dvae/decoder/", "encoder": "^dvae/encoder/"}.items():
        config = scenes("dvae.py:gumbel", *small, f"--config.trainable=({pattern!r},)")
        program = program_of(config)
        inputs = program.abstract_state, program.abstract_frozen, program.abstract_batch
        with program.in_mesh():
            flops[name] = matrix_flops(program.train_step, *inputs)
            compiled = program.train_step.lower(*inputs).compile()
        memory[name] = compiled.memory_analysis().temp_size_in_bytes
        assert describe(config, depth=1)["matrix_flops_per_step"] == flops[name]
    # Behind the forward pass as much again for the gradients of kernels, and of inputs, but for the input of the first
    # layer that is trained. Through a held decoder goes a gradient, without those of its kernels.
    forward, codes = describe(scenes("dvae.py:gumbel", *small), depth=1)["matrix_flops_forward"], 8 * 8 * 8
    encoder_input, decoder_input = 2 * codes * (9 * 48 * 32), 2 * codes * (256 * 128)
    decoder = flops["all"] - flops["encoder"]
    assert flops["all"] == 3 * forward - encoder_input
    assert flops["decoder"] == forward + 2 * decoder - decoder_input
    assert memory["decoder"] < 0.7 * memory["all"] and memory["encoder"] < memory["all"], memory


def test_statistics_of_what_is_held_go_on():
    """As the documentation says: the pattern is of parameters, and a codebook is none."""
    before, after, _ = one_step(scenes("dvae.py:debug", "--config.trainable=('decoder/',)"))
    assert np.array_equal(
        before.params["dvae"]["encoder"]["input"]["kernel"], after.params["dvae"]["encoder"]["input"]["kernel"]
    )
    assert not np.array_equal(before.variables["dvae"]["codebook"]["sums"], after.variables["dvae"]["codebook"]["sums"])


PARAMS = {
    "clip": {
        "image": {"blocks_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}},
        "text": {"blocks_0": {"kernel": jnp.ones((2, 2))}, "projection": {"kernel": jnp.ones((2, 2))}},
        "logit_scale": jnp.ones(()),
    }
}


def test_patterns_are_found_anywhere_in_a_path_and_add_up():
    kept = trained_params(PARAMS, ("/bias$", "text/.*projection", "^clip/logit"))
    assert flatten_dict(kept, sep="/").keys() == {
        "clip/image/blocks_0/bias",
        "clip/text/projection/kernel",
        "clip/logit_scale",
    }
    assert jax.tree.structure(overlay(PARAMS, kept)) == jax.tree.structure(PARAMS)
    assert jax.tree.structure(trained_params(PARAMS, (".*",))) == jax.tree.structure(PARAMS)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ("text", "clip/image/block_0/"),
            "'clip/image/block_0/' matches no parameter; did you mean clip/image/blocks_0",
        ),
        (("txet",), "'txet' matches no parameter; did you mean clip/text?"),
        ((r"^logit_scale$",), "did you mean clip/logit_scale?"),
        (("qqq",), "matches no parameter; paths begin with clip/image, clip/text, clip/logit_scale"),
        (("(text",), "'(text' is not a pattern of paths (missing ), unterminated subpattern at position 0)"),
        ((1,), "1 is not a pattern of paths"),
        ((), "config.trainable is empty"),
    ],
)
def test_a_pattern_that_fits_nothing_is_one_line_that_says_what_would(patterns, message):
    with pytest.raises(UserError) as error:
        trained_params(PARAMS, patterns)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_mistaken_pattern_is_found_before_anything_is_made(tmp_path):
    with pytest.raises(UserError, match="config.trainable: 'denoiser/upp_0' .* did you mean denoiser/up_0"):
        train(points("--config.trainable=('denoiser/upp_0',)"), tmp_path / "run")
    with pytest.raises(UserError, match=r"config.trainable=up_0 has the wrong type: it must be a tuple such as"):
        points("--config.trainable=up_0")


def test_optimizer_rules_may_speak_of_what_is_held_but_not_of_nothing():
    trained = trained_params(PARAMS, ("/text/",))
    rules = ({"pattern": "/image/", "schedule": {"peak": 1.0}}, {"pattern": "/text/", "schedule": {"peak": 0.5}})
    config = points().optimizer
    config.update({"rules": rules, "schedule": {"name": "constant", "warmup_steps": 0}})
    optimizer, schedule = create_optimizer(
        config, trained, 10, whole=PARAMS
    )  # no rule is of logit_scale, which is held
    assert schedule(0) == 0.5  # what the log shows is of what is trained
    sizes = [leaf.size for leaf in jax.tree.leaves(optimizer.init(trained)) if leaf.ndim]
    assert sum(sizes) == 2 * sum(leaf.size for leaf in jax.tree.leaves(trained))
    config.rules = (*rules, {"pattern": "/audio/"})
    with pytest.raises(UserError, match="optimizer rule 2 matches no parameter: '/audio/'"):
        create_optimizer(config, trained, 10, whole=PARAMS)


def test_a_description_counts_what_is_held():
    description = describe(points(TRAINABLE), depth=1)
    assert (description["trained"]["denoiser"]["parameters"], description["trained"]["denoiser"]["held"]) == (898, 592)
    assert "denoiser (trained): 898 parameters, 592 of them held by config.trainable" in format_description(description)
    assert "held" not in format_description(describe(points(), depth=1))
