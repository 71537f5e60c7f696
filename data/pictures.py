"""The one door for pictures: bytes of a file, or the name of one, to RGB as a viewer shows it.

Records of datasets, `--image` and archives all come through here, so that one file has the same pixels everywhere:

- turned as its EXIF or XMP orientation says;
- palette, one-bit, gray, CMYK, YCbCr and Lab as the colors that they stand for, naively where a color profile is
  embedded (profiles and gamma are not applied, as is usual in training);
- transparency laid on white, the color of most pages;
- of 16 bits (and 12, of TIFF) the high byte. Numbers without an agreed white, of 32 bits or floats, are refused;
- of an animation the first frame, and white where that leaves its canvas free.

Only the formats of `FORMATS` are opened: never one whose reader starts another program. What a file claims is checked
before memory is taken for it.
"""

import functools
import io
import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, ImageCms, ImageFile

from cli.errors import UserError
from cli.locations import Location, in_store, locate, write_whole
from data.plain_png import decode_plain_png, has_all_rows

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")

_T = TypeVar("_T")

MAX_PIXELS = 2**26  # that are decoded: 8192 x 8192, some 700 MB at the peak
MAX_BYTES = 2**28  # of a file

BACKGROUND = (255, 255, 255)  # under transparency

_ORIENTATION = 0x0112  # the tag of EXIF and TIFF
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF
_FILL_ORDER, _PLANES, _APART, _SAMPLE_FORMAT, _SIGNED = 266, 284, 2, 339, 2

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_PILLOW = re.compile(r"PIL\.")  # modules whose warnings are ignored

_CONVERT = "convert it to PNG or JPEG"
_SIGN = f"its pixels have a sign or 32 bits, without an agreed white; {_CONVERT} of 8 bits"

_LFS = "a pointer of Git LFS, not the file itself"
# How files begin that people take for pictures of a format above.
_OTHERS = (
    (b"%PDF", "a PDF"),
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript"),
    (b"8BPS", "a PSD"),
    (b"DDS ", "a DDS"),
    (b"qoif", "a QOI"),
    (b"\x00\x00\x01\x00", "an icon"),
    (b"\xff\x0a", "a JPEG XL"),
    (b"\x00\x00\x00\x0cJXL ", "a JPEG XL"),
    (b"v/1\x01", "an OpenEXR"),
    (b"#?RADIANCE", "a Radiance HDR"),
    (b"\x1f\x8b", "gzip"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"version https://git-lfs", _LFS),
)

logging.getLogger("PIL").setLevel(logging.CRITICAL)  # what cannot be read is said in one line, below


class PictureError(UserError):
    """Bytes that are no picture, or one that is not read; the message says why, without the name of a record."""


def read_picture(source: bytes | str | Path, size: int = 0) -> UInt8[np.ndarray, "h w 3"]:
    """Reads a picture as RGB, upright. The array cannot be written to.

    Args:
      source: the bytes of a file, or the name of one.
      size: the short side that is wanted, in pixels; 0 for all there is. A hint: a JPEG at least twice as large is
        decoded at a half, a quarter or an eighth, which saves time and memory, and stays at least `size`.

    Raises:
      PictureError: if it is missing, damaged, too large or of another kind.
    """
    return np.asarray(_read(source, lambda data: load_picture(data, size)))


def open_picture(source: bytes | str | Path, size: int = 0) -> Image.Image:
    """As `read_picture`, a Pillow image of mode RGB that is loaded and owns its memory."""
    return _read(source, lambda data: _open(data, functools.partial(_decode, size=size)))


def load_picture(data: bytes, size: int = 0) -> UInt8[np.ndarray, "h w 3"] | Image.Image:
    """As `read_picture` or as `open_picture`, whichever takes no copy."""
    plain_png = decode_plain_png(data, MAX_PIXELS) if len(data) <= MAX_BYTES else None
    if plain_png is not None:
        return plain_png

    def pixels(picture: ImageFile.ImageFile) -> np.ndarray | Image.Image:
        plain = _decode_plain(data, picture, size)
        return _decode(picture, size) if plain is None else plain

    return _open(data, pixels)


def picture_size(source: bytes) -> tuple[int, int]:
    """The height and width of what `read_picture` makes of the bytes of a file, from what stands before its pixels.

    A PNG that tells its orientation behind them is taken as it lies.

    Raises:
      PictureError: if it is of a kind that is not read, or too large.
    """

    def upright(picture: ImageFile.ImageFile) -> tuple[int, int]:
        _check_pixels(picture, picture.size)
        width, height = picture.size
        # Of a TIFF Pillow has exchanged them already, and it would decode a PNG to look for more.
        known = picture.format != "PNG" or {"exif", "xmp", "XML:com.adobe.xmp"} & set(picture.info)
        turned = picture.format != "TIFF" and known and _orientation(picture) in (5, 6, 7, 8)
        return (width, height) if turned else (height, width)

    return _open(source, upright)


