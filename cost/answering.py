"""The program that answers questions, of a Llama or a vision adapter, as the TPU compiler sees it.

It reads prompts and pictures and makes all tokens of the answers, in one loop that may end early: what is said of
collectives counts that loop's body, one token, once.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from cli.errors import UserError
from cost.chips import GIB, chip_of
from cost.compiled import Compilation, compile_lowered, shard_bytes, topology_devices
from models.layers.tile_positions import canvases
from sample.samplers import create_sampler
from train.distributed.mesh import make_mesh
from train.program import create_program
from weights.lora import LORA

_ANSWERING = ("llama", "vision_adapter")


@dataclasses.dataclass(frozen=True)
class FittedAnswers:
    """Answers to questions on a slice of TPUs.

    Attributes:
      topology: of the slice.
      mesh: sizes of the axes.
      questions: at once, over all devices.
      prompt_length: tokens of a question, without those of its picture.
      answer_length: tokens of an answer at most.
      parameter_bytes: of a device, by their shapes.
      compilation: the compiler's part.
    """

    topology: str
    mesh: dict[str, int]
    questions: int
    prompt_length: int
    answer_length: int
    parameter_bytes: int
    compilation: Compilation


def fit_answers(config: ConfigDict, topology: str, questions: int) -> FittedAnswers:
    """Compiles answers to `config.data.text_length` tokens and a picture each, as `config.sample` makes them.

    Low-rank pairs are part of the kernels then, and left out.

    Args:
      config: of a Llama or a vision adapter.
      topology: such as `v5e:4x4`.
      questions: at once; 0 for one a device.

    Raises:
      UserError: if the config answers nothing, or questions do not divide over the devices; see `cost.compiled.fit`.
    """
    if config.objective not in _ANSWERING:
        raise UserError(f"--decode is of {' and '.join(_ANSWERING)}; a {config.objective} answers no questions")
    mesh = make_mesh(config.mesh, topology_devices(topology))
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    questions = questions or shards
    if questions % shards:
        raise UserError(f"--decode={questions} questions do not divide over the {shards} shards of a batch")
    program, sampler = create_program(config, mesh), create_sampler(config)
    rows: dict[str, Any] = {"text": np.ones((questions, config.data.text_length), np.int32)}
    if "image" in sampler.reads:
        model = sampler.model
        tiles = (model.max_tiles,) if model.max_tiles > 1 else ()
        rows["image"] = np.zeros((questions, *tiles, model.tile_size, model.tile_size, 3), np.uint8)
        if tiles:
            rows["canvas"] = np.full(questions, len(canvases(model.max_tiles)), np.int32)
    request = sampler.request(**rows)
    length = request.pop("answer_length")
    described = {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=program.rows if name in rows else program.whole)
        for name, value in request.items()
    }
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), questions))
    keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=program.rows)

    def answer(params: Any, frozen: Any, request: Any, keys: Any) -> Any:
        return sampler(params, {}, frozen, {**request, "answer_length": length}, keys)

    params = {part: tree for part, tree in program.abstract_state.params.items() if part != LORA}
    with program.in_mesh():
        lowered = jax.jit(answer, out_shardings=program.rows).lower(params, program.abstract_frozen, described, keys)
        compilation = compile_lowered(lowered, mesh.size)
    return FittedAnswers(
        topology, dict(mesh.shape), questions, config.data.text_length, length, shard_bytes(params), compilation
    )


def describe_answers(name: str, fitted: FittedAnswers) -> dict[str, Any]:
    """What `scripts.fit --decode` reports, ready for JSON.

    Args:
      name: the config and its overrides, as they were typed.
      fitted: of `fit_answers`.
    """
    compilation, traffic = fitted.compilation, fitted.compilation.collectives
    return {
        "config": name,
        "topology": fitted.topology,
        "mesh": fitted.mesh,
        "questions": fitted.questions,
        "prompt_length": fitted.prompt_length,
        "answer_length": fitted.answer_length,
        "fits": compilation.fits,
        "memory_bytes": compilation.memory_bytes,
        "hbm_bytes": compilation.available_bytes or chip_of(fitted.topology).hbm_bytes,
        "parameter_bytes": fitted.parameter_bytes,
        "sent_bytes_of_prompt_and_one_token": traffic and traffic.sent_bytes,
        "compile_seconds": compilation.seconds,
    }


def format_answers(report: dict[str, Any]) -> str:
    """Lays such a report out for a terminal."""
    needed, hbm, sent = report["memory_bytes"], report["hbm_bytes"], report["sent_bytes_of_prompt_and_one_token"]
    lines = {
        "config": report["config"],
        "topology": report["topology"],
        "mesh": " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items()),
        "answers": f"{report['questions']} at once, prompts of {report['prompt_length']} tokens beside pictures, "
        f"up to {report['answer_length']} tokens",
        "memory of a device": f"{needed / GIB:.2f} GiB of {hbm / GIB:.2f} GiB: "
        f"{'fits' if report['fits'] else 'does not fit'}",
        "  of it parameters": f"{report['parameter_bytes'] / GIB:.2f} GiB by their shapes",
        "sent by a device": "-" if sent is None else f"{sent / 1e9:.4g} GB for the prompts and one token",
        "compiled in": f"{report['compile_seconds']:.0f} s",
    }
    return "\n".join(f"{name:<24}{text}" for name, text in lines.items())
