"""Reads a picture of the embedded dataset and says, attribute by attribute, whether it shows what a caption asks for.

Nothing is learned: the grader fits the renderer's own shapes to each object by least squares. A picture whose object is
no clean shape, or is as near to one shape as to another, is not read, so it cannot score.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy import ndimage

from data.scenes.captions import CaptionQuery, ObjectQuery, parse_caption
from data.scenes.render import SUPERSAMPLE, coverage
from data.scenes.scene import World

FOREGROUND_DISTANCE = 38.0  # RGB distance from the background at which a pixel belongs to an object
OBJECT_AREA = 6  # connected pixels that make an object; fewer are a speck
OBJECT_DISTANCE = 75.0  # an object's strongest pixel differs by this much; what stays fainter is a smear
SPLIT_DISTANCES = (60.0, 95.0, 135.0, 180.0)  # raised thresholds that part two objects whose blurred edges meet
COLOR_TOLERANCE = 60.0  # farther than this in RGB from every color of the world, a color has no name
DIAMETER_STEPS = (-1.0, -0.5, 0.0, 0.5, 1.0)  # templates' diameters, pixels more than the size's own
BLURS = (0.0, 0.8)  # templates' softness: standard deviation in pixels of a Gaussian
CENTER_REACH = 0.75  # how far, in x and y, templates' centers of mass lie from the middle of the crop, pixels
MAX_FADING = 1.35  # a blurred color may be this many times nearer to the background than its name's RGB
# A template may leave this share of an object's energy unexplained, divided by its diameter: an outline that is off
# by some fraction of a pixel costs a large object a smaller share than a small one.
MAX_RESIDUAL = 1.5
CANDIDATES = 6  # objects of a picture that may be those of a caption of three: the clearest ones
MAX_BLEND = 0.42  # how far an object may lie on the line from its shape (0) to another (1)


@dataclasses.dataclass(frozen=True)
class ObjectReading:
    """One object of a picture.

    Attributes:
      shape: its name; None where the object is no clean shape.
      color: its name; None where no color of the world is near.
      size: its name.
      center: (x, y) in pixels from the top left corner.
      residual: share of the object's energy that the best template leaves unexplained, 0 to 1.
      blend: how far it lies on the line from its shape (0) to the nearest other (1).
    """

    shape: str | None
    color: str | None
    size: str
    center: tuple[float, float]
    residual: float
    blend: float


@dataclasses.dataclass(frozen=True)
class SceneReading:
    """What a picture shows.

    Attributes:
      background: its name; None where no background of the world is near.
      objects: in reading order of their centers along the axis on which they differ most.
      relation: where each object lies as seen from the next; None where there is one alone, more than the world has,
        or not the same for all.
    """

    background: str | None
    objects: tuple[ObjectReading, ...]
    relation: str | None


class SceneGrader:
    """The grader of one world.

    Args:
      world: the world whose pictures and captions it reads.
    """

    def __init__(self, world: World):
        self.world = world
        self._colors = np.array(list(world.colors.values()), np.float32)
        self._backgrounds = np.array(list(world.backgrounds.values()), np.float32)
        self._bank = _TemplateBank(world)

    def read(self, image: UInt8[np.ndarray, "h w 3"]) -> SceneReading:
        """Reads one picture."""
        return self.read_all(image[None])[0]

    def read_all(self, images: UInt8[np.ndarray, "b h w 3"]) -> list[SceneReading]:
        """Reads pictures, several times faster than one by one.

        Raises:
          ValueError: if they are not of the world's size.
        """
        side = self.world.image_size
        if images.shape[1:3] != (side, side):
            height, width = images.shape[1:3]
            raise ValueError(f"pictures of {self.world.name} have {side} x {side} pixels, not {height} x {width}")
        backgrounds, differences, owners, masks = [], [], [], []
        for i, image in enumerate(images):
            border = np.concatenate([image[0], image[-1], image[1:-1, 0], image[1:-1, -1]])
            backgrounds.append(np.median(border, axis=0).astype(np.float32))
            differences.append(image.astype(np.float32) - backgrounds[i])
            parts = _components(differences[i], FOREGROUND_DISTANCE)
            masks += parts
            owners += [i] * len(parts)
        # All objects of all pictures at once: that makes the fit a product of two large matrices.
        readings = self._read_objects([differences[i] for i in owners], masks, [backgrounds[i] for i in owners])
        objects: list[list[ObjectReading]] = [[] for _ in images]
        for i, mask, reading in zip(owners, masks, readings, strict=True):
            parts = [] if reading.shape else self._split(differences[i], mask, backgrounds[i])
            objects[i] += parts or [reading]
        return [self._scene(background, items) for background, items in zip(backgrounds, objects, strict=True)]

    def score(self, caption: str, image: UInt8[np.ndarray, "h w 3"]) -> dict[str, bool]:
        """Compares one picture with its caption.

        Args:
          caption: what it should show.
          image: the picture.

        Returns:
          "count", and whichever of "background", "shape", "color", "size", "relation" the caption names -> whether the
          picture has it right (for every object that the caption gives it); "all" -> whether it has all of them right.

        Raises:
          ValueError: if the caption cannot be read (`data.scenes.parse_caption`).
        """
        return self.grade([caption], image[None])[0]

    def grade(self, captions: Sequence[str], images: UInt8[np.ndarray, "b h w 3"]) -> list[dict[str, bool]]:
        """Compares pictures with their captions, one by one; see `score`."""
        if len(captions) != len(images):
            raise ValueError(f"{len(captions)} captions for {len(images)} pictures")
        queries = [parse_caption(self.world, caption) for caption in captions]
        return [self._compare(*pair) for pair in zip(queries, self.read_all(images), strict=True)]

    def _read_objects(
        self, differences: list[np.ndarray], masks: list[np.ndarray], backgrounds: list[np.ndarray]
    ) -> list[ObjectReading]:
        """Fits templates to objects: each is a picture minus its background, a mask, and that background's color."""
        crops = [
            _Crop.cut(difference, mask, self._bank.side) for difference, mask in zip(differences, masks, strict=True)
        ]
        readings = []
        for crop, fit, background in zip(crops, self._bank.fit(crops), backgrounds, strict=True):
            clean = fit.residual <= MAX_RESIDUAL / fit.diameter and fit.blend <= MAX_BLEND
            readings.append(
                ObjectReading(
                    shape=fit.shape if clean else None,
                    color=self._color(fit.gain * crop.direction, background),
                    size=fit.size,
                    center=(crop.corner[0] + fit.center[0], crop.corner[1] + fit.center[1]),
                    residual=fit.residual,
                    blend=fit.blend,
                )
            )
        return readings

    def _color(self, offset: np.ndarray, background: np.ndarray) -> str | None:
        """Names the color that differs by `offset` from the background, or by a little more in the same direction."""
        colors = self._colors - background
        fading = np.clip(colors @ offset / (offset @ offset + 1e-6), 1.0, MAX_FADING)
        return _nearest(np.zeros(3), colors - fading[:, None] * offset, tuple(self.world.colors))

    def _split(self, difference: np.ndarray, mask: np.ndarray, background: np.ndarray) -> list[ObjectReading]:
        """Reads an object that is no clean shape as several that touch; empty where that does not help."""
        inside = difference * mask[..., None]
        for threshold in SPLIT_DISTANCES:
            parts = _components(inside, threshold)
            if 2 <= len(parts) <= self.world.max_objects:
                # Each faint pixel between them belongs to the nearest one.
                away = [np.asarray(ndimage.distance_transform_edt(~part)) for part in parts]
                owners = np.argmin(away, axis=0)
                cut = [mask & (owners == number) for number in range(len(parts))]
                readings = self._read_objects([difference] * len(parts), cut, [background] * len(parts))
                if all(reading.shape for reading in readings):
                    return readings
        return []

    def _scene(self, background: np.ndarray, items: list[ObjectReading]) -> SceneReading:
        """Names the background and the relation, and puts the objects in order."""
        name = _nearest(background, self._backgrounds, tuple(self.world.backgrounds))
        spread = np.ptp([item.center for item in items], axis=0) if items else np.zeros(2)
        axis = int(spread[1] > spread[0])
        items = sorted(items, key=lambda item: item.center[axis])
        return SceneReading(name, tuple(items), self._relation(items) if len(items) <= self.world.max_objects else None)

    def _relation(self, items: Sequence[ObjectReading]) -> str | None:
        """The relation whose direction is nearest to that from each object to the one before it, if it is the same."""
        names = set()
        for first, second in itertools.pairwise(items):
            offset = np.subtract(first.center, second.center)
            scores = {name: float(offset @ np.array(vector)) for name, vector in self.world.relations.items()}
            names.add(max(scores, key=scores.__getitem__, default=None))
        return names.pop() if len(names) == 1 else None

    def _compare(self, query: CaptionQuery, reading: SceneReading) -> dict[str, bool]:
        """Scores a reading under the assignment of its objects to the caption's that gets most right."""
        size = len(query.objects)
        items: list[ObjectReading | None] = list(reading.objects)
        if size > 2:
            items = sorted(reading.objects, key=lambda item: item.residual)[:CANDIDATES]
        items += [None] * (size - len(items))
        candidates = (self._compare_ordered(query, reading, order) for order in itertools.permutations(items, size))
        return max(candidates, key=lambda score: sum(score.values()))

    def _compare_ordered(
        self, query: CaptionQuery, reading: SceneReading, items: Sequence[ObjectReading | None]
    ) -> dict[str, bool]:
        """Scores a reading whose objects are given in the caption's order; None stands for one that is missing."""
        score = {"count": len(reading.objects) == len(query.objects)}
        if query.background is not None:
            score["background"] = reading.background == query.background
        for key in (field.name for field in dataclasses.fields(ObjectQuery)):
            asked = [(getattr(want, key), item) for want, item in zip(query.objects, items, strict=True)]
            asked = [(value, item) for value, item in asked if value is not None]
            if asked:
                score[key] = all(item is not None and getattr(item, key) == value for value, item in asked)
        if query.relation is not None:
            found = [item for item in items if item is not None]
            score["relation"] = len(found) == len(items) and self._relation(found) == query.relation
        return {"all": all(score.values()), **score}


