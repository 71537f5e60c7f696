"""The map of an experiment: its arrows are those of the network, and it can be read."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from cli.config import load_config
from cli.errors import UserError
from cost.architecture.drawing import Rectangle, Text, width_of, write_svg
from cost.architecture.figure import rounded
from cost.architecture.flow import OUTPUT, read_flow
from cost.architecture.modules import read_network
from cost.architecture.traced import trace_network
from scripts.describe import draw_figure, main
from weights.run import model_of

ROOT = Path(__file__).resolve().parents[3]
SVG = "{http://www.w3.org/2000/svg}"


def config_of(name):
    return load_config([f"--config={ROOT / 'configs' / name}"])


def flow_of(name, part="denoiser"):
    config = config_of(name)
    traced = trace_network(model_of(config.models[part]), config)
    return read_flow(traced, read_network(traced))


def test_arrows_of_a_unet_are_its_skips_time_and_caption():
    flow = flow_of("scenes/latent_unet.py")
    assert flow.inputs["conditioning.tokens"][0] == config_of("scenes/latent_unet.py").data.text_length
    edges = set(flow.edges)
    assert {("x_t", "input"), ("input", "down 0"), ("down 0", "down 1"), ("down 1", "mid"), ("mid", "up 1")} <= edges
    # What the way down left is read at the same place of the way up; the last one of a level is resampled already.
    assert {("down 1", "up 1"), ("down 0", "up 1"), ("down 0", "up 0"), ("input", "up 0")} <= edges
    assert ("t", "time") in edges and all(("time", box) in edges for box in ("down 0", "mid", "up 1", "up 0"))
    assert ("conditioning.tokens", "mid") in edges and ("conditioning.tokens", "output") not in edges
    assert [made for made, read in edges if read == OUTPUT] == ["output"]
    sizes = {box.name: (box.size, box.output) for box in flow.boxes}
    assert sizes["down 0"][0][0] == 2 * sizes["down 1"][0][0] == 2 * sizes["mid"][0][0]
    assert sizes["up 1"][1][:2] == sizes["up 0"][0][:2] == sizes["down 0"][0][:2]


def test_arrows_of_a_uvit_are_its_long_skips():
    flow = flow_of("scenes/latent_uvit.py:debug")
    edges = set(flow.edges)
    assert {("x_t", "patch"), ("conditioning.tokens", "context"), ("context", "in_blocks"), ("t", "in_blocks")} <= edges
    assert {("in_blocks", "mid"), ("in_blocks", "skips"), ("mid", "skips"), ("skips", "out_blocks")} <= edges
    assert not {("x_t", "in_blocks"), ("mid", "out_blocks"), ("in_blocks", "out_blocks")} & edges


@pytest.fixture(scope="module")
def drawn():
    names = ["scenes/latent_unet.py", "scenes/vision_adapter.py:debug", "scenes/unidiffuser.py:debug"]
    return {name: draw_figure(config_of(name), name) for name in names}


def test_a_map_can_be_read(drawn):
    """Well-formed; no two lines of text touch, and each lies in one box or in none, whole."""
    for name, svg in drawn.items():
        root = ElementTree.fromstring(svg)
        width, height = float(root.get("width", 0)), float(root.get("height", 0))
        texts = []
        for node in root.iter(f"{SVG}text"):
            size, words = float(node.get("font-size", 0)), node.text or ""
            texts.append((Text(float(node.get("x", 0)), float(node.get("y", 0)), words, size).extent, words))
        boxes = [
            tuple(float(node.get(key, 0)) for key in ("x", "y", "width", "height")) for node in root.iter(f"{SVG}rect")
        ]
        assert len(texts) > 40 and len(boxes) > 10
        for place, ((left, top, right, bottom), words) in enumerate(texts):
            assert left >= 0 and right <= width and top >= 0 and bottom <= height, (name, words)
            for (other_left, other_top, other_right, other_bottom), other in texts[:place]:
                apart = right <= other_left or other_right <= left or bottom <= other_top or other_bottom <= top
                assert apart, (name, words, other)
            for x, y, box_width, box_height in boxes[1:]:  # the first is the sheet
                inside = x <= left and right <= x + box_width and y <= top and bottom <= y + box_height
                outside = right <= x or x + box_width <= left or bottom <= y or y + box_height <= top
                assert inside or outside, (name, words)
        for place, (x, y, box_width, box_height) in enumerate(boxes[1:], 1):
            for u, v, other_width, other_height in boxes[1:place]:
                assert x + box_width <= u or u + other_width <= x or y + box_height <= v or v + other_height <= y


def test_a_map_has_every_part_with_its_counts(drawn):
    svg = drawn["scenes/latent_unet.py"]
    for part in ("denoiser: unet, trained; 4,283,012", "text: text_encoder, trained; 443,264", "frozen; 663,568"):
        assert f"{part} parameters" in svg
    assert all(f">{box}</text>" in svg for box in ("down 0", "mid", "up 0", "encoder/down 0", "decoder/up 0"))
    assert "each step, from noise" in svg and "guidance enters here" in svg and "8 x 8 x 64 -&gt; 4 x 4 x 64" in svg
    adapter = "scenes/vision_adapter.py:debug"
    assert drawn[adapter] == draw_figure(config_of(adapter), adapter)


def test_the_command_writes_a_map(tmp_path, capsys):
    config = f"--config={ROOT}/configs/toy/swiss_roll.py:debug"
    main(["--config", config.removeprefix("--config="), f"--figure={tmp_path}/maps/map.svg", "--depth=1"])
    assert ElementTree.fromstring((tmp_path / "maps" / "map.svg").read_text()).tag == f"{SVG}svg"
    assert re.search(r"denoiser \(trained\): [\d,]+ parameters", capsys.readouterr().out)
    with pytest.raises(UserError, match=r"end its name in \.svg"):
        main([config, f"--figure={tmp_path}/map.png"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        main([config, f"--figure={tmp_path}/file/map.svg"])


def test_numbers_have_the_unit_that_they_round_to():
    assert [rounded(n) for n in (999, 999_499, 999_500, 1_234_567)] == ["999 ", "999 k", "1 M", "1.23 M"]


def test_words_are_escaped():
    svg = write_svg(9, 9, [Rectangle(1, 1, 5, 5, "#fff", "#000"), Text(1, 1, "a < b & c")], 'a "title" <')
    assert ElementTree.fromstring(svg).find(f"{SVG}text").text == "a < b & c"
    assert width_of("abcd", 10) == pytest.approx(24.4)
