"""Sweeps: cells, pages, numbers, compilation, and what is refused before work is done."""

import csv
import itertools
import json

import numpy as np
import pytest
from PIL import Image

import sample.samplers.diffusion_program
from cli.errors import UserError
from data.scenes.grader import SceneGrader
from evaluation.caption_accuracy import captioned_pictures
from sample.__main__ import main
from sample.conditions import Made, Order, make_conditions
from sample.embedding import ClipEmbedder
from sample.sheets.sweep import Cell, Measure, _draw_cell, diversity, make_cells, vary
from sample.trained import TrainedSampler

PROMPTS = ("a small red circle, on a black background", "a large blue star on a gray background")


@pytest.fixture(scope="module")
def swept(diffusion_run, tmp_path_factory):
    """A sweep of guidance, seed and prompt: its run and folder, programs compiled, and how often it drew."""
    run, folder = diffusion_run("captions"), tmp_path_factory.mktemp("sweep")
    (folder / "captions.txt").write_text("\n".join(PROMPTS))
    calls, call = [], TrainedSampler.__call__
    before = sample.samplers.diffusion_program.draw._cache_size()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainedSampler, "__call__", lambda self, rows, **k: calls.append(k) or call(self, rows, **k))
        arguments = ["--sweep=guidance=2,3.5,5", "--sweep=seed=0,1", f"--sweep=prompt=@{folder}/captions.txt"]
        main([f"--run={run}", *arguments, "--num=2", "--steps=2", f"--out={folder}/a.png", f"--files={folder}/files"])
    return run, folder, sample.samplers.diffusion_program.draw._cache_size() - before, calls


