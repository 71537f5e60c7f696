"""What a clone must hold together: packaging, the lock file, the Makefile and what runs its targets."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
SETUP = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
LOCKED = ("dev", "drawings", "parity", "cuda", "tokamax")  # extras whose versions requirements.lock gives
OPTIONAL = ("tokamax",)  # which the oldest Python lacks, and a lock that is made for it


def setup_arguments() -> dict[str, ast.expr]:
    """The keyword arguments of setup.py's call of `setup`."""
    calls = [node for node in ast.walk(SETUP) if isinstance(node, ast.Call) and ast.unparse(node.func) == "setup"]
    return {keyword.arg: keyword.value for keyword in calls[0].keywords if keyword.arg}


def packages() -> set[str]:
    """The folders of code at the top level."""
    return {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}


def requirements(*extras: str) -> list[Requirement]:
    """What setup.py asks for, with these extras."""
    arguments = setup_arguments()
    lines = list(ast.literal_eval(arguments["install_requires"]))
    for extra in extras:
        lines += ast.literal_eval(arguments["extras_require"])[extra]
    return [Requirement(line) for line in lines]


def locked_versions() -> dict[str, set[Version]]:
    """Distribution -> the versions that requirements.lock gives it on one platform or another."""
    versions: dict[str, set[Version]] = {}
    for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines():
        if found := re.match(r"([A-Za-z0-9._-]+)(?:\[.*\])?==([^ ;]+)", line):
            versions.setdefault(canonicalize_name(found[1]), set()).add(Version(found[2]))
    return versions


def files_of_repository() -> list[Path]:
    """Every file that is tracked, or would be: what a clone consists of."""
    if not (ROOT / ".git").exists():  # an unpacked archive
        return [
            path for path in ROOT.rglob("*") if path.is_file() and not path.relative_to(ROOT).parts[0].startswith(".")
        ]
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def targets() -> set[str]:
    """The names that `make` knows and the Makefile explains."""
    return set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("build", ["build_wheel", "build_editable"])
def test_installation_puts_no_package_into_site_packages(build: str, tmp_path: Path):
    """`models` or `data` in site-packages would collide with anybody's; the project runs from a checkout."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in packages():
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    program = f"from setuptools import build_meta; build_meta.{build}('dist')"
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True, timeout=120)
    with zipfile.ZipFile(next(tmp_path.glob("dist/*.whl"))) as wheel:
        top = {name.split("/")[0] for name in wheel.namelist()}
        assert {name for name in top if not re.match(r"__editable__|tessera_jax-", name)} == set()
        finders = [wheel.read(name).decode() for name in wheel.namelist() if name.endswith("_finder.py")]
    assert all(re.search(r"^MAPPING\b.*= \{\}$", finder, re.MULTILINE) for finder in finders)


def test_every_folder_of_code_is_a_package():
    """One without __init__.py would be joined with a folder of its name anywhere else on Python's path."""
    folders = {path.parent for name in packages() for path in (ROOT / name).rglob("*.py")}
    assert [str(folder.relative_to(ROOT)) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize(
    "requirement",
    requirements(*LOCKED),
    ids=lambda requirement: requirement.name,
)
def test_lock_has_what_setup_asks_for(requirement: Requirement):
    versions = locked_versions().get(canonicalize_name(requirement.name))
    if versions is None and requirement.name in OPTIONAL:
        return
    assert versions, f"the lock lacks {requirement}"
    assert all(version in requirement.specifier for version in versions), f"{requirement} but the lock has {versions}"


def test_every_dependency_has_a_lower_bound():
    """Without one, continuous integration could not try the oldest versions that work."""
    unbounded = [str(each) for each in requirements(*LOCKED) if not re.search(">=|==", str(each.specifier))]
    assert unbounded == []


def test_lock_names_no_index():
    """A clone installs from whatever index its pip is set up for."""
    assert "://" not in (ROOT / "requirements.lock").read_text(encoding="utf-8")


def test_no_file_is_large():
    large = [f"{path.relative_to(ROOT)}: {path.stat().st_size}" for path in files_of_repository()]
    assert [line for line in large if int(line.rsplit(": ")[1]) > 1_000_000] == []


@pytest.mark.parametrize("file", [".ci/run", ".github/workflows/ci.yml"])
def test_continuous_integration_names_targets_that_exist(file: str):
    text = (ROOT / file).read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^ *(?:- run: )?|`)make ([a-z][a-z-]*)", text, re.MULTILINE))
    assert named - targets() == set()


def test_continuous_integration_runs_every_check():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.findall(r"^step make ([a-z-]+)$", script, re.MULTILINE) == ["test", "check", "test-slow", "parity"]
    assert targets() >= {"demo", "test", "test-slow", "check", "parity", "lock", "clean", "help"}
