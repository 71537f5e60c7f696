"""`--size`: a diffusion that trained on several shapes draws one of them, and what is refused."""

import json
import shutil

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from cli.errors import UserError
from data.preprocess import center_crop
from sample.__main__ import main
from sample.samplers.diffusion import DiffusionSampler


@pytest.fixture
def shaped_run(diffusion_run, tmp_path):
    """A run folder whose config has buckets."""
    folder = shutil.copytree(diffusion_run("nothing"), tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    config["data"] |= {"buckets": [[16, 32], [32, 16]], "transform": "random_crop"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_shape_that_the_run_trained_on_is_drawn(shaped_run, tmp_path, capsys):
    few = ["--sampler=ddim", "--steps=2", "--num=2", f"--files={tmp_path}/files", f"--out={tmp_path}/grid.png"]
    main([f"--run={shaped_run}", "--size=16x32", *few])
    drawn = np.stack([np.asarray(Image.open(tmp_path / "files" / f"0000{i}.png")) for i in range(2)])
    assert drawn.shape == (2, 16, 32, 3) and np.any(drawn[0] != drawn[1])
    assert json.loads((tmp_path / "files" / "samples.json").read_text())["settings"]["size"] == "16x32"
    assert '"size": "16x32"' in capsys.readouterr().out
    photo = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    main([f"--run={shaped_run}", "--size=32x16", f"--image={tmp_path}/photo.png", "--strength=0", *few[2:]])
    kept = np.asarray(Image.open(tmp_path / "files" / "00000.png"))
    np.testing.assert_array_equal(kept, center_crop(photo, (32, 16)))


def test_other_shapes_are_refused_in_one_line(shaped_run, diffusion_run, tmp_path):
    for run, size, message in (
        (shaped_run, "24x32", "--size=24x32 is none of the shapes that .* trained on; choose one of 16x32, 32x16"),
        (shaped_run, "32", "--size: '32' is no height and width; such as 48x80"),
        (diffusion_run("nothing"), "16x32", "config.data.buckets, and .* has none: it draws 32 x 32 pixels alone"),
    ):
        with pytest.raises(UserError, match=message) as error:
            main([f"--run={run}", f"--size={size}", f"--out={tmp_path}/grid.png"])
        assert "\n" not in str(error.value)


def test_learned_positions_are_of_one_shape():
    fields = {"name": "uvit", "image_size": 8, "patch_size": 4, "width": 8, "depth": 2, "heads": 2}
    process = {"schedule": {"name": "discrete"}, "prediction": "eps"}

    def sampler(positions):
        models = {"denoiser": {**fields, "positions": positions}}
        groups = {
            "models": models,
            "frozen": {},
            "process": process,
            "sample": {},
            "loss": {},
            "data": {"image_size": 8},
        }
        return DiffusionSampler.from_config(ConfigDict({"objective": "diffusion", **groups}))

    assert sampler("sincos_2d").in_shape((4, 12)).sample_shape == (4, 12, 3)
    for positions, shape in (("learned", (4, 12)), ("sincos_2d", (4, 10))):
        with pytest.raises(
            UserError, match=f"the denoiser does not take pictures of 4 x {shape[1]} pixels: .*leave out --size"
        ):
            sampler(positions).in_shape(shape)
