"""What happens to one example before it joins a batch: crops, resizes, flips, and the choice of a caption.

Every function takes a `numpy.random.Generator` keyed by the example's place in the stream, so that augmentation is a
function of that place alone.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
from jaxtyping import UInt8
from PIL import Image

from cli.errors import UserError
from data.buckets import Shape, cut_to

Picture = UInt8[np.ndarray, "_ _ c"]
Source = Picture | Image.Image  # what transforms take: pixels, or (faster) Pillow's image of them
PictureTransform = Callable[[Source, Any, np.random.Generator | None], Picture]

_LONGEST = 64  # times the short side that is resized of the long one: a line of pixels would fill the memory


class TransformPair(NamedTuple):
    """What happens to pictures in training, and what evaluation does with them in its place.

    Attributes:
      training: may draw from the example's generator.
      evaluation: draws nothing, and takes None for the generator. A pair of twice the same draws nothing at all.
      reads: the short side that is needed of a picture, in sizes of the result; 0 for all there is.
      any_shape: whether both take (height, width) as well as the side of a square, as buckets ask for.
    """

    training: PictureTransform
    evaluation: PictureTransform
    reads: float = 1.0
    any_shape: bool = False

    def draft_side(self, size: int) -> int:
        """The short side, in pixels, that is asked of a draft of a picture for a result of `size`; 0 for all of it."""
        return math.ceil(self.reads * size)


def center_square(
    image: Source, size: int, rng: np.random.Generator | None = None
) -> UInt8[np.ndarray, "{size} {size} c"]:
    """Cuts the central square and resizes it to `size`; what evaluation and undistorted training use. Draws nothing."""
    del rng
    height, width = _extent(image)
    side = min(height, width)
    return _resize(_crop(image, (height - side) // 2, (width - side) // 2, side), size)


def dvae_training(image: Source, size: int, rng: np.random.Generator) -> UInt8[np.ndarray, "{size} {size} c"]:
    """Augmentation of the discrete VAE (Ramesh et al. 2021, listing 1).

    A random square as large as the picture holds, resized to between 9/8 and 12/8 of `size`, a random crop of `size`,
    and a horizontal flip in half of the cases. No picture is enlarged for that: a small one is resized less.
    """
    side = min(_extent(image))
    square = _random_crop(image, side, rng)
    image = _resize(square, _random_side(side, size, (9 / 8, 12 / 8), rng))
    return _flip(_random_crop(image, size, rng), rng)


def dalle_training(image: Source, size: int, rng: np.random.Generator) -> UInt8[np.ndarray, "{size} {size} c"]:
    """Augmentation of the transformer (Ramesh et al. 2021, listing 2).

    A square near the center (its offset from 3/8 to below 5/8 of the slack), resized to between 1 and 9/8 of `size`,
    and a random crop of `size`. No flip: pictures hold text, and captions say left and right. No picture is enlarged
    for that: a small one is resized less.
    """
    height, width = _extent(image)
    side = min(height, width)
    slack = max(height, width) - side
    low = slack * 3 // 8
    offset = int(rng.integers(low, max(low + 1, slack * 5 // 8)))
    top, left = (offset, 0) if height > width else (0, offset)
    image = _resize(_crop(image, top, left, side), _random_side(side, size, (1.0, 9 / 8), rng))
    return _random_crop(image, size, rng)


def clip_evaluation(
    image: Source, size: int, rng: np.random.Generator | None = None
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """CLIP's view of a picture: its short side resized to `size`, the center cut out, as RGB. Draws nothing.

    Rounds as torchvision does, which the authors' code uses: its pictures, byte for byte.
    """
    del rng
    image = _resize_short_side(image, size)
    top, left = (round((extent - size) / 2) for extent in _extent(image))  # a half goes to the even number
    return _rgb(_crop(image, top, left, size))


def clip_training(image: Source, size: int, rng: np.random.Generator) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """CLIP's only augmentation (Radford et al. 2021, section 2.4): a random square of the resized picture."""
    return _rgb(_random_crop(_resize_short_side(image, size), size, rng))


