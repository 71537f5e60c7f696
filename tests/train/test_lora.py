"""Low-rank pairs beside networks that stay as they are: nothing at the start, small checkpoints, one kind of run."""

import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from cli.config import load_config
from cli.errors import EXIT_OK, UserError
from models import create_model
from sample.trained import TrainedSampler
from scripts.describe import describe, format_description
from train.distributed.mesh import make_mesh
from train.loop import train
from train.objectives import create_objective
from train.objectives.lora import PAIR_RULES
from train.program import create_program
from train.unread import unread_keys
from weights.checkpoint import CheckpointStore
from weights.lora import kernels_of, merge
from weights.run import IDENTITY, Run, model_of

ROOT = Path(__file__).resolve().parents[2]
RANK = 2


def scenes(*overrides):
    return config_of("scenes/latent_unet.py:debug", *overrides)


def points(*overrides):
    """A network of five layers, with all that moves parameters but a gradient."""
    return config_of("toy/swiss_roll.py:debug", "optimizer.weight_decay=0.1", "ema.decay=0.9", *overrides)


def config_of(name, *overrides):
    return load_config([f"--config={ROOT}/configs/{name}", *(f"--config.{each}" for each in overrides)])


def pairs_on(folder, *overrides):
    """The config of a run of pairs beside all kernels of another run of points."""
    config = points(f"lora.rank={RANK}", "lora.alpha=8.0", "lora.paths=('kernel$',)", *overrides)
    with config.unlocked():
        config.initialize.denoiser = ConfigDict({"source": str(folder), "part": "denoiser"})
    return config


