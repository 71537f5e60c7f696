"""The map of an experiment as a figure: its networks, their parts, and how data pass through them."""

import dataclasses
import re
import textwrap
from collections import Counter
from collections.abc import Sequence

from cli.plurals import spell_count
from cost.architecture.drawing import FAINT, INK, LINE, Arrow, Number, Rectangle, Text, width_of, write_svg
from cost.architecture.flow import OUTPUT, Box, Flow
from cost.architecture.modules import Module

Shape = Text | Rectangle | Arrow

_WIDTH, _GUTTER, _GAP, _MARGIN, _PAD = 320, 78, 26, 24, 9
_SMALL, _PLAIN, _TITLE = 9.5, 11, 15
_SHARED = 3  # what so many boxes read is written into them, and not drawn as so many arrows

# Objective -> chains of what its parts do one after another when it is sampled; parts that an experiment lacks are
# left out, as is a chain without any.
_CHAINS = {
    "autoencoder": (("picture", "autoencoder", "picture"),),
    "captioner": (("picture or caption", "clip", "captioner", "caption"),),
    "clip": (("picture and caption", "clip", "cosine of both"),),
    "dalle": (("caption", "dalle", "dvae", "picture"),),
    "diffusion": (("caption", "text", "clip", "denoiser", "first_stage", "picture"),),
    "dvae": (("picture", "dvae", "tokens, picture"),),
    "llama": (("text", "llama", "next token"),),
    "unidiffuser": (
        ("caption", "clip", "captioner", "unidiffuser", "first_stage", "picture"),
        ("picture", "first_stage", "unidiffuser", "captioner", "caption"),
    ),
    "vision_adapter": (("pictures and text", "vision_adapter", "next token"),),
    "vqvae": (("picture", "dvae", "tokens, picture"),),
}
_REPEATED = {"denoiser": "each step, from noise", "unidiffuser": "each step, from noise", "dalle": "each token"}

# Pattern of a box's name -> fill and frame.
_COLORS = (
    (r"(.*/)?(time|class|label|.*position|bos|.*_tile|parameters|.*_gate)", "#fff6d8", "#d9b84a"),
    (r"(.*/)?(context|.*embedding|token|text_in|clip_in|encode_prefix|decode_prefix)", "#e4f3e4", "#74ae78"),
    (r"(.*/)?(cross_blocks|projection)", "#e4f3e4", "#74ae78"),
    (r"(.*/)?(.*blocks|mid|skips)", "#ece6f7", "#8f79c0"),
    (r"(.*/)?((down|up|stage|group) \d+|stem|conv|input|patch)", "#e3eefb", "#6f9ccf"),
    (r".*", "#f0f0ee", "#a0a0a4"),
)


@dataclasses.dataclass(frozen=True)
class Panel:
    """A network of an experiment.

    Attributes:
      part: its name in the config.
      role: what it is for.
      frozen: whether it is not trained.
      tree: its modules.
      flow: its graph.
    """

    part: str
    role: str
    frozen: bool
    tree: Module
    flow: Flow


def draw_map(objective: str, panels: Sequence[Panel], title: str) -> str:
    """The figure as the text of an SVG file.

    Args:
      objective: of the experiment.
      panels: its networks.
      title: of the figure.
    """
    shapes, top = _draw_head(objective, panels, title)
    right = max(_right(shapes), 2 * _MARGIN + 2 * _WIDTH)
    for panel in panels:
        drawn, bottom = _draw_panel(panel, top)
        right = max(right, _right(drawn) + _MARGIN)
        shapes += drawn
        top = bottom + 2 * _GAP
    return write_svg(right, top, shapes, title)


