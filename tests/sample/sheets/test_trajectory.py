"""Pictures of denoising: what each column and row shows, and what is refused."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from cli.errors import UserError
from sample.__main__ import main
from sample.conditions import Order, draw, make_conditions, order_rows
from sample.sheets.grid import draw_mosaic
from sample.sheets.trajectory import draw_trajectory
from sample.trained import TrainedSampler


@pytest.fixture(scope="module")
def drawn(diffusion_run):
    """A trajectory of two pictures at 3 of 5 moments, its run and order."""
    trained = TrainedSampler.open(diffusion_run("captions"))
    order = Order(make_conditions(["a red circle"]), settings={"sampler": "ddim", "steps": 4})
    return trained, order, draw_trajectory(trained, order, 2, 3)


def cell(table, row, column):
    """Pixels of a cell, counted from the right bottom corner, where nothing but cells and margins stands."""
    side, step = 96, 104
    height, width = table.shape[:2]
    top, left = height - (4 - row) * step, width - (3 - column) * step
    return table[top : top + side, left : left + side].astype(int)


def test_columns_go_from_noise_to_the_sample(drawn):
    trained, order, result = drawn
    table = np.asarray(result.picture)
    plain = draw(trained, order, order_rows(trained, order), 2).images
    assert np.abs(result.images.astype(int) - plain).max() <= 1
    for picture in range(2):
        expected = np.asarray(draw_mosaic(result.images[picture][None], columns=1, min_side=96))
        np.testing.assert_array_equal(cell(table, 2 * picture, 2), expected)
        noise = cell(table, 2 * picture, 0)
        assert noise.std() > 50 and np.abs(noise - expected).mean() > 20
        assert (cell(table, 2 * picture + 1, 2) > 240).all()  # of the sample there is no estimate
    assert np.abs(cell(table, 0, 1) - cell(table, 1, 1)).max() > 20  # x_t, and what is taken for x_0 in it


def test_there_are_no_more_columns_than_moments(drawn):
    trained, order, result = drawn
    all_of_them = draw_trajectory(trained, order, 1, 50).picture
    assert all_of_them.width - result.picture.width == 2 * 104  # 4 steps and the sample


def test_a_picture_that_is_changed_is_shown_from_its_own_first_step(diffusion_run, tmp_path):
    trained = TrainedSampler.open(diffusion_run("captions"))
    Image.new("RGB", (32, 32), (200, 30, 30)).save(tmp_path / "red.png")
    settings = {"sampler": "ddim", "steps": 4, "strength": 0.5}
    order = Order(make_conditions(["x"], images=[f"{tmp_path}/red.png"]), settings=settings)
    result = draw_trajectory(trained, order, 1, 50)
    whole = draw_trajectory(trained, dataclasses.replace(order, settings={**settings, "strength": 1.0}), 1, 50)
    assert whole.picture.width - result.picture.width == 2 * 104 and result.settings["strength"] == 0.5
    plain = draw(trained, order, order_rows(trained, order), 1).images
    assert np.abs(result.images.astype(int) - plain).max() <= 1
    with pytest.raises(UserError, match="strength 0 runs no step that could be shown"):
        draw_trajectory(trained, dataclasses.replace(order, settings={"strength": 0.0}), 1, 50)
    unread = dataclasses.replace(order, settings={**settings, "sampler": "ddpm", "end": "first"})
    with pytest.raises(UserError, match="end=first has no effect, as the times of ddpm are the same without it"):
        draw_trajectory(trained, unread, 1, 50)


def test_mistakes_get_a_line(diffusion_run, debug_run, tmp_path):
    out = f"--out={tmp_path}/x.png"
    captions = [f"--run={diffusion_run('captions')}", "--prompt=x", out]
    for arguments, message in [
        ([*captions, "--trajectory=1"], "--trajectory=1 must be at least 2"),
        ([*captions, "--trajectory", "--sweep=seed=1,2"], "leave one of them out"),
        ([*captions, "--trajectory", "--rerank=x"], "leave out --sweep and --trajectory"),
        (
            [f"--run={debug_run('scenes/dalle.py')}", "--prompt=x", "--trajectory", out],
            "run of dalle and makes image; --traj",
        ),
        ([f"--run={debug_run('toy/swiss_roll.py')}", "--trajectory", out], "makes point; --trajectory is for"),
    ]:
        with pytest.raises(UserError, match=message):
            main(arguments)
