"""Files that tests write and compare."""

from pathlib import Path


def put(root: Path, name: str, data: bytes | str = b"") -> None:
    """Writes a file below a folder, and the folders on the way to it."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def contents(path: Path) -> dict[str, bytes]:
    """What the files below a folder hold, by name."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