def table(folder):
    with (folder / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def pictures(folder):
    """{(guidance, seed, prompt, index): picture} of what was written."""
    written = json.loads((folder / "samples.json").read_text())
    return {
        (record.get("guidance"), record["seed"], record["prompt"], record["index"]): np.asarray(
            Image.open(folder / record["file"])
        )
        for record in written["samples"]
    }


def test_the_table_has_a_row_for_each_cell(swept):
    _, folder, _, _ = swept
    rows = table(folder)
    assert list(rows[0]) == [
        *("guidance", "seed", "prompt", "seconds", "pictures"),
        *("pictures_per_second", "accuracy", "clip_score", "diversity"),
    ]
    cells = [(p, g, s) for p, g, s in itertools.product(PROMPTS, ("2", "3.5", "5"), ("0", "1"))]
    assert [(row["prompt"], row["guidance"], row["seed"]) for row in rows] == cells
    drawn = pictures(folder / "files")
    for row in rows:
        assert row["pictures"] == "2" and row["clip_score"] == "" and float(row["accuracy"]) in (0, 0.5, 1)
        assert float(row["pictures_per_second"]) == pytest.approx(2 / float(row["seconds"]), rel=1e-4)
        pair = [drawn[float(row["guidance"]), int(row["seed"]), row["prompt"], index] / 255 for index in (0, 1)]
        assert float(row["diversity"]) == pytest.approx(np.sqrt(np.mean((pair[0] - pair[1]) ** 2)), rel=1e-4)


def test_pages_are_tables_of_the_first_two_axes(swept):
    _, folder, _, _ = swept
    assert {path.name for path in folder.glob("*.png")} == {"a_prompt_1.png", "a_prompt_2.png"}
    page = np.asarray(Image.open(folder / "a_prompt_2.png")).astype(int)
    drawn = pictures(folder / "files")
    # 3 rows and 2 columns of mosaics, two pictures of 64 pixels beside each other, from the right bottom corner.
    for (row, guidance), (column, seed) in itertools.product(enumerate((2.0, 3.5, 5.0)), enumerate((0, 1))):
        top, left = page.shape[0] - (3 - row) * 72, page.shape[1] - (2 - column) * 138
        for index in (0, 1):
            shown = page[top : top + 64 : 2, left + 66 * index : left + 66 * index + 64 : 2]
            np.testing.assert_array_equal(shown, drawn[guidance, seed, PROMPTS[1], index])
        assert (page[top : top + 20, 8 : left - 8] < 100).any() or column  # the row's header


def test_a_cell_has_the_pictures_that_are_drawn_without_a_sweep(swept, tmp_path):
    run, folder, _, _ = swept
    (tmp_path / "one.txt").write_text(PROMPTS[0])
    arguments = [f"--run={run}", f"--prompt=@{tmp_path}/one.txt", "--seed=1", "--guidance=3.5", "--steps=2", "--num=2"]
    main([*arguments, f"--out={tmp_path}/x.png", f"--files={tmp_path}/files"])
    alone, cells = pictures(tmp_path / "files"), pictures(folder / "files")
    for index in (0, 1):
        np.testing.assert_array_equal(alone[None, 1, PROMPTS[0], index], cells[3.5, 1, PROMPTS[0], index])


def test_guidance_seeds_and_prompts_share_one_program_which_is_warm_when_it_is_timed(swept):
    _, _, programs, calls = swept
    assert programs == 1
    assert len(calls) == 1 + 12 and [len(call["indices"]) for call in calls] == [1] + [2] * 12


def test_programs_are_told_apart(diffusion_run):
    trained = TrainedSampler.open(diffusion_run("captions"))
    cells = make_cells(trained, Order(make_conditions(["a red circle"])), ())
    rows = cells[0].rows
    first = trained.program(rows, guidance=2.0)
    assert first == trained.program({"text": np.repeat(rows["text"], 3, axis=0)}, guidance=5.0, rescale=0.5)
    others = [trained.program(rows, guidance=1.0), trained.program(rows, guidance=2.0, steps=7)]
    assert len({first, *others}) == 3


def test_what_a_sweep_does_not_change_stays(diffusion_run):
    order = Order(make_conditions(["a", "b"]), 3, {"steps": 5}, "c")
    changed = vary(order, {"guidance": 2.0, "seed": 4})
    assert changed == Order(order.conditions, 4, {"steps": 5, "guidance": 2.0}, "c")
    assert vary(order, {"prompt": "d", "negative_prompt": "e"}) == Order(make_conditions(["d"]), 3, {"steps": 5}, "e")
    assert vary(order, {"label": 2}).conditions == make_conditions(["a", "b"], labels=[2])
    assert vary(order, {"prompt": "d", "image": "x.png"}).conditions == make_conditions(["d"], images=["x.png"])


def test_accuracy_and_clip_score_are_those_of_the_pictures(diffusion_run, debug_run):
    trained = TrainedSampler.open(diffusion_run("captions"))
    clip = ClipEmbedder.open(debug_run("scenes/clip.py"))
    true = captioned_pictures(trained.config, "validation", 4)
    order = Order(make_conditions(true.captions))
    measure = Measure(trained, make_cells(trained, order, ()), clip)
    right = measure(order, Made(true.images, None), 1, 2.0)
    assert right["accuracy"] == 1 and right["pictures_per_second"] == 2 and right["diversity"] is None
    cosine = float(np.mean(clip.cosines(true.images, true.captions)))
    assert right["clip_score"] == pytest.approx(100 * max(cosine, 0), abs=1e-4)
    blurred = np.concatenate([true.images[:3], np.zeros_like(true.images[3:])])
    assert measure(order, Made(blurred, None), 1, 2.0)["accuracy"] == 0.75


def test_weighed_words_are_measured_without_brackets(diffusion_run, monkeypatch):
    trained, read = TrainedSampler.open(diffusion_run("captions")), []
    monkeypatch.setattr(ClipEmbedder, "cosines", lambda _, __, captions: read.append(captions) or np.ones(2))
    monkeypatch.setattr(SceneGrader, "grade", lambda _, captions, __: read.append(captions) or [{"all": True}] * 2)
    order = Order(make_conditions([f"({prompt}:1.3)" for prompt in PROMPTS]), prompt_weights=True)
    measure = Measure(trained, [Cell({}, order, {})], ClipEmbedder(trained))
    measure(order, Made(np.zeros((2, 32, 32, 3), np.uint8), None), 1, 2.0)
    assert read == [list(PROMPTS)] * 2


def test_a_caption_that_cannot_be_graded_leaves_accuracy_empty(diffusion_run, capsys):
    trained = TrainedSampler.open(diffusion_run("captions"))
    order = Order(make_conditions(["a sad walrus"]))
    measure = Measure(trained, make_cells(trained, order, ()), None)
    assert measure(order, Made(np.zeros((2, 32, 32, 3), np.uint8), None), 2, 1.0)["accuracy"] is None
    assert "no accuracy for 'a sad walrus'" in capsys.readouterr().out


def test_diversity_is_the_mean_distance_of_pairs_of_a_prompt():
    images = np.zeros((2, 2, 4, 4, 3), np.uint8)
    images[1, 1] = 255
    assert diversity(images) == 0.5  # 0 for the first prompt, 1 for the second
    assert diversity(images[:, :1]) is None


def test_a_given_picture_begins_a_row_of_its_cell_however_many_are_made():
    told = np.stack([np.full((64, 64, 3), value, np.uint8) for value in (10, 20)])
    cell = Cell({}, Order(make_conditions(["a"], images=["x.png", "y.png"])), {"image": told})
    shown = np.asarray(_draw_cell(cell, Made(np.full((16, 64, 64, 3), 200, np.uint8), None), 8))
    assert shown[:: 64 + 2, 0, 0].tolist() == [10, 200, 20, 200]


def test_every_run_that_draws_can_be_swept(diffusion_run, debug_run, tmp_path):
    for number, (run, arguments) in enumerate(
        [
            (debug_run("scenes/dalle.py"), ["--sweep=temperature=0,1", "--prompt=a red circle", "--prompt=a star"]),
            (diffusion_run("classes"), ["--sweep=label=0,3,4"]),
            (diffusion_run("nothing"), ["--sweep=seed=0,1"]),
        ]
    ):
        folder = tmp_path / str(number)
        main([f"--run={run}", *arguments, "--num=2", f"--out={folder}/grid.png"])
        rows = table(folder)
        name = arguments[0].split("=")[1]
        assert [row[name] for row in rows] == arguments[0].split("=")[2].split(",")
        assert len({row["pictures"] for row in rows}) == 1 and (folder / "grid.png").is_file()
    assert float(table(tmp_path / "0")[0]["diversity"]) == 0  # greedy
    assert table(tmp_path / "1")[0]["accuracy"] == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sweep=steps=2,3000"], "3000 steps are not between"),
        (["--sweep=guidance=2,-1"], "guidance=-1.0 is impossible"),
        (["--sweep=temperature=1,2"], "has no such setting; it has .*eta, guidance"),
        (["--sweep=guidance=1,2", "--negative_prompt=a blue star"], "no effect with guidance 1"),
        (["--sweep=seed=1,2", "--seed=0"], "--sweep seed and --seed are both given"),
        (["--sweep=prompt=a,b"], "--sweep prompt and --prompt are both given"),
        (["--sweep=label=1,2"], "takes no classes; it takes captions"),
        (["--sweep=seed=1,2", "--out={tmp}/grid.txt"], "cannot write"),
        (["--sweep=seed=1,2", "--rerank=x"], "leave out --sweep"),
        (["--clip=x"], "--clip scores the cells of a --sweep"),
    ],
)
def test_mistakes_are_found_before_anything_is_drawn(diffusion_run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(TrainedSampler, "__call__", lambda *_, **__: pytest.fail("it drew"))
    command = [f"--run={diffusion_run('captions')}", "--prompt=a red circle", f"--out={tmp_path}/grid.png"]
    with pytest.raises(UserError, match=message):
        main([*command, *(argument.format(tmp=tmp_path) for argument in arguments)])
    assert not list(tmp_path.iterdir())


def test_rows_of_cells_that_are_done_are_there_when_a_later_one_fails(diffusion_run, tmp_path, monkeypatch):
    calls, call = [], TrainedSampler.__call__

    def failing(self, rows, **arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return call(self, rows, **arguments)

    monkeypatch.setattr(TrainedSampler, "__call__", failing)
    command = [f"--run={diffusion_run('nothing')}", "--num=1", f"--out={tmp_path}/grid.png"]
    with pytest.raises(KeyboardInterrupt):
        main([*command, "--sweep=seed=0,1,2,3"])
    assert [row["seed"] for row in table(tmp_path)] == ["0", "1"]
