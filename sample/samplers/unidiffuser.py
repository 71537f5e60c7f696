"""Pictures and captions by one network (Bao et al. 2023): the parts that it works with, and what it is asked for.

`unidiffuser_modes.py` says what the network is asked in each mode.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt8
from ml_collections import ConfigDict

from cli.errors import UserError
from cli.plurals import spell_count
from diffusion.plan import Plan
from diffusion.process import Process
from diffusion.schedule import DiscreteSchedule
from diffusion.solver_choice import make_plan
from models.captioner import Captioner
from models.clip import Clip
from models.unidiffuser import PictureAndText, UniDiffuser
from sample.first_stage import FirstStage
from sample.samplers.captioner import (
    CaptionSettings,
    caption_latents,
    check_features,
    clip_pictures,
    collections_of,
    frozen_clip,
    write_captions,
    writes_with,
)
from sample.samplers.dvae import from_uint8
from sample.samplers.from_config import build_network, build_process, read_settings
from sample.samplers.given_picture import STAYS, chosen_strength, lay_over
from sample.samplers.llama import check_questions, end_of_texts
from sample.samplers.unidiffuser_changes import changes, picture_to_change, split_request
from sample.samplers.unidiffuser_modes import (
    MODES,
    PICTURE,
    TEXT,
    Latents,
    choose_modes,
    draw_latents,
    drawn_names,
    made_of,
    normal_latents,
    stages,
    unread_settings,
)
from sample.samplers.unidiffuser_settings import (
    MEASURED,
    Choices,
    Scales,
    check_kind,
    find_kind,
    kinds_of,
    learned_kind,
    scaled,
)

Tree = Any
Request = dict[str, Any]

# Numbers that a key is folded with, one for each use.
_FIRST, _FRESH, _POSTERIOR, _WORDS, _SECOND = range(5)


@dataclasses.dataclass(frozen=True)
class UniDiffuserSampler:
    """Draws pictures and writes captions.

    Attributes:
      model: the network; its parameters are `params["unidiffuser"]`.
      process: what it was trained on.
      first_stage: pictures to latents and back; frozen, as the next two.
      clip: reads pictures and captions. The two towers may be of different networks.
      captioner: captions' features to latents, and latents to captions.
      scales: of latents.
      choices: defaults.
      captions: how captions are written.
      guidance: default w; 1 for none.
      data_type: default kind of data to draw, of a network that tells kinds apart; -1 of any other one. In
        `config.sample` -1 is the kind that the run learned.
    """

    model: UniDiffuser
    process: Process
    first_stage: FirstStage
    clip: Clip
    captioner: Captioner
    scales: Scales
    choices: Choices
    captions: CaptionSettings
    guidance: float = 1.0
    data_type: int = -1

    @classmethod
    def from_config(cls, config: ConfigDict) -> "UniDiffuserSampler":
        """Builds the sampler of `config.models`, `frozen`, `process`, `scales`, `sample` and `data.data_type`.

        Raises:
          UserError: if a part is missing, parts do not go together, or a setting is impossible.
        """
        model, clip = build_network(config, "models.unidiffuser"), frozen_clip(config)
        first_stage = FirstStage.from_config(config)
        if first_stage is None or "captioner" not in config.frozen:
            raise UserError("UniDiffuser diffuses latents; name config.frozen.first_stage and config.frozen.captioner")
        captioner = build_network(config, "frozen.captioner")
        _check_parts(config, model, first_stage, clip, captioner)
        process = build_process(config)
        if not isinstance(process.schedule, DiscreteSchedule) or process.time_shift != 1:
            raise UserError("UniDiffuser's time 0 is that of data; set config.process to a chain with time_shift 1")
        if process.variance == "learned" or process.clip:
            raise UserError("UniDiffuser learns no variance, and latents are not clipped; change config.process")
        given = config.get("scales", {})
        if not isinstance(given, Mapping | ConfigDict):
            raise UserError(f"config.scales is {given!r}; it must be an object, such as {dataclasses.asdict(Scales())}")
        scales = Scales(**read_settings(given, Scales, place="config.scales"))
        if min(scales.clip, scales.text) < 0 or scales.examples < 1:
            raise UserError(
                f"config.scales is {dataclasses.asdict(scales)}; factors are above 0, or 0 to be measured of 1 example "
                "or more"
            )
        choices = Choices(**read_settings(config.sample, Choices))
        captions = CaptionSettings(**read_settings(config.sample, CaptionSettings))
        numbers = read_settings(config.sample, cls)
        kind = numbers.get("data_type", -1)
        numbers["data_type"] = find_kind(model, "config.sample.data_type", kind, learned_kind(config, model))
        sampler = cls(model, process, first_stage, clip, captioner, scales, choices, captions, **numbers)
        sampler._changed({})
        return sampler

    @property
    def reads(self) -> tuple[str, ...]:
        """The rows that a request may hold; it need hold none."""
        return ("text", "image")

    @property
    def needs_none(self) -> bool:
        """Nothing need be given."""
        return True

    @property
    def may_read(self) -> dict[str, dict[str, Any]]:
        """The rows that a user may give besides: where a picture is to be changed, which strength says without it."""
        return {"mask": {"strength": 1.0}}

    @property
    def makes(self) -> tuple[str, ...]:
        """What outputs may hold."""
        return ("image", "text")

    @property
    def settings(self) -> dict[str, Any]:
        """The keys of `config.sample`, with their values."""
        numbers = {"guidance": self.guidance, "data_type": self.data_type}
        return {**dataclasses.asdict(self.choices), **numbers, **dataclasses.asdict(self.captions)}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of an example's latents."""
        x = self.model.example_inputs(1)[0]
        return {name: getattr(x, name).shape[1:] for name in PICTURE + TEXT}

    @property
    def writes_with(self) -> str:
        """The file of the tokenizer that reads what is written."""
        return writes_with(self.captioner, self.clip)

    @property
    def end_id(self) -> int:
        """Ends a caption."""
        return end_of_texts(self.captioner, "captioner")

    def request(
        self,
        text: Int[np.ndarray, "b l"] | None = None,
        image: UInt8[np.ndarray, "b H W 3"] | None = None,
        mask: Bool[np.ndarray, "b H W"] | None = None,
        **overrides: Any,
    ) -> Request:
        """A request for a picture, a caption, or both, for each key.

        Args:
          text: ids of captions, framed, 0 behind.
          image: pictures to describe; with a strength or a mask to change, as `text` says if there is any.
          mask: where they are drawn anew; all other pixels stay.
          **overrides: of `settings`, and strength, of pictures to change: from 0, their reconstructions, to 1, fresh
            ones where there is no mask.

        Raises:
          UserError: on an unknown override, an impossible value, or rows that the mode does not read.
        """
        strength = chosen_strength(image, mask, overrides)
        told = [name for name, row in (("text", text), ("image", image), ("mask", mask)) if row is not None]
        given, settings = split_request(told, overrides, self.choices.mode)
        choices, captions, guidance, kind = self._changed(settings)
        modes = choose_modes(choices.mode, given)
        rows: Request = {}
        if text is not None:
            rows["text"] = check_questions(text, self.clip.text_vocab_size, self.clip.text_end_id)
        if image is not None:
            side = self.model.image_size * self.first_stage.model.downsampling
            if image.shape[1:] != (side, side, 3):
                raise UserError(f"pictures are {list(image.shape[1:])}, this run's {[side, side, 3]}")
            rows["image"] = np.asarray(image)
        if mask is not None:
            rows["mask"] = np.asarray(mask)
        return {
            **rows,
            "modes": modes,
            "choices": choices,
            "captions": captions.program,
            "guidance": np.float32(guidance),
            "data_type": np.int32(kind),
            **captions.numbers,
            **({"strength": strength} if changes(told, overrides) else {}),
        }

    def __call__(
        self, params: Tree, variables: Tree, frozen: Tree, request: Request, keys: Key[Array, "b"]
    ) -> dict[str, Array]:
        """Draws for each key; what comes of it depends on its rows and key alone.

        Args:
          params: {"unidiffuser": tree}.
          variables: {"unidiffuser": {"statistics": mean squares}}, if there is a scale that was measured.
          frozen: "first_stage", "clip" and "captioner".
          request: from `request`.
          keys: one for each.

        Returns:
          {"image": float [b H W 3] in [-1, 1], "text": int32 [b l], 0 behind the end}, those of them that the mode
          makes; a variation also what is between.
        """
        static = ("modes", "choices", "captions", "strength")
        told = {name: value for name, value in request.items() if name not in static}
        modes, choices, program, strength = (request.get(name) for name in static)
        guided = float(request["guidance"]) != 1.0
        return _draw(
            *(self, modes, choices, program, guided, strength),
            *(params["unidiffuser"], self.factors(variables), frozen, told, keys),
        )

    def made_of(self, request: Request) -> dict[str, str]:
        """What of the outputs is made of the other side, see `sample.samplers.contract`."""
        if request.get("strength") == 0:
            return {}
        return {name: how for mode in request["modes"] for name, how in made_of(mode).items()}

    def idle(self, told: Collection[str], overrides: Mapping[str, Any]) -> dict[str, str]:
        """Settings and rows that a request does not read, each with the reason; see `sample.samplers.contract`.

        Args:
          told: names of the rows that it holds.
          overrides: of `settings`, and strength, with 0 of which none is read but the mode, nor a caption.

        Raises:
          UserError: as of `request`.
        """
        given, settings = split_request(told, overrides, self.choices.mode)
        choices, captions, guidance, kind = self._changed(settings)
        if changes(told, overrides) and overrides.get("strength") == 0:
            chosen = overrides.get("mode", self.choices.mode)  # which needs what it is of
            return dict.fromkeys((*(self.settings.keys() - {"mode"}), *(() if chosen else given)), STAYS)
        idle = unread_settings(choose_modes(choices.mode, given), guidance, tuple(dataclasses.asdict(captions)))
        return idle | ({"data_type": "this network tells no kinds of data apart"} if kind < 0 else {})

    def plan(self, choices: Choices, strength: float = 1.0) -> Plan:
        """The plan of a solver; of its last steps, see `make_plan`.

        Raises:
          ValueError: if there is no such sampler or spacing, or the steps are impossible.
        """
        return make_plan(
            self.process.schedule, choices.sampler, choices.steps, spacing=choices.spacing, strength=strength
        )

    @property
    def statistics(self) -> dict[str, Array]:
        """Mean squares of latents before anything is measured; {} if nothing is to be."""
        return {name: jnp.ones(()) for name in MEASURED} if self.scales.measured else {}

    def factors(self, variables: Tree) -> dict[str, Array]:
        """What latents of "clip" and "text" are multiplied by, those of the config or as they were measured."""
        given = {name: jnp.float32(getattr(self.scales, name)) for name in MEASURED}
        if not self.scales.measured:
            return given
        squares = variables["unidiffuser"]["statistics"]
        return given | {name: jax.lax.rsqrt(jnp.maximum(squares[name], 1e-12)) for name in self.scales.measured}

    def encode_text(self, frozen: Tree, text: Int[Array, "b l"]) -> Latents:
        """Latents of captions, not scaled."""
        return {"text": caption_latents(self.captioner, self.clip, frozen, text)}

    def encode_image(self, frozen: Tree, images: UInt8[Array, "b H W 3"], keys: Key[Array, "b"]) -> Latents:
        """Latents of pictures, drawn by one key an example, and their CLIP embeddings; these are not scaled."""
        encoded = self.first_stage.encode(frozen, from_uint8(images), keys)
        return {"image": encoded, "clip": self.embed(frozen, images)}

    def embed(self, frozen: Tree, images: UInt8[Array, "b H W 3"]) -> Float[Array, "b e"]:
        """CLIP embeddings of pictures."""
        return clip_pictures(self.clip, collections_of(frozen["clip"]), from_uint8(images))

    def write(
        self, frozen: Tree, latents: Latents, program: tuple[int, int], numbers: dict[str, Array], keys: Array
    ) -> Int[Array, "b l"]:
        """Captions of latents that are not scaled; see `sample.samplers.captioner.write_captions`."""
        captioner, params = self.captioner, frozen["captioner"]["params"]

        def prefill(length: int) -> tuple[Array, Any]:
            return captioner.apply({"params": params}, latents["text"], length, method="prefill_latents")

        return write_captions(captioner, params, prefill, program, numbers, self.end_id, keys)

    def _changed(self, overrides: Mapping[str, Any]) -> tuple[Choices, CaptionSettings, float, int]:
        """Settings with others, guidance and the kind of data last; raises UserError unless they are possible."""
        if unknown := sorted(overrides.keys() - self.settings.keys()):
            raise UserError(f"{', '.join(unknown)}: no such sampling option; choose from {', '.join(self.settings)}")
        own = {field.name for field in dataclasses.fields(Choices)}
        choices = dataclasses.replace(self.choices, **{k: v for k, v in overrides.items() if k in own})
        own |= {"guidance", "data_type"}
        captions = self.captions.changed({k: v for k, v in overrides.items() if k not in own})
        choices.check_names()
        guidance = float(overrides.get("guidance", self.guidance))
        if not 0 <= guidance < float("inf"):
            raise UserError(f"guidance={guidance} is impossible; 1 means none, more follows what is given more")
        kind = self.data_type
        if "data_type" in overrides:
            kind = check_kind(self.model, "data_type", overrides["data_type"])
        most = self.captioner.length - self.captioner.prefix_length + 1
        if captions.caption_length > most:
            raise UserError(f"caption_length={captions.caption_length} is more than the captioner has; use {most}")
        try:
            self.plan(choices)
        except (TypeError, ValueError) as error:
            steps = spell_count(choices.steps, "step")
            raise UserError(f"sampler {choices.sampler!r} with {steps}: {error}") from error
        return choices, captions, guidance, kind


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def _draw(
    sampler: UniDiffuserSampler,
    modes: tuple[str, ...],
    choices: Choices,
    program: tuple[int, int],
    guided: bool,
    strength: float | None,
    params: Tree,
    factors: dict[str, Array],
    frozen: Tree,
    request: Request,
    keys: Array,
) -> dict[str, Array]:
    """The compiled program of `UniDiffuserSampler.__call__`; `strength` is None where no picture is to be changed."""
    change = None if strength is None else picture_to_change(sampler, frozen, factors, request, strength)
    if change is not None and strength == 0:
        return {"image": sampler.first_stage.decode(frozen, change.data["image"])}
    plan, shapes, outputs = sampler.plan(choices, strength or 1.0), sampler.shapes, {}
    numbers = {name: request[name] for name in ("temperature", "top_k", "top_p", "length_penalty")}
    folded = [jax.vmap(jax.random.fold_in, (0, None))(keys, use) for use in range(_SECOND + 1)]

    def network(x: PictureAndText, t_image: Array, t_text: Array) -> PictureAndText:
        kinds = kinds_of(sampler.model, request["data_type"], len(t_image))
        return sampler.model.apply({"params": params}, x, t_image, t_text, kinds)

    def noise(keys: Array) -> Latents:
        drawn = normal_latents(keys, shapes)
        if choices.noise == "diffusers":
            clip = normal_latents(keys, {"text": (shapes["text"][0], sampler.captioner.feature_width)})["text"]
            encoded = sampler.captioner.apply(collections_of(frozen["captioner"]), clip, method="encode")
            drawn["text"] = jnp.asarray(encoded, jnp.float32)
        return drawn

    def draw(mode: str, told: Latents, keys: Array) -> Latents:
        first_keys, own_keys = (jax.vmap(jax.random.fold_in, (0, None))(keys, use) for use in (_FIRST, _FRESH))
        whole = noise(first_keys)
        first = {name: whole[name] for name in drawn_names(mode)}
        kept = whole if choices.noise == "diffusers" and mode in ("image", "text") else None
        guidance = request["guidance"] if guided and mode not in ("image", "text") else None
        empty = None
        if guidance is not None and mode == "text_to_image" and choices.unconditional == "empty":
            blank = jnp.array([sampler.clip.text_end_id - 1, sampler.clip.text_end_id], jnp.int32)
            empty = scaled(sampler.encode_text(frozen, jnp.broadcast_to(blank, (len(keys), 2))), factors)["text"]
        return draw_latents(
            network, sampler.process, plan, mode, first, told, own_keys, guidance, empty, kept, shapes, change
        )

    def given(row: str) -> Latents:
        if row == "text":
            return scaled(sampler.encode_text(frozen, request["text"]), factors)
        return scaled(sampler.encode_image(frozen, request["image"], folded[_POSTERIOR]), factors)

    for mode in modes:
        row = MODES[mode]
        told: Latents = {} if row is None else given(row)
        drawn: Latents = {}
        for stage, stage_keys in zip(stages(mode), (keys, folded[_SECOND]), strict=False):
            drawn |= draw(stage, drawn or told, stage_keys)
        if "image" in drawn:
            outputs["image"] = lay_over(sampler.first_stage.decode(frozen, drawn["image"]), request)
        if "text" in drawn:
            words = {"text": drawn["text"] / factors["text"]}
            outputs["text"] = sampler.write(frozen, words, program, numbers, folded[_WORDS])
    return outputs


def _check_parts(
    config: ConfigDict, model: UniDiffuser, first_stage: FirstStage, clip: Clip, captioner: Captioner
) -> None:
    """Raises UserError unless the networks go together."""
    if not isinstance(captioner, Captioner) or captioner.mapper != "bottleneck":
        raise UserError("config.frozen.captioner must be a captioner with a bottleneck, whose latents are diffused")
    check_features(captioner, clip)
    side, _, channels = first_stage.latent_shape(config.data.image_size)
    wanted = {
        "image_size": side,
        "in_channels": channels,
        "clip_width": clip.embed_dim,
        "text_length": captioner.prefix_length,
        "text_width": captioner.latent_width,
    }
    wrong = [
        f"{name} {getattr(model, name)}, not {value}" for name, value in wanted.items() if getattr(model, name) != value
    ]
    if wrong:
        raise UserError(f"config.models.unidiffuser is not of what the frozen networks make: {'; '.join(wrong)}")
