"""Plain PNGs have Pillow's pixels without Pillow; all others, and what is wrong with one, are left to it."""

import io
import platform
import struct
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from data import pictures, plain_png
from data.pictures import PictureError, load_picture, open_picture
from data.plain_png import decode_plain_png

HAS_WHEEL = sys.platform == "darwin" or (sys.platform == "linux" and platform.machine() == "x86_64")
# As setup.py has it; elsewhere Pillow reads every one.
pytestmark = pytest.mark.skipif(not HAS_WHEEL or sys.version_info >= (3, 15), reason="no wheel of imgread")

HEIGHT, WIDTH = 31, 23

Chunk = tuple[bytes, bytes]


def join(*chunks: Chunk) -> bytes:
    """A file of chunks, (name, body) each, with their sums."""
    parts = [struct.pack(">I", len(body)) + name + body for name, body in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(part + struct.pack(">I", zlib.crc32(part[4:])) for part in parts)


def header(*kind: int, width: int = WIDTH, height: int = HEIGHT) -> Chunk:
    """Of (depth, color type, interlacing), RGB of 8 bits by default."""
    depth, color, interlacing = kind or (8, 2, 0)
    return b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlacing)


def rows(width: int = 3 * WIDTH, height: int = HEIGHT) -> bytes:
    """Rows of so many bytes at random, with each of the five filters in turn."""
    noise = np.random.default_rng(0).integers(0, 256, (height, 1 + width), np.uint8)
    noise[:, 0] = np.arange(height) % 5
    return noise.tobytes()


def pixels(data: bytes) -> Chunk:
    return b"IDAT", zlib.compress(data)


def saved(array: np.ndarray, **options) -> bytes:
    Image.fromarray(array).save(stream := io.BytesIO(), "PNG", **options)
    return stream.getvalue()


END: Chunk = (b"IEND", b"")
NOISE = np.random.default_rng(1).integers(0, 256, (200, 150, 3), np.uint8)
PACKED = zlib.compress(rows())

PLAIN = {
    "rgb": join(header(), pixels(rows()), END),
    "gray": join(header(8, 0, 0), pixels(rows(WIDTH)), END),
    "one pixel": join(header(width=1, height=1), pixels(rows(3, 1)), END),
    "more than a block": saved(NOISE),
    "exactly two blocks": join(header(8, 0, 0, width=256, height=510), pixels(rows(256, 510)), END),
    "not compressed": saved(NOISE, compress_level=0),
    "several chunks": join(header(), (b"IDAT", PACKED[:9]), (b"IDAT", b""), (b"IDAT", PACKED[9:]), END),
    "more than its rows": join(header(), (b"IDAT", PACKED + b"more"), END),
    "gamma and resolution": join(header(), (b"gAMA", bytes(4)), (b"pHYs", bytes(9)), pixels(rows()), END),
    "text": join(header(), (b"tEXt", b"Software\0none"), pixels(rows()), END),
}

