"""A caption, or a picture -> a caption, by GPT-2 behind a prefix made of a frozen CLIP's features.

A captioner with a bottleneck reads a caption's features, token by token, and says it again (UniDiffuser's text
decoder); one with a mapper reads a picture's embedding, not normalized (ClipCap). Texts are written with the tokenizer
that reads them, or with one of the captioner's own (`config.data.writes_with`), which the run keeps beside it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8
from ml_collections import ConfigDict

from cli.errors import UserError
from models.captioner import Captioner
from models.clip import Clip
from sample.decoding import Decoding, check_numbers, decode
from sample.samplers.dvae import from_uint8
from sample.samplers.from_config import build_network, read_settings
from sample.samplers.llama import check_questions, end_of_texts
from weights.run import TOKENIZER, WRITES_WITH

Tree = Any
Request = dict[str, Any]

_NUMBERS = ("temperature", "top_k", "top_p", "length_penalty")


@dataclasses.dataclass(frozen=True)
class CaptionSettings:
    """How a caption is made.

    Attributes:
      temperature: divisor of the logits; 0 takes the most likely token.
      top_k: number of most likely tokens to keep, 0 for all.
      top_p: probability that the kept tokens reach together, 1 for all.
      beams: of a search, in which finished captions keep their places (ClipCap); 0 for none. UniDiffuser has 5.
      length_penalty: exponent of the length in a beam's score.
      caption_length: tokens of a caption at most, its end included.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    beams: int = 0
    length_penalty: float = 1.0
    caption_length: int = 67

    @classmethod
    def from_config(cls, config: ConfigDict) -> "CaptionSettings":
        """Reads `config.sample`.

        Raises:
          UserError: if a setting is impossible.
        """
        settings = cls(**read_settings(config.sample, cls))
        settings.changed({})
        return settings

    def changed(self, overrides: dict[str, Any]) -> "CaptionSettings":
        """With others.

        Raises:
          UserError: on an unknown or impossible one, or one that has no effect beside the others.
        """
        known = [field.name for field in dataclasses.fields(self)]
        if unknown := sorted(set(overrides) - set(known)):
            raise UserError(f"{', '.join(unknown)}: no such sampling option; choose from {', '.join(known)}")
        settings = dataclasses.replace(self, **overrides)
        numbers = {name: getattr(settings, name) for name in ("temperature", "top_k", "top_p")}
        check_numbers({"guidance": 1.0, **numbers})
        if not np.isfinite(settings.length_penalty):
            raise UserError(f"length_penalty={settings.length_penalty} is impossible; 1 compares means, 0 sums")
        for name, low, high in (("beams", 0, 64), ("caption_length", 1, 4096)):
            value = getattr(settings, name)
            if not low <= value <= high or value != int(value):
                raise UserError(f"{name}={value} is impossible; use {low} to {high}")
        if settings.beams and settings.temperature:
            raise UserError(
                f"beams={settings.beams} and temperature={settings.temperature}: a search draws nothing; set one to 0"
            )
        return settings

    @property
    def numbers(self) -> dict[str, np.generic]:
        """What a program is given; none of it leads to another one."""
        return {name: (np.int32 if name == "top_k" else np.float32)(getattr(self, name)) for name in _NUMBERS}

    @property
    def program(self) -> tuple[int, int]:
        """What a program is compiled for: beams, and tokens."""
        return int(self.beams), int(self.caption_length)


def write_captions(
    model: Captioner,
    params: Tree,
    prefill: Callable[[int], tuple[Array, Any]],
    program: tuple[int, int],
    numbers: dict[str, Array],
    end_id: int,
    keys: Key[Array, "b"],
) -> Int[Array, "b l"]:
    """Tokens of captions, 0 behind the end.

    Args:
      model: the network.
      params: its parameters.
      prefill: from how many tokens will be made, what `Captioner.prefill` gives.
      program: see `CaptionSettings.program`.
      numbers: see `CaptionSettings.numbers`.
      end_id: ends a caption.
      keys: of the draws.
    """
    beams, length = program
    logits, cache = prefill(length)

    def step(token: Array, position: Array, cache: Any) -> tuple[Array, Any]:
        return model.apply({"params": params}, token, position, cache, method="decode_step")

    settings = Decoding(**numbers, beams=beams, finished_beams="within", stop_tokens=(end_id,))
    return decode(step, logits, cache, keys, length, settings).tokens


