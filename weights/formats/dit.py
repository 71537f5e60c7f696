"""DiT as its authors have it (github.com/facebookresearch/DiT): shapes or arguments, and state dicts to ours, and back.

They publish bare state dicts, `DiT-XL-2-256x256.pt`; their training writes checkpoints of which sampling takes the
moving average, "ema". What shapes do not tell is the number of heads, which goes with the width, and that the last row
of the table of classes stands for none. Our own files have the arguments of the published class beside them.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from cli.errors import UserError
from models import create_model
from models.dit import DiT
from models.layers.embeddings import grid_embedding
from weights.files.fields import Field, flag, read_fields, real, whole, word
from weights.files.layout import CONVOLUTION, Layout, Rule, Tensors, Tree, linear
from weights.files.origin import Origin, WeightsFile, learned, read_weights
from weights.files.tensors import TORCH_SUFFIXES, read_with
from weights.files.torch_pickle import read_pickle, tensors_of
from weights.formats.contract import Converted, Files, Format
from weights.formats.runs import denoiser_run
from weights.formats.transformers import mlp_ratio

ARGUMENTS = "dit.json"
WEIGHTS = ("dit.safetensors", "dit.pt", "DiT-XL-2-256x256.pt", "DiT-XL-2-512x512.pt")
POSITIONS = "pos_embed"  # fixed, and yet among the parameters

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # by the network's width
DROPOUT = 0.1  # of the class, with which the published networks were trained
# What they were trained on and how their code samples: evenly over the chain, with guidance of the first channels.
PROCESS = {
    "schedule": {"name": "discrete", "kind": "linear", "steps": 1000, "start": 1e-4, "end": 0.02},
    "prediction": "eps",
}
SAMPLE = {"sampler": "ddpm", "steps": 250, "spacing": "linspace"}
GUIDED_CHANNELS = 3

# Of the published class: (argument, our field, what it may be).
_ARGUMENTS: tuple[tuple[str, str, Field], ...] = (
    ("input_size", "image_size", whole(32)),
    ("patch_size", "patch_size", whole(2)),
    ("in_channels", "in_channels", whole(4)),
    ("hidden_size", "width", whole(1152)),
    ("depth", "depth", whole(28, high=1024)),
    ("num_heads", "heads", whole(16)),
    ("mlp_ratio", "mlp_ratio", real(4.0, low=0, high=1024, above=True)),
)
_OTHER_ARGUMENTS: dict[str, Field] = {
    "name": word(choices=("DiT",)),
    "class_dropout_prob": real(DROPOUT, low=0, high=1),
    "num_classes": whole(1000),
    "learn_sigma": flag(True),
}

_TABLE = {argument: field for argument, _, field in _ARGUMENTS} | _OTHER_ARGUMENTS

LAYOUT = Layout(
    what="this DiT in its authors' layout",
    rules=(
        Rule(r"patch/(\w+)", r"x_embedder.proj.\1", CONVOLUTION),
        Rule(r"time_1/(\w+)", r"t_embedder.mlp.0.\1"),
        Rule(r"time_2/(\w+)", r"t_embedder.mlp.2.\1"),
        Rule(r"label/(\w+)", r"y_embedder.embedding_table.\1"),
        Rule(r"blocks_(\d+)/modulation/(\w+)", r"blocks.\1.adaLN_modulation.1.\2"),
        Rule(r"blocks_(\d+)/attention/query_key_value/(\w+)", r"blocks.\1.attn.qkv.\2"),
        Rule(r"blocks_(\d+)/attention/out/(\w+)", r"blocks.\1.attn.proj.\2", linear(inputs=2)),
        Rule(r"blocks_(\d+)/mlp/up/(\w+)", r"blocks.\1.mlp.fc1.\2"),
        Rule(r"blocks_(\d+)/mlp/down/(\w+)", r"blocks.\1.mlp.fc2.\2"),
        Rule(r"final_modulation/(\w+)", r"final_layer.adaLN_modulation.1.\1"),
        Rule(r"pixel_head/(\w+)", r"final_layer.linear.\1"),
    ),
)


def fixed_positions(model: DiT) -> np.ndarray:
    """The positions of a network's patches as it adds them, [L, D]."""
    return np.asarray(grid_embedding(*model.grid, model.width, column_first=True, sine_first=True))


