"""The command's figure of points, and what it refuses."""

import numpy as np
import pytest
from PIL import Image

from cli.errors import UserError
from sample.__main__ import main


@pytest.fixture(scope="module")
def run(debug_run):
    return debug_run("toy/swiss_roll.py")


def test_the_figure_has_three_rows_and_something_in_each(run, tmp_path):
    main([f"--run={run}", "--num=50", f"--out={tmp_path}/figure.png"])
    picture = np.asarray(Image.open(tmp_path / "figure.png").convert("L"))
    assert picture.shape[1] > 1.5 * picture.shape[0]
    for row in np.array_split(picture, 3):
        assert (row < 200).mean() > 0.002


def test_points_take_no_prompt(run, tmp_path):
    with pytest.raises(UserError, match="takes no captions; it takes no condition at all; leave it out"):
        main([f"--run={run}", "--prompt=a circle", f"--out={tmp_path}/figure.png"])


def test_a_run_of_captions_needs_one(debug_run, tmp_path):
    with pytest.raises(UserError, match="give --prompt=TEXT"):
        main([f"--run={debug_run('scenes/dalle.py')}", f"--out={tmp_path}/grid.png"])
