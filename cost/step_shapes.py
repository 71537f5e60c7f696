"""What a training step needs on meshes of any size, from programs that are traced for one device: no compiler."""

import functools
import math

import jax
from ml_collections import ConfigDict

from cli.errors import UserError
from cli.plurals import spell_count
from cost.compiled import step_flops
from cost.flops import plain_config
from cost.temporaries import program_temporary_bytes
from train.distributed.mesh import AXES, check_batch_size
from train.distributed.sharding import shardings
from train.objectives.lora import PAIR_RULES
from train.program import Program, create_program
from train.trainable import trained_params, trained_patterns


class StepShapes:
    """Programs of one experiment, one for each recomputation and number of microbatches.

    Args:
      config: an experiment; its mesh is of no account.
      device: any; nothing is put on it.
      fused_attention: whether programs are taken to have that of GPUs, which keeps its scores to itself.
    """

    def __init__(self, config: ConfigDict, device: jax.Device, fused_attention: bool = False):
        self._config, self._device, self._fused_attention = config, device, fused_attention
        self._programs: dict[str, Program] = {}
        self._traced = {}
        self._flops: int | None = None

    def argument_bytes(self, config: ConfigDict, devices: int) -> int:
        """Bytes of the step's arguments on each of so many devices, by their shapes.

        Raises:
          UserError: if the mesh, a rule of it or the batch does not fit so many devices.
        """
        mesh = _abstract_mesh(config, devices)
        check_batch_size(config, mesh)
        program = self._program(self._config)
        rows = mesh.shape["data"] * mesh.shape["fsdp"]
        placed = sum(
            size for tree in (program.abstract_state, program.abstract_frozen) for size in _placed(tree, config, mesh)
        )
        return placed + sum(leaf.size * leaf.dtype.itemsize // rows for leaf in program.abstract_batch.values())

    def temporary_bytes(self, config: ConfigDict, devices: int) -> int:
        """An estimate of what else the step needs on each of so many devices, see `cost.temporaries`."""
        mesh, program = _abstract_mesh(config, devices), self._program(config)
        key = _key(config)
        if key not in self._traced:
            with program.in_mesh():
                self._traced[key] = jax.make_jaxpr(program.train_step)(
                    program.abstract_state, program.abstract_frozen, program.abstract_batch
                )
        trained = trained_params(program.abstract_state.params, trained_patterns(config))
        whole = shardings(trained, (*PAIR_RULES, *config.mesh.rules), mesh)
        kinds = {
            sides(leaf.shape): leaf.size // math.prod(sharding.shard_shape(leaf.shape))
            for leaf, sharding in zip(jax.tree.leaves(trained), jax.tree.leaves(whole), strict=True)
        }
        split = functools.partial(split_of, kinds, mesh.shape["data"] * mesh.shape["fsdp"])
        return program_temporary_bytes(self._traced[key].jaxpr, split, self._fused_attention)

    def state_bytes(self) -> int:
        """Bytes of parameters, optimizer, averages and frozen networks over all devices, each value held once."""
        program = self._program(self._config)
        return sum(
            leaf.size * leaf.dtype.itemsize
            for leaf in jax.tree.leaves((program.abstract_state, program.abstract_frozen))
        )

    @functools.cached_property
    def _alone(self) -> jax.sharding.Mesh:
        return jax.make_mesh((1, 1, 1), AXES, (jax.sharding.AxisType.Auto,) * 3, devices=[self._device])

    def step_flops(self) -> int:
        """Matrix FLOPs of the step over all devices, without what is computed a second time to save memory."""
        if self._flops is None:
            self._flops = step_flops(_on_one(plain_config(self._config, recompute=False)), self._alone)
        return self._flops

    def _program(self, config: ConfigDict) -> Program:
        key = _key(config)
        if key not in self._programs:
            self._programs[key] = create_program(_on_one(config), self._alone)
        return self._programs[key]


def sides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Equal for a shape and its transpositions."""
    return tuple(sorted(side for side in shape if side != 1))


def split_of(kinds: dict[tuple[int, ...], int], rows: int, shape: tuple[int, ...]) -> int:
    """Over how many devices a value is divided that a step computes.

    Args:
      kinds: `sides` of trained parameters -> over how many these are: their gradients are, too.
      rows: over how many a batch is, and so all else.
      shape: of the value; layers that are scanned are stacked.
    """
    return kinds.get(sides(shape)) or kinds.get(sides(shape[1:])) or rows


def _key(config: ConfigDict) -> str:
    return repr((config.mesh.microbatches, [network.get("remat") for network in config.models.values()]))


def _on_one(config: ConfigDict) -> ConfigDict:
    alone = config.copy_and_resolve_references()
    alone.update({"mesh": {"data": 1, "fsdp": 1, "tensor": 1}})
    return alone


def _abstract_mesh(config: ConfigDict, devices: int) -> jax.sharding.AbstractMesh:
    sizes = [config.mesh[axis] for axis in AXES]
    given = math.prod(size for size in sizes if size != -1)
    if devices % given or (-1 not in sizes and given != devices):
        there = spell_count(devices, "device")
        raise UserError(f"config.mesh {dict(zip(AXES, sizes, strict=True))} does not fit {there}")
    return jax.sharding.AbstractMesh(tuple(devices // given if size == -1 else size for size in sizes), AXES)


def _placed(tree: object, config: ConfigDict, mesh: jax.sharding.AbstractMesh) -> list[int]:
    """Bytes of each leaf on a device."""
    places = shardings(tree, (*PAIR_RULES, *config.mesh.rules), mesh)
    return [
        math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, place in zip(jax.tree.leaves(tree), jax.tree.leaves(places), strict=True)
    ]
