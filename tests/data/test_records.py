"""Records of other people's datasets: what their fields hold, and what of it is read."""

import io

import numpy as np
import pytest
from PIL import Image

from cli.errors import UserError
from configs.scenes.dvae import get_config
from data.pipeline import ExampleStream, RecordSource

from .made_up import NAME, prepare_made_up


def file(picture: Image.Image, form: str = "PNG", **options) -> bytes:
    picture.save(stream := io.BytesIO(), form, **options)
    return stream.getvalue()


def test_a_batch_holds_pictures_of_every_kind(tmp_path, capsys):
    color = Image.new("RGB", (40, 40), (10, 20, 30))
    sideways = Image.Exif()
    sideways[0x0112] = 6
    files = [
        file(color),
        file(color.convert("RGBA")),
        file(color.quantize(2)),
        file(Image.new("LA", (40, 40), (7, 255))),
        file(Image.new("1", (40, 40), 1)),
        file(Image.fromarray(np.full((40, 40), 0x1234, np.uint16))),
        file(Image.new("RGB", (60, 40), (0, 0, 255)), "JPEG", exif=sideways),
        b"<html>not found</html>",
    ]
    prepare_made_up(tmp_path, {}, {"train": [{"image": data} for data in files]})
    source = RecordSource(NAME, "train", str(tmp_path))
    records = [source[index] for index in range(8)]
    shown = {tuple(record["image"][0, 0].tolist()) for record in records}
    assert shown == {(10, 20, 30), (7,) * 3, (255,) * 3, (0x12,) * 3, (0, 0, 254)}
    assert (60, 40, 3) in [record["image"].shape for record in records]
    assert len(source.damaged) == 1 and "it is a web page" in capsys.readouterr().out
    config = get_config("debug").data
    with config.unlocked():
        config.dataset, config.data_dir = NAME, str(tmp_path)
    for transform in ("center_square", "dvae_training", "dalle_training", "clip_training", "adm_training"):
        with config.unlocked():
            config.transform = transform
        batch = ExampleStream(config, None, split="train", seed=0, train=True).batch(range(8))
        assert batch["image"].shape == (8, 32, 32, 3)


def test_a_split_without_any_picture_is_refused(tmp_path):
    prepare_made_up(tmp_path, {}, {"train": [{"image": b"no picture"}] * 2})
    with pytest.raises(UserError, match=r"no record of made_up \(train\) can be read"):
        RecordSource(NAME, "train", str(tmp_path))[0]
