"""The discrete VAE of the DALL-E package (github.com/openai/DALL-E): its modules or state dicts to a run, and back.

OpenAI publishes encoder and decoder apart, each a pickled module, `encoder.pkl` and `decoder.pkl`. A tensor is
`blocks.group_1.block_2.res_path.conv_3.w` (or `.b`), kernels [out, in, height, width]. Ours is
`encoder/group_1_block_2/conv_3/kernel`, [height, width, in, out]; the decoder's first 1x1 convolution is a matrix
[in, out] here, since it is also used as a lookup table.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from cli.errors import UserError
from models import create_model
from models.dvae import DiscreteVAE
from weights.files.layout import CONVOLUTION, Layout, Rule, Tensors
from weights.files.origin import Origin, WeightsFile, read_weights
from weights.formats.contract import Converted, Files, Format, Network

_SUFFIXES = (".pkl", ".safetensors", ".pt", ".pth")
_IMAGE_SIZE = 256  # of the published pictures; any other that is a multiple of 8 works too

_LAYOUT = Layout(
    what="this discrete VAE",
    rules=(
        Rule(r"(\w+)/(group_\d+)_(block_\d+)/(conv_\d+)/(\w+)", r"\1.blocks.\2.\3.res_path.\4.\5", CONVOLUTION),
        Rule(r"(\w+)/(group_\d+)_(block_\d+)/(\w+)/(\w+)", r"\1.blocks.\2.\3.\4.\5", CONVOLUTION),
        Rule(r"(\w+)/output/(\w+)", r"\1.blocks.output.conv.\2", CONVOLUTION),
        Rule(r"(\w+)/(\w+)/(\w+)", r"\1.blocks.\2.\3", CONVOLUTION),
    ),
    leaves={"kernel": "w", "bias": "b"},
)


def from_dall_e(
    model: DiscreteVAE, encoder: Mapping[str, np.ndarray], decoder: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Converts the package's state dicts to the parameters of `model`, in its `param_dtype`.

    Args:
      model: says what shapes are expected.
      encoder: state dict of the encoder, as numpy arrays.
      decoder: state dict of the decoder, as numpy arrays.

    Raises:
      UserError: if tensors are missing, unexpected or of another shape; lists them.
    """
    given = {f"encoder.{name}": array for name, array in encoder.items()}
    given |= {f"decoder.{name}": array for name, array in decoder.items()}
    return _LAYOUT.read(model, given)["params"]


def to_dall_e(params: Mapping[str, Any]) -> tuple[Tensors, Tensors]:
    """Converts parameters to the package's (encoder, decoder) state dicts of float32 numpy arrays."""
    state: dict[str, Tensors] = {"encoder": {}, "decoder": {}}
    for full_name, tensor in _LAYOUT.write({"params": params}).items():
        side, name = full_name.split(".", 1)
        state[side][name] = tensor
    return state["encoder"], state["decoder"]


def dvae_fields(encoder: Mapping[str, np.ndarray], decoder: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Tells {"name": "dvae", fields of `models.dvae.DiscreteVAE`} from the shapes of the package's state dicts.

    Raises:
      UserError: if a tensor that says a size is missing or empty.
    """

    def shape(tensors: Mapping[str, np.ndarray], name: str) -> tuple[int, ...]:
        if tensors.get(name) is None or tensors[name].ndim != 4:
            raise UserError(f"these are not the weights of OpenAI's discrete VAE: there is no {name}")
        if not tensors[name].size:
            raise UserError(f"these are not the weights of OpenAI's discrete VAE: {name} is {tensors[name].shape}")
        return tensors[name].shape

    blocks = {match.groups() for name in encoder if (match := re.match(r"blocks\.group_(\d+)\.block_(\d+)\.", name))}
    hidden, channels, kernel, _ = shape(encoder, "blocks.input.w")
    groups = sorted({int(group) for group, _ in blocks})
    widths = [shape(encoder, f"blocks.group_{group}.block_1.res_path.conv_4.w")[0] for group in groups]
    decoder_init, vocab_size = shape(decoder, "blocks.input.w")[:2]
    return {
        "name": "dvae",
        "image_size": _IMAGE_SIZE,
        "channels": channels,
        "vocab_size": vocab_size,
        "encoder_hidden": hidden,
        "decoder_hidden": shape(decoder, f"blocks.group_{len(groups)}.block_1.res_path.conv_4.w")[0],
        "decoder_init": decoder_init,
        "width_multipliers": tuple(width // hidden for width in widths),
        "blocks_per_group": len(blocks) // max(1, len(groups)),
        "input_kernel": kernel,
    }


def _read(origin: Origin) -> Converted:
    if isinstance(origin, WeightsFile):
        raise UserError(
            f"{origin.describe()} is half of a discrete VAE; give the folder of encoder.pkl and decoder.pkl"
        )
    encoder, decoder = (
        read_weights(origin, [f"{side}{suffix}" for suffix in _SUFFIXES]) for side in ("encoder", "decoder")
    )
    fields = dvae_fields(encoder, decoder)
    params = from_dall_e(create_model(**fields), encoder, decoder)
    config = {"objective": "dvae", "models": {"dvae": fields}, "data": {"image_size": fields["image_size"]}}
    return Converted(config, {"dvae": params})


def _write(network: Network) -> Files:
    model = network.model
    wanted = {"patch_size": 1, "bottleneck": 4, "width_multipliers": (1, 2, 4, 8), "input_kernel": 7}
    if problems := [
        f"its {field} is {getattr(model, field)!r}, theirs {value!r}"
        for field, value in wanted.items()
        if getattr(model, field) != value
    ]:
        raise UserError(f"this discrete VAE cannot be written for OpenAI's package: {'; '.join(problems)}")
    encoder, decoder = to_dall_e(network.params)
    return {"encoder.safetensors": encoder, "decoder.safetensors": decoder}


FORMAT = Format(
    name="dall_e",
    networks=("dvae",),
    inputs="OpenAI's discrete VAE: the folder of encoder.pkl and decoder.pkl",
    outputs="load_state_dict of dall_e.Encoder and dall_e.Decoder, with safetensors.torch.load_file",
    recognizes=lambda origin: all(
        origin.find(*(f"{side}{suffix}" for suffix in _SUFFIXES)) is not None for side in ("encoder", "decoder")
    ),
    read=_read,
    write=_write,
)