def as_rgb(pixels: UInt8[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "h w 3"]:
    """Pixels that are stored as such, [h w] or [h w c] with one channel, two with alpha, three or four, as RGB.

    Raises:
      PictureError: if they have another shape, or there are none.
    """
    if pixels.ndim not in (2, 3) or not pixels.size or (pixels.ndim == 3 and pixels.shape[-1] not in (1, 2, 3, 4)):
        raise PictureError(f"an array of {' x '.join(map(str, pixels.shape))} numbers is no picture")
    pixels = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels
    return np.asarray(_to_rgb(Image.fromarray(pixels)))


def save_picture(location: Location, picture: Image.Image) -> None:
    """Writes a picture as the format that its location's name ends in."""
    if not in_store(location):
        picture.save(location)
        return
    file = io.BytesIO()
    picture.save(file, Image.registered_extensions()[location.suffix.lower()])
    write_whole(location, file.getvalue())


def _read_file(name: str | Path) -> bytes:
    """The bytes of a regular file, here or in a store; a device or a pipe might never end."""
    try:
        path = locate(name)
        if not path.exists():
            raise PictureError("there is no such file")
        if not path.is_file():
            raise PictureError("it is no file; name one picture")
        status: Any = path.stat()
        _check_bytes(status.length if in_store(path) else status.st_size)
        return path.read_bytes()
    except (OSError, ValueError) as error:  # a name may hold a null byte
        raise PictureError(_one_line(error)) from error


def _check_bytes(num: int) -> None:
    if num > MAX_BYTES:
        raise PictureError(f"a file of {num:,} bytes is larger than the {MAX_BYTES:,} that are read")


def _read(source: bytes | str | Path, decode: Callable[[bytes], _T]) -> _T:
    """What `decode` makes of a file; an error names it."""
    if isinstance(source, bytes):
        return decode(source)
    try:
        return decode(_read_file(source))
    except PictureError as error:
        raise PictureError(f"cannot read the picture {source}: {error}") from error


def _decode(picture: ImageFile.ImageFile, size: int) -> Image.Image:
    whole = picture.size
    picture.draft(None, (size, size) if size else None)  # of a JPEG alone
    _check_pixels(picture, whole)
    _scale_transparency(picture)
    _check_samples(picture)
    drawn = picture.tile[0][1] if picture.format == "GIF" and picture.tile else None
    png: Any = picture.fp if picture.format == "PNG" else None
    data = png.getvalue() if png else b""
    picture.load()
    last = picture.crop((0, picture.height - 1, *picture.size))
    if png and not np.asarray(last).any() and not has_all_rows(data):
        raise PictureError("it is damaged or cut short: rows of pixels are missing")
    turn = _TURNS.get(_orientation(picture))
    rgb = _to_rgb(picture)
    if drawn not in (None, (0, 0, *rgb.size)):  # around a frame that is smaller than its canvas there is nothing
        canvas = Image.new("RGB", rgb.size, BACKGROUND)
        canvas.paste(rgb.crop(drawn), drawn)
        rgb = canvas
    return rgb if turn is None else rgb.transpose(turn)


def _decode_plain(data: bytes, picture: ImageFile.ImageFile, size: int) -> UInt8[np.ndarray, "h w 3"] | None:
    """What `_decode` makes of a whole and upright JPEG in color, to the byte; None of any other picture.

    The library is the one that Pillow has (libjpeg-turbo), here straight into the array: a fifth less for a small
    picture. Of whatever it so much as warns of Pillow decides.
    """
    small = size and min(picture.size) >= 2 * size  # which Pillow decodes at a part
    if picture.format != "JPEG" or picture.mode != "RGB" or small or _orientation(picture) in _TURNS:
        return None
    _check_pixels(picture, picture.size)
    try:
        pixels = simplejpeg.decode_jpeg(data, strict=True)
    except ValueError:
        return None
    if pixels.shape != (picture.height, picture.width, 3):
        return None
    pixels.flags.writeable = False
    return pixels


def _open(data: bytes, use: Callable[[ImageFile.ImageFile], _T]) -> _T:
    """What `use` makes of a picture that is opened and not yet decoded.

    Raises:
      PictureError: for whatever either raises.
    """
    _check_bytes(len(data))
    _hush()
    try:
        return use(Image.open(io.BytesIO(data), formats=_formats()))
    except PictureError:
        raise
    except Image.UnidentifiedImageError as error:
        raise PictureError(_what_else(data)) from error
    except Image.DecompressionBombError as error:
        raise PictureError(f"it claims more than the {MAX_PIXELS:,} pixels that are read; make it smaller") from error
    except Exception as error:  # damaged bytes make the readers of formats raise of every kind; nothing else runs here
        raise PictureError(_what_is_wrong(error)) from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _hush() -> None:
    """Ignores Pillow's warnings: about what it can live with, once a process, and to nobody who knows the record.

    Threads share the list of filters, so that none can be set for the time of one picture. Somebody may take it away.
    """
    if not warnings.filters or warnings.filters[0][3] != _PILLOW:
        warnings.filterwarnings("ignore", module=_PILLOW.pattern)


def _check_pixels(picture: Image.Image, whole: tuple[int, int]) -> None:
    """Refuses what would take too much memory; a progressive JPEG holds all of itself whatever is wanted of it."""
    width, height = whole if picture.info.get("progressive") else picture.size
    if width * height > MAX_PIXELS:
        raise PictureError(f"{width} x {height} pixels are more than the {MAX_PIXELS:,} that are read; make it smaller")


def _check_samples(picture: ImageFile.ImageFile) -> None:
    """Refuses a TIFF whose samples Pillow takes for others, and has it read planes of 16 bits as such."""
    tags: Any = getattr(picture, "tag_v2", {})
    if _SIGNED in tags.get(_SAMPLE_FORMAT, ()):
        raise PictureError(_SIGN)
    if tags.get(_PLANES) != _APART or not picture.tile or picture.tile[0][0] != "raw":
        return
    # Pillow takes planes that are not compressed for plain bytes, of a single sample too.
    tiles: Any = picture.tile
    bits = set(tags.get(_BITS_PER_SAMPLE, (1,)))
    plain = tags.get(_FILL_ORDER, 1) == 1 and tags.get(_PHOTOMETRIC) != _WHITE_IS_ZERO
    if plain and bits == {16} and picture.mode in ("RGB", "RGBA"):
        deep = ";16L" if tags.prefix == b"II" else ";16B"
        picture.tile = [tile._replace(args=(tile[3][0] + deep, *tile[3][1:])) for tile in tiles]
    elif not plain or bits != {8}:
        raise PictureError(f"its colors are apart in a form that is not read; {_CONVERT} of 8 bits")


def _scale_transparency(picture: ImageFile.ImageFile) -> None:
    """Gives the clear color of a PNG the scale that Pillow gives its pixels."""
    clear = picture.info.get("transparency")
    if picture.format != "PNG" or clear is None or not picture.tile:
        return
    depth = picture.tile[0][3]
    if depth == "RGB;16B":
        picture.info["transparency"] = tuple(value >> 8 for value in clear)
    elif depth in ("L;2", "L;4"):
        picture.info["transparency"] = clear * (85 if depth == "L;2" else 17)


def _orientation(picture: Image.Image) -> Any:
    """How a loaded picture is to be turned; 1 for not at all. Of a TIFF Pillow has turned the pixels already."""
    try:
        return picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # as in `_decode`; a viewer ignores damaged EXIF
        return 1


def _to_rgb(picture: Image.Image) -> Image.Image:
    """A loaded picture of any mode as RGB.

    Raises:
      PictureError: if its numbers have no agreed scale.
    """
    if picture.mode == "F":
        raise PictureError(f"its pixels are floats, which have no agreed white; {_CONVERT} of 8 bits")
    if picture.mode == "I" and picture.format == "TIFF":
        raise PictureError(_SIGN)
    if picture.mode == "La":
        picture = picture.convert("LA")
    if picture.mode.startswith("I"):
        picture = _from_16_bits(picture)
    if picture.mode == "LAB":
        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(picture, lab, rgb, outputMode="RGB")
    if picture.has_transparency_data:
        clear = picture.convert("RGBA")
        picture = Image.new("RGB", picture.size, BACKGROUND)
        picture.paste(clear, mask=clear)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _from_16_bits(picture: Image.Image) -> Image.Image:
    """Gray of 16 bits as gray of 8, or as gray with alpha where one level is clear."""
    levels, tags = np.asarray(picture), getattr(picture, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
    gray = (levels >> (bits - 8)).clip(0, 255).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        gray = 255 - gray
    result = Image.fromarray(gray)
    clear = picture.info.get("transparency")
    if clear is not None:
        result.putalpha(Image.fromarray(np.where(levels == clear, 0, 255).astype(np.uint8)))
    return result


def _what_else(data: bytes) -> str:
    """What bytes are that no reader of `FORMATS` takes."""
    if not data:
        return "the file is empty"
    head = data[:1024].lstrip().lower()
    other = next((name for start, name in _OTHERS if data.startswith(start)), None)
    if other is None and data[4:8] == b"ftyp":
        brands = data[8 : min(int.from_bytes(data[:4], "big"), 1024)]
        other = "a HEIC" if data[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1") else "a video"
        if b"avif" in brands or b"avis" in brands:
            other = "an AVIF"
            if "AVIF" in _formats():
                return f"it is {other} that is damaged or cut short"
    if b"<svg" in head:
        other = "an SVG drawing"
    elif head.startswith((b"<!doctype html", b"<html")):
        other = "a web page"
    if other == _LFS:
        return f"it is {other}; run `git lfs pull` where it came from"
    if other:
        return f"it is {other}; {_CONVERT}"
    return f"it is no picture of a kind that is read ({', '.join(_formats())}), or its header is damaged"


def _what_is_wrong(error: Exception) -> str:
    if "MAX_TEXT" in str(error):
        return "its text or color profile unpacks to more than is read; save it again without metadata"
    return f"it is damaged, cut short or of a kind that is not read ({_one_line(error)})"


def _one_line(error: Exception) -> str:
    """The message of a library, without the line breaks and addresses that it may hold."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return re.sub(r"\s+", " ", re.sub(r"<[^<>]* at 0x[0-9a-f]+>", "the file", text))[:200]
