"""LPIPS of the lpips package (github.com/richzhang/PerceptualSimilarity), with VGG-16: its parts to our parameters.

The package holds the linear layers alone, `lpips/weights/v0.1/vgg.pth` of its wheel; VGG-16 is a download of
torchvision's, `vgg16-397923af.pth`. A state dict of the whole has both. Those of version 0.0 have the same names and
shapes, and were trained on pictures that were not normalized: they are not told apart here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cli.errors import UserError
from models import create_model
from models.lpips import DEPTHS, DEVIATION, LPIPS, MEAN
from weights.files.layout import CONVOLUTION, Layout, Rule, Tensors, Tree
from weights.files.origin import Origin, WeightsFile, open_origin, read_weights
from weights.formats.contract import Converted, Format

VGG = tuple(f"{name}{suffix}" for name in ("vgg16-397923af", "vgg16") for suffix in (".pth", ".safetensors"))
WHOLE = ("lpips.safetensors", "lpips.pth")
LINS = ("vgg.pth", "lpips/weights/v0.1/vgg.pth", "weights/v0.1/vgg.pth")


def _places() -> dict[tuple[str, str], int]:
    """Of each stage and convolution its place among the layers of VGG-16, with a ReLU behind each and pools between."""
    places, place = {}, 0
    for stage, depth in enumerate(DEPTHS, start=1):
        for layer in range(1, depth + 1):
            places[str(stage), str(layer)] = place
            place += 2
        place += 1
    return places


_PLACES = _places()

LAYOUT = Layout(
    what="LPIPS with VGG-16",
    rules=(
        Rule(
            r"conv_(\d)_(\d)/(\w+)",
            lambda match: f"net.slice{match[1]}.{_PLACES[match[1], match[2]]}.{match[3]}",
            CONVOLUTION,
        ),
        Rule(r"lin_(\d)/(\w+)", lambda match: f"lin{int(match[1]) - 1}.model.1.{match[2]}", CONVOLUTION),
    ),
    # The package has its linear layers twice.
    ignored=r"lins\..*|scaling_layer\..*",
)


def lpips_from_torch(model: LPIPS, tensors: Mapping[str, np.ndarray]) -> Tree:
    """Converts a state dict of the whole to the parameters of `model`.

    Raises:
      UserError: if tensors are missing, unexpected or of another shape, or normalize pictures otherwise.
    """
    for name, ours in (("scaling_layer.shift", MEAN), ("scaling_layer.scale", DEVIATION)):
        if name in tensors and not np.allclose(np.ravel(tensors[name]), ours, atol=1e-4):
            raise UserError(f"these are not the weights of {LAYOUT.what}: {name} is {np.ravel(tensors[name]).tolist()}")
    return LAYOUT.read(model, tensors)["params"]


def lpips_to_torch(params: Tree) -> Tensors:
    """Converts parameters to the package's names, float32."""
    return LAYOUT.write({"params": params})


def lpips_fields(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Tells {"name": "lpips", fields} from the shapes of tensors of the whole.

    Raises:
      UserError: if a linear layer is missing.
    """
    names = [f"lin{stage}.model.1.weight" for stage in range(len(DEPTHS))]
    if absent := [name for name in names if np.ndim(tensors.get(name)) != 4]:
        raise UserError(f"these are not the weights of {LAYOUT.what}: there is no {absent[0]}")
    return {"name": "lpips", "widths": tuple(int(tensors[name].shape[1]) for name in names)}


def read_lpips(origin: Origin, lins: str = "") -> Tensors:
    """Reads the tensors of the whole, by the package's names.

    Args:
      origin: a file of VGG-16 or of the whole, or a folder with one.
      lins: path of the linear layers of a VGG-16; "" where they lie in the same folder or file.

    Raises:
      UserError: if one of the two is missing.
    """
    tensors = read_weights(origin, (*WHOLE, *VGG), ignored=r"classifier\..*")
    if not any(name.startswith("features.") for name in tensors):
        if lins:
            raise UserError(f"{origin.describe()} is not VGG-16 of torchvision; leave --lins out")
        return tensors
    stages = {str(place): stage for (stage, _), place in _PLACES.items()}
    named = {}
    for name, array in tensors.items():
        _, _, rest = name.partition("features.")
        place = rest.partition(".")[0]
        named[f"net.slice{stages[place]}.{rest}" if place in stages else name] = array
    if lins:
        return named | read_weights(open_origin(str(Path(lins).expanduser())), LINS)
    if origin.find(*LINS) is None:
        raise UserError(
            f"{origin.describe()} is VGG-16 without the linear layers of LPIPS; give --lins=FILE, "
            "lpips/weights/v0.1/vgg.pth of the wheel of the lpips package"
        )
    return named | read_weights(origin, LINS)


def _recognizes(origin: Origin) -> bool:
    if isinstance(origin, WeightsFile):
        return origin.path.stem.startswith(("vgg16", "lpips"))
    return origin.find(*WHOLE, *VGG) is not None


def _read(origin: Origin, lins: str = "") -> Converted:
    tensors = read_lpips(origin, lins)
    fields = lpips_fields(tensors)
    params = lpips_from_torch(create_model(**fields), tensors)
    # A run of nothing but a network that others use frozen.
    return Converted({"objective": "autoencoder", "models": {"lpips": fields}}, {"lpips": params})


FORMAT = Format(
    name="lpips",
    networks=("lpips",),
    inputs="torchvision's vgg16-397923af.pth with --lins, a folder of both, or a state dict of lpips.LPIPS(net='vgg')",
    outputs="nothing",
    recognizes=_recognizes,
    read=_read,
    write=None,
    options={"lins": "the linear layers of LPIPS, lpips/weights/v0.1/vgg.pth of the wheel of the lpips package"},
)
