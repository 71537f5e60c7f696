"""From a scene to its pixels: exact, anti-aliased and the same on every machine.

A shape is drawn as a yes-or-no mask at 4x the resolution and averaged over 4 x 4 blocks, so its coverage is a whole
number of sixteenths; colors are mixed in integers. Positions on a 1/4-pixel grid are whole steps of the fine mask, so
each (shape, diameter, fraction of a pixel) is drawn once and kept.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import UInt8

from data.scenes.scene import Scene, World

SUPERSAMPLE = 4


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a scene's objects lie.

    Attributes:
      centers: (x, y) of each object's center in pixels from the top left corner, on a 1/4-pixel grid.
      diameters: each object's diameter in pixels.
    """

    centers: tuple[tuple[float, float], ...]
    diameters: tuple[float, ...]


def sample_layout(world: World, scene: Scene, rng: np.random.Generator) -> Layout:
    """Draws where the objects of a scene lie, so that they neither touch nor leave the picture."""
    jitters = (-world.diameter_jitter, 0.0, world.diameter_jitter)
    diameters = tuple(world.sizes[item.size] + jitters[rng.integers(3)] for item in scene.objects)
    middle = world.image_size / 2
    if len(scene.objects) == 1:
        center = (middle + _jitter(rng, world.center_jitter), middle + _jitter(rng, world.center_jitter))
        return Layout((center,), diameters)
    while True:
        across = [_jitter(rng, world.pair_across_jitter) for _ in scene.objects]
        if max(across) - min(across) <= world.pair_across_distance:
            break
    x, y = world.relations[scene.relation]
    centers = []
    for place, offset in enumerate(across):
        steps = (len(across) - 1) / 2 - place  # from the middle of the row
        along = steps * world.pair_distance * (x + y) + _jitter(rng, world.pair_along_jitter)
        centers.append((middle + along, middle + offset) if x else (middle + offset, middle + along))
    return Layout(tuple(centers), diameters)


def render(world: World, scene: Scene, layout: Layout) -> UInt8[np.ndarray, "h w 3"]:
    """Draws a scene; the picture is a function of the arguments alone, to the last bit."""
    size = world.image_size
    image = np.empty((size, size, 3), np.int32)
    image[:] = world.backgrounds[scene.background]
    full = SUPERSAMPLE**2
    for item, (x, y), diameter in zip(scene.objects, layout.centers, layout.diameters, strict=True):
        fine_x, fine_y = round(x * SUPERSAMPLE), round(y * SUPERSAMPLE)
        cover = coverage(item.shape, diameter, fine_x % SUPERSAMPLE, fine_y % SUPERSAMPLE)
        radius = len(cover) // 2
        top, left = fine_y // SUPERSAMPLE - radius, fine_x // SUPERSAMPLE - radius
        rows, columns = slice(max(top, 0), top + len(cover)), slice(max(left, 0), left + len(cover))
        cover = cover[rows.start - top : size - top, columns.start - left : size - left, None].astype(np.int32)
        patch = image[rows, columns]
        image[rows, columns] = (patch * (full - cover) + cover * np.array(world.colors[item.color]) + full // 2) // full
    return image.astype(np.uint8)


@functools.cache
def coverage(shape: str, diameter: float, fine_x: int, fine_y: int) -> UInt8[np.ndarray, "s s"]:
    """How much of each pixel a shape covers, in sixteenths.

    Args:
      shape: its name.
      diameter: in pixels.
      fine_x: the center's distance from the left edge of the middle pixel, in quarters of a pixel.
      fine_y: the same from its top edge.

    Returns:
      Values from 0 to 16 in a square with an odd side; its middle pixel holds the center. Read-only.

    Raises:
      ValueError: if there is no such shape; lists the choices.
    """
    if shape not in _OUTLINES:
        raise ValueError(f"no shape is called {shape!r}; shapes are {', '.join(_OUTLINES)}")
    # No outline reaches further than 1.1 radii; one more pixel for the fraction.
    radius = int(np.ceil(diameter * 0.55)) + 1
    side = 2 * radius + 1
    points = np.arange(side * SUPERSAMPLE) + 0.5 - radius * SUPERSAMPLE
    scale = SUPERSAMPLE * diameter / 2
    inside = _OUTLINES[shape](((points - fine_x) / scale)[None, :], ((points - fine_y) / scale)[:, None])
    blocks = inside.reshape(side, SUPERSAMPLE, side, SUPERSAMPLE)
    cover = blocks.sum((1, 3), dtype=np.uint8)
    cover.flags.writeable = False
    return cover


def _jitter(rng: np.random.Generator, limit: float) -> float:
    """A uniform draw from [-limit, limit], on the 1/4-pixel grid."""
    steps = round(limit * SUPERSAMPLE)
    return int(rng.integers(-steps, steps + 1)) / SUPERSAMPLE


def _polygon(*vertices: tuple[float, float]):
    """Returns the outline of a polygon, by the even-odd rule."""

    def inside(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        odd = np.zeros(np.broadcast_shapes(x.shape, y.shape), bool)
        for (x0, y0), (x1, y1) in zip(vertices, vertices[1:] + vertices[:1], strict=True):
            if y0 != y1:
                odd ^= ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
        return odd

    return inside


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The sextic (u^2 + v^2 - 1)^3 = u^2 v^3, v upwards."""
    u, v = x * 1.15, 0.12 - y * 1.15
    return (u**2 + v**2 - 1) ** 3 < u**2 * v**3


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return (np.maximum(x, y) < 1) & (np.minimum(x, y) < 0.33)


# Is the point (x, y) inside a shape of radius 1 around 0? y points down. Rounded vertices keep it alike everywhere.
_OUTLINES = {
    "circle": lambda x, y: x**2 + y**2 < 1,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) < 0.88,
    "triangle": _polygon((0.0, -0.95), (1.05, 0.9), (-1.05, 0.9)),
    "star": _polygon(
        *((0.0, -0.99), (0.2939, -0.3045), (1.0366, -0.2368), (0.4755, 0.2545), (0.6407, 0.9818)),
        *((0.0, 0.6), (-0.6407, 0.9818), (-0.4755, 0.2545), (-1.0366, -0.2368), (-0.2939, -0.3045)),
    ),
    "ring": lambda x, y: np.abs(x**2 + y**2 - 0.63) < 0.4,
    "cross": _cross,
    "diamond": lambda x, y: np.abs(x) / 0.82 + np.abs(y) / 1.09 < 1,
    "heart": _heart,
}