def from_dit(model: DiT, tensors: Mapping[str, np.ndarray]) -> Tree:
    """Converts a published state dict to the parameters of `model`.

    Raises:
      UserError: if tensors are missing, unexpected or of another shape; lists them; or positions are not fixed ones.
    """
    positions = fixed_positions(model)
    given = np.asarray(tensors.get(POSITIONS, positions[None]), np.float32)
    if given.shape != (1, *positions.shape) or np.abs(given[0] - positions).max() > 1e-2:  # half precision has 1e-3
        raise UserError(f"{POSITIONS} are not the fixed sines and cosines of {model.grid[0]} x {model.grid[1]} patches")
    return LAYOUT.read(model, {name: array for name, array in tensors.items() if name != POSITIONS})["params"]


def to_dit(model: DiT, params: Tree) -> Tensors:
    """Converts parameters to a state dict of the published class, float32.

    Raises:
      UserError: if the published class cannot compute what `model` does.
    """
    dit_arguments(model)
    return {POSITIONS: fixed_positions(model)[None], **LAYOUT.write({"params": params})}


def dit_fields(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Reads arguments of the published class as {"name": "dit", fields of `models.dit.DiT`}.

    Raises:
      UserError: if they are another network's, or one that ours cannot compute.
    """
    given = read_fields("this DiT", arguments, _TABLE)
    fields = {ours: given[argument] for argument, ours, _ in _ARGUMENTS}
    fields["mlp_ratio"] = mlp_ratio(int(fields["width"] * fields["mlp_ratio"]), fields["width"])
    return {
        "name": "dit",
        **fields,
        "out_channels": fields["in_channels"] * (2 if given["learn_sigma"] else 1),
        "num_classes": given["num_classes"] + (given["class_dropout_prob"] > 0),
    }


def dit_arguments(model: DiT) -> dict[str, Any]:
    """The name and arguments of the published class that computes what `model` does; `dit_fields` backwards.

    The last class is taken for none, as in all networks that were trained with dropped classes.

    Raises:
      UserError: if there is none.
    """
    problems = [
        f"its {field} is {value!r}"
        for field, choices in (
            ("context_width", (0,)),
            ("out_channels", (model.in_channels, 2 * model.in_channels)),
            ("last_period", (False,)),
            ("mlp_norm_epsilon", (1e-6,)),
        )
        if (value := getattr(model, field)) not in choices
    ]
    if model.num_classes < 2:
        problems.append(f"its num_classes is {model.num_classes}, and theirs has one at least, and one for none")
    if problems:
        raise UserError(f"this DiT cannot be written for its authors' code: {'; '.join(problems)}")
    return {
        "name": "DiT",
        **{argument: getattr(model, field) for argument, field, _ in _ARGUMENTS},
        "num_classes": model.num_classes - 1,
        "class_dropout_prob": DROPOUT,
        "learn_sigma": model.out_channels != model.in_channels,
    }


def dit_fields_of_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Tells {"name": "dit", fields} from the shapes of a published state dict; the number of heads by its width.

    Raises:
      UserError: if a tensor that says a size is missing, or sizes are not those of a published network.
    """
    shapes = {name: tuple(array.shape) for name, array in tensors.items()}

    def size(name: str, axis: int) -> int:
        if len(shapes.get(name, ())) <= axis:
            raise UserError(f"these are not the weights of a DiT in its authors' layout: there is no {name}")
        return shapes[name][axis]

    width, patch = size("x_embedder.proj.weight", 0), size("x_embedder.proj.weight", 2)
    tokens = size(POSITIONS, 1)
    grid = math.isqrt(tokens)
    if grid < 1 or grid**2 != tokens or width not in HEADS:
        raise UserError(
            f"shapes do not tell the heads of a width of {width} or the picture of {tokens} patches, which no "
            f"published DiT has; put {ARGUMENTS}, the arguments of its class, in the folder of the weights"
        )
    return {
        "name": "dit",
        "image_size": grid * patch,
        "patch_size": patch,
        "in_channels": size("x_embedder.proj.weight", 1),
        "width": width,
        "depth": len({match[1] for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))}),
        "heads": HEADS[width],
        "mlp_ratio": mlp_ratio(size("blocks.0.mlp.fc1.weight", 0), width),
        "out_channels": size("final_layer.linear.weight", 0) // patch**2,
        "num_classes": size("y_embedder.embedding_table.weight", 0),
    }


