"""Which pixels read which word: the attention of a diffusion to the tokens of its captions, as a labelled picture."""

import dataclasses

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from cli.errors import UserError
from data.tokenizer import Tokenizer
from sample.command import Drawn, draw_made
from sample.conditions import Made, Order, draw_outputs, order_rows, refuse_unread
from sample.samplers.diffusion import DiffusionSampler
from sample.sheets.grid import draw_table, to_uint8
from sample.trained import TrainedSampler

_CHUNK = 8  # pictures drawn at once, at most: the weights of all pixels over all tokens are kept
_SIDE = 128  # pixels of a cell, about
_COLUMNS = 12  # of a table, at most
_BAR = 7  # pixels of a token's color under its map
_COLORS = np.array(
    [
        *((230, 75, 53), (77, 187, 213), (0, 160, 135), (240, 180, 60), (132, 105, 200), (220, 110, 170)),
        *((120, 180, 70), (60, 84, 136), (176, 112, 72), (140, 140, 140)),
    ],
    np.float32,
)


@dataclasses.dataclass(frozen=True)
class Token:
    """A token of a caption, or all that fill it up.

    Attributes:
      text: what it says; "start", "end" or "padding" of those that say nothing.
      places: in the caption.
      word: whether it says something.
    """

    text: str
    places: tuple[int, ...]
    word: bool = True


def read_tokens(tokenizer: Tokenizer, ids: Int[np.ndarray, " l"], length: int) -> list[Token]:
    """The tokens of a caption's ids, what fills it up as the last one.

    Args:
      tokenizer: of the run.
      ids: of the caption; of a long one several contexts, each with ends of its own.
      length: of a context.
    """
    tokens: list[Token] = []
    padding: list[int] = []
    for start in range(0, len(ids), length):
        part = ids[start : start + length].tolist()
        if tokenizer.end_id is not None and tokenizer.end_id in part:
            count = part.index(tokenizer.end_id) + 1
        else:
            count = max((place + 1 for place, one in enumerate(part) if one != tokenizer.pad_id), default=0)
        for place, one in enumerate(part[:count]):
            ends = {tokenizer.start_id: "start", tokenizer.end_id: "end"}
            text = ends.get(one) or tokenizer.decode(np.array([one])) or f"token {one}"
            tokens.append(Token(text, (start + place,), one not in ends))
        padding += range(start + count, start + len(part))
    return [*tokens, *([Token("padding", tuple(padding), word=False)] if padding else [])]


def draw_attention(trained: TrainedSampler, order: Order, num: int) -> tuple[Drawn, Image.Image]:
    """Draws pictures, and for each a row of maps: how much of each pixel's attention goes to each token.

    A map is as bright as its share of the largest of its own; under it stands the token and its share of all pixels'
    attention, which add up to 100 % over tokens. The second cell has the color of the word that a pixel reads more than
    pixels do on average, of words alone. Drawn in smaller chunks than elsewhere, so equal to pictures drawn without it
    to float rounding.

    Args:
      trained: a diffusion that reads captions.
      order: what.
      num: pictures of each condition.

    Returns:
      The pictures with their grid, and the maps.

    Raises:
      UserError: if the run shows no attention to captions, or the order is impossible.
    """
    if not isinstance(trained.sampler, DiffusionSampler):
        raise UserError(
            f"{trained.run.folder} is a run of {trained.config.objective}; --attention_maps is for diffusions that "
            "read captions"
        )
    rows = order_rows(trained, order)
    trained.sampler.request(**rows, **order.settings, attention=True)  # says what is missing before anything is drawn
    refuse_unread(trained, order)
    outputs = draw_outputs(
        dataclasses.replace(trained, chunk=min(trained.chunk, _CHUNK)), order, rows, num, attention=True
    )
    images, weights = to_uint8(outputs["image"]), outputs["attention"]
    sheets, length = [], trained.config.data.text_length
    for place, condition in enumerate(order.conditions):
        seen = rows["contexts"][place] * length if "contexts" in rows else rows["text"].shape[1]
        tokens = read_tokens(trained.tokenizer_for([]), rows["text"][place, :seen], length)
        chosen = slice(place * num, (place + 1) * num)
        sheets += _tables(str(condition), images[chosen], weights[chosen], tokens)
    labels = [str(condition) for condition in order.conditions for _ in range(num)]
    grid = draw_made(order, Made(images, None), labels, num, rows.get("image"), {})
    drawn = Drawn(images, None, order.records(num), order.describe(trained), grid)
    return drawn, _stack(sheets)


