"""Plain PNGs to pixels, faster than Pillow: libdeflate inflates them, the filters of their rows are undone in Rust.

Only what cannot be read in two ways is taken, whole and not too large: gray or RGB of 8 bits, rows in order, nothing
that turns a picture or makes a color clear. The rest is Pillow's, and so is whatever is wrong with one, which Pillow
puts into words: the sums that it checks are checked here.
"""

import re
import struct
import zlib

import deflate
import numpy as np
from jaxtyping import UInt8

try:
    import imgread
except ImportError:  # there is no wheel for this system
    imgread = None

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER = struct.Struct(">I4sIIBBBBB")  # length, name, width, height, depth, color, compression, filters, interlacing
_HEADER_ENDS = 33  # with its sum
_CHUNK, _SUM = struct.Struct(">I4s"), struct.Struct(">I")
_CHANNELS = {(8, 0, 0, 0, 0): 1, (8, 2, 0, 0, 0): 3}  # of gray and of RGB, by what the header says after the size
_END = b"\0\0\0\0IEND\xae\x42\x60\x82"

_MAX_PIXELS = 2**24  # three copies are held for a moment

# Chunks before the pixels that change none, and how long they are.
_SILENT = {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"pHYs": 9, b"tIME": 7}
_LONGEST_HEAD = 2**16  # bytes before the pixels; longer texts are Pillow's to count
_TURNS = re.compile(b"exif|xmp", re.IGNORECASE)  # in a text that may say how a picture is to be turned

_BLOCK = 65535  # bytes: the longest that deflate stores
_BLOCK_HEAD = struct.Struct("<BHH")  # last or not, length, its complement


def decode_plain_png(data: bytes, max_pixels: int) -> UInt8[np.ndarray, "h w 3"] | None:
    """The pixels of a plain PNG of at most so many; None of any other bytes. The array cannot be written to."""
    if imgread is None or not data.startswith(_SIGNATURE):
        return None
    try:
        size = _size_of_rows(data, max_pixels)
        rows = deflate.zlib_decompress(_find_rows(data), size) if size else b""
        if not size or len(rows) != size:
            return None
        pixels = imgread.load_numpy_from_bytes(_store(data[:_HEADER_ENDS], rows))
    except (struct.error, deflate.DeflateError, RuntimeError, ValueError):  # the first of files that are cut short
        return None
    pixels.flags.writeable = False
    return pixels


def has_all_rows(data: bytes) -> bool:
    """Whether the rows of a PNG, not interlaced, unpack to what its header claims; Pillow takes zeros for others.

    Of what Pillow refuses itself it is said that they do: interlaced ones, and what cannot be unpacked at all.
    """
    try:
        _, _, width, height, depth, color, _, _, interlaced = _HEADER.unpack_from(data, len(_SIGNATURE))
        bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
        missing = 0 if interlaced else height * (1 + (width * bits + 7) // 8)
        place, inflater = _HEADER_ENDS, zlib.decompressobj()
        while missing > 0 and not inflater.eof:
            length, name = _CHUNK.unpack_from(data, place)
            packed = data[place + 8 : place + 8 + length] if name == b"IDAT" else b""
            place += length + 12
            while packed and missing > 0:
                missing -= len(inflater.decompress(packed, _BLOCK))
                packed = inflater.unconsumed_tail
    except (KeyError, struct.error, zlib.error):
        return True
    return missing <= 0


def _size_of_rows(data: bytes, max_pixels: int) -> int:
    """How many bytes its header lets the rows of a PNG have, unpacked; 0 if they are not plain ones, or too many."""
    length, name, width, height, *kind = _HEADER.unpack_from(data, len(_SIGNATURE))
    whole = length == 13 and name == b"IHDR" and _has_sum(data, len(_SIGNATURE), _HEADER_ENDS - 4)
    channels = _CHANNELS.get(tuple(kind), 0)
    small = width * height <= min(max_pixels, _MAX_PIXELS)
    return height * (1 + width * channels) if whole and channels and small else 0


def _find_rows(data: bytes) -> bytes:
    """The compressed rows of a PNG that has no more to say, and ends where its bytes end; of others none."""
    view, place, parts = memoryview(data), _HEADER_ENDS, []
    while True:
        length, name = _CHUNK.unpack_from(data, place)
        end = place + 8 + length
        if name == b"IDAT":
            parts.append(view[place + 8 : end])
        elif parts:
            return b"".join(parts) if data[place:] == _END else b""
        elif end > _LONGEST_HEAD or not _is_silent(name, data[place + 8 : end]) or not _has_sum(data, place, end):
            return b""
        place = end + 4


def _is_silent(name: bytes, body: bytes) -> bool:
    """Whether a chunk before the pixels says nothing about them."""
    return not _TURNS.search(body) if name == b"tEXt" else _SILENT.get(name) == len(body)


def _has_sum(data: bytes, place: int, end: int) -> bool:
    """Whether the chunk at a place has the right sum at its end."""
    return zlib.crc32(data[place + 4 : end]) == _SUM.unpack_from(data, end)[0]


def _store(start: bytes, rows: bytes | bytearray) -> bytes:
    """A PNG of rows that are not compressed."""
    view, body = memoryview(rows), [b"IDAT\x78\x01"]
    for place in range(0, len(rows), _BLOCK):
        block = view[place : place + _BLOCK]
        body += [_BLOCK_HEAD.pack(place + _BLOCK >= len(rows), len(block), len(block) ^ 0xFFFF), block]
    body.append(_SUM.pack(deflate.adler32(rows)))
    crc = 0
    for part in body:
        crc = deflate.crc32(part, crc)
    return b"".join([start, _SUM.pack(sum(map(len, body)) - 4), *body, _SUM.pack(crc), _END])
