"""A folder of pictures: captions in text files beside them, in tables, or classes as the names of sub-folders.

No name that a table holds is ever opened: it is looked up among the files that were found by walking the folder. Links
to files are followed where they end inside the folder; links to folders never, so that no loop can be walked.
"""

import dataclasses
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from cli.errors import UserError
from cli.plurals import spell_count
from data.folder.captions import captions_of_sidecars
from data.folder.items import (
    ALONE,
    CONVERTIBLE,
    MAX_PICTURE,
    MAX_TEXT,
    PICTURES,
    Item,
    Listing,
    Portion,
    Rejected,
    fingerprint_of_files,
    is_number,
    read_file,
    shown,
)
from data.folder.tables import NAMES, Fields, Table

PORTION = 512  # pictures that are read by one process at once, and that a kill can cost

_SIDECARS = (".txt", ".json")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A picture that was found.

    Attributes:
      name: of its file, below the folder.
      sidecars: names of the files beside it that may hold captions, where no table does.
      captions: of a table.
      label: of a table, or the sub-folder's name.
      rejected: why it is not even read.
    """

    name: str
    sidecars: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    label: str | int | None = None
    rejected: Rejected | None = None


@dataclasses.dataclass(frozen=True)
class FilesPortion(Portion):
    """Some pictures of a folder."""

    root: Path
    entries: Sequence[Entry]
    fields: Fields

    def read(self) -> Iterator[Item]:
        """Yields a picture for each entry."""
        for entry in self.entries:
            name = shown(entry.name)
            try:
                if entry.rejected is not None:
                    raise entry.rejected
                captions, label = entry.captions, entry.label
                if entry.sidecars:
                    captions, found = self._read_sidecars(entry.sidecars)
                    label = found if found is not None else label
                yield Item(name, read_file(self.root / entry.name, MAX_PICTURE), captions, label)
            except Rejected as rejected:
                yield Item(name, rejected=rejected)

    def _read_sidecars(self, names: Sequence[str]) -> tuple[tuple[str, ...], str | int | None]:
        """The captions and the class of the files beside a picture."""
        texts: dict[str, bytes | Rejected] = {}
        for name in names:
            try:
                texts[_suffix(name)] = read_file(self.root / name, MAX_TEXT)
            except Rejected as rejected:
                texts[_suffix(name)] = Rejected("bad caption", f"{shown(name)}: {rejected.detail}")
        return captions_of_sidecars(texts, self.fields.text, self.fields.label)


def list_folder(
    root: Path, fields: Fields, found: tuple[Sequence[str], Sequence[Item]], table: Path | None = None
) -> Listing:
    """Looks through a folder.

    Args:
      root: the folder.
      fields: that were asked for, of tables and JSON files.
      found: what `walk` found in it.
      table: the one table to be read; None for those whose names are in `NAMES`.

    Raises:
      UserError: if there is no picture in it, or a table cannot be understood.
    """
    files, ignored = found[0], list(found[1])
    pictures = {name: Entry(name) for name in files if _suffix(name) in PICTURES}
    named = [name for name in files if PurePosixPath(name).name.lower() in NAMES]
    tables = [table.relative_to(root).as_posix()] if table else named
    used, notes = set(tables), []
    for name in tables:
        notes += _read_table(root, name, fields, pictures, ignored)
    texts = {  # by their names with a suffix in small letters; sorted, A.txt comes after A.TXT and is the one
        str(PurePosixPath(name).with_suffix(_suffix(name))): name
        for name in sorted(files)
        if _suffix(name) in _SIDECARS and name not in used
    }
    stems = {_stem(name) for name in pictures}
    composed = {_composed(text): name for text, name in texts.items() if _stem(text) not in stems}
    alone = set(texts.values())
    for name, entry in pictures.items():
        names = (str(PurePosixPath(name).with_suffix(suffix)) for suffix in _SIDECARS)
        beside = [text for each in names if (text := texts.get(each) or composed.get(_composed(each)))]
        used.update(beside)
        if beside and not entry.captions and entry.rejected is None:
            pictures[name] = dataclasses.replace(entry, sidecars=tuple(beside))
    if not pictures:
        kinds = Counter(_suffix(name) or "no suffix" for name in files).most_common(3)
        there = ", ".join(f"{count:,} of {suffix}" for suffix, count in kinds) or "no file"
        raise UserError(
            f"there is no picture in {root}: it has {there}; give another --source, or convert what is none of "
            f"{', '.join(sorted(PICTURES))}"
        )
    if sidecars := sum(bool(entry.sidecars) for entry in pictures.values()):
        notes.append(f"{spell_count(sidecars, 'caption')} of files beside the pictures")
    folders = [PurePosixPath(name).parent.name for name in pictures]
    known = any(entry.sidecars or entry.captions or entry.label is not None for entry in pictures.values())
    if not known and any(folders):
        pictures = {name: _labelled(entry) for name, entry in pictures.items()}
        numbers = all(map(is_number, filter(None, folders)))
        taken = "classes" if numbers else "classes, and for captions"
        notes.append(f"no captions: the names of sub-folders are taken for {taken}")
    ignored += [
        Item(shown(name), rejected=Rejected("other", _what_else(name) if name not in alone else ALONE))
        for name in files
        if name not in pictures and name not in used
    ]
    # What is not read, such as a page about the dataset that was written there, does not make it another source.
    read = [(name, root / name) for name in files if name in pictures or name in used]
    fingerprint = fingerprint_of_files(read, tables[0] if table else "")
    entries = list(pictures.values())
    portions = [FilesPortion(root, entries[i : i + PORTION], fields) for i in range(0, len(entries), PORTION)]
    return Listing("a folder of pictures", portions, fingerprint, ignored, notes)


def _composed(name: str) -> str:
    """The name with its accents in its letters, which macOS and some programs take apart."""
    return unicodedata.normalize("NFC", name)


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _what_else(name: str) -> str:
    """What to say of a file that is no picture of a kind that is read, but may have been meant as one."""
    return "convert it to JPEG or PNG" if _suffix(name) in CONVERTIBLE else ""


def _labelled(entry: Entry) -> Entry:
    """The picture with the name of its folder, in which a line ends no name, as its class."""
    label = " ".join(shown(PurePosixPath(entry.name).parent.name).split()) or None
    return dataclasses.replace(entry, label=label)


def walk(root: Path, bounds: Path) -> tuple[list[str], list[Item]]:
    """The names of regular files below a folder, sorted, and what else is there.

    Args:
      root: the folder.
      bounds: the folder out of which no link may lead.

    Raises:
      UserError: if the folder cannot be read.
    """
    files: list[str] = []
    ignored: list[Item] = []
    waiting = [""]

    def ignore(name: str, reason: str, detail: str) -> None:
        ignored.append(Item(shown(name), rejected=Rejected(reason, detail)))

    while waiting:
        folder = waiting.pop()
        try:
            entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
        except OSError as error:
            if not folder:
                raise UserError(f"cannot read the folder {root}: {error.strerror}; give another --source") from error
            ignore(folder, "unreadable", error.strerror or str(error))
            continue
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                ignore(name, "other", "hidden")
            elif entry.is_dir(follow_symlinks=False):
                waiting.append(name)
            elif entry.is_file(follow_symlinks=False):
                files.append(name)
            elif not entry.is_symlink():
                ignore(name, "special", "no regular file")
            elif problem := _problem_of_link(root / name, bounds):
                ignore(name, "link", problem)
            else:
                files.append(name)
    return sorted(files), sorted(ignored, key=lambda item: item.name)


def _problem_of_link(path: Path, bounds: Path) -> str:
    """Why a link is not followed; "" if it is."""
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):  # a loop of links is either, as Python's version has it
        return "leads nowhere"
    if not target.is_relative_to(bounds):
        return "leads out of the folder"
    return "" if target.is_file() else "leads to no file"


def _read_table(root: Path, name: str, fields: Fields, pictures: dict[str, Entry], ignored: list[Item]) -> list[str]:
    """Puts captions and classes of a table to its pictures; returns what to say of it."""
    folder = PurePosixPath(name).parent
    inside = "" if str(folder) == "." else f"{folder}/"
    names = {path: _composed(path) for path in pictures if path.startswith(inside)}
    by_path = {composed: path for path, composed in names.items()}
    times = Counter(PurePosixPath(composed).name for composed in names.values())
    by_name = {PurePosixPath(composed).name: path for path, composed in names.items()}
    table = Table(root / name, fields)
    for row in table.rows():
        where = f"{shown(name)}, line {row.line}"
        path = PurePosixPath(row.file.replace("\\", "/") if f"{inside}{row.file}" not in pictures else row.file)
        if path.is_absolute() or ".." in path.parts:
            ignored.append(Item(where, rejected=Rejected("outside", shown(row.file[:200]))))
            continue
        found = f"{inside}{path}"
        if found not in pictures:
            found = by_path.get(_composed(found), found)
        if found not in pictures and times[last := _composed(path.name)] == 1:
            found = by_name[last]  # a table that lies beside the folder of its pictures
        if found not in pictures:
            ignored.append(Item(where, rejected=Rejected("missing", shown(row.file[:200]))))
            continue
        entry = pictures[found]
        captions = tuple(dict.fromkeys((*entry.captions, *row.captions)))
        label = row.label if row.label is not None else entry.label
        pictures[found] = dataclasses.replace(entry, captions=captions, label=label)
    ignored += table.ignored
    return table.notes