def clip_pictures(clip: Clip, tree: Tree, images: Float[Array, "b H W 3"]) -> Float[Array, "b e"]:
    """A picture's embedding as captioners and UniDiffuser take it, not normalized; resized for CLIP where it must be.

    Args:
      clip: the network.
      tree: its collections.
      images: in [-1, 1], of any size.
    """
    side = clip.image_size
    if images.shape[1:3] != (side, side):
        images = jnp.clip(jax.image.resize(images, (len(images), side, side, 3), "cubic"), -1, 1)
    return jnp.asarray(clip.apply(tree, images, method="project_images"), jnp.float32)


def frozen_clip(config: ConfigDict) -> Clip:
    """The network `config.frozen.clip`.

    Raises:
      UserError: if there is none, or it is another one.
    """
    if "clip" not in config.frozen:
        raise UserError(f"objective {config.objective!r} reads features of a CLIP; name it in config.frozen.clip")
    clip = build_network(config, "frozen.clip")
    if not isinstance(clip, Clip):
        raise UserError(f"config.frozen.clip is a {config.frozen.clip.name!r}; it must be a clip")
    return clip


def check_squares(config: ConfigDict) -> None:
    """Raises UserError if pictures have several shapes: a CLIP would see them stretched."""
    if config.data.buckets:
        raise UserError(
            f"config.data.buckets shapes pictures, and this {config.objective} reads them by a CLIP, which takes "
            "squares; leave it empty"
        )


def check_features(model: Captioner, clip: Clip) -> None:
    """Raises UserError unless a captioner reads what a CLIP makes."""
    made = {"text_length and text_width": (clip.text_length, clip.text_width)}
    wanted = (model.prefix_length, model.feature_width)
    if model.mapper != "bottleneck":
        made, wanted = {"embed_dim": (clip.embed_dim,)}, (model.feature_width,)
    ((name, sizes),) = made.items()
    if sizes != wanted:
        fields = "prefix_length and feature_width" if model.mapper == "bottleneck" else "feature_width"
        raise UserError(
            f"the captioner's {fields} are {', '.join(map(str, wanted))}, and CLIP's {name} are "
            f"{', '.join(map(str, sizes))}; set config.models.captioner to those"
        )


def writes_with(model: Captioner, clip: Clip) -> str:
    """The file, in a run folder, of the tokenizer that reads what a captioner writes."""
    reads, writes = ((each.text_vocab_size, each.text_end_id) for each in (clip, model))
    return TOKENIZER if reads == writes else WRITES_WITH


