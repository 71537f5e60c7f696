"""What `--source` may be: patterns, mixtures, and the cache of the Hugging Face hub."""

from pathlib import Path

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import DryRunFileInfo, constants, errors

from cli.errors import UserError
from data import folder
from data.folder.sources import expand_braces

from .damaged import FORMS, make
from .files import put


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("{8..11}.tar", ["8.tar", "9.tar", "10.tar", "11.tar"]),
        ("{008..010}.tar", ["008.tar", "009.tar", "010.tar"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
        ("none.tar", ["none.tar"]),
        ("{5..3}", ["5", "4", "3"]),
        ("{10..08}", ["10", "09", "08"]),
        ("{1}{}", ["{1}{}"]),
    ],
)
def test_braces_mean_what_a_shell_means(pattern: str, names: list[str]):
    assert list(expand_braces(pattern)) == names


@pytest.mark.parametrize("pattern", ["{:03d}.tar", "*.tar", "{{000..001}}.tar", "{{000,001}}.tar", ""])
def test_a_pattern_names_archives(pattern: str, tmp_path: Path, read_source):
    FORMS["tar"](make(6, 0), tmp_path / "in")
    source = tmp_path / "in" / pattern.format(0) if "{:" in pattern else tmp_path / "in" / pattern.format()
    kept, left_out = read_source(source)
    assert len(kept) == (3 if "{:" in pattern else 6) and not left_out


def test_a_file_with_braces_in_its_name_can_be_named(tmp_path: Path, read_source):
    FORMS["tar"](make(2, 0), tmp_path / "in")
    path = (tmp_path / "in" / "000.tar").rename(tmp_path / "a{1,2}.tar")
    assert len(read_source(path)[0]) == 1


def test_other_files_beside_archives_are_named(tmp_path: Path, read_source):
    FORMS["parquet"](make(6, 0), tmp_path / "in" / "data")
    put(tmp_path, "in/README.md", "# about")
    kept, left_out = read_source(tmp_path / "in")
    assert len(kept) == 6 and left_out == {"README.md": "other"}


def test_a_folder_of_img2dataset_is_read_as_its_archives(tmp_path: Path, read_source):
    FORMS["tar"](make(6, 0), tmp_path / "in")
    for shard in ("000", "001"):
        pq.write_table(pa.table({"url": ["http"], "caption": ["x"]}), tmp_path / "in" / f"{shard}.parquet")
        put(tmp_path, f"in/{shard}_stats.json", "{}")
    kept, left_out = read_source(tmp_path / "in")
    assert len(kept) == 6 and all(item.captions for item in kept.values())
    assert left_out == {f"{shard}{end}": "other" for shard in ("000", "001") for end in (".parquet", "_stats.json")}


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_suffixes_are_read_in_any_case(form: str, tmp_path: Path, read_source):
    FORMS[form](make(2, 0), tmp_path / "in")
    path = min((tmp_path / "in").iterdir())
    path = path.rename(path.with_suffix(path.suffix.upper()))
    for other in set((tmp_path / "in").iterdir()) - {path}:
        other.unlink()
    expected = set(read_source(path)[0])
    assert expected and set(read_source(tmp_path / "in")[0]) == expected


def test_a_table_may_be_named_in_any_case(tmp_path: Path, png: bytes, read_source):
    put(tmp_path, "a.png", png)
    put(tmp_path, "list.CSV", "file_name,text\na.png,x\n")
    assert read_source(tmp_path / "list.CSV")[0]["a.png"].captions == ("x",)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none", "there is no file .*none"),
        ("{000..003}.tar", "there is no file .*/000.tar .and 3 more are missing"),
        ("{0..99999999}.tar", "names more than 100,000 files"),
        ("*.tar", "there is no file"),
        ("x" * 300, "cannot read .*: File name too long"),
        ("a.zip", "is no folder and no kind of file that is read"),
        ("{a.zip,b.csv}", "all of one kind"),
    ],
)
def test_a_source_that_is_not_there_is_one_line(source: str, message: str, tmp_path: Path, read_source):
    put(tmp_path, "a.zip")
    put(tmp_path, "b.csv")
    with pytest.raises(UserError, match=message):
        read_source(tmp_path / source)