def summarize(scores: Iterable[Mapping[str, bool]]) -> dict[str, tuple[int, int]]:
    """Adds up scores.

    Args:
      scores: what `SceneGrader.grade` returned.

    Returns:
      attribute -> (pictures that have it right, pictures whose caption names it), "all" first.
    """
    totals: dict[str, tuple[int, int]] = {}
    for score in scores:
        for key, right in score.items():
            have, counted = totals.get(key, (0, 0))
            totals[key] = (have + int(right), counted + 1)
    return totals


@dataclasses.dataclass(frozen=True)
class _Crop:
    """An object cut out of a picture, alone, with its center of mass in the middle pixel.

    Attributes:
      projection: the picture minus its background, along `direction` [s s].
      direction: unit vector in RGB from the background to the object's color.
      energy: sum of squares of the picture minus its background, in all directions.
      corner: (x, y) of the crop's top left corner in the picture.
    """

    projection: np.ndarray
    direction: np.ndarray
    energy: float
    corner: tuple[int, int]

    @classmethod
    def cut(cls, difference: Float[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "h w"], side: int) -> "_Crop":
        """Cuts the object at `mask` out of a picture minus its background."""
        ys, xs = np.nonzero(mask)
        pixels = difference[ys, xs]
        # The strongest third of the pixels is free of edges, whose color is mixed with the background's.
        strength = (pixels**2).sum(1)
        strongest = pixels[strength >= np.partition(strength, -(len(strength) // 3) - 1)[-(len(strength) // 3) - 1]]
        direction = strongest.mean(0)
        direction /= np.linalg.norm(direction) + 1e-6
        along = pixels @ direction
        weight = np.maximum(along, 0) + 1e-6
        left = int(weight @ (xs + 0.5) / weight.sum()) - side // 2
        top = int(weight @ (ys + 0.5) / weight.sum()) - side // 2
        projection = np.zeros((side, side), np.float32)
        inside = (ys >= top) & (ys < top + side) & (xs >= left) & (xs < left + side)
        projection[ys[inside] - top, xs[inside] - left] = along[inside]
        return cls(projection, direction, float(strength.sum()), (left, top))


@dataclasses.dataclass(frozen=True)
class _Fit:
    """The best template of an object: its labels, center (x, y) in the crop, and amplitude; see ObjectReading."""

    shape: str
    size: str
    diameter: float
    center: tuple[float, float]
    gain: float
    residual: float
    blend: float


class _TemplateBank:
    """The renderer's shapes at every diameter, softness and 1/4-pixel position an object in a crop can have.

    A crop has the object's center of mass in its middle pixel, so only templates that do too (or nearly) are kept.
    """

    def __init__(self, world: World):
        diameters = [(size, diameter + step) for size, diameter in world.sizes.items() for step in DIAMETER_STEPS]
        # A triangle reaches 0.62 diameters from its center of mass, further than any other shape.
        self.side = 2 * int(np.ceil(0.62 * max(d for _, d in diameters) + CENTER_REACH)) + 1
        rows, self._labels, shapes = [], [], []
        for shape in world.shapes:
            for (size, diameter), blur in itertools.product(diameters, BLURS):
                for template, center in _placements(shape, diameter, blur, self.side):
                    rows.append(template.ravel())
                    self._labels.append((shape, size, diameter, center))
                    shapes.append(shape)
        templates = np.array(rows, np.float32)
        self._norms = np.linalg.norm(templates, axis=1)
        self._templates = templates / self._norms[:, None]  # [t, side * side], unit rows
        self._shapes = [slice(shapes.index(name), shapes.index(name) + shapes.count(name)) for name in world.shapes]

    def fit(self, crops: Sequence[_Crop], block: int = 64) -> list[_Fit]:
        """Returns the best template of each crop."""
        fits = []
        for start in range(0, len(crops), block):
            part = crops[start : start + block]
            projections = np.stack([crop.projection.ravel() for crop in part])
            # Least squares over the amplitude leaves |a|^2 - (a . t)^2 of a crop a, for a template t of length one.
            matches = projections @ self._templates.T
            fits += [self._choose(crop, match) for crop, match in zip(part, matches, strict=True)]
        return fits

    def _choose(self, crop: _Crop, matches: np.ndarray) -> _Fit:
        """Picks the best template from the products of a crop with all of them."""
        winners = [part.start + int(matches[part].argmax()) for part in self._shapes]  # the best of each shape
        amplitudes = matches[winners]
        first = int(amplitudes.argmax())
        best = winners[first]
        # With the best template at 0 and another's at 1, the crop's foot on the line between them.
        others = np.delete(np.arange(len(winners)), first)
        fitted = amplitudes[:, None] * self._templates[winners]
        gaps = ((fitted[others] - fitted[first]) ** 2).sum(1)
        lead = amplitudes[first] ** 2 - amplitudes[others] ** 2
        shape, size, diameter, center = self._labels[best]
        return _Fit(
            shape=shape,
            size=size,
            diameter=diameter,
            center=center,
            gain=float(matches[best] / self._norms[best]),
            residual=float(1 - matches[best] ** 2 / (crop.energy + 1e-6)),
            blend=float(np.max(0.5 - lead / (2 * gaps + 1e-6))),
        )


def _placements(
    shape: str, diameter: float, blur: float, side: int
) -> Iterator[tuple[np.ndarray, tuple[float, float]]]:
    """Draws a shape at every position that has its center of mass in the middle pixel, or a little outside it.

    Yields:
      Its coverage [side side], 0 to 1, and its center (x, y).
    """
    margin = side // 2
    steps = range(-margin * SUPERSAMPLE // 2, margin * SUPERSAMPLE // 2)
    mass_x, mass_y = _center_of_mass(coverage(shape, diameter, 0, 0))
    for fine_y, fine_x in itertools.product(steps, steps):
        if max(abs(mass_x + fine_x / SUPERSAMPLE - 0.5), abs(mass_y + fine_y / SUPERSAMPLE - 0.5)) > CENTER_REACH:
            continue
        cover = coverage(shape, diameter, fine_x % SUPERSAMPLE, fine_y % SUPERSAMPLE)
        canvas = np.zeros((side + 2 * margin,) * 2, np.float32)
        top = len(canvas) // 2 - len(cover) // 2 + fine_y // SUPERSAMPLE
        left = len(canvas) // 2 - len(cover) // 2 + fine_x // SUPERSAMPLE
        canvas[top : top + len(cover), left : left + len(cover)] = cover / np.float32(SUPERSAMPLE**2)
        if blur:
            canvas = ndimage.gaussian_filter(canvas, blur)
        center = (side // 2 + fine_x / SUPERSAMPLE, side // 2 + fine_y / SUPERSAMPLE)
        yield canvas[margin:-margin, margin:-margin], center


def _center_of_mass(cover: np.ndarray) -> tuple[float, float]:
    """(x, y) from the top left corner of the middle pixel."""
    place = np.arange(len(cover)) + 0.5 - len(cover) // 2
    return float(cover.sum(0) @ place / cover.sum()), float(cover.sum(1) @ place / cover.sum())


def _components(difference: Float[np.ndarray, "h w 3"], threshold: float) -> list[Bool[np.ndarray, "h w"]]:
    """Where the objects are: connected pixels that differ by more than `threshold`, and two pixels around them."""
    strength = (difference**2).sum(-1)
    labels = np.empty(strength.shape, np.int32)
    count = ndimage.label(strength > threshold**2, structure=np.ones((3, 3)), output=labels)
    parts = [strength[labels == k] for k in range(1, count + 1)]
    keep = [k for k, part in enumerate(parts, 1) if len(part) >= OBJECT_AREA and part.max() > OBJECT_DISTANCE**2]
    grown = np.where(labels > 0, labels, ndimage.maximum_filter(labels, 5))
    return [grown == k for k in keep]


def _nearest(value: Float[np.ndarray, "3"], palette: Float[np.ndarray, "n 3"], names: tuple[str, ...]) -> str | None:
    """The name of the nearest color, or None where that is far."""
    distances = np.linalg.norm(palette - value, axis=1)
    best = int(distances.argmin())
    return names[best] if distances[best] <= COLOR_TOLERANCE else None
