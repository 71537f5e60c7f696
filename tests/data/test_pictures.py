"""Every kind of picture file has the pixels that a viewer shows, and every other file a line that says what it is."""

import io
import struct
import tracemalloc
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageCms, PngImagePlugin

from data import pictures
from data.pictures import PictureError, load_picture, open_picture, read_picture

RED, BLUE = (255, 0, 0), (0, 0, 255)


def file(picture: Image.Image | np.ndarray, form: str = "PNG", **options) -> bytes:
    picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    picture.save(stream := io.BytesIO(), form, **options)
    return stream.getvalue()


def halves() -> np.ndarray:
    """Red left, blue right; [8 16 3]."""
    picture = np.zeros((8, 16, 3), np.uint8)
    picture[:, :8], picture[:, 8:] = RED, BLUE
    return picture


def turned(orientation: int) -> bytes:
    """EXIF that says how a picture is to be turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def png(header: tuple[int, int, int, int], rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of (width, height, depth, color type) whose rows, each after a zero, are given."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    first = chunk(b"IHDR", struct.pack(">IIBBBBB", *header, 0, 0, 0))
    body = [chunk(name, content) for name, content in (*chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b""))]
    return b"\x89PNG\r\n\x1a\n" + first + b"".join(body)


def tiff(size: tuple[int, int], strips: list[bytes], order: str = "<", **tags: tuple[int, ...]) -> bytes:
    """An uncompressed TIFF of (width, height) with tags `_NUMBER` of shorts beside those that every one has.

    One without values is left out.
    """
    rest = {int(name[1:]): values for name, values in tags.items()}
    count = len(rest.get(258, (8,)))
    places = [1000 + sum(map(len, strips[:index])) for index in range(len(strips))]
    every = {256: size[:1], 257: size[1:], 258: (8,), 259: (1,), 262: (2 if count > 2 else 1,), 277: (count,)}
    every |= {273: tuple(places), 278: size[1:], 279: tuple(map(len, strips)), **rest}
    every = {tag: values for tag, values in every.items() if values}
    entries, values, place = b"", b"", 8 + 2 + 12 * len(every) + 4
    for tag in sorted(every):
        packed = struct.pack(f"{order}{len(every[tag])}H", *every[tag])
        entries += struct.pack(order + "HHI", tag, 3, len(every[tag]))
        entries += packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack(order + "I", place + len(values))
        values += packed if len(packed) > 4 else b""
    mark = b"II" if order == "<" else b"MM"
    head = struct.pack(order + "2sHIH", mark, 42, 8, len(every)) + entries + bytes(4) + values
    return head.ljust(1000, b"\0") + b"".join(strips)


@pytest.mark.parametrize("form", ["PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_a_palette_is_looked_up(form):
    picture = Image.fromarray(halves())
    picture = picture if form == "WEBP" else picture.quantize(2)
    assert (read_picture(file(picture, form, **({"lossless": True} if form == "WEBP" else {}))) == halves()).all()


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM"])
def test_one_bit_is_black_or_white(form):
    mask = np.arange(64).reshape(8, 8) % 3 == 0
    picture = read_picture(file(Image.fromarray(mask), form))
    assert (picture == np.where(mask, 255, 0)[..., None]).all() and picture.shape == (8, 8, 3)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_read(form):
    frames = [Image.new("RGB", (16, 16), color) for color in (RED, BLUE)]
    options = {"lossless": True} if form == "WEBP" else {}
    data = file(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert (read_picture(data) == RED).all()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(form, orientation):
    stored = np.zeros((16, 24, 3), np.uint8)
    stored[:8, :12], stored[8:, 12:] = RED, BLUE
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(form, {})
    flat = stored.astype(int)
    upright = {
        1: flat,
        2: flat[:, ::-1],
        3: flat[::-1, ::-1],
        4: flat[::-1],
        5: flat.swapaxes(0, 1),
        6: flat[::-1].swapaxes(0, 1),
        7: flat[::-1, ::-1].swapaxes(0, 1),
        8: flat[:, ::-1].swapaxes(0, 1),
    }[orientation]
    picture = read_picture(file(stored, form, exif=exif, **lossless))
    assert picture.shape == upright.shape and np.abs(picture - upright).max() <= 3


def test_damaged_exif_does_not_lose_the_picture():
    assert (read_picture(file(halves(), exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff")) == halves()).all()


DEEP = np.array([[0x0000, 0x0080, 0x0100, 0x8080, 0xFF80, 0xFFFF]], np.uint16).repeat(4, 0)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_gray_of_16_bits_keeps_its_high_byte(form):
    picture = read_picture(file(DEEP, form))
    assert np.abs(picture[..., 0].astype(int) - np.array([0, 0, 1, 128, 255, 255])).max() <= 1
    assert (picture == picture[..., :1]).all() and picture.shape == (4, 6, 3)


def test_other_layouts_of_16_bits():
    ramp = np.arange(256, dtype=np.uint16)[None] * 256 + 128
    assert (read_picture(file(ramp)) == np.arange(256)[None, :, None]).all()
    big = Image.frombytes("I;16B", (256, 1), ramp.astype(">u2").tobytes())
    assert (read_picture(file(big, "TIFF")) == np.arange(256)[None, :, None]).all()
    color = np.stack([ramp, ramp[:, ::-1], np.full_like(ramp, 0x1234)], -1)
    rows = b"\0" + color.astype(">u2").tobytes()
    expected = np.stack([np.arange(256), np.arange(256)[::-1], np.full(256, 0x12)], -1)
    assert (read_picture(png((256, 1, 16, 2), rows)) == expected).all()
    white_is_zero = file(ramp, "TIFF", tiffinfo={262: 0})
    assert (read_picture(white_is_zero) == 255 - np.arange(256)[None, :, None]).all()


def test_numbers_without_an_agreed_white_are_refused():
    for array, words in ((np.zeros((4, 4), np.float32), "floats"), (np.zeros((4, 4), np.int32), "32 bits")):
        with pytest.raises(PictureError, match=f"{words}.* convert it to PNG or JPEG of 8 bits"):
            read_picture(file(array, "TIFF"))


def test_samples_that_would_be_taken_for_others_are_refused():
    plain = tiff((2, 1), [b"\1\x80"])
    assert read_picture(plain)[0, :, 0].tolist() == [1, 128]
    with pytest.raises(PictureError, match="pixels have a sign or.* convert it to PNG or JPEG of 8 bits"):
        read_picture(tiff((2, 1), [b"\1\x80"], _339=(2,)))
    for odd in ({"_262": (0,)}, {"_266": (2,)}, {"_258": (4,)}, {"_258": (16,)}):
        with pytest.raises(PictureError, match="colors are apart in a form that is not read; convert"):
            read_picture(tiff((2, 1), [bytes(4)], _284=(2,), **odd))
    assert read_picture(tiff((2, 1), [b"\1\x80"], _284=(2,)))[0, :, 0].tolist() == [1, 128]
    apart = tiff((2, 1), [b"\1\2", b"\3\4", b"\5\6"], _258=(8, 8, 8), _284=(2,))
    assert read_picture(apart).tolist() == [[[1, 3, 5], [2, 4, 6]]]


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("compressed", [(), (1,)])  # the tag's default
def test_colors_of_16_bits_that_are_apart_keep_their_high_bytes(order, channels, compressed):
    levels = np.random.default_rng(0).integers(0, 2**16, (5, 6, channels), np.uint16)
    levels[..., 3:] = 0xFFFF
    planes = [levels[..., i].astype(f"{order}u2").tobytes() for i in range(channels)]
    strips = [plane[place : place + 24] for plane in planes for place in (0, 24, 48)]  # of two rows
    tags = {"_258": (16,) * channels, "_278": (2,), "_284": (2,), "_259": compressed}
    tags |= {"_338": (2,)} if channels == 4 else {}
    assert (read_picture(tiff((6, 5), strips, order, **tags)) == levels[..., :3] >> 8).all()


def test_gray_that_was_multiplied_by_its_alpha_is_laid_on_white():
    data = tiff((2, 1), [bytes([50, 128, 0, 0])], _258=(8, 8), _338=(1,))
    assert abs(int(read_picture(data)[0, 0, 0]) - (50 + 127)) <= 1 and read_picture(data)[0, 1, 0] == 255


def test_around_a_frame_that_is_smaller_than_its_canvas_it_is_white():
    data = bytearray(file(Image.new("P", (4, 4), 1), "GIF"))
    frame = data.index(b",", 13 + 3 * 2 ** ((data[10] & 7) + 1))
    data[6:10], data[frame + 1 : frame + 5] = struct.pack("<HH", 8, 8), struct.pack("<HH", 2, 3)
    picture = read_picture(bytes(data))
    color = picture[3, 2]
    assert picture.shape == (8, 8, 3) and (picture[3:7, 2:6] == color).all() and (color != 255).any()
    picture = picture.copy()
    picture[3:7, 2:6] = 255
    assert (picture == 255).all()


@pytest.mark.parametrize(("color", "depth"), [(0, 8), (2, 8), (6, 8), (3, 4), (0, 1), (2, 16)])
def test_a_png_that_ends_before_its_rows_do_is_damaged(color, depth):
    row = b"\0" + bytes(-(-5 * depth * {0: 1, 2: 3, 3: 1, 6: 4}[color] // 8))
    palette = [(b"PLTE", bytes(48))] if color == 3 else []
    assert read_picture(png((5, 6, depth, color), 6 * row, *palette)).shape == (6, 5, 3)
    for rows in (b"", 3 * row, (6 * row)[:-1]):
        with pytest.raises(PictureError, match="damaged"):
            read_picture(png((5, 6, depth, color), rows, *palette))


@pytest.mark.parametrize(("form", "mode"), [("PNG", "RGBA"), ("WEBP", "RGBA"), ("TIFF", "RGBA"), ("PNG", "LA")])
def test_transparency_is_laid_on_white(form, mode):
    color = {"RGBA": (200, 100, 0), "LA": (100,)}[mode]
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    for alpha in (0, 51, 255):
        picture = read_picture(file(Image.new(mode, (4, 4), (*color, alpha)), form, **options))
        laid = [255 + (level - 255) * alpha / 255 for level in color]
        assert picture.shape == (4, 4, 3) and np.abs(picture - np.array(laid)).max() <= 0.5


def test_a_clear_color_is_laid_on_white():
    two = Image.fromarray(halves()).quantize(2)
    red = int(np.asarray(two)[0, 0])
    expected = halves()
    expected[:, :8] = 255
    for form in ("PNG", "GIF"):
        assert (read_picture(file(two, form, transparency=red)) == expected).all()
    assert (
        read_picture(file(two, transparency=bytes([0 if place == red else 255 for place in (0, 1)]))) == expected
    ).all()
    assert (read_picture(file(halves(), transparency=RED)) == expected).all()
    gray = np.array([[10, 20]], np.uint8)
    assert read_picture(file(gray, transparency=10))[0, :, 0].tolist() == [255, 20]


@pytest.mark.parametrize(
    ("depth", "rows", "clear", "expected"),
    [
        (1, b"\x00\x40", 0, [255, 255]),
        (2, b"\x00\x10", 0, [255, 85]),
        (2, b"\x00\x10", 1, [0, 255]),
        (4, b"\x00\x3a", 3, [255, 170]),
        (16, b"\x00\x12\x34\x12\x35", 0x1234, [255, 0x12]),
    ],
)
def test_a_clear_level_has_the_scale_of_its_depth(depth, rows, clear, expected):
    data = png((2, 1, depth, 0), rows, (b"tRNS", struct.pack(">H", clear)))
    assert read_picture(data)[0, :, 0].tolist() == expected


def test_a_clear_color_of_16_bits():
    rows = b"\0" + struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0x1111, 0x2222, 0x3333)
    picture = read_picture(png((2, 1, 16, 2), rows, (b"tRNS", struct.pack(">3H", 0x1234, 0x5678, 0x9ABC))))
    assert picture.tolist() == [[[255] * 3, [0x11, 0x22, 0x33]]]


def test_inks_and_other_color_spaces():
    inks = Image.merge("CMYK", [Image.new("L", (16, 16), level) for level in (0, 255, 255, 0)])
    for form, options in (("TIFF", {}), ("JPEG", {"quality": 100})):
        assert np.abs(read_picture(file(inks, form, **options)).astype(int) - RED).max() <= 3
    video = Image.new("RGB", (16, 16), (200, 90, 40)).convert("YCbCr")
    assert np.abs(read_picture(file(video, "TIFF")).astype(int) - (200, 90, 40)).max() <= 2
    lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    measured = ImageCms.profileToProfile(Image.new("RGB", (16, 16), (200, 90, 40)), rgb, lab, outputMode="LAB")
    assert np.abs(read_picture(file(measured, "TIFF")).astype(int) - (200, 90, 40)).max() <= 3


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({"subsampling": 0}, True),
        ({"subsampling": 1, "quality": 30}, True),
        ({"subsampling": 2}, True),
        ({"progressive": True}, True),
        ({"restart_marker_rows": 1}, True),
        ({"keep_rgb": True}, True),
        ({"exif": b"damaged"}, True),
        ({"exif": turned(1)}, True),
        ({"exif": turned(6)}, False),
    ],
    ids=str,
)
def test_a_plain_jpeg_has_the_pixels_that_pillow_gives(monkeypatch, options, plain):
    picture = np.random.default_rng(0).integers(0, 256, (37, 51, 3), np.uint8).cumsum(axis=1).astype(np.uint8)
    data = file(picture, "JPEG", **options)
    pixels = load_picture(data)
    assert isinstance(pixels, np.ndarray) == plain
    assert (np.asarray(pixels) == np.asarray(open_picture(data))).all() and np.ptp(pixels) > 200
    if plain:
        with pytest.raises(ValueError, match="read-only"):
            pixels[0, 0, 0] = 1
    monkeypatch.setattr(pictures, "MAX_PIXELS", 37 * 51 - 1)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", None)  # the limit comes before it
    with pytest.raises(PictureError, match="51 x 37 pixels are more|37 x 51 pixels are more"):
        load_picture(data)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_jpegs_are_left_to_pillow(mode):
    data = file(Image.fromarray(halves()).convert(mode), "JPEG")
    pixels = load_picture(data)
    assert isinstance(pixels, Image.Image) and (np.asarray(pixels) == np.asarray(open_picture(data))).all()


@pytest.mark.parametrize("damage", [lambda data: data[:-200], lambda data: data[:700] + b"\xff\xd8" + data[702:]])
def test_of_a_damaged_jpeg_pillow_decides(damage):
    data = damage(file(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), "JPEG"))
    with pytest.raises(ValueError, match=r"."):
        simplejpeg.decode_jpeg(data)
    results = []
    for read in (load_picture, open_picture):
        try:
            results.append(np.asarray(read(data)).tolist())
        except PictureError as error:
            results.append(str(error))
    assert results[0] == results[1]


def test_a_large_jpeg_is_decoded_smaller_when_little_is_wanted():
    smooth = np.linspace(0, 255, 400).astype(np.uint8)[None, :, None].repeat(300, 0).repeat(3, 2)
    data = file(smooth, "JPEG", quality=95)
    assert read_picture(data).shape == (300, 400, 3)
    assert read_picture(data, 151).shape == (300, 400, 3)
    halved = read_picture(data, 150)
    assert halved.shape == (150, 200, 3)
    assert np.abs(halved.astype(int) - smooth.reshape(150, 2, 200, 2, 3).mean((1, 3))).max() < 4
    assert read_picture(data, 40).shape == (75, 100, 3)
    assert (read_picture(file(smooth), 40) == smooth).all()


def claims(width: int, height: int) -> bytes:
    """A BMP of one bit a pixel that says a size and holds little."""
    data = file(Image.new("1", (8, 8)), "BMP")
    return data[:18] + width.to_bytes(4, "little") + height.to_bytes(4, "little") + data[26:]


def broken_chunk() -> bytes:
    data = file(np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8))
    place = data.index(b"IDAT", data.index(b"IDAT") + 4)
    return data[:place] + b"\0\1\2\3" + data[place + 4 :]


def long_text() -> bytes:
    notes = PngImagePlugin.PngInfo()
    notes.add_text("note", "a" * 2**21, zip=True)
    return file(halves(), pnginfo=notes)


def wide_profile() -> bytes:
    return file(halves(), icc_profile=bytes(2**21))


def zero_avif() -> bytes:
    data = bytearray(file(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), "AVIF"))
    start = data.find(b"mdat") + 4
    data[start:] = bytes(len(data) - start)
    return bytes(data)


UNREADABLE = {
    "empty": (b"", "the file is empty"),
    "cut": (file(halves(), "JPEG")[:-40], "damaged, cut short"),
    "cut_png": (file(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))[:5000], "damaged, cut short"),
    "html": (b"\n<!DOCTYPE html><html>not found</html>", "a web page; convert"),
    "svg": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing; convert"),
    "pdf": (file(Image.fromarray(halves()), "PDF"), "a PDF; convert"),
    "eps": (file(Image.fromarray(halves()), "EPS"), "PostScript; convert"),
    "dds": (file(Image.fromarray(halves()), "DDS"), "a DDS; convert"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC; convert"),
    "avif": (b"\0\0\0\x20ftypavif\0\0\0\0avif", "an AVIF that is damaged"),
    "avif_of_another_brand": (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avif", "an AVIF that is damaged"),
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "pointer of Git LFS.*; run `git lfs pull`",
    ),
    "text": (b"hello", "no picture of a kind that is read"),
    "claims": (claims(15000, 15000), "more than the 67,108,864 pixels"),
    "claims_less": (claims(9000, 9000), "9000 x 9000 pixels are more than the 67,108,864"),
    "no_width": (claims(0, 8), "no picture of a kind that is read"),
    "chunk": (broken_chunk(), "damaged"),
    "long_text": (long_text(), "text or color profile unpacks to more"),
    "wide_profile": (wide_profile(), "text or color profile unpacks to more"),
    "zero_avif": (zero_avif(), "damaged"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_read_is_said_in_one_line(tmp_path, kind):
    data, words = UNREADABLE[kind]
    with pytest.raises(PictureError, match=words) as raised:
        read_picture(data)
    assert "\n" not in str(raised.value) and " at 0x" not in str(raised.value)
    (tmp_path / "picture").write_bytes(data)
    with pytest.raises(PictureError, match=f"cannot read the picture .*picture: .*{words}"):
        read_picture(tmp_path / "picture")


def test_a_format_that_pillow_was_built_without_is_not_called_damaged(monkeypatch):
    monkeypatch.setattr(pictures, "_formats", lambda: ("PNG",))
    with pytest.raises(PictureError, match="it is an AVIF; convert it to PNG"):
        read_picture(file(halves(), "AVIF"))


def test_names_that_hold_no_picture(tmp_path):
    for name, words in ((tmp_path, "no file"), (tmp_path / "none.png", "no such file"), ("/dev/zero", "no file")):
        with pytest.raises(PictureError, match=f"cannot read the picture {name}: .*{words}"):
            read_picture(name)
    with pytest.raises(PictureError, match="cannot read the picture"):
        read_picture("a\0b")


def test_a_claim_takes_no_memory(tmp_path, monkeypatch):
    large = tmp_path / "large.png"
    with large.open("wb") as stream:
        stream.truncate(pictures.MAX_BYTES + 1)  # takes no space
    tracemalloc.start()
    for data in (UNREADABLE["claims"][0], UNREADABLE["claims_less"][0], large, UNREADABLE["long_text"][0]):
        with pytest.raises(PictureError):
            read_picture(data)
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


def test_a_progressive_jpeg_counts_whole(monkeypatch):
    """It holds all of its coefficients, however small it is decoded."""
    monkeypatch.setattr(pictures, "MAX_PIXELS", 2000)
    large = np.zeros((64, 64, 3), np.uint8)
    assert read_picture(file(large, "JPEG"), 16).shape == (16, 16, 3)
    with pytest.raises(PictureError, match="64 x 64 pixels"):
        read_picture(file(large, "JPEG", progressive=True), 16)


def test_no_warning_of_pillow_leaves_the_door():
    data = file(halves(), "TIFF")
    bad = [claims(9500, 9500), file(halves(), exif=b"Exif\0\0II\x2a\0\x08\0\0\0\xff\xff" + bytes(30)), data[:-60]]

    def read(data):
        try:
            read_picture(data)
        except PictureError:
            return

    with warnings.catch_warnings(record=True) as caught, ThreadPoolExecutor(4) as pool:
        warnings.simplefilter("always")
        list(pool.map(read, bad * 10))
    assert not caught