def read_dit(origin: Origin) -> tuple[dict[str, Any], Tensors]:
    """Reads a file of weights, or a folder with one: ({"name": "dit", fields}, tensors).

    Raises:
      UserError: if files are missing, or say nothing of a DiT that ours can compute.
    """
    path = origin.path if isinstance(origin, WeightsFile) else origin.require(*WEIGHTS)
    if path.suffix in TORCH_SUFFIXES:

        def read(path: Any) -> Tensors:
            content = read_pickle(path)
            average = isinstance(content, Mapping) and isinstance(content.get("ema"), Mapping)
            return tensors_of(content["ema"] if average else content)

        tensors = learned(origin, str(path), read_with(read, path))
    else:
        tensors = read_weights(origin, WEIGHTS)
    described = origin.find(ARGUMENTS) is not None
    return dit_fields(origin.json(ARGUMENTS)) if described else dit_fields_of_tensors(tensors), tensors


def dit_files(model: DiT, params: Tree, null_class: bool = True) -> Files:
    """What the published code can be given.

    Args:
      model: the network.
      params: its parameters.
      null_class: whether its last class stands for none. Otherwise all are classes, and the published class has no row
        for none where its class_dropout_prob is 0.

    Raises:
      UserError: if it cannot compute what `model` does.
    """
    arguments = dit_arguments(model)
    if not null_class:
        arguments |= {"num_classes": model.num_classes, "class_dropout_prob": 0.0}
    return {ARGUMENTS: arguments, WEIGHTS[0]: to_dit(model, params)}


def dit_run(
    fields: Mapping[str, Any],
    params: Tree,
    process: Mapping[str, Any] | None,
    sample: Mapping[str, Any],
    first_stage: tuple[Mapping[str, Any], Tree] | None = None,
    notes: tuple[str, ...] = (),
    dropout: float = DROPOUT,
) -> Converted:
    """A DiT as a run; see `denoiser_run`. At `dropout` 0 no class is for none."""
    run = denoiser_run(fields, params, process, sample, first_stage, notes)
    run.config["loss"] = {"dropout": dropout}
    return run


def _recognizes(origin: Origin) -> bool:
    if isinstance(origin, WeightsFile):
        return re.match(r"dit\b", origin.path.name, re.IGNORECASE) is not None
    return origin.find(ARGUMENTS, *WEIGHTS) is not None


def _read(origin: Origin) -> Converted:
    fields, tensors = read_dit(origin)
    described = origin.find(ARGUMENTS) is not None
    dropout = read_fields("this DiT", origin.json(ARGUMENTS), _TABLE)["class_dropout_prob"] if described else DROPOUT
    sample = {**SAMPLE, "guided_channels": min(GUIDED_CHANNELS, fields["in_channels"])}
    return dit_run(fields, from_dit(create_model(**fields), tensors), PROCESS, sample, dropout=dropout)


FORMAT = Format(
    name="dit",
    networks=("dit",),
    inputs="a DiT of classes, a published .pt file, a checkpoint of its training or what --to=dit writes",
    outputs="DiT(**ARGUMENTS) of the published code with dit.json, and load_state_dict",
    recognizes=_recognizes,
    read=_read,
    write=lambda network: dit_files(network.model, network.params, network.null_class),
)
