"""A run folder made ready to sample: weights, frozen stages, tokenizer, and a compiled sampler."""

import dataclasses
import functools
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, UInt8
from ml_collections import ConfigDict

from cli.errors import UserError
from cli.locations import Location
from cli.ranges import check_seed
from data.buckets import Shape, shapes_of
from data.preprocess import transform_pair
from data.tiles import picture_fields
from data.tokenizer import Tokenizer
from models import MODELS
from sample.arguments import idle_settings
from sample.first_stage import PART as FIRST_STAGE
from sample.guide import check_guide
from sample.progress import DrawingBar
from sample.samplers import create_sampler
from sample.samplers.contract import besides
from weights.run import TOKENIZER, Run, RunWeights
from weights.sources import load_frozen, resolve_frozen

Rows = dict[str, np.ndarray]
Call = tuple[Collection[str], Mapping[str, Any]]  # names of the rows that are told, and overrides of `config.sample`

# One size for every command, so that a picture comes out of the same program whichever command draws it. Diffusions,
# and whatever else reads or makes large pictures by a first stage, take as many as have the pixels of 64 of 64 x 64,
# which is one of 512 x 512.
CHUNK = 64
_PIXELS = CHUNK * 64 * 64


@dataclasses.dataclass
class TrainedSampler:
    """Samples from a run.

    Attributes:
      run: the folder.
      config: its config, with frozen stages found, and every setting of the sampler in `config.sample`.
      sampler: what `create_sampler(config)` gave.
      weights: parameters and where they come from.
      frozen: weights of the frozen stages.
      tokenizer: of the run; None without text.
      chunk: images drawn in one call. Requests are padded to it, so one program serves every number of images.
      guide: what says which weights guide it, {"guide_run", "guide_step", "guide_ema"}; {} without any.
      dtype: what its networks compute in where that was chosen; "" for what its config says.
      shape: height and width of the pictures, where the run trained on several and one was chosen.
    """

    run: Run
    config: ConfigDict
    sampler: Any
    weights: RunWeights
    frozen: Any
    tokenizer: Tokenizer | None
    chunk: int
    guide: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dtype: str = ""
    shape: Shape | None = None

    @classmethod
    def open(
        cls,
        folder: str | Location,
        *,
        step: int | None = None,
        ema: bool | float = True,
        chunk: int = 0,
        dtype: str = "",
    ) -> "TrainedSampler":
        """Loads a run.

        Args:
          folder: of the run.
          step: of the checkpoint, as in `weights.run.Run.load`.
          ema: as there.
          chunk: see the attributes; 0 for what suits its pictures.
          dtype: what networks compute in, but a first stage, which rounds what is seen; "" for what the config says.

        Raises:
          UserError: if the run, its checkpoint or a frozen stage is missing, or nothing can be sampled from it.
        """
        run = Run.open(folder)
        config = run.config
        resolve_frozen(config, near=run.folder)
        if dtype:
            with config.unlocked():
                for part, entry in (*config.models.items(), *config.frozen.items()):
                    if part != FIRST_STAGE and "dtype" in MODELS[entry.name].__dataclass_fields__:
                        entry.dtype = dtype
        sampler = create_sampler(config)
        # An older run may lack settings, and the value of one may stand for another, as -1 does for the kind of data.
        config.sample = ConfigDict({**config.sample, **sampler.settings})
        weights = run.load(step, ema)
        large = FIRST_STAGE in config.frozen or config.objective in ("diffusion", "autoencoder", "vision_adapter")
        pixels = max(1, config.data.image_size) ** 2 * config.data.max_tiles
        most = max(1, _PIXELS // pixels) if large else CHUNK
        chunk = chunk or min(CHUNK, most)
        return cls(run, config, sampler, weights, load_frozen(config), run.tokenizer(), chunk, dtype=dtype)

    def guided_by(self, folder: str | Location, step: int | None = None) -> "TrainedSampler":
        """The same, led away from what another run draws; see `DiffusionSampler.guided_by`.

        Args:
          folder: of that run; an earlier checkpoint of the same run is one, too.
          step: of its checkpoint; None for the newest.

        Raises:
          UserError: if there is no such run or checkpoint, or this one cannot be guided by it, see `sample.guide`.
        """
        other = TrainedSampler.open(folder, step=step, dtype=self.dtype)
        if not hasattr(self.sampler, "guided_by"):
            raise UserError(f"{self.run.folder} is a run of {self.config.objective}, which no second run guides")
        sampler = self.sampler.guided_by(other.sampler)
        check_guide(self, other)
        weights = {"params": other.weights.params, "frozen": other.frozen}
        return dataclasses.replace(
            self,
            sampler=sampler,
            frozen={**self.frozen, "guide": weights},
            guide={"guide_run": str(folder), "guide_step": other.weights.step, "guide_ema": other.weights.ema},
        )

    def in_shape(self, shape: Shape) -> "TrainedSampler":
        """The same, for pictures of one of the shapes that the run trained on, `config.data.buckets`.

        Raises:
          UserError: if it trained on no such shape, or draws pictures of one alone.
        """
        data, folder = self.config.data, self.run.folder
        said = f"--size={shape[0]}x{shape[1]}"
        if not hasattr(self.sampler, "in_shape") or "image" not in self.sampler.makes:
            raise UserError(
                f"{said} is of a diffusion of pictures, and {folder} is a run of {self.config.objective} and makes "
                f"{' and '.join(self.sampler.makes)}; leave it out"
            )
        shapes = shapes_of(data.buckets)
        if not shapes:
            raise UserError(
                f"{said} is of a run of config.data.buckets, and {folder} has none: it draws {data.image_size} x "
                f"{data.image_size} pixels alone, as its positions may be learned; leave it out"
            )
        if shape not in shapes:
            trained_on = ", ".join(f"{height}x{width}" for height, width in shapes)
            raise UserError(f"{said} is none of the shapes that {folder} trained on; choose one of {trained_on}")
        return dataclasses.replace(self, sampler=self.sampler.in_shape(shape), shape=shape)

    @property
    def picture_size(self) -> Shape | int:
        """Height and width of the pictures that it is given and makes, or the side of a square."""
        return self.shape or self.config.data.image_size

    def picture_rows(self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> Rows:
        """Pictures of any size for a request, {"image": [n ...]}, prepared as those that training evaluates on.

        Beside it stands "canvas" [n] where the run cuts them into tiles.
        """
        transform, tiles = transform_pair(self.config.data.transform).evaluation, self.config.data.max_tiles
        fields = [picture_fields(image, self.picture_size, transform, tiles) for image in images]
        return {name: np.stack([one[name] for one in fields]) for name in fields[0]}

    @property
    def setting_names(self) -> tuple[str, ...]:
        """What may be set: the keys of `config.sample`, and what comes with rows that the sampler may read besides."""
        brought = (name for settings in besides(self.sampler).values() for name in settings)
        return tuple(dict.fromkeys((*self.config.sample, *brought)))  # two rows may bring the same

    @property
    def inferred(self) -> dict[str, Any]:
        """What overrides `config.sample` so that what is made follows from the rows, where it has a mode of its own."""
        return {"mode": ""} if self.config.sample.get("mode") else {}

    def check_settings(
        self, settings: Mapping[str, Any], swept: Mapping[str, Sequence[Any]] | None = None, besides: bool = True
    ) -> None:
        """Looks at overrides of `config.sample`, before anything is drawn.

        Args:
          settings: the overrides.
          swept: the values of those that differ between cells.
          besides: whether the sampler may be told what only a user gives, which brings settings of its own.

        Raises:
          UserError: if one is of what the run's sampler does not have, or has no effect beside the others.
        """
        known = self.setting_names if besides else tuple(self.config.sample)
        unknown = [f"--{name}" for name in settings if name not in known]
        if unknown:
            has = f"it has {', '.join(known)}" if known else "it has no settings"
            raise UserError(
                f"{self.run.folder} is a run of {self.config.objective}; leave out {', '.join(unknown)} ({has})"
            )
        for name, why in idle_settings(settings, self.config.sample.to_dict(), swept) if settings or swept else ():
            value = settings.get(name, (swept or {}).get(name))
            raise UserError(f"{name}={value} has no effect, as {why}; leave it out")
        guidance = (swept or {}).get("guidance") or (settings.get("guidance", self.config.sample.get("guidance")),)
        if self.guide and all(weight == 1 for weight in guidance):
            raise UserError("--guide_run has no effect, as guidance 1 means none; choose another --guidance")

    def idle(self, *calls: Call) -> dict[str, str]:
        """Settings, also of the run's config, that have no effect in any of several calls, each with the reason.

        Those that are what they would be without an effect, as a rescale of 0, are none of them.

        Raises:
          UserError: if a call is impossible.
        """
        found = []
        for told, settings in calls:
            idle = dict(idle_settings({}, {**self.config.sample.to_dict(), **settings}))
            found.append(idle | (self.sampler.idle(told, settings) if hasattr(self.sampler, "idle") else {}))
        return {name: why for name, why in found[0].items() if all(name in idle for idle in found)} if found else {}

    def check_request(self, settings: Mapping[str, Any]) -> None:
        """Looks at the values of overrides, as a request for one output of each row that records may have would.

        Args:
          settings: the overrides; of a sampler with modes without one.

        Raises:
          UserError: if one is impossible, alone or beside the others.
        """
        if not self.config.sample:
            return
        rows: Rows = {}
        if "text" in self.sampler.reads:
            rows["text"] = np.zeros((1, self.config.data.text_length), np.int32)
            if self.tokenizer is not None and self.tokenizer.end_id is not None:
                rows["text"][:, -1] = self.tokenizer.end_id  # without which nothing reads it
        if "label" in self.sampler.reads:
            rows["label"] = np.zeros(1, np.int32)
        if "image" in self.sampler.reads:
            side = self.config.data.image_size
            rows |= self.picture_rows([np.zeros((side, side, 3), np.uint8)])
        self.sampler.request(**rows, **{**self.inferred, **settings})

    def describe(self, seed: int, settings: Mapping[str, Any], idle: Collection[str] = ()) -> dict[str, Any]:
        """Which weights these are, and the settings of their sampler, those of the run's config included.

        Args:
          seed: of what is drawn.
          settings: overrides of `config.sample`, and what else was told.
          idle: settings that had no effect, which are left out.
        """
        weights = {"run": str(self.run.folder), **self.weights.record}
        size = {} if self.shape is None else {"size": f"{self.shape[0]}x{self.shape[1]}"}
        size |= {"dtype": self.dtype} if self.dtype else {}
        drawing = {**self.config.sample.to_dict(), **settings}
        drawing = {name: value for name, value in drawing.items() if name not in idle}
        return {**weights, **self.guide, **size, "seed": seed, **drawing}

    def program(self, rows: Rows, **settings: Any) -> Hashable:
        """What a request is compiled for: requests that agree in it share a program, whatever their number.

        Samplers have a program with guidance and one without; all other numbers are arguments of the program.

        Args:
          rows: as in a call.
          **settings: overrides of `config.sample`.
        """
        request = self.sampler.request(**{name: value[:1] for name, value in rows.items()}, **settings)
        guided = float(request.get("guidance", 1.0)) != 1.0
        return guided, *(
            (name, request[name].shape if isinstance(request[name], np.ndarray | np.generic) else request[name])
            for name in sorted(request)
        )

    def _check_finite(self, outputs: Rows) -> None:
        """Raises UserError if numbers are not finite: as bytes, ranks or averages they would pass for others."""
        for name, value in outputs.items():
            broken = int(np.sum(~np.isfinite(value))) if np.issubdtype(value.dtype, np.floating) else 0
            if broken:
                raise UserError(
                    f"{self.run.folder}: {broken} of {value.size} numbers of its {name} are not finite at step "
                    f"{self.weights.step}; the weights diverged or are damaged: take another step, or train or convert "
                    "again"
                )

    def tokenizer_for(self, captions: Sequence[str]) -> Tokenizer:
        """The tokenizer that reads captions.

        Raises:
          UserError: if a caption is empty, or the run has no text.
        """
        if self.tokenizer is None:
            hint = "; convert it again, with --tokenizer" if self.run.converted else ""
            raise UserError(f"{self.run.folder} takes no captions; it has no tokenizer{hint}")
        if any(not caption.strip() for caption in captions):
            raise UserError("the prompt is empty; describe a picture, for example --prompt='a small red circle'")
        return self.tokenizer

    def warn_of_cut(self, captions: Sequence[str]) -> None:
        """Says that captions are too long: a line for all, which names the first and counts each once."""
        if captions:
            more = len(set(captions)) - 1
            of = repr(captions[0]) + (f" and of {more} more" if more else "")
            print(f"warning: only the first {self.config.data.text_length} tokens count of {of}", flush=True)

    def encode(self, captions: Sequence[str]) -> Rows:
        """Tokenizes captions for a request: {"text": int32 [n l]}.

        Raises:
          UserError: if a caption is empty, or the run has no text.
        """
        tokenizer = self.tokenizer_for(captions)
        encoded = [tokenizer.encode(caption, self.config.data.text_length) for caption in captions]
        self.warn_of_cut([caption for caption, one in zip(captions, encoded, strict=True) if one.truncated])
        return {"text": np.stack([one.ids for one in encoded])}

    def decode(self, ids: Int[np.ndarray, "n l"]) -> tuple[str, ...]:
        """The texts of ids that the sampler made.

        Raises:
          UserError: if the run lacks the tokenizer that reads them.
        """
        if self._writer is None:
            file = getattr(self.sampler, "writes_with", TOKENIZER)
            raise UserError(f"{self.run.folder} makes text and has no {file}, which would read it; copy it there")
        return tuple(self._writer.decode(one) for one in ids)

    @functools.cached_property
    def _writer(self) -> Tokenizer | None:
        """The tokenizer of what the sampler makes, read once: text that is streamed is decoded at every token."""
        file = getattr(self.sampler, "writes_with", TOKENIZER)
        return self.tokenizer if file == TOKENIZER else self.run.tokenizer(file)

    def stream(self, rows: Rows, *, seed: int, index: int, **settings: Any) -> Iterator[Int[np.ndarray, " l"]]:
        """The text of one row as it is written: what there is of its ids, again with each further one.

        Of samplers that have a `stream`. Arguments as of a call, of one row.
        """
        check_seed("seed", seed)
        keys = jax.random.fold_in(jax.random.key(seed), index)[None]
        request = self.sampler.request(**rows, **settings)
        ids: list[int] = []
        for token in self.sampler.stream(self.weights.params, self.weights.variables, self.frozen, request, keys):
            ids.append(int(token[0]))
            yield np.array(ids, np.int32)

    def __call__(self, rows: Rows, *, seed: int, indices: Sequence[int], **settings: Any) -> Rows:
        """Samples one output for each row.

        Args:
          rows: arrays with leading dimension n, such as `text`.
          seed: s; output i of it is drawn with `fold_in(key(s), i)`, whatever else is drawn.
          indices: i of each row.
          **settings: overrides of `config.sample`.

        Returns:
          The sampler's outputs as numpy arrays with leading dimension n.

        Raises:
          UserError: if the seed is none that the generator tells from others, the request is impossible, or what
            comes out is not finite.
        """
        check_seed("seed", seed)
        count, numbers = len(indices), np.asarray(indices, np.int32)
        chunks, starts = [], range(0, count, self.chunk)
        with DrawingBar(count, len(starts)) as bar:
            for start in starts:
                places = np.minimum(np.arange(start, start + self.chunk), count - 1)
                keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), numbers[places])
                part = {name: value[places] for name, value in rows.items()}
                request = self.sampler.request(**part, **settings)
                watched = bar.shown and hasattr(self.sampler, "evaluations")
                bar.begin(self.sampler.evaluations(request) if watched else 0)
                given = (self.weights.params, self.weights.variables, self.frozen, request, keys)
                outputs = self.sampler(*given, **({"moved": bar.moved} if watched else {}))
                chunks.append(jax.device_get(outputs))
                self._check_finite(chunks[-1])
                bar.drew(min(self.chunk, count - start))
        return {name: np.concatenate([chunk[name] for chunk in chunks])[:count] for name in chunks[0]}


def refuse_idle(idle: Mapping[str, str], *given: Mapping[str, Any]) -> None:
    """Raises UserError if a setting that was given has no effect.

    Args:
      idle: those that have none, each with the reason.
      given: overrides of `config.sample`, of each cell of a sweep.
    """
    for settings in given:
        for name, value in settings.items():
            if name in idle:
                raise UserError(f"{name}={value} has no effect, as {idle[name]}; leave it out")
