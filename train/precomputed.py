"""What frozen networks make of a dataset, computed once and found again; `data.precomputed` is the format.

A field is precomputed where `config.data.<field>` says so: "auto" for the folder beside the dataset that belongs to the
frozen weights, or the folder itself. Training then reads it in place of the picture, or beside the caption.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array
from ml_collections import ConfigDict

from cli.errors import UserError
from cli.locations import Location, locate
from data.pipeline import batch_spec
from data.precomputed import AUTO, MADE_OF, PROVENANCE, field_folder, read_provenance
from data.tokenizer import Tokenizer
from models.captioner import Captioner
from models.clip import Clip
from sample.first_stage import PART as FIRST_STAGE
from sample.first_stage import FirstStage
from sample.image_tokens import PART as IMAGE_TOKENS
from sample.image_tokens import ImageTokens
from sample.samplers.captioner import caption_latents, clip_pictures, clip_tokens, collections_of, frozen_clip
from sample.samplers.dvae import from_uint8
from sample.samplers.from_config import build_network
from train.distributed.processes import from_first
from weights.fingerprint import fingerprint
from weights.run import model_of
from weights.sources import abstract_frozen, load_part

Tree = Any


@dataclasses.dataclass(frozen=True)
class Field:
    """How a frozen network makes a field.

    Attributes:
      parts: the names that the network may have in `config.frozen`.
      build: (config, the name that it has) -> what computes it; raises UserError where that cannot be.
      compute: (that, {its name: its trees}, pictures uint8 [b H W c] or captions int32 [b l]) -> the field [b ...].
      dtype: that -> what it is stored as.
      beside: names of other networks that it takes, whose trees `compute` gets too.
    """

    parts: tuple[str, ...]
    build: Callable[[ConfigDict, str], Any]
    compute: Callable[[Any, Tree, Array], Array]
    dtype: Callable[[Any], Any]
    beside: tuple[str, ...] = ()

    def part(self, config: ConfigDict) -> str:
        """The name that the network has in `config.frozen`; "" if it is not there."""
        return next((part for part in self.parts if part in config.frozen), "")


def _network(config: ConfigDict, part: str) -> Any:
    return build_network(config, f"frozen.{part}")


def _tokens(image_tokens: ImageTokens, frozen: Tree, images: Array) -> Array:
    return image_tokens.encode(frozen, from_uint8(images)).reshape(len(images), -1)


def _tokens_dtype(image_tokens: ImageTokens) -> Any:
    return np.uint16 if image_tokens.vocab_size <= 2**16 else np.int32


def _text_features(network: Any, frozen: Tree, text: Array) -> Array:
    (part,) = frozen.values()
    return network.apply({"params": part["params"], **part["variables"]}, text, method="encode_text")


def _image_features(clip: Clip, frozen: Tree, images: Array) -> Array:
    return clip_pictures(clip, collections_of(frozen["clip"]), from_uint8(images))


def _token_features(clip: Clip, frozen: Tree, text: Array) -> Array:
    return clip_tokens(clip, collections_of(frozen["clip"]), text)


def _captioner(config: ConfigDict, part: str) -> tuple[Captioner, Clip]:
    return build_network(config, f"frozen.{part}"), frozen_clip(config)


def _caption_latents(networks: tuple[Captioner, Clip], frozen: Tree, text: Array) -> Array:
    return caption_latents(*networks, frozen, text)


def _float32(_: Any) -> Any:
    """Whatever a network computes in, nothing of it is lost, and no file needs a type that numpy lacks."""
    return np.float32


FIELDS: Mapping[str, Field] = {
    "image_tokens": Field((IMAGE_TOKENS,), lambda config, _: ImageTokens.from_config(config), _tokens, _tokens_dtype),
    # Mean and logarithm of the variance of each latent, from which each step draws anew; of a codebook's, vectors
    # before codes are looked for.
    "latent_moments": Field(
        (FIRST_STAGE,),
        lambda config, _: FirstStage.from_config(config),
        lambda stage, frozen, images: stage.moments(frozen, from_uint8(images)),
        _float32,
    ),
    "text_features": Field(("text", "clip"), _network, _text_features, _float32),
    # What captioners and UniDiffuser read: CLIP's embeddings of pictures, its states of a caption's tokens, and what
    # the captioner's bottleneck makes of these.
    "image_features": Field(("clip",), lambda config, _: frozen_clip(config), _image_features, _float32),
    "token_features": Field(("clip",), lambda config, _: frozen_clip(config), _token_features, _float32),
    "caption_latents": Field(("captioner",), _captioner, _caption_latents, _float32, beside=("clip",)),
}


def precomputable(config: ConfigDict) -> tuple[str, ...]:
    """The fields that can be precomputed for a config, those of pictures first.

    Raises:
      UserError: if there is none.
    """
    names = tuple(name for name, field in FIELDS.items() if name in config.data and field.part(config))
    if not names:
        needs = (f"config.data.{name} and config.frozen.{field.parts[0]}" for name, field in FIELDS.items())
        raise UserError(
            f"this {config.objective} has nothing that can be precomputed; {', '.join(FIELDS)} can, of configs with "
            f"{', '.join(needs)}"
        )
    return names


def locate_precomputed(config: ConfigDict, tokenizer: Tokenizer | None) -> ConfigDict:
    """A config whose precomputed fields are folders that belong to its frozen weights; itself without such fields.

    Args:
      config: of a run.
      tokenizer: of its captions.

    Raises:
      UserError: if one was not stored, or with other weights.
    """
    named = [name for name in FIELDS if config.data.get(name, "")]
    if not named:
        return config
    found = from_first(lambda: {name: str(_find(config, tokenizer, name)) for name in named})
    config = config.copy_and_resolve_references()
    with config.unlocked():
        for name, folder in found.items():
            config.data[name] = folder
    return config


def _find(config: ConfigDict, tokenizer: Tokenizer | None, name: str) -> Location:
    part, *_ = parts = parts_of(config, name)
    weights = weights_of(config, *parts)
    own = field_folder(name, config.data, tokenizer, weights)
    folder = own if config.data[name] == AUTO else locate(config.data[name])
    made = read_provenance(folder)
    again = "run `python -m scripts.precompute` with this config"
    if made is None:
        others = sorted(path.parent.name for path in own.parent.glob(f"*/{PROVENANCE}"))
        there = f"; of other weights or sizes there are {', '.join(others)}" if others else ""
        raise UserError(f"no {name} of config.frozen.{part} are stored in {folder}{there}; {again}")
    if made.get("weights") != weights:
        raise UserError(
            f"{folder} has {name} of other weights ({made.get('source')}, step {made.get('step')}) than "
            f"config.frozen.{part}; {again}, or set config.data.{name}=auto"
        )
    return folder


def weights_of(config: ConfigDict, *parts: str) -> str:
    """The `fingerprint` of the frozen network that computes, which is the resolved config's; a hash of them of several.

    Its source may leave open what the config says, such as the dtype.
    """
    entries = [config.frozen[part] for part in parts]
    found = [
        fingerprint(dataclasses.replace(load_part(entry, config.seed), model=model_of(entry))) for entry in entries
    ]
    return found[0] if len(found) == 1 else hashlib.sha256("\n".join(found).encode()).hexdigest()


def parts_of(config: ConfigDict, name: str) -> tuple[str, ...]:
    """The name, in `config.frozen`, of the network that makes a field, and those of others that it takes.

    Raises:
      UserError: if one is not there.
    """
    part = FIELDS[name].part(config) if all(other in config.frozen for other in FIELDS[name].beside) else ""
    if not part:
        parts = " or ".join(f"config.frozen.{part}" for part in FIELDS[name].parts)
        raise UserError(f"config.data.{name} is made by {parts}, which this config lacks")
    return part, *FIELDS[name].beside


def example_spec(config: ConfigDict) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """What an example of a run holds, told from its config alone: `data.pipeline.batch_spec`, and what is precomputed.

    Raises:
      UserError: if a frozen network cannot be built, or pictures of several shapes are precomputed.
    """
    spec = batch_spec(config.data)
    for name in (name for name in FIELDS if config.data.get(name, "")):
        field, source, parts = FIELDS[name], MADE_OF[name], parts_of(config, name)
        if source not in spec:
            raise UserError(f"config.data.{name} is made of {source}s, which this config does not read")
        if config.data.buckets:
            raise UserError("config.data.buckets shapes pictures, and this run reads stored fields; leave one out")
        shape, dtype = batch_spec(config.data)[source]
        builder, networks = field.build(config, parts[0]), abstract_frozen(config)
        frozen = {part: networks[part] for part in parts}
        made = jax.eval_shape(
            lambda trees, given, field=field, builder=builder: field.compute(builder, trees, given),
            frozen,
            jax.ShapeDtypeStruct((1, *shape), dtype),
        )
        stored = np.dtype(field.dtype(builder))
        spec[name] = (made.shape[1:], np.dtype(np.int32) if np.issubdtype(stored, np.integer) else stored)
    if any(MADE_OF[name] == "image" for name in spec if name in MADE_OF):
        del spec["image"]
    return spec
