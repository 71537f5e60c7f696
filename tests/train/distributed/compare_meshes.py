"""Run by test_devices.py with eight simulated devices: a step on each mesh against the step on one device.

Its first argument lists pairs of a config and names of meshes. Prints one JSON line per config and mesh: the largest
relative differences of loss, metrics, gradients and variables, over all batches. With a second argument, "float64", all
that is float32 is float64.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

if "float64" in sys.argv:  # before the project's modules are imported, which name float32 where they are defined
    jax.config.update("jax_enable_x64", True)
    jnp.float32 = jnp.float64

from cli.config import load_config
from train.distributed.mesh import make_mesh, place_batch
from train.distributed.sharding import path_name
from train.program import Program, create_program

MESHES = {
    "one": {"data": 1},
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "tensor": {"data": 4, "tensor": 2},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
    "microbatches": {"data": 2, "fsdp": 2, "tensor": 2, "microbatches": 2},
}


def main() -> None:
    for arguments, names in json.loads(sys.argv[1]):
        reference = None
        for name in ("one", *names):
            sizes = MESHES[name]
            config = load_config(arguments)
            config.mesh.update({"data": 1, "fsdp": 1, "tensor": 1, **sizes})
            count = int(np.prod([config.mesh[axis] for axis in ("data", "fsdp", "tensor")]))
            program = create_program(config, make_mesh(config.mesh, jax.devices()[:count]))
            values = [step(program, config, seed) for seed in seeds(config)]
            reference = reference or values
            differences = {
                key: max(difference(one[key], other[key]) for one, other in zip(values, reference, strict=True))
                for key in values[0]
            }
            if name == "microbatches":
                differences["metrics"] = 0.0  # some are of a batch as a whole, which a microbatch is not
            print(json.dumps({"config": arguments[0], "mesh": name, "split": split(program), **differences}))


def seeds(config) -> tuple[int, ...]:
    """Of the batches, each of which is a first step."""
    if "float64" in sys.argv:
        return 0, 1, 2
    # A ResNet's gradient jumps where a rectifier's input is 0 but for rounding: a batch in which none is.
    return (5 if config.objective == "clip" else 0,)


def step(program: Program, config, seed: int) -> dict:
    """Loss, gradient and new state of the first step, as numpy."""
    rng = np.random.default_rng(seed)
    batch = {name: rng.integers(0, 200, leaf.shape).astype(leaf.dtype) for name, leaf in program.abstract_batch.items()}
    batch["index"] = np.arange(config.batch_size, dtype=np.int32)
    if config.objective == "clip":
        batch["text"][:, 5] = config.models.clip.text_end_id
    if "label" in batch:
        batch["label"] %= config.models.denoiser.num_classes
    placed = place_batch(batch, range(config.batch_size), config.batch_size, program.rows)

    def frozen():
        from weights.sources import load_frozen

        return load_frozen(config, 0, program.abstract_frozen)

    with program.in_mesh():
        state = program.init(placed)
        params = jax.device_get(state.params)
        if config.objective in ("diffusion", "autoencoder", "vision_adapter"):
            state = dataclasses.replace(state, params=disturbed(state.params))
        state, metrics, health = program.train_step(state, frozen(), placed)
    # The first moment of Adam, and Muon's momentum, are multiples of the gradient.
    moments = {path: leaf for path, leaf in named(state.opt_state) if "/mu/" in path or "/trace/" in path}
    return {
        "initial": params,
        "loss": np.asarray(health.loss),
        "metrics": jax.device_get(metrics),
        "gradients": np.asarray(health.leaf_norms),
        "moments": list(moments.values()),
        "variables": jax.device_get(state.variables),
    }


def disturbed(params):
    """Parameters of which none is zero: a layer that starts at zero hides what is wrong with gradients before it."""
    rng = np.random.default_rng(1)

    def add_noise(leaf):
        noise = rng.normal(scale=0.1, size=leaf.shape).astype(leaf.dtype)
        return jax.device_put(jax.device_get(leaf) + noise, leaf.sharding)

    return jax.tree.map(add_noise, params)


def named(tree):
    return [(path_name(path), jax.device_get(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def difference(value, reference) -> float:
    """Largest difference over a tree, each leaf relative to its largest value."""
    worst = 0.0
    for one, other in zip(jax.tree.leaves(value), jax.tree.leaves(reference), strict=True):
        scale = max(float(np.max(np.abs(other))), 1e-12)
        worst = max(worst, float(np.max(np.abs(np.asarray(one, np.float64) - other))) / scale)
    return worst


def split(program: Program) -> int:
    """How many parameters are split over devices."""
    return sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(program.abstract_state.params))


main()
