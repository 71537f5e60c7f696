"""`python -m scripts.prepare` where datasets are kept in a store of objects, and sources of pictures in one."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.config import load_config
from cli.errors import UserError
from cli.locations import locate
from data.pipeline import load_tokenizer, open_stream
from data.records import RecordSource, dataset_folder
from data.storage import INFO, DataHome
from scripts import prepare

from ..data.folder.damaged import MIN_SIZE, make, write_folder, write_parquet, write_tar
from ..object_store import ObjectStore

MADE = make(24, 6)


def call(capsys, *arguments: str) -> str:
    prepare.main(arguments)
    return capsys.readouterr().out


def test_a_dataset_is_made_here_and_read_there(
    object_store: ObjectStore, bucket: str, scenes_dir: Path, monkeypatch, capsys
):
    data_dir = f"gs://{bucket}/data"
    made = DataHome.open(data_dir).made

    def drawn(name: str, folder: Path) -> None:
        shutil.copytree(scenes_dir / "scenes", folder / "scenes", ignore=shutil.ignore_patterns("tokenizer.json"))

    monkeypatch.setattr(prepare.MADE_HERE["scenes"], "prepare", drawn)
    object_store.forbidden = f"POST .*{INFO}"  # cut short before the file that says that it is whole
    with pytest.raises(OSError, match="Forbidden"):
        call(capsys, "--dataset=scenes/single32", f"--data_dir={data_dir}")
    with pytest.raises(UserError, match=f"dataset scenes/single32 is not in {data_dir}; run .*--data_dir={data_dir}"):
        dataset_folder("scenes/single32", data_dir)
    object_store.forbidden = ""
    (locate(data_dir) / "scenes/single32/1.0.0.bak" / INFO).write_text("{}")  # a backup is no version
    assert not DataHome.open(data_dir).published("scenes/single32")
    monkeypatch.setattr(prepare.MADE_HERE["scenes"], "prepare", lambda name, folder: None)  # it is there
    printed = call(capsys, "--dataset=scenes/single32", f"--data_dir={data_dir}")
    assert "300 training pictures, 351 text ids" in printed and f"in {data_dir}/scenes/single32/" in printed
    assert not list(made.rglob("*.array_record*"))
    object_store.requests.clear()
    assert "300 training pictures" in call(capsys, "--dataset=scenes/single32", f"--data_dir={data_dir}")
    assert not any(request.startswith("POST") for request in object_store.requests)

    streams = [
        open_stream(config.data, load_tokenizer(config.data), split="train", seed=0, train=True)
        for where in (scenes_dir, data_dir)
        for config in [load_config(["--config=configs/scenes/dalle.py:debug", f"--config.data.data_dir={where}"])]
    ]
    for here, there in zip(*(stream.batch(range(8)).values() for stream in streams), strict=True):
        assert (here == there).all()
    for name in [name for name in object_store.objects if name.startswith(f"{bucket}/") and "train.array" in name]:
        del object_store.objects[name]
    with pytest.raises(UserError, match=f"reading gs://{bucket}/data/scenes/.*; check that it is there"):
        RecordSource("scenes/single32", "train", data_dir)[0]


@pytest.mark.parametrize(("write", "suffix"), [(write_tar, "tar"), (write_parquet, "parquet")])
def test_archives_are_read_where_they_lie(
    write: Callable[..., str], suffix: str, object_store: ObjectStore, bucket: str, tmp_path: Path, capsys
):
    here = write(MADE, tmp_path / "shards")
    object_store.put_folder(f"{bucket}/shards", tmp_path / "shards")
    sources = {"here": here, "there": f"gs://{bucket}/shards/*.{suffix}"}
    options = ("--dataset=folder", f"--min_size={MIN_SIZE}", "--workers=1")
    records = {}
    for name, source in sources.items():
        printed = call(capsys, *options, f"--source={source}", f"--name={name}", f"--data_dir={tmp_path}")
        assert "left out: 6" in printed
        folder = dataset_folder(f"folder/{name}", str(tmp_path))
        records[name] = {path.name: path.read_bytes() for path in folder.glob("*.array_record*")}
    assert records["here"] == records["there"] != {}
    object_store.forbidden = "alt=media"
    arguments = (*options, f"--source={sources['there']}", "--name=again", f"--data_dir={tmp_path}")
    with pytest.raises(UserError, match="the store refused"):  # and nothing is taken for damaged
        prepare.main(arguments)
    with pytest.raises(UserError, match=f"there is no file gs://{bucket}/none; of a store, tar archives and parquet"):
        prepare.main([*options, f"--source=gs://{bucket}/none", "--name=none"])


def test_own_pictures_in_a_store_are_those_that_were_asked_for(bucket: str, tmp_path: Path, capsys):
    source = write_folder(MADE, tmp_path / "pets")
    arguments = ["--dataset=folder", f"--data_dir=gs://{bucket}", f"--min_size={MIN_SIZE}", "--workers=1"]
    printed = call(capsys, *arguments, f"--source={source}")
    assert f"all of them in gs://{bucket}/folder/pets/1.0.0/report.json" in printed
    assert "left out: 6" in call(capsys, *arguments, f"--source={source}")
    with pytest.raises(UserError, match="was prepared with another --size; give another --name, or remove gs:"):
        prepare.main([*arguments, f"--source={source}", "--size=16"])


def test_a_home_that_nobody_has_is_no_place_for_data(tmp_path: Path):
    with pytest.raises(UserError, match="~nobody-here begins with a home folder that nobody has"):
        prepare.main(["--dataset=scenes/single32", "--data_dir=~nobody-here"])
