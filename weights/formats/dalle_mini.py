"""DALL-E mini and mega (github.com/borisdayma/dalle-mini): told apart from what is converted.

Their transformer is an encoder-decoder after BART, with an encoder of its own for captions, gated feed-forward blocks
and norms inside of them; ours is a decoder alone over one stream of both. Their image tokenizer is a VQGAN. So nothing
of either maps.
"""

from typing import NoReturn

from cli.errors import UserError
from weights.files.origin import Origin, WeightsFile, peek_json
from weights.formats.contract import Format


def _recognizes(origin: Origin) -> bool:
    if isinstance(origin, WeightsFile):
        return origin.path.name == "flax_model.msgpack"
    config = origin.find("config.json")
    return config is not None and peek_json(config).get("model_type") == "dallebart"


def _read(origin: Origin) -> NoReturn:
    raise UserError(
        f"{origin.describe()}: DALL-E mini is an encoder-decoder (BART) over the tokens of a VQGAN, of which "
        "this project has neither; dall_e, dalle_pytorch and mindall_e are converted"
    )


FORMAT = Format(
    name="dalle_mini",
    networks=("dalle",),
    inputs="recognized and refused: an encoder-decoder, of which this project has none",
    outputs="nothing",
    recognizes=_recognizes,
    read=_read,
    write=None,
)