@dataclasses.dataclass(frozen=True)
class CaptionerSampler:
    """Writes captions.

    Attributes:
      model: the network; its parameters are `params["captioner"]`.
      clip: reads captions or pictures; its weights are `frozen["clip"]`.
      captions: how captions are made.
      end_id: of the tokenizer.
    """

    model: Captioner
    clip: Clip
    captions: CaptionSettings
    end_id: int

    @classmethod
    def from_config(cls, config: ConfigDict) -> "CaptionerSampler":
        """Builds the sampler of `config.models.captioner`, `config.frozen.clip` and `config.sample`.

        Raises:
          UserError: if a setting is impossible, the networks do not go together, or it is not known where texts end.
        """
        model, clip = build_network(config, "models.captioner"), frozen_clip(config)
        check_features(model, clip)
        sampler = cls(model, clip, CaptionSettings.from_config(config), end_of_texts(model, "captioner"))
        sampler._check_length(sampler.captions)
        return sampler

    @property
    def reads(self) -> tuple[str, ...]:
        """The rows of a request."""
        return ("text",) if self.model.mapper == "bottleneck" else ("image",)

    @property
    def makes(self) -> tuple[str, ...]:
        """What outputs hold."""
        return ("text",)

    @property
    def writes_with(self) -> str:
        """The file of the tokenizer that reads what is written."""
        return writes_with(self.model, self.clip)

    @property
    def settings(self) -> dict[str, Any]:
        """The keys of `config.sample`, with their values."""
        return dataclasses.asdict(self.captions)

    def request(
        self,
        text: Int[np.ndarray, "b t"] | None = None,
        image: UInt8[np.ndarray, "b H W 3"] | None = None,
        **overrides: Any,
    ) -> Request:
        """A request for a caption each.

        Args:
          text: ids of captions, framed, 0 behind; of a captioner with a bottleneck.
          image: pictures; of any other one.
          **overrides: of `settings`.

        Raises:
          UserError: on an unknown override, an impossible value, or rows that it does not read.
        """
        settings = self.captions.changed(overrides)
        self._check_length(settings)
        given = {"text": text, "image": image}
        told = [name for name, value in given.items() if value is not None]
        (row,) = self.reads
        if told != [row]:
            raise UserError(f"this captioner reads {row}, not {' and '.join(told) or 'nothing'}")
        rows: Request = {}
        if text is not None:
            rows["text"] = check_questions(text, self.clip.text_vocab_size, self.clip.text_end_id)
        if image is not None:
            rows["image"] = np.asarray(image)
        return {**rows, "program": settings.program, **settings.numbers}

    def __call__(
        self, params: Tree, variables: Tree, frozen: Tree, request: Request, keys: Key[Array, "b"]
    ) -> dict[str, Array]:
        """Writes each caption; caption i depends on its row and key alone.

        Returns:
          {"text": int32 [b caption_length]}, 0 behind the end.
        """
        del variables
        told = {name: value for name, value in request.items() if name != "program"}
        return {"text": _write(self, request["program"], params["captioner"], frozen, told, keys)}

    def features(self, frozen: Tree, rows: dict[str, Array]) -> Float[Array, "b *f"]:
        """What CLIP makes of captions or pictures, as the captioner reads it; rows may hold it already."""
        stored = "token_features" if self.model.mapper == "bottleneck" else "image_features"
        if stored in rows:
            return rows[stored]
        tree = collections_of(frozen["clip"])
        if self.model.mapper != "bottleneck":
            return clip_pictures(self.clip, tree, from_uint8(rows["image"]))
        return clip_tokens(self.clip, tree, rows["text"])

    def _check_length(self, settings: CaptionSettings) -> None:
        most = self.model.length - self.model.prefix_length + 1  # the last one is never read
        if settings.caption_length > most:
            raise UserError(
                f"caption_length={settings.caption_length} is impossible: the captioner has {self.model.length} "
                f"positions, {self.model.prefix_length} of them for the prefix; use {most} at most"
            )


def clip_tokens(clip: Clip, tree: Tree, text: Int[Array, "b l"]) -> Float[Array, "b m d"]:
    """Features of each token of captions, padded behind to CLIP's context by ends, as published captioners read them.

    Args:
      clip: the network.
      tree: its collections.
      text: ids of captions, whose pads may be any id.
    """
    text = jnp.pad(text, ((0, 0), (0, clip.text_length - text.shape[1])))
    text = jnp.where(jnp.cumsum(text == clip.text_end_id, axis=1) > 0, clip.text_end_id, text)
    return jnp.asarray(clip.apply(tree, text, method="encode_text"), jnp.float32)


def caption_latents(model: Captioner, clip: Clip, frozen: Tree, text: Int[Array, "b l"]) -> Float[Array, "b p z"]:
    """What a bottleneck makes of CLIP's features of captions; `frozen` has "captioner" and "clip"."""
    features = clip_tokens(clip, collections_of(frozen["clip"]), text)
    latents = model.apply(collections_of(frozen["captioner"]), features, method="encode")
    return jnp.asarray(latents, jnp.float32)


def collections_of(trees: dict[str, Tree]) -> Tree:
    """What a frozen network is applied to."""
    return {"params": trees["params"], **trees["variables"]}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _write(
    sampler: CaptionerSampler,
    program: tuple[int, int],
    params: Tree,
    frozen: Tree,
    request: Request,
    keys: Array,
) -> Int[Array, "b l"]:
    features = sampler.features(frozen, request)
    numbers = {name: request[name] for name in _NUMBERS}

    def prefill(length: int) -> tuple[Array, Any]:
        return sampler.model.apply({"params": params}, features, length, method="prefill")

    return write_captions(sampler.model, params, prefill, program, numbers, sampler.end_id, keys)
