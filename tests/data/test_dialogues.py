"""Questions about scenes: their answers are right, each kind is asked, and rows say where the answer is."""

import re
from collections import Counter

import numpy as np
import pytest

from cli.errors import UserError
from data.dialogues import check_dialogues, encode_dialogue, make_dialogue
from data.scenes.captions import parse_caption, write_captions
from data.scenes.questions import TYPES, Dialogue, answer_type, ask_whether
from data.scenes.scene import WORLDS, sample_scene
from data.tokenizer import Tokenizer


def seen(scene, question, answer):
    """Whether an answer is right, told from the scene and not from a caption."""
    things = {f"{item.color} {item.shape}": item for item in scene.objects}
    kind = answer_type(question)
    if kind == "count":
        return answer == ("one", "two", "three")[len(scene.objects) - 1]
    if kind == "yes or no":
        thing = re.fullmatch(r"is there (?:an?|anything) (.*)\?", question)[1]
        alone = {item.shape for item in scene.objects} | {item.color for item in scene.objects}
        return answer == ("yes" if thing in things or thing in alone else "no")
    if kind == "describe":
        return answer in write_captions(WORLDS["pair32" if len(scene.objects) == 2 else "single32"], scene)
    if len(scene.objects) == 1:
        (item,) = scene.objects
        return answer == {"shape": item.shape, "color": item.color}.get(kind, f"on a {scene.background} background")
    ends, middle = (scene.objects[0], scene.objects[-1]), scene.objects[-2:][0]
    places = (ends, ends[::-1]) if len(scene.objects) == 2 else ((ends[0], middle), (ends[1], middle))
    back = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[scene.relation]
    for (one, other), relation in zip(places, (scene.relation, back), strict=True):
        theirs = f"{relation} the {other.color} {other.shape}"
        if kind == "where" and question == f"where is the {one.color} {one.shape}?":
            return answer == theirs
        if kind == "shape" and question == f"which shape is {theirs}?":
            return answer == one.shape
        if kind == "color" and question == f"which color is the {one.shape} {theirs}?":
            return answer == one.color
    return False


@pytest.mark.parametrize("world", ["single32", "pair32", "pair64"])
def test_answers_are_right_and_each_kind_is_asked(world):
    rng = np.random.default_rng(0)
    kinds, said = Counter(), Counter()
    for _ in range(400):
        scene = sample_scene(WORLDS[world], rng)
        captions = write_captions(WORLDS[world], scene)
        question, answer = make_dialogue("scenes", f"scenes/{world}", captions, rng)
        if len(scene.objects) == 1 or answer_type(question) != "describe":
            assert seen(scene, question, answer), (scene, question, answer)
        else:
            assert answer in captions
        kinds[answer_type(question)] += 1
        said[answer] += 1
    assert set(kinds) == set(TYPES) and min(kinds.values()) > 40
    assert 0.5 < said["yes"] / said["no"] < 2


def asked_whether(world, draws):
    """{what is asked about: (times that it is there, times that it is not)}, of scenes that training shows."""
    rng, counts = np.random.default_rng(1), {}
    for _ in range(draws):
        scene = parse_caption(world, write_captions(world, sample_scene(world, rng))[0])
        question, answer = ask_whether(world, scene, rng)
        thing = re.fullmatch(r"is there (an?|anything) (.*)\?", question)[2]
        counts.setdefault(thing, Counter())[answer] += 1
    return counts


@pytest.mark.parametrize("world", ["single32", "pair32"])
def test_no_question_for_yes_or_no_tells_its_answer(world):
    world = WORLDS[world]
    counts = asked_whether(world, 6_000)
    shown = {(shape, color) for shape in world.shapes for color in world.colors} - world.held_out
    alone = {*world.shapes, *world.colors}
    assert set(counts) == {f"{color} {shape}" for shape, color in shown} | alone
    deviations = [(said["yes"] - said["no"]) / np.sqrt(said.total()) for said in counts.values()]
    assert np.abs(deviations).max() < 4 and np.mean(np.square(deviations)) < 1.6
    assert 0.47 < sum(counts[name].total() for name in alone) / 6_000 < 0.53


def test_questions_in_words_mostly_stand_behind_a_caption_that_says_all():
    """Of all pairs of shape and color, whatever the picture shows: a text shows nothing."""
    world, told, kinds, pairs = WORLDS["single32"], 0, Counter(), set()
    for seed in range(300):
        text, answer = make_dialogue(
            "scenes_in_words", "scenes/single32", ["a red circle"], np.random.default_rng(seed)
        )
        caption, stop, question = text.rpartition(". ")
        if stop:
            told += 1
            kind = answer_type(question)
            kinds[kind] += 1
            scene = parse_caption(world, caption)
            assert scene.complete
            assert kind == "describe" or seen(scene, question, answer)
            pairs |= {(item.shape, item.color) for item in scene.objects}
    assert 200 < told < 250 and set(kinds) == set(TYPES) and 0.7 < kinds["yes or no"] / told < 0.88
    assert pairs == {(shape, color) for shape in world.shapes for color in world.colors}


def test_the_answer_is_what_stands_between_both_ends():
    tokenizer = Tokenizer.train(["which color is the red circle", "a red circle"], 300).with_ends()
    row, mask, truncated = encode_dialogue(tokenizer, Dialogue("which color is the circle?", "red"), 40)
    assert not truncated and tokenizer.decode(row) == "which color is the circle?"
    assert tokenizer.decode(row[mask]) == "red" and row[mask][-1] == tokenizer.end_id
    cut, answer, truncated = encode_dialogue(
        tokenizer, Dialogue("which color is the circle?", "red"), int(mask.argmax()) + 1
    )
    assert truncated and len(cut) == mask.argmax() + 1 and answer.tolist() == [False] * (len(cut) - 1) + [True]


def test_captions_are_answers_to_nothing_and_a_tab_parts_questions_from_theirs():
    texts = ["what is it?\ta circle\tor a ball ", "a red circle"]
    said = [make_dialogue("tabs", "folder/x", [text], None) for text in texts]
    assert said == [Dialogue("what is it?", "a circle\tor a ball"), Dialogue("", "a red circle")]
    drawn = {make_dialogue("captions", "folder/x", texts, np.random.default_rng(seed)) for seed in range(9)}
    assert drawn == {Dialogue("", text) for text in texts}


def test_what_cannot_be_asked_about_is_one_line():
    tokenizer = Tokenizer.train(["a"], 257)
    for arguments, message in (
        (("coco", "scenes/single32", tokenizer), "choose one of scenes, scenes_in_words, captions, tabs"),
        (("scenes", "coco", tokenizer), "asks about datasets scenes/..., not coco"),
        (("scenes", "scenes/single32", tokenizer), "set config.data.text_ends=True"),
    ):
        with pytest.raises(UserError, match=message):
            check_dialogues(*arguments)
