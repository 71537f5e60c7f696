"""Captions, classes or nothing -> pictures with a trained diffusion: one compiled scan of a solver.

Guidance is uncond + w (cond - uncond), w = 1 meaning none (Ho and Salimans 2022), of the network's output, in one call
on both halves of a doubled batch. The unconditional half reads the blank caption, or a negative prompt.

In place of the unconditional half there may be a second, weaker network, told the same (autoguidance, Karras et al.
2024, "Guiding a Diffusion Model with a Bad Version of Itself").

A picture may be given, see `sample.samplers.given_picture`.
"""

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt8
from ml_collections import ConfigDict

from cli.errors import UserError
from cli.plurals import spell_count
from diffusion.plan import Plan
from diffusion.process import Process
from diffusion.solver_choice import make_plan
from models.conditioning import Conditioning
from models.layers.attention import KeyLengths
from sample.first_stage import FirstStage, check_denoiser
from sample.samplers import diffusion_program
from sample.samplers.diffusion_checks import (
    check_attention,
    check_condition,
    check_guide_fits,
    check_negative,
    check_picture,
    check_shape,
)
from sample.samplers.diffusion_settings import CHURN, NUMBERS, Steps, check_numbers, unread_times
from sample.samplers.dvae import from_uint8
from sample.samplers.from_config import build_network, build_process, read_settings
from sample.samplers.given_picture import STAYS, STRENGTH, GivenPicture, chosen_strength, known_places, lay_over
from sample.text_context import TextContext, create_text_context, weigh

Tree = Any
Request = dict[str, Any]

BETWEEN = 0.2  # seconds between two looks at a request that is watched, about: each look costs some milliseconds
_SHOWN = ("attention", "trajectory")  # what a request may ask for beside the samples, one of them