def paths_of(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def flat(tree):
    return flatten_dict(jax.device_get(tree), sep="/")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "base"
    assert train(points("steps=2"), workdir) == EXIT_OK
    return workdir


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "pairs"
    assert train(pairs_on(base), workdir) == EXIT_OK
    return workdir


def test_pairs_are_of_every_kind_of_kernel_and_their_product_has_its_form():
    kernels = kernels_of(create_model(**model_of(scenes().models.denoiser)))
    rng = np.random.default_rng(0)
    for path, kernel in kernels.items():
        down, up = (rng.normal(size=shape).astype(np.float32) for shape in kernel.pair_shapes(RANK).values())
        module = path.removesuffix("/kernel")
        pair = unflatten_dict({f"{module}/down": down, f"{module}/up": up}, sep="/")
        whole = unflatten_dict({path: np.ones(kernel.shape, np.float32)}, sep="/")
        merged = flat(merge({"unet": whole, "lora": {"unet": pair}}, 0.5)["unet"])[path]
        before, behind = kernel.shape[: kernel.inputs], kernel.shape[kernel.inputs + kernel.joint :]
        pairs = zip(down, up, strict=True) if kernel.joint else ((down, up),)
        products = [(a.reshape(-1, RANK) @ b.reshape(RANK, -1)).reshape(*before, *behind) for a, b in pairs]
        expected = np.stack(products, axis=kernel.inputs) if kernel.joint else products[0]
        np.testing.assert_allclose(merged, 1 + 0.5 * expected, atol=1e-5)
    joint = "down_0_attention_0/blocks_0/context_attention/key_value/kernel"
    assert kernels[joint].pair_shapes(3) == {"down": (2, 32, 3), "up": (2, 3, 1, 16)}
    assert kernels["input/kernel"].pair_shapes(3) == {"down": (3, 3, 4, 3), "up": (3, 16)}
    assert kernels[joint.replace("key_value", "out")].pair_shapes(3) == {"down": (1, 16, 3), "up": (3, 16)}


def test_before_the_first_update_pairs_change_no_bit():
    objective = create_objective(points("lora.rank=2", "lora.alpha=8.0", "lora.paths=('kernel$',)"))
    init = jax.jit(
        lambda inner: (objective.objective if inner else objective).init(jax.random.key(0), {})[0], static_argnums=0
    )
    alone, params = flat(init(True)), init(False)
    downs = [leaf for path, leaf in flat(params["lora"]).items() if path.endswith("/down")]
    assert downs and all(np.std(leaf) > 0.01 for leaf in downs)
    merged = flat(merge(params, objective.scale))
    assert merged.keys() == alone.keys() and objective.scale == 4.0
    for path, leaf in alone.items():
        np.testing.assert_array_equal(merged[path], leaf)


def test_a_checkpoint_holds_pairs_alone_and_opens_as_a_whole_network(base, run):
    stored = CheckpointStore(run / "checkpoints").abstract(4)
    assert all(set(stored[name]) == {"lora"} for name in ("params", "ema_params"))
    moments = [path for path in paths_of(stored["opt_state"]) if "/mu/" in path]
    assert moments and all("/lora/" in path for path in moments)
    before, after, averaged = (
        flat(Run.open(at).load(ema=ema).params) for at, ema in ((base, True), (run, False), (run, True))
    )
    assert before.keys() == after.keys()
    for path, leaf in after.items():
        assert np.array_equal(leaf, before[path]) != path.endswith("kernel"), path
        assert np.array_equal(leaf, averaged[path]) != path.endswith("kernel"), path
    assert TrainedSampler.open(run, chunk=2)({}, seed=0, indices=range(2))["point"].shape == (2, 2)


def test_a_run_that_was_interrupted_ends_as_the_uninterrupted_one_and_may_move(run, base, tmp_path):
    train(pairs_on(base, "steps=2"), tmp_path / "run")
    moved = shutil.copytree(base, tmp_path / "elsewhere")
    train(pairs_on(moved), tmp_path / "run")
    trees = [
        CheckpointStore(folder / "checkpoints").load(4, ("params", "ema_params", "opt_state"))
        for folder in (run, tmp_path / "run")
    ]
    jax.tree.map(np.testing.assert_array_equal, *trees)
    # What it is added to is found beside the run where it is not where it was.
    copies = tmp_path / "copies"
    copies.mkdir()
    shutil.copytree(base, copies / "elsewhere")
    copy = Run.open(shutil.copytree(tmp_path / "run", copies / "run"))
    shutil.rmtree(moved)
    jax.tree.map(np.testing.assert_array_equal, copy.load().params, Run.open(run).load().params)
    with pytest.raises(UserError, match="elsewhere is missing"):
        Run.open(tmp_path / "run").load()
    (copies / "elsewhere" / IDENTITY).write_text("another")
    with pytest.raises(UserError, match="config.initialize.denoiser: .*elsewhere is another run"):
        copy.load()
    with pytest.raises(UserError, match="elsewhere is another run"):
        train(pairs_on(copies / "elsewhere", "steps=5"), copy.folder)


def test_pairs_are_not_added_to_what_learned_another_process(base, tmp_path):
    with pytest.raises(UserError, match="config.initialize.denoiser: .*base was trained on another process"):
        train(pairs_on(base, "process.prediction=x0"), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_pairs_are_added_to_a_run_of_pairs_as_to_any(run, tmp_path):
    train(pairs_on(run, "steps=2", "lora.rank=1"), tmp_path / "run")
    before, after = (flat(Run.open(folder).load().params) for folder in (run, tmp_path / "run"))
    assert all(np.allclose(after[path], leaf, atol=0.1) for path, leaf in before.items())
    assert sum(not np.array_equal(after[path], leaf) for path, leaf in before.items()) >= 2


def test_without_a_source_the_checkpoint_holds_the_network_and_says_that_it_is_random(tmp_path, capsys):
    assert train(points("lora.rank=1", "steps=2", "lora.paths=('up_0',)"), tmp_path / "run") == EXIT_OK
    said = capsys.readouterr().out
    assert "(config.lora); the others stay as they are" in said and "what is held of denoiser is random" in said
    stored = CheckpointStore(tmp_path / "run" / "checkpoints").abstract(2)["params"]
    assert set(stored) == {"denoiser", "lora"} and all("up_0" in path for path in paths_of(stored["lora"]))
    assert Run.open(tmp_path / "run").load().params.keys() == {"denoiser"}


def test_what_trainable_names_is_trained_in_whole_beside_the_pairs_and_kept(base, tmp_path):
    train(pairs_on(base, "trainable=('/out/',)", "lora.paths=('up_0',)", "steps=2"), tmp_path / "run")
    stored = paths_of(CheckpointStore(tmp_path / "run" / "checkpoints").abstract(2)["params"])
    whole = {path for path in stored if not path.startswith("lora/")}
    assert whole == {"denoiser/out/bias", "denoiser/out/kernel"}
    before, after = (
        flat(Run.open(folder).load(ema=ema).params) for folder, ema in ((base, True), (tmp_path / "run", False))
    )
    changed = {path for path, leaf in after.items() if not np.array_equal(leaf, before[path])}
    assert changed == {*whole, "denoiser/up_0/kernel"}


def test_pairs_are_whole_on_every_device_whatever_the_rules_of_their_kernels():
    config = scenes("lora.rank=2")
    params = jax.eval_shape(lambda: create_objective(config).init(jax.random.key(0), {})[0])
    assert params["lora"].keys() == {"denoiser", "text"}
    rules = (*PAIR_RULES, *config.mesh.rules)
    for path in (f"{prefix}/{path}" for prefix in ("params", "opt_state/mu") for path in paths_of(params)):
        axes = next(axes for pattern, axes in rules if re.search(pattern, path))
        assert axes == () or "/lora/" not in path
        assert axes != () or "/lora/" in path or "query" not in path or path.endswith("bias")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lora.rank=-1", "config.lora.rank must be at least 0 and below 65536, not -1"),
        ("ema.every=2147483648", "config.ema.every must be at least 1 and below 2147483648, not 2147483648"),
        ("lora.alpha=-0.5", "config.lora.alpha must be at least 0, not -0.5"),
        ("lora.paths=('(',)", r"config.lora.paths: '\(' is not a pattern of paths"),
        ("lora.paths=()", "config.lora.paths is empty"),
        (
            "lora.paths=('up_9/kernel',)",
            "config.lora.paths: 'up_9/kernel' matches no kernel that can have a pair; did you",
        ),
        ("lora.paths=('bias$',)", r"'bias\$' matches no kernel that can have a pair"),
        ("trainable=('nothing',)", "config.trainable: 'nothing' matches no parameter"),
    ],
)
def test_impossible_settings_are_one_line(setting, message):
    config = points("lora.rank=2", "lora.paths=('kernel$',)", setting)
    with pytest.raises(UserError, match=message) as error:
        create_program(config, make_mesh(config.mesh, jax.devices()[:1]))
    assert "\n" not in str(error.value)


def test_keys_that_nothing_reads_are_said():
    idle = "config.lora.alpha=4.0 has no effect: there are no low-rank pairs while config.lora.rank is 0"
    assert unread_keys(points("lora.alpha=4.0")) == [idle]
    assert not unread_keys(points("lora.alpha=4.0", "lora.rank=1"))


def test_a_description_counts_pairs_as_trained_and_all_else_as_held():
    description = describe(points("lora.rank=2", "lora.paths=('up_0',)"), depth=1)
    pairs, network = (description["trained"][part] for part in ("lora", "denoiser"))
    assert (pairs["held"], network["held"], network["parameters"]) == (0, 898, 898) and pairs["parameters"] > 0
    assert "898 of them held by config.lora" in format_description(description)