def _tables(
    title: str, images: UInt8[np.ndarray, "n h w 3"], weights: Float[np.ndarray, "n a b l"], tokens: list[Token]
) -> list[Image.Image]:
    """The maps of one caption, in as many tables as its tokens need."""
    maps = np.stack([weights[..., list(token.places)].sum(axis=-1) for token in tokens], axis=-1)
    colors = _COLORS[np.arange(len(tokens)) % len(_COLORS)]
    shares = maps.mean(axis=(0, 1, 2))
    columns = [f"{token.text} {share:.1%}" for token, share in zip(tokens, shares, strict=True)]
    words = [place for place, token in enumerate(tokens) if token.word]
    cells = []
    for image, one in zip(images, maps, strict=True):
        shown = [_plain(image)]
        if words:
            relative = one[..., words] / np.maximum(one[..., words].mean(axis=(0, 1)), 1e-30)
            shown.append(_painted(image, np.ones(one.shape[:2]), colors[words][relative.argmax(axis=-1)]))
        for place, color in enumerate(colors):
            values = one[..., place] / max(float(one[..., place].max()), 1e-30)
            shown.append(_painted(image, values, color, bar=True))
        cells.append(shown)
    headers = ["picture", *(["read more than elsewhere"] if words else []), *columns]
    names = [f"picture {number}" for number in range(len(images))]
    return [
        draw_table(
            [row[start : start + _COLUMNS] for row in cells],
            rows=names,
            columns=headers[start : start + _COLUMNS],
            title=title if start == 0 else f"{title} (continued)",
        )
        for start in range(0, len(headers), _COLUMNS)
    ]


def _plain(image: UInt8[np.ndarray, "h w 3"]) -> Image.Image:
    """A picture at the size of a cell."""
    picture = Image.fromarray(image)
    factor = _SIDE / max(picture.size)
    size = tuple(max(1, round(side * (int(factor) if factor >= 1 else factor))) for side in picture.size)
    return picture.resize((size[0], size[1]), Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS)


def _painted(
    image: UInt8[np.ndarray, "h w 3"],
    values: Float[np.ndarray, "a b"],
    color: Float[np.ndarray, "*_ 3"],
    bar: bool = False,
) -> Image.Image:
    """A gray picture under a color, as strong as values from 0 to 1; with `bar` over a line of that color."""
    plain = _plain(image)
    gray = np.asarray(plain.convert("L"), np.float32)[..., None] * 0.55
    strength = Image.fromarray(np.asarray(values, np.float32)).resize(plain.size, Image.Resampling.BILINEAR)
    if color.ndim > 1:  # a color for each place, seen through to the picture
        tint = Image.fromarray(color.astype(np.uint8)).resize(plain.size, Image.Resampling.NEAREST)
        mixed = 0.4 * gray + 0.6 * np.asarray(tint, np.float32)
    else:
        share = np.asarray(strength)[..., None]
        mixed = gray * (1 - share) + color * share
    picture = Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8))
    if not bar:
        return picture
    framed = Image.new("RGB", (picture.width, picture.height + _BAR), tuple(int(value) for value in color))
    framed.paste(picture, (0, 0))
    return framed


def _stack(sheets: list[Image.Image]) -> Image.Image:
    """Tables below each other."""
    whole = Image.new("RGB", (max(one.width for one in sheets), sum(one.height for one in sheets)), (250, 250, 248))
    top = 0
    for one in sheets:
        whole.paste(one, (0, top))
        top += one.height
    return whole
