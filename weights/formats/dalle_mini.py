"""DALL-E mini and mega (github.com/borisdayma/dalle-mini): the VQGAN that draws their pictures, as vqgan-jax has it.

Their transformer is an encoder-decoder after BART, with an encoder of its own for captions, gated feed-forward blocks
and norms inside of them; ours is a decoder alone over one stream of both. So nothing of it maps, and it is told apart.
Their image tokenizer is published by itself: `config.json` beside `flax_model.msgpack`. A DALL-E of this project may be
trained over its tokens.
"""

from collections.abc import Mapping
from typing import Any

from flax.serialization import msgpack_restore

from cli.errors import UserError
from models import create_model
from weights.files.fields import IDLE, Field, fixed, read_fields, whole
from weights.files.origin import Origin, WeightsFile, learned, peek_json
from weights.files.tensors import read_with
from weights.formats.compvis import autoencoder_fields, autoencoder_from_compvis
from weights.formats.contract import Converted, Format
from weights.formats.runs import autoencoder_run
from weights.formats.taming import TRUNK, from_flax, vqgan_fields

CONFIG, WEIGHTS = "config.json", "flax_model.msgpack"

_WHAT = "this VQGAN of DALL-E mini"
_TABLE: dict[str, Field] = {
    **TRUNK,
    "n_embed": whole(1024),
    "embed_dim": whole(256),
    "give_pre_end": fixed(False),
    "num_resolutions": IDLE,  # as many as ch_mult has
    # A library's notes to itself.
    **dict.fromkeys(("architectures", "model_type", "transformers_version", "torch_dtype", "name_or_path"), IDLE),
}


def config_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Reads config.json as {"name": "autoencoder_vq", fields of `models.autoencoder.VQAutoencoder`}.

    Raises:
      UserError: if ours cannot compute that network; names the keys.
    """
    given = read_fields(_WHAT, config, _TABLE)
    return vqgan_fields(_WHAT, given, given["n_embed"], given["embed_dim"])


def _recognizes(origin: Origin) -> bool:
    if isinstance(origin, WeightsFile):
        return origin.path.name == WEIGHTS
    config = origin.find(CONFIG)
    told = {} if config is None else peek_json(config)
    return told.get("model_type") == "dallebart" or ("n_embed" in told and "ch_mult" in told)


def _read(origin: Origin) -> Converted:
    config = None if isinstance(origin, WeightsFile) else origin.json(CONFIG)
    if config is not None and config.get("model_type") == "dallebart":
        raise _other(origin)
    path = origin.path if isinstance(origin, WeightsFile) else origin.require(WEIGHTS)
    tree = read_with(lambda path: msgpack_restore(path.read_bytes()), path)
    if not isinstance(tree, Mapping) or "quantize" not in tree:
        raise _other(origin)
    tensors = learned(origin, str(path), from_flax(tree))
    fields = {**autoencoder_fields(tensors), "latent_scale": 1.0} if config is None else config_fields(config)
    return autoencoder_run(fields, {"autoencoder": autoencoder_from_compvis(create_model(**fields), tensors)})


def _other(origin: Origin) -> UserError:
    return UserError(
        f"{origin.describe()}: DALL-E mini is an encoder-decoder (BART), of which this project has none; its VQGAN "
        "(dalle-mini/vqgan_imagenet_f16_16384) is converted, and so are dall_e, dalle_pytorch and mindall_e"
    )


FORMAT = Format(
    name="dalle_mini",
    networks=("autoencoder_vq",),
    inputs=f"its VQGAN: the folder of {CONFIG} and {WEIGHTS}, or the latter alone; its transformer, an "
    "encoder-decoder, is refused",
    outputs="nothing",
    recognizes=_recognizes,
    read=_read,
    write=None,
)