def test_a_home_that_nobody_has_is_one_line(read_source):
    with pytest.raises(UserError, match="there is no file ~nobody_is_called_so/x"):
        read_source("~nobody_is_called_so/x")


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch) -> Path:
    """A cache as the hub's library lays it out: links from a snapshot to blobs."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    repository = cache / "datasets--org--pets"
    put(repository, "refs/main", "a" * 40)
    FORMS["parquet"](make(6, 0), tmp_path / "made")
    (repository / "blobs").mkdir(parents=True)
    (tmp_path / "made" / "train-00000.parquet").rename(repository / "blobs" / "blob")
    (repository / "snapshots" / ("a" * 40) / "data").mkdir(parents=True)
    (repository / "snapshots" / ("a" * 40) / "data" / "train.parquet").symlink_to("../../../blobs/blob")
    return cache


def test_a_cached_dataset_of_the_hub_needs_no_network(hub_cache: Path, read_source, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    kept, left_out = read_source("hf:org/pets")
    assert len(kept) == 6 and not left_out
    assert next(iter(kept)) == "data/train.parquet, row 0 (00000.png)"
    assert folder.name_of_source("hf:org/pets@v1") == "pets"
    with pytest.raises(UserError, match="hf:org/none is not in the cache .* and the hub cannot be reached"):
        read_source("hf:org/none")


def _answer(kind: type[Exception]) -> Exception:
    """An error as the library raises it; what it is made with differs between versions."""
    error = kind.__new__(kind)
    error.args = ("x",)
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.LocalEntryNotFoundError("x"), "cannot be reached"),
        (_answer(errors.RepositoryNotFoundError), "there is no dataset 'org/none' on the hub"),
        (_answer(errors.GatedRepoError), "is gated"),
        (_answer(errors.RevisionNotFoundError), "has no revision 'v2'"),
        (RuntimeError("no route\nto host"), "cannot fetch hf:org/none@v2: no route to host"),
        (OSError(28, "No space left on device"), "cannot fetch hf:org/none@v2: .*No space left"),
    ],
)
def test_what_the_hub_answers_is_one_line(error: Exception, message: str, hub_cache: Path, read_source, monkeypatch):
    def download(**_: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match=message):
        read_source("hf:org/none@v2")


def test_what_the_cache_lacks_is_said_and_fetched(hub_cache: Path, read_source, monkeypatch, capsys):
    snapshot = hub_cache / "datasets--org--pets" / "snapshots" / ("a" * 40)

    names = ("data/train.parquet", "data/more.parquet")
    said = []

    def download(**asked: object) -> str | list[DryRunFileInfo]:
        if asked.get("dry_run"):
            cached = [(snapshot / name).exists() for name in names]
            return [
                DryRunFileInfo("a" * 40, 1_234_567, name, str(snapshot / name), there, not there)
                for name, there in zip(names, cached, strict=True)
            ]
        said.append(capsys.readouterr().out)
        (snapshot / "data" / "more.parquet").write_bytes((snapshot / "data" / "train.parquet").read_bytes())
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    kept, _ = read_source("hf:org/pets")
    assert len(kept) == 12
    assert "hf:org/pets: fetching 1 of 2 files, 1.235 MB: data/more.parquet" in said[0]
    read_source("hf:org/pets")
    assert "fetching" not in said[1]


@pytest.mark.parametrize(
    ("source", "name"),
    [("/data/My Pets/", "My_Pets"), ("shards/{000..010}.tar", "shards"), ("*.tar", "pictures"), ("a/b.parquet", "b")],
)
def test_a_dataset_is_named_after_its_source(source: str, name: str):
    assert folder.name_of_source(source) == name