def rounded(number: int) -> str:
    """Such as "24.2 G"."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:  # which three digits round to it
            return f"{number / size:.3g} {unit}"
    return f"{number} "


def _right(shapes: Sequence[Shape]) -> Number:
    ends = [shape.extent[2] for shape in shapes if isinstance(shape, Text)]
    ends += [shape.x + shape.width for shape in shapes if isinstance(shape, Rectangle)]
    return max(ends, default=0)


def _draw_head(objective: str, panels: Sequence[Panel], title: str) -> tuple[list[Shape], Number]:
    """The title, and what the parts do one after another; and where that ends."""
    shapes: list[Shape] = [Text(_MARGIN, _MARGIN + _TITLE, title, _TITLE, bold=True)]
    top = _MARGIN + 2.2 * _TITLE
    known = {panel.part: panel for panel in panels}
    for chain in _CHAINS.get(objective, ()):
        places = [name for i, name in enumerate(chain) if name in known or i in (0, len(chain) - 1)]
        if not any(name in known for name in places):
            continue
        if "denoiser" in known and "text" not in known and "clip" not in known:
            places[0] = "noise"
        x = float(_MARGIN)
        for place, name in enumerate(places):
            panel = known.get(name) if 0 < place < len(places) - 1 else None
            lines = [name] if panel is None else [name, panel.tree.name, f"{panel.tree.parameters:,}"]
            if panel is not None and name in _REPEATED:
                lines.append(_REPEATED[name])
            width = max(width_of(line, _PLAIN) for line in lines) + 2 * _PAD
            height = 4 * LINE * _PLAIN + _PAD
            if panel is not None:
                shapes.append(Rectangle(x, top, width, height, "#ffffff", FAINT, dash=panel.frozen))
            first = top + height / 2 - (len(lines) / 2 - 0.8) * LINE * _PLAIN
            for row, line in enumerate(lines):
                words = Text(x + _PAD, first + row * LINE * _PLAIN, line, _PLAIN, bold=row == 0)
                shapes.append(words if row == 0 else dataclasses.replace(words, color=FAINT))
            x += width
            if place < len(places) - 1:
                shapes.append(Arrow(((x + 3, top + height / 2), (x + 35, top + height / 2)), INK))
                x += 38
        top += 4 * LINE * _PLAIN + _PAD + _GAP
    return shapes, top


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """A box with a place: its left and top, and lines of text (words, size, color, bold)."""

    box: Box
    lines: tuple[tuple[str, Number, str, bool], ...]
    x: Number = 0
    y: Number = 0

    @property
    def height(self) -> Number:
        return sum(LINE * size for _, size, *_ in self.lines) + 2 * _PAD

    def at(self, x: Number, y: Number) -> "_Drawn":
        return dataclasses.replace(self, x=x, y=y)

    def shapes(self) -> list[Shape]:
        fill, frame = next(colors for pattern, *colors in _COLORS if re.fullmatch(pattern, self.box.name))
        shapes: list[Shape] = [Rectangle(self.x, self.y, _WIDTH, self.height, fill, frame)]
        y = self.y + _PAD
        for words, size, color, bold in self.lines:
            shapes.append(Text(self.x + _PAD, y + size, words, size, color, bold))
            y += LINE * size
        return shapes


def _draw_panel(panel: Panel, top: Number) -> tuple[list[Shape], Number]:
    """One network below `top`; and where that ends."""
    state = "frozen" if panel.frozen else "trained"
    figures = f"{panel.tree.parameters:,} parameters, {rounded(panel.tree.flops)}FLOPs a call"
    head = f"{panel.part}: {panel.tree.name}, {state}; {figures}"
    shapes: list[Shape] = [Text(_MARGIN, top + 13, head, 13, bold=True)]
    y = top + 13 + 6
    columns, mid = _columns(panel.flow)
    reach = len(columns) * _WIDTH + (len(columns) - 1) * _GUTTER
    for line in textwrap.wrap(panel.role, int(max(reach, 2 * _WIDTH) / (_PLAIN * 0.61))):
        y += LINE * _PLAIN
        shapes.append(Text(_MARGIN, y, line, _PLAIN, FAINT))
    top = y + _GAP

    arrows, written = _edges(panel.flow, columns, mid)
    made = {box.name: _Drawn(box, _lines(box, panel.flow, written)) for box in panel.flow.boxes}
    placed: dict[str, _Drawn] = {}
    pairs = [column for column in columns if not column.side]
    count = max((len(column.names) for column in pairs), default=0)
    tops, y = [], top
    for row in range(count):  # of both columns of a U, aligned at its bottom
        tops.append(y)
        here = [c.names[row - count + len(c.names)] for c in pairs if row - count + len(c.names) >= 0]
        y += max(made[name].height for name in here) + _GAP
    bottom = y
    for place, column in enumerate(columns):
        x, stacked = _MARGIN + place * (_WIDTH + _GUTTER), top
        for row, name in enumerate(column.names):
            own = stacked if column.side else tops[row + count - len(column.names)]
            placed[name] = made[name].at(x, own)
            stacked = own + made[name].height + _GAP
        bottom = max(bottom, stacked)
    if mid:
        left = placed[pairs[0].names[-1]].x if pairs else _MARGIN
        placed[mid] = made[mid].at(left + (_WIDTH + _GUTTER) / 2, y)
        bottom = max(bottom, y + made[mid].height + _GAP)
    shapes += _route(arrows, placed, [column.names for column in columns], mid)
    for drawn in placed.values():
        shapes += drawn.shapes()
    return shapes, bottom - _GAP


@dataclasses.dataclass(frozen=True)
class _Column:
    """Names of boxes from top to bottom; `side` if what they make joins the way of the first input."""

    names: tuple[str, ...]
    side: bool = False


def _columns(flow: Flow) -> tuple[list[_Column], str]:
    """Columns from left to right, and the box at the bottom of a U, if it is one."""
    names = [box.name for box in flow.boxes]
    main = {next(iter(flow.inputs))}
    for _ in names:
        main |= {read for made, read in flow.edges if made in main}
    side = [name for name in names if name not in main]
    on_way = [name for name in names if name in main]
    mid = "mid" if "mid" in on_way else ""
    second = re.compile(r"up \d+|out_blocks|skips|decoder/.*|post_quant")
    turn = next((place for place, name in enumerate(on_way) if second.fullmatch(name)), len(on_way))
    paired = mid or any(name.startswith("encoder/") for name in on_way)
    if not paired or turn == len(on_way) or not turn:
        down, up, mid = on_way, [], ""
    else:
        down, up = [name for name in on_way[:turn] if name != mid], on_way[turn:]
    columns = [_Column(tuple(side), side=True), _Column(tuple(down)), _Column(tuple(reversed(up)))]
    return [column for column in columns if column.names], mid


def _edges(flow: Flow, columns: Sequence[_Column], mid: str) -> tuple[list[tuple[str, str]], dict[str, list[str]]]:
    """What is drawn as arrows, and what each box is written to read."""
    place = {name: number for number, column in enumerate(columns) for name in column.names}
    if mid:
        place[mid] = max(place.values()) - 1  # near both columns of the U
    readers = Counter(made for made, read in flow.edges if read != OUTPUT)
    row = {name: n - len(column.names) for column in columns for n, name in enumerate(column.names)}  # from the bottom
    arrows: list[tuple[str, str]] = []
    written: dict[str, list[str]] = {}
    for made, read in flow.edges:
        if read == OUTPUT:
            continue
        near = made in place and abs(place[made] - place[read]) <= 1
        beside = near and (mid in (made, read) or abs(row[made] - row[read]) + abs(place[made] - place[read]) == 1)
        if near and (readers[made] < _SHARED or (beside and not columns[place[made]].side)):
            arrows.append((made, read))
        else:
            written.setdefault(read, []).append(made)
    return arrows, written


def _lines(box: Box, flow: Flow, written: dict[str, list[str]]) -> tuple[tuple[str, Number, str, bool], ...]:
    """What stands in a box."""
    kinds: Counter[str] = Counter()
    for module in box.modules:
        kinds[_kind(module.name)] += module.count
    name, stem = box.name, box.name.rpartition("/")[2]
    alone = len(kinds) == 1 and next(iter(kinds)) in (stem, "")
    total = kinds.total()
    lines = [(f"{total} x {name}" if alone and total > 1 else name, 12.0, INK, True)]

    def add(words: str, size: Number, color: str) -> None:
        wrapped = textwrap.wrap(words, int((_WIDTH - 2 * _PAD) / (size * 0.61)), subsequent_indent="  ")
        lines.extend((line, size, color, False) for line in wrapped)

    sizes = [_shape(shape) for shape in dict.fromkeys((box.size, box.output)) if shape]
    if sizes:
        add(" -> ".join(sizes), _PLAIN, INK)
    if not alone:
        add(", ".join(f"{n} x {kind}" if n > 1 else kind for kind, n in kinds.items()), _SMALL, INK)
    work = f", {rounded(box.flops)}FLOPs" if box.flops else ""
    add(f"{spell_count(box.parameters, 'parameter')}{work}", _SMALL, INK)
    for role in dict.fromkeys(module.role for module in box.modules if module.role):
        add(role, _SMALL, FAINT)
    reads = [f"{one} {_shape(flow.inputs.get(one, ()))}".rstrip() for one in written.get(name, ())]
    if reads:
        add("reads " + ", ".join(reads), _SMALL, "#2458a0")
    if (name, OUTPUT) in flow.edges:
        add("makes what the network returns", _SMALL, "#2458a0")
    return tuple(lines)


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _kind(name: str) -> str:
    """What a module is called apart from its place: "residual" of "down_0_residual_1"."""
    name = re.sub(r"^(down|up|stage|group)_\d+_|^mid_", "", name)
    return re.sub(r"(_\d+)+$", "", name)


def _route(
    arrows: Sequence[tuple[str, str]], placed: dict[str, _Drawn], columns: Sequence[Sequence[str]], mid: str
) -> list[Shape]:
    """Arrows between boxes: straight down or up to a neighbor, else through the gutters, each in a lane of its own."""
    shapes: list[Shape] = []
    gutters: dict[int, list[tuple[str, str]]] = {}
    column_of = {name: number for number, names in enumerate(columns) for name in names}
    for made, read in arrows:
        a, b = placed[made], placed[read]
        if mid in (made, read):
            other = b if made == mid else a
            left = other.x < placed[mid].x
            x = other.x + _WIDTH * (0.2 if left else 0.8)
            edge = placed[mid].x + (0 if left else _WIDTH)
            y = placed[mid].y + placed[mid].height / 2
            points = ((x, other.y + other.height), (x, y), (edge, y))
            shapes.append(Arrow(points if read == mid else points[::-1]))
            continue
        names = columns[column_of[made]]
        if column_of[made] == column_of[read] and abs(names.index(made) - names.index(read)) == 1:
            down = a.y < b.y
            # Two that read each other have two arrows.
            x = a.x + _WIDTH * (0.5 if (read, made) not in arrows else 0.4 if down else 0.6)
            ends = (a.y + a.height, b.y) if down else (a.y, b.y + b.height)
            shapes.append(Arrow(((x, ends[0]), (x, ends[1]))))
            continue
        last = len(columns) - 1
        gutter = min(column_of[made], column_of[read])
        if column_of[made] == column_of[read] and (gutter == last or gutter > 0):
            gutter -= 1  # left of a column where there is something
        gutters.setdefault(gutter, []).append((made, read))
    ports: dict[tuple[str, Number], list[tuple[str, str]]] = {}

    def sides(gutter: int, name: str) -> Number:
        """The x of the side of a box that looks at a gutter."""
        return placed[name].x + (_WIDTH if column_of[name] <= gutter else 0)

    for gutter, edges in gutters.items():
        for edge in edges:
            for name in edge:
                ports.setdefault((name, sides(gutter, name)), []).append(edge)

    def port(name: str, x: Number, edge: tuple[str, str]) -> Number:
        others = ports[name, x]
        return placed[name].y + placed[name].height * (others.index(edge) + 1) / (len(others) + 1)

    for gutter, edges in gutters.items():
        left = _MARGIN + gutter * (_WIDTH + _GUTTER) + _WIDTH
        for lane, (made, read) in enumerate(edges):
            x = left + _GUTTER * (lane + 1) / (len(edges) + 1)
            start, end = sides(gutter, made), sides(gutter, read)
            y0, y1 = port(made, start, (made, read)), port(read, end, (made, read))
            shapes.append(Arrow(((start, y0), (x, y0), (x, y1), (end, y1))))
    return shapes