@dataclasses.dataclass(frozen=True)
class DiffusionSampler:
    """Draws pictures, or points.

    Attributes:
      model: the denoiser, a diffusion backbone; its parameters are `params["denoiser"]`.
      process: what it was trained on.
      text: where captions' features come from; None for a denoiser that reads none.
      defaults: of the solver.
      first_stage: what makes pictures of the denoiser's latents; None for a denoiser of pixels or points.
      null_class: whether a denoiser's last class stands for none, as where classes are dropped in training.
      guidance: default w; 1 for none.
      rescale: default phi, see `diffusion.guidance.Guidance`.
      guidance_start: default share of the process before which there is no guidance.
      guidance_stop: default share after which there is none.
      shape: height and width of pictures, where they are not the network's own square; see `in_shape`.
      guide: the sampler of a network that guidance leads away from, whose weights are `frozen["guide"]`:
        {"params": {"denoiser": tree, ...}, "frozen": those of its own frozen stages}; None for usual guidance.
    """

    model: nn.Module
    process: Process
    text: TextContext | None
    defaults: Steps
    first_stage: FirstStage | None = None
    null_class: bool = False
    guidance: float = 1.0
    rescale: float = 0.0
    guidance_start: float = 0.0
    guidance_stop: float = 1.0
    shape: tuple[int, int] | None = None
    guide: "DiffusionSampler | None" = None

    @classmethod
    def from_config(cls, config: ConfigDict) -> "DiffusionSampler":
        """Builds the sampler of `config.models`, `config.frozen`, `config.process` and the defaults in `config.sample`.

        Raises:
          UserError: if the process or a default is impossible.
        """
        given = read_settings(config.sample, cls, Steps)
        model = build_network(config, "models.denoiser")
        process = build_process(config)
        solver = (field.name for field in dataclasses.fields(Steps))
        steps = Steps(**{key: given[key] for key in solver if key in given})
        numbers = {key: given[key] for key in NUMBERS if key in given}
        null_class = bool(config.loss.get("dropout", 0.0))
        text = create_text_context(config, getattr(model, "context_width", None))
        if text is None and getattr(model, "reads_tokens", getattr(model, "context_width", 0) > 0):
            raise UserError("the denoiser reads a context; name what makes one in config.models.text or frozen.text")
        first_stage = FirstStage.from_config(config)
        check_denoiser(config, model, process, first_stage)
        sampler = cls(model, process, text, steps, first_stage, null_class, **numbers)
        sampler._settings({})  # finds what is impossible in the defaults
        return sampler

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample of what is diffused."""
        own = self.model.example_inputs(1)[0].shape[1:]
        if self.shape is None:
            return own
        factor = 1 if self.first_stage is None else self.first_stage.model.downsampling
        return (*(side // factor for side in self.shape), own[-1])

    def data(self, frozen: Tree, batch: Mapping[str, Array], keys: Key[Array, "b"]) -> Float[Array, "b h w z"]:
        """What the denoiser learns of pictures: their pixels in [-1, 1], or latents, drawn by one key an example.

        `batch` holds image uint8 [b H W c]; or, of latents, latent_moments as `FirstStage.moments` gives them.
        """
        stage = self.first_stage
        if "latent_moments" in batch and stage is not None:
            return stage.draw(frozen, batch["latent_moments"], keys)
        pixels = from_uint8(batch["image"])
        return pixels if stage is None else stage.encode(frozen, pixels, keys)

    def given(self, frozen: Tree, request: Mapping[str, Array], strength: float) -> GivenPicture | None:
        """What a solver has of the picture in a request, if there is one; of latents they are the mean ones."""
        if "image" not in request:
            return None
        image = from_uint8(request["image"])
        data = image if self.first_stage is None else self.first_stage.mean(frozen, image)
        known = known_places(request["mask"], *data.shape[1:3]) if "mask" in request else None
        return GivenPicture(data, known, strength)

    def show(self, frozen: Tree, outputs: Mapping[str, Array], request: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs [b ...] or [b s ...] as pictures, where they are latents; the samples with known pixels over them."""
        stage = self.first_stage
        if stage is None:
            return dict(outputs)

        def decode(z: Array) -> Array:
            images = stage.decode(frozen, z.reshape(-1, *self.sample_shape))
            return images.reshape(*z.shape[:-3], *images.shape[1:])

        shown = {name: decode(z) for name, z in outputs.items()}
        return {**shown, "image": lay_over(shown["image"], request)}

    @property
    def classes(self) -> int:
        """Number of classes that the denoiser knows, one that stands for none included; 0 for one without."""
        return getattr(self.model, "num_classes", 0)

    @property
    def null_label(self) -> int | None:
        """The class that stands for none, if there is one."""
        return self.classes - 1 if self.classes and self.null_class else None

    @property
    def conditional(self) -> bool:
        """Whether the denoiser is told what to draw."""
        return self.text is not None or self.classes > 0

    @property
    def guidable(self) -> bool:
        """Whether the denoiser was trained with its condition and without."""
        return self.text is not None or self.null_label is not None

    def guided_by(self, guide: Any) -> "DiffusionSampler":
        """This sampler, which another one's network guides.

        Raises:
          UserError: if that draws something else, or was told or trained on something else.
        """
        check_guide_fits(self, guide)
        return dataclasses.replace(self, guide=guide)

    def in_shape(self, shape: tuple[int, int]) -> "DiffusionSampler":
        """This sampler, of pictures of another height and width.

        Raises:
          UserError: if a network does not take them, as one with a learned position of each patch.
        """
        check_shape(self, shape)
        return dataclasses.replace(self, shape=shape)

    @property
    def class_range(self) -> str:
        """The classes' numbers, for messages."""
        last = ", the last for none" if self.null_class else ""
        return f"0 to {self.classes - 1}{last}"

    @property
    def reads(self) -> tuple[str, ...]:
        """The rows that a request may hold, of what records have."""
        return (*(("text",) if self.text is not None else ()), *(("label",) if self.classes else ()))

    @property
    def may_read(self) -> dict[str, dict[str, Any]]:
        """The rows that a user may give besides: of pictures one to change, and where."""
        negative: dict[str, dict[str, Any]] = {"negative": {}} if self.text is not None else {}
        given = {"image": {"strength": STRENGTH}, "mask": {"strength": 1.0}} if "image" in self.makes else {}
        return negative | given

    @property
    def makes(self) -> tuple[str, ...]:
        """What outputs hold."""
        return ("point",) if len(self.sample_shape) == 1 else ("image",)

    @property
    def settings(self) -> dict[str, Any]:
        """The keys of `config.sample`, with their values."""
        return {**dataclasses.asdict(self.defaults), **{key: getattr(self, key) for key in NUMBERS}}

    def idle(self, told: Collection[str], overrides: Mapping[str, Any]) -> dict[str, str]:
        """Settings and rows that a request does not read, each with the reason; see `sample.samplers.contract`.

        Args:
          told: names of the rows that it holds.
          overrides: of `settings`, and strength, with 0 of which none is read, nor what says what to draw.

        Raises:
          UserError: on an unknown override or an impossible value.
        """
        steps, _ = self._settings({name: value for name, value in overrides.items() if name != "strength"})
        if overrides.get("strength") == 0:
            needed = {"image", *(("label",) if self.null_label is None else ())}  # without which there is no request
            return dict.fromkeys((*self.settings, *(row for row in told if row not in needed)), STAYS)
        return unread_times(steps, self.plan)

    def request(
        self,
        text: Int[np.ndarray, "b l"] | None = None,
        label: Int[np.ndarray, " b"] | None = None,
        negative: Int[np.ndarray, "b l"] | None = None,
        image: UInt8[np.ndarray, "b H W 3"] | None = None,
        mask: Bool[np.ndarray, "b H W"] | None = None,
        text_weights: Float[np.ndarray, "b l"] | None = None,
        negative_weights: Float[np.ndarray, "b l"] | None = None,
        contexts: Int[np.ndarray, " b"] | None = None,
        **overrides: Any,
    ) -> Request:
        """A request for pictures, one for each key.

        Args:
          text: caption ids; None draws without a caption.
          label: class numbers; None draws without a class.
          negative: ids of what to lead away from, in place of the blank caption.
          image: pictures to change.
          mask: where they are drawn anew; all other pixels stay. None changes all of them.
          text_weights: how much the tokens of `text` count, see `weigh`; None for all alike.
          negative_weights: the same of `negative`.
          contexts: how many contexts of a row's captions are seen, where these are several long; None for all.
          **overrides: of the defaults, those of `Steps`; guidance, rescale, guidance_start, guidance_stop;
            strength, of pictures that are given, from 0, which returns them, to 1, which draws fresh ones where there
            is no mask; trajectory=True for what the network saw and estimated on the way; and attention=True for what
            pixels read of their captions.

        Returns:
          What `__call__` takes. Prompts, classes and the numbers of guidance lead to no new compilation.

        Raises:
          UserError: on an unknown override, an impossible value, or a condition that the denoiser does not take.
        """
        given = {"text": text, "label": label, "negative": negative}
        rows = {name: np.asarray(value, np.int32) for name, value in given.items() if value is not None}
        check_condition(self, rows, rows.get("label"))
        strength = chosen_strength(image, mask, overrides)
        if image is not None:
            check_picture(self, np.asarray(image))
        attention = bool(overrides.get("attention", False))
        if attention:
            check_attention(self, "text" in rows, strength)
        for name, weights in (("text_weights", text_weights), ("negative_weights", negative_weights)):
            if weights is not None:
                rows[name] = np.asarray(weights, np.float32)
        if contexts is not None:
            rows["contexts"] = np.asarray(contexts, np.int32)
        if image is not None:
            rows["image"] = np.asarray(image)
        if mask is not None:
            rows["mask"] = np.asarray(mask)
        steps, numbers = self._settings({key: value for key, value in overrides.items() if key != "strength"}, strength)
        if "negative" in rows:
            check_negative(self, numbers["guidance"])
        return {
            **rows,
            **{key: np.float32(value) for key, value in numbers.items()},
            "steps": steps,
            "strength": strength,
            "trajectory": bool(overrides.get("trajectory", False)),
            **({"attention": True} if attention else {}),
        }

    def __call__(
        self,
        params: Tree,
        variables: Tree,
        frozen: Tree,
        request: Request,
        keys: Key[Array, "b"],
        moved: Callable[[int], None] | None = None,
    ) -> dict[str, Array]:
        """Draws one sample for each key; sample i depends on its condition and key alone.

        Args:
          params: {"denoiser": tree, ...}.
          variables: unused.
          frozen: {"text" or "clip": {"params": tree, "variables": collections}} where captions are read by a frozen
            network, and "guide" and "first_stage" where there are such.
          request: from `request`.
          keys: one for each sample.
          moved: is told how many of the steps that `evaluations` counts are done, each `BETWEEN` seconds or each step
            if that takes longer; what is drawn is the same.

        Returns:
          {"image" (or "point"): float [b ...]}; with a trajectory also "states" and "estimates", [b s ...], of a
          diffusion in latents decoded: its states after division by `Plan.state_scales`. With attention also
          "attention" [b h w l], see `sample.attention_maps.caption_maps`.
        """
        del variables
        guided = (self.conditional or self.guide is not None) and float(request["guidance"]) != 1.0
        shown = next((key for key in _SHOWN if request.get(key)), "")
        arrays = {key: value for key, value in request.items() if key not in ("steps", "strength", *_SHOWN)}
        static = (self, request["steps"], request["strength"], guided)
        count = 0 if moved is None else self.evaluations(request)
        if moved is None or not count:
            return diffusion_program.draw(*static, shown, params, frozen, arrays, keys)
        given = (params, frozen, arrays, keys)
        start, progress = diffusion_program.begin(*static, *given)
        done, each = 0, 1
        while done < count:
            before, stop = time.perf_counter(), min(done + each, count)
            progress = diffusion_program.advance(*static, *given, start, progress, np.int32(done), np.int32(stop))
            jax.block_until_ready(progress)
            each = max(1, int(BETWEEN * (stop - done) / max(time.perf_counter() - before, 1e-9)))
            done = stop
            moved(done)
        return diffusion_program.end(*static[:3], frozen, arrays, start, progress)

    def evaluations(self, request: Request) -> int:
        """How many steps a request says that it has done; 0 where it says nothing of them.

        That is so where a picture stays as it is, and where what is shown of the way is kept for the end.
        """
        if request["strength"] == 0 or any(request.get(key) for key in _SHOWN):
            return 0
        return self.plan(request["steps"], request["strength"]).evaluations

    def plan(self, steps: Steps, strength: float = 1.0) -> Plan:
        """The plan of a solver on this process; of its last steps, see `make_plan`.

        Raises:
          ValueError: if there is no such sampler or spacing, or the steps are impossible.
        """
        more = {name: getattr(steps, name) for name in ("spacing", "eta", *CHURN, "times", "offset", "end")}
        more |= {"variance": self.process.variance, "strength": strength}
        return make_plan(self.process.schedule, steps.sampler, steps.steps, **more)

    def estimate(self, params: Tree, x_t: Float[np.ndarray, "b *shape"], t: float) -> Float[np.ndarray, "b *shape"]:
        """The estimate of the data in x_t, without a condition."""

        def network(x: Array, time: Array) -> Array:
            return self.check_output(self.model.apply({"params": params["denoiser"]}, x, time, Conditioning()), x)

        estimate = jax.jit(self.process.denoiser(network))(jnp.asarray(x_t), jnp.asarray(t, jnp.float32))
        return np.asarray(estimate[0] if self.process.variance == "learned" else estimate)

    def check_output(self, output: Array, x_t: Array) -> Array:
        """Returns the network's output, of as many channels as the process needs: more or fewer might be broadcast.

        Raises:
          UserError: names both numbers.
        """
        learned = self.process.variance == "learned"
        needed = x_t.shape[-1] * (2 if learned else 1)
        if output.shape[-1] != needed:
            what = "mean and variance of each" if learned else "one for each"
            raise UserError(
                f"the denoiser makes {output.shape[-1]} channels, and the process needs {needed}, {what} of the data's "
                f"{x_t.shape[-1]} (variance {self.process.variance!r}); change config.models.denoiser.out_channels, "
                "where the network has it, or config.process.variance"
            )
        return output

    def conditioning(self, params: Tree, frozen: Tree, rows: Mapping[str, Array]) -> Conditioning:
        """What the denoiser is told of rows that have `text` (and perhaps its `text_features`), `label`, or both."""
        tokens, seen = rows.get("text_features"), None
        if tokens is None and self.text is not None:
            tokens = self.text(params, frozen, rows["text"])
        if self.text is not None and "contexts" in rows:
            seen = KeyLengths(rows["contexts"] * len(self.text.blank))
        if tokens is not None and "weights" in rows:
            tokens = weigh(tokens, rows["weights"], seen)
        return Conditioning(tokens=tokens, mask=seen, label=rows["label"] if self.classes else None)

    def blank_features(self, params: Tree, frozen: Tree) -> Float[Array, "1 l d"]:
        """The features of the caption that says nothing."""
        assert self.text is not None  # or nobody asks for them
        return self.text(params, frozen, self.blank({}, 1)["text"])

    def blank(self, rows: Mapping[str, Array], count: int, chunks: int = 1) -> dict[str, Array]:
        """The rows with what they lack: blank captions of so many contexts, the class that stands for none."""
        filled = dict(rows)
        if self.text is not None and "text" not in filled:
            blank = self.text.blank * chunks
            filled["text"] = jnp.broadcast_to(jnp.asarray(blank, jnp.int32), (count, len(blank)))
        if self.null_label is not None and "label" not in filled:
            filled["label"] = jnp.full(count, self.null_label, jnp.int32)
        return filled

    def _settings(self, overrides: Mapping[str, Any], strength: float = 1.0) -> tuple[Steps, dict[str, float]]:
        """The solver and the numbers of guidance, defaults filled in; raises UserError unless they are possible."""
        unknown = sorted(set(overrides) - {*self.settings, *_SHOWN})
        if unknown:
            raise UserError(f"{', '.join(unknown)}: no such sampling option; choose from {', '.join(self.settings)}")
        solver = {field.name for field in dataclasses.fields(Steps)} & overrides.keys()
        steps = dataclasses.replace(self.defaults, **{key: overrides[key] for key in solver})
        self._check_steps(steps, strength)
        numbers = {key: float(overrides.get(key, getattr(self, key))) for key in NUMBERS}
        check_numbers(numbers)
        if self.guide is not None:
            return steps, numbers
        if numbers["guidance"] != 1 and not self.conditional:
            raise UserError("this run takes no condition, so there is nothing to guide; leave guidance at 1")
        if numbers["guidance"] != 1 and not self.guidable:
            raise UserError("this run was never trained without its class, as guidance needs; leave guidance at 1")
        return steps, numbers

    def _check_steps(self, steps: Steps, strength: float) -> None:
        """Raises UserError unless the solver can run."""
        if not 0 <= steps.guided_channels <= self.sample_shape[-1]:
            raise UserError(
                f"guided_channels={steps.guided_channels} is impossible: the data have {self.sample_shape[-1]} "
                "channels, and 0 guides all"
            )
        try:
            self.plan(steps, strength or 1.0)  # at 0 nothing is solved
        except (TypeError, ValueError) as error:
            raise UserError(f"sampler {steps.sampler!r} with {spell_count(steps.steps, 'step')}: {error}") from error
