"""What a sweep runs over: values, headers, file names, and what is refused."""

import pytest

from cli.errors import UserError
from sample.sheets.axes import Axis, parse_axes


def test_values_have_the_type_of_their_key():
    axes = parse_axes(["guidance=1,2.5", "steps=5,10", "sampler=ddim,heun", "seed=4294967295,3", "spacing=,karras"], [])
    assert [axis.name for axis in axes] == ["guidance", "steps", "sampler", "seed", "spacing"]
    assert [axis.values for axis in axes] == [(1.0, 2.5), (5, 10), ("ddim", "heun"), (4294967295, 3), ("", "karras")]
    assert [type(value) for value in axes[0].values] == [float, float]


def test_prompts_are_split_at_commas_and_come_whole_from_a_file(tmp_path):
    captions = tmp_path / "captions, all.txt"
    captions.write_text("a red circle, small\n\n a blue star \n")
    (given,) = parse_axes(["prompt=a red circle, a blue star"], [])
    (read,) = parse_axes([f"prompt=@{captions}"], [])
    assert given.values == ("a red circle", "a blue star")
    assert read.values == ("a red circle, small", "a blue star")


def test_headers_say_what_and_file_names_are_safe():
    assert Axis("guidance", (3.0, 1.5)).header(0) == "guidance=3"
    assert Axis("guidance", (3.0, 1.5)).file_part(1) == "guidance_1.5"
    assert Axis("prompt", ("a red circle",)).header(0) == "a red circle"
    assert Axis("negative_prompt", ("x", "a/../b: c")).file_part(1) == "negative_prompt_2"
    assert Axis("spacing", ("",)).file_part(0) == "spacing_default"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["width=3"], "--sweep width: there is no such key; choose from guidance, temperature"),
        (["guidance"], "--sweep guidance has no values"),
        (["guidance= "], "--sweep guidance has no values"),
        (["steps=5,many"], "--sweep steps=5,many: 'many' is not a whole number"),
        (["guidance=high"], "'high' is not a number"),
        (["steps=5,,7"], "has an empty value"),
        (["seed=1", "seed=2"], "--sweep seed stands twice"),
        (["guidance=3,1,3.0"], "--sweep guidance has 3 twice"),
        (["seed=0,4294967296"], "--sweep seed=4294967296 is impossible; a seed is a whole number from 0 to 4294967295"),
        (["seed=3,-1"], "--sweep seed=-1 is impossible"),
        (["eta=0,1"], "--sweep eta and --eta are both given"),
        (["prompt=a,,b"], "--sweep prompt is empty"),
        (["prompt=@nowhere.txt"], "no prompt file nowhere.txt"),
        (["prompt=a\udcff"], "is not UTF-8 text"),
    ],
)
def test_mistakes_get_a_line(texts, message):
    with pytest.raises(UserError, match=message):
        parse_axes(texts, ["eta", "run"])