def center_crop(image: Source, size: int | Shape, rng: np.random.Generator | None = None) -> Picture:
    """The middle of a picture, as large as it has the aspect ratio that is asked for, resized. Draws nothing.

    Args:
      image: of any size and aspect ratio.
      size: height and width of the result, or the side of a square.
      rng: not used.
    """
    del rng
    return _cover(image, size, lambda slack: slack // 2)


def random_crop(image: Source, size: int | Shape, rng: np.random.Generator) -> Picture:
    """As `center_crop`, of a random place: what pictures of a bucket lack in training is not always the same."""
    return _cover(image, size, lambda slack: int(rng.integers(slack + 1)))


def random_crop_flip(image: Source, size: int | Shape, rng: np.random.Generator) -> Picture:
    """As `random_crop`, flipped horizontally in half of the cases."""
    return _flip(random_crop(image, size, rng), rng)


def center_square_flip(image: Source, size: int, rng: np.random.Generator) -> UInt8[np.ndarray, "{size} {size} c"]:
    """The central square, flipped horizontally in half of the cases, as DDPM does (Ho et al. 2020, App. B)."""
    return _flip(center_square(image, size), rng)


def celeba_evaluation(
    image: Source, size: int, rng: np.random.Generator | None = None
) -> UInt8[np.ndarray, "{size} {size} c"]:
    """The face of an aligned CelebA picture of 178 x 218: 128 x 128 pixels around (89, 121), resized. Draws nothing.

    The crop of DDIM and U-ViT (Song et al. 2021, Bao et al. 2023), whose code resizes with a bilinear filter.

    Raises:
      UserError: if the picture does not hold the crop.
    """
    del rng
    height, width = _extent(image)
    half, column, row = 64, 89, 121
    if width < column + half or height < row + half:
        raise UserError(
            f"a picture of {width} x {height} is no aligned one of CelebA (178 x 218); choose another "
            "config.data.transform"
        )
    crop = _crop(image, row - half, column - half, 2 * half)
    return np.asarray(_image(crop).resize((size, size), Image.Resampling.BILINEAR))


def celeba_training(image: Source, size: int, rng: np.random.Generator) -> UInt8[np.ndarray, "{size} {size} c"]:
    """The face of a CelebA picture, flipped horizontally in half of the cases."""
    return _flip(celeba_evaluation(image, size), rng)


def adm_evaluation(
    image: Source, size: int, rng: np.random.Generator | None = None
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """ADM's view of a picture of ImageNet (Dhariwal and Nichol 2021), which DiT and U-ViT share. Draws nothing.

    Halved by averages while the short side is at least twice `size`, then resized to it with a bicubic filter; of that
    the center, as RGB.
    """
    del rng
    picture = _image(_cut_long(image)).convert("RGB")
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    width, height = (round(extent * scale) for extent in picture.size)
    resized = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return resized[top : top + size, left : left + size]


def adm_training(image: Source, size: int, rng: np.random.Generator) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """ADM's view of a picture, flipped horizontally in half of the cases."""
    return _flip(adm_evaluation(image, size), rng)


def first_stage_evaluation(
    image: Source, size: int, rng: np.random.Generator | None = None
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """The view of a picture that latent diffusion's first stages are evaluated on. Draws nothing.

    The short side is resized to 3/2 of `size` and the center cut out, as RGB.
    """
    del rng
    image = _resize_short_side(image, size * 3 // 2)
    top, left = ((extent - size) // 2 for extent in _extent(image))
    return _rgb(_crop(image, top, left, size))


def first_stage_training(image: Source, size: int, rng: np.random.Generator) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """A random square of a picture whose short side is 3/2 of it: 256 of 384 in latent diffusion's released configs."""
    return _rgb(_random_crop(_resize_short_side(image, size * 3 // 2), size, rng))


TRANSFORMS: Mapping[str, TransformPair] = {
    "center_square": TransformPair(center_square, center_square),
    "center_square_flip": TransformPair(center_square_flip, center_square),
    "dvae_training": TransformPair(dvae_training, center_square, reads=12 / 8),
    "dalle_training": TransformPair(dalle_training, center_square, reads=9 / 8),
    "clip_training": TransformPair(clip_training, clip_evaluation),
    "clip_evaluation": TransformPair(clip_evaluation, clip_evaluation),
    "center_crop": TransformPair(center_crop, center_crop, any_shape=True),
    "random_crop": TransformPair(random_crop, center_crop, any_shape=True),
    "random_crop_flip": TransformPair(random_crop_flip, center_crop, any_shape=True),
    "celeba_training": TransformPair(celeba_training, celeba_evaluation, reads=0),
    "adm_training": TransformPair(adm_training, adm_evaluation),
    "first_stage_training": TransformPair(first_stage_training, first_stage_evaluation, reads=3 / 2),
}


def transform_pair(name: str) -> TransformPair:
    """Returns the transforms called `name`.

    Raises:
      UserError: if there are none; lists the choices.
    """
    if name not in TRANSFORMS:
        raise UserError(f"config.data.transform={name!r} is unknown; choose one of {', '.join(TRANSFORMS)}")
    return TRANSFORMS[name]


def choose_caption(captions: Sequence[str], rng: np.random.Generator | None) -> int:
    """The number of one of an example's captions: any of them at random, or the first one without a generator."""
    return 0 if rng is None else int(rng.integers(len(captions)))


def _extent(image: Source) -> tuple[int, int]:
    """Height and width."""
    return (image.height, image.width) if isinstance(image, Image.Image) else image.shape[:2]


def _image(image: Source) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    return Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)


def _crop(image: Source, top: int, left: int, height: int, width: int = 0) -> Source:
    """A part of a picture, square unless a width is given."""
    width = width or height
    if isinstance(image, Image.Image):
        return image.crop((left, top, left + width, top + height))
    return image[top : top + height, left : left + width]


def _cut_long(image: Source) -> Source:
    """The middle of a picture that is very long or very wide."""
    height, width = _extent(image)
    limit = _LONGEST * min(height, width)
    tall, wide = min(height, limit), min(width, limit)
    if (tall, wide) == (height, width):
        return image
    return _crop(image, (height - tall) // 2, (width - wide) // 2, tall, wide)


def _flip(image: Picture, rng: np.random.Generator) -> Picture:
    """The picture's mirror image in half of the cases."""
    return image[:, ::-1] if rng.random() < 0.5 else image


def _random_crop(image: Source, side: int, rng: np.random.Generator) -> Source:
    height, width = _extent(image)
    top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
    return _crop(image, top, left, side)


def _random_side(side: int, size: int, between: tuple[float, float], rng: np.random.Generator) -> int:
    """The side that a square of `side` is resized to: in a range of multiples of `size`, where it is that large."""
    low, high = (max(size, min(side, round(factor * size))) for factor in between)
    return int(rng.integers(low, high + 1))


def _cover(image: Source, size: int | Shape, offset: Callable[[int], int]) -> Picture:
    """A part of the aspect ratio of `size`, resized to it; `offset` says how much of the slack lies before the part."""
    shape = (size, size) if isinstance(size, int) else size
    extent = _extent(image)
    height, width = cut_to(extent, shape)
    top, left = (offset(slack) if slack else 0 for slack in (extent[0] - height, extent[1] - width))
    return _resize(_crop(image, top, left, height, width), *shape)


def _resize(image: Source, side: int, width: int = 0) -> Picture:
    """Resizes a square, or a rectangle where a width is given beside its height `side`.

    To a smaller one by averages over areas, to one that is larger in any direction by a bicubic filter. An output pixel
    is the mean over its own area, to which the pixels at its edge count by the part of them in it; rounded to the
    nearest. The listings of the DALL-E paper move the areas a little apart beside (corners aligned).
    """
    shape = (side, width or side)
    before = _extent(image)
    if before[0] < shape[0] or before[1] < shape[1]:
        image, before = _image(image).resize(shape[::-1], Image.Resampling.BICUBIC), shape
    if before == shape:
        pixels = np.asarray(image)
        return pixels if pixels.ndim == 3 else pixels[..., None]
    pixels, channels = _four_channels(image)
    down, across = (_areas(count, parts) for count, parts in zip(before, shape, strict=True))
    rows = down @ pixels.reshape(before[0], -1).astype(np.float32)
    columns = np.ascontiguousarray(rows.view(np.complex128).T).view(np.float32)  # turned pixel by pixel
    means = across @ columns
    turned = np.rint(means, out=means).astype(np.uint8).view(np.uint32)  # [width height], a pixel each
    return _of_four_channels(np.ascontiguousarray(turned.T).view(np.uint8).reshape(*shape, 4), channels)


def _four_channels(image: Source) -> tuple[UInt8[np.ndarray, "h w 4"], int]:
    """Pixels with so many channels that each can be moved as one number, which is fast; and how many they had."""
    height, width = _extent(image)
    channels = len(image.getbands()) if isinstance(image, Image.Image) else image.shape[-1]
    if channels == 3:
        data = _image(image).tobytes("raw", "RGBX")
        return np.frombuffer(data, np.uint8).reshape(height, width, 4), channels
    pixels = np.asarray(image).reshape(height, width, channels)
    return np.concatenate([pixels, np.zeros((height, width, 4 - channels), np.uint8)], axis=-1), channels


def _of_four_channels(pixels: UInt8[np.ndarray, "h w 4"], channels: int) -> Picture:
    """The first channels of them."""
    if channels == 3:
        return np.asarray(Image.frombytes("RGB", pixels.shape[1::-1], pixels.data, "raw", "RGBX"))
    return np.ascontiguousarray(pixels[..., :channels])


@functools.lru_cache(maxsize=256)
def _areas(count: int, side: int) -> scipy.sparse.csr_array:
    """[side count], float32: the share of each of `count` pixels in the mean over each of `side` equal parts."""
    borders = np.arange(side + 1) * (count / side)
    first = borders[:-1].astype(int)
    places = first[:, None] + np.arange(math.ceil(count / side) + 1)  # one more than there are, for the last border
    covered = np.minimum(borders[1:, None], places + 1) - np.maximum(borders[:-1, None], places)
    shares = (np.maximum(covered, 0) * (side / count)).astype(np.float32)
    rows, columns = np.nonzero(shares)
    return scipy.sparse.csr_array(
        (shares[rows, columns], (rows, np.minimum(places[rows, columns], count - 1))), shape=(side, count)
    )


def _resize_short_side(image: Source, size: int) -> Image.Image:
    """Resizes the short side to `size` and the long one in proportion, rounded down.

    Alpha is dropped after the resize, as the published transforms drop it: a clear pixel adds nothing to its neighbors.
    """
    picture = _image(_cut_long(image))
    short = min(picture.size)
    width, height = (int(size * extent / short) for extent in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def _rgb(image: Source) -> UInt8[np.ndarray, "_ _ 3"]:
    """The pixels of a picture, in which gray and alpha become RGB."""
    picture = _image(image)
    return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))