OTHERS = {
    "palette": join(header(8, 3, 0), (b"PLTE", bytes(range(24))), pixels(bytes((1 + WIDTH) * HEIGHT)), END),
    "alpha": saved(np.dstack([NOISE, NOISE[..., 0]])),
    "gray with alpha": saved(np.ascontiguousarray(NOISE[..., :2])),
    "16 bits": join(header(16, 2, 0), pixels(rows(6 * WIDTH)), END),
    "gray of 16 bits": join(header(16, 0, 0), pixels(rows(2 * WIDTH)), END),
    "one bit": join(header(1, 0, 0), pixels(rows(-(-WIDTH // 8))), END),
    "interlaced": join(header(8, 2, 1, width=1, height=1), pixels(b"\0abc"), END),
    "clear color": join(header(), (b"tRNS", bytes(6)), pixels(bytes(len(rows()))), END),
    "clear gray": join(header(8, 0, 0), (b"tRNS", bytes(2)), pixels(bytes((1 + WIDTH) * HEIGHT)), END),
    "turned": saved(NOISE, exif=bytes.fromhex("4578696600004d4d002a00000008000101120003000000010006000000000000")),
    "turned behind its pixels": join(
        header(), pixels(rows()), (b"eXIf", bytes.fromhex("4d4d002a00000008000101120003000000010006000000000000")), END
    ),
    "turned by text": join(header(), (b"tEXt", b'XML:com.adobe.xmp\0<tiff:Orientation="6">'), pixels(rows()), END),
    "color profile": saved(NOISE, icc_profile=bytes(200)),
    "bytes behind its end": join(header(), pixels(rows()), END) + b"more",
    "no end": join(header(), pixels(rows())),
    "too few rows": join(header(), pixels(rows()[:-70]), END),
    "unknown chunk": join(header(), (b"teSt", b""), pixels(rows()), END),
}


def flip(data: bytes, place: int) -> bytes:
    """The same bytes with one changed."""
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


WHOLE = PLAIN["gamma and resolution"]
DAMAGED = {
    "sum of the header": flip(WHOLE, 8 + 8 + 13),
    "sum of a silent chunk": flip(WHOLE, WHOLE.index(b"gAMA") + 8),
    "name of a chunk": flip(WHOLE, WHOLE.index(b"IDAT")),
    "length of a chunk": flip(WHOLE, WHOLE.index(b"gAMA") - 1),
    "length of resolution": join(header(), (b"pHYs", b"abc"), pixels(rows()), END),
    "sum of the pixels": join(header(), (b"IDAT", flip(PACKED, len(PACKED) - 1)), END),
    "a compressed byte": join(header(), (b"IDAT", flip(PACKED, 100)), END),
    "filter": join(header(), pixels(b"\5" + rows()[1:]), END),
    "cut in the pixels": WHOLE[:1000],
    "cut in the header": WHOLE[:20],
    "cut behind the header": WHOLE[:36],
    "no pixels": join(header(), END),
    "no width": join(header(width=0), pixels(rows()), END),
    "huge": join(header(width=2**31 - 1, height=2**31 - 1), pixels(rows()), END),
}


def outcome(read, data: bytes) -> str | list:
    try:
        return np.asarray(read(data)).tolist()
    except PictureError as error:
        return str(error)


@pytest.mark.parametrize("kind", PLAIN)
def test_a_plain_png_has_the_pixels_that_pillow_gives(monkeypatch, kind):
    data = PLAIN[kind]
    expected = np.asarray(open_picture(data))
    monkeypatch.setattr(Image, "open", None)  # which is not needed
    found = load_picture(data)
    assert isinstance(found, np.ndarray) and (found == expected).all() and found.shape == expected.shape
    with pytest.raises(ValueError, match="read-only"):
        found[0, 0, 0] = 1


@pytest.mark.parametrize("kind", OTHERS)
def test_other_pngs_are_left_to_pillow(kind):
    assert decode_plain_png(OTHERS[kind], 2**26) is None
    assert outcome(load_picture, OTHERS[kind]) == outcome(open_picture, OTHERS[kind])


@pytest.mark.parametrize("kind", DAMAGED)
def test_of_a_damaged_png_pillow_says_what_is_wrong(kind):
    said = outcome(load_picture, DAMAGED[kind])
    assert isinstance(said, str) and said == outcome(open_picture, DAMAGED[kind]) and "\n" not in said


@pytest.mark.parametrize("place", range(8, len(PLAIN["one pixel"])))
def test_every_bit_that_is_wrong_has_pillows_outcome(place):
    for bit in range(8):
        data = bytearray(PLAIN["one pixel"])
        data[place] ^= 1 << bit
        assert outcome(load_picture, bytes(data)) == outcome(open_picture, bytes(data))


def test_too_many_pixels_are_refused(monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PIXELS", HEIGHT * WIDTH - 1)
    with pytest.raises(PictureError, match=f"{WIDTH} x {HEIGHT} pixels are more"):
        load_picture(PLAIN["rgb"])


def test_what_unpacks_to_more_than_its_size_takes_no_memory():
    data = join(header(), pixels(bytes(2**26)), END)
    tracemalloc.start()
    assert decode_plain_png(data, 2**26) is None
    assert tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()
    assert outcome(load_picture, data) == outcome(open_picture, data)


def test_without_a_wheel_pillow_reads_it(monkeypatch):
    expected = load_picture(PLAIN["rgb"])
    monkeypatch.setattr(plain_png, "imgread", None)
    found = load_picture(PLAIN["rgb"])
    assert isinstance(found, Image.Image) and (np.asarray(found) == expected).all()
