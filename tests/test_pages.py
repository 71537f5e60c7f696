"""The pages a reader follows: links and anchors, files and commands that they name, the front page's size."""

import contextlib
import functools
import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from cli.config import flatten, load_config
from cli.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
FRONT, INDEX = ROOT / "README.md", ROOT / "docs" / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
LAUNCHERS = ("gpu.sh", "slurm.sh", "tpu_vm.sh")


def prose_of(page: Path) -> str:
    """The page without blocks of code, fenced or indented, in which nothing is a link or a heading."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(?<=\n\n)(?: {4}.*\n+)+", "\n", text)


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives headings: lower case, hyphens for spaces, no punctuation; -1 for the next alike."""
    anchors: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        name = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        count = 0
        while (anchor := f"{name}-{count}" if count else name) in anchors:
            count += 1
        anchors.add(anchor)
    return anchors


def links_of(page: Path) -> list[str]:
    """Targets of the page's links and pictures but those to other sites."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose_of(page))
    return [target for target in targets if "://" not in target and not target.startswith("mailto:")]


def destination(page: Path, link: str) -> Path:
    """The file or folder that a link of a page leads to."""
    name = link.partition("#")[0]
    return (page.parent / name).resolve() if name else page


def commands_of(page: Path) -> list[str]:
    """Every command of the page that starts a module of this project: of its blocks, and between backticks."""
    text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
    spans = re.findall(r"`([^`\n]*)`", text) + [line for line in text.splitlines() if line.startswith("    ")]
    found = (re.search(r"python -m ((?:train|sample|evaluation|scripts)\b.*)", span) for span in spans)
    # What follows the command: a comment, the end of a loop, the next of two columns of a block.
    return [re.split(r"\s+#|;|\s{2,}", match[1])[0] for match in found if match]


@functools.cache
def help_of(module: str) -> str:
    """What `python -m module --help` prints."""
    package = ROOT / module.replace(".", "/")
    name = f"{module}.__main__" if package.is_dir() else module
    printed: list[str] = []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("argparse.ArgumentParser.print_help", lambda self, file=None: printed.append(self.format_help()))
        importlib.import_module(name).main(["--help"])
    return printed[0]


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])(--[a-z_]+)", text))


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str):
    page, broken = ROOT / name, []
    for link in links_of(page):
        target, anchor = destination(page, link), link.partition("#")[2]
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("name", NAMES)
def test_lines_have_at_most_120_characters(name: str):
    """But for blocks of code, tables, headings and pictures, what a benchmark writes, and a link that is longer."""
    text = re.sub(r"<!-- benchmark:.*?<!-- end", "", prose_of(ROOT / name), flags=re.DOTALL)
    long = [line for line in text.splitlines() if len(line) > 120 and " " in line]
    assert [line for line in long if not line.startswith(("|", "#", "!["))] == []


def test_index_has_every_page_and_pages_every_picture():
    in_docs = {path for path in (ROOT / "docs").rglob("*") if path.is_file()}
    pages = {path for path in in_docs if path.suffix == ".md"} - {INDEX}
    assert pages - {destination(INDEX, link) for link in links_of(INDEX)} == set()
    shown = {destination(page, link) for page in PAGES for link in links_of(page)}
    assert in_docs - pages - {INDEX} - shown == set()
    assert INDEX in [destination(FRONT, link) for link in links_of(FRONT)]


def test_pages_named_in_code_exist():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    files = [ROOT / name for name in tracked if name.endswith((".py", ".sh"))] or list(ROOT.rglob("*.py"))
    texts = {path: path.read_text(encoding="utf-8") for path in files if path.is_file()}
    named = {(path, page) for path, text in texts.items() for page in re.findall(r"\bdocs/\w+\.md\b", text)}
    assert named
    assert [(str(path), page) for path, page in sorted(named) if not (ROOT / page).is_file()] == []


def test_front_page_is_short_and_begins_with_a_picture():
    text = FRONT.read_text(encoding="utf-8")
    assert len(text.split()) <= 900
    picture = re.search(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert picture is not None and text[: picture.start()].count("\n") < 10
    path = FRONT.parent / picture[1]
    assert path.stat().st_size < 300_000
    with Image.open(path) as opened:
        assert opened.height < 700  # pixels: what is said of it is seen without scrolling


def test_front_page_launches_every_config_of_the_embedded_data():
    commands = "\n".join(commands_of(FRONT))
    configs = [*ROOT.glob("configs/scenes/[a-z]*.py"), *ROOT.glob("configs/toy/[a-z]*.py")]
    assert [path.name for path in configs if f"--config={path.relative_to(ROOT)}" not in commands] == []
    assert [name for name in LAUNCHERS if f"scripts/launch/{name}" not in FRONT.read_text(encoding="utf-8")] == []


def test_every_config_has_a_row_of_what_it_takes_to_reproduce():
    named = set(re.findall(r"\w+\.py", (ROOT / "docs/reproduction.md").read_text(encoding="utf-8")))
    assert {path.name for path in ROOT.glob("configs/*/[a-z]*.py")} - named == set()


@pytest.mark.parametrize("name", NAMES)
def test_commands_on_pages_exist(name: str):
    """Modules, their flags, configs with their arguments, and keys that are overridden."""
    for command in commands_of(ROOT / name):
        module, *arguments = shlex.split(command.replace("...", ""))
        known = flags_in(help_of(module)) | {"--help"}
        config = [argument for argument in arguments if argument.split("=")[0].split(".")[0] == "--config"]
        flags = flags_in(" ".join(argument for argument in arguments if argument not in config))
        assert flags <= known, f"{command}: {module} has no {', '.join(sorted(flags - known))}"
        files = [argument for argument in config if re.match(r"--config=\S+\.py", argument)]
        if files:
            # A loop's variable, or an ellipsis, is no value to be checked.
            load_config([argument for argument in config if re.search(r"=[^$]+$", argument)])


@functools.cache
def keys_of_configs() -> frozenset[str]:
    """Every key, and every group of keys, of some config that ships, of some argument that its docstring names."""
    found: set[str] = set()
    for path in (ROOT / "configs").glob("*/[a-z]*.py"):
        docstring = path.read_text(encoding="utf-8").split('"""')[1]
        for argument in ("", *set(re.findall(r"`(\w+)`", docstring))):
            with contextlib.suppress(UserError):  # other things stand between backticks, too
                for key in flatten(load_config([f"--config={path}:{argument}"])):
                    parts = key.split(".")
                    found |= {".".join(parts[:depth]) for depth in range(1, len(parts) + 1)}
    return frozenset(found)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "CHANGELOG.md"])
def test_keys_on_pages_exist(name: str):
    """What a page calls config.a.b can be set in some config: <name> and * stand for any part."""
    text, keys = (ROOT / name).read_text(encoding="utf-8"), keys_of_configs()
    named = {each.rstrip(".") for each in re.findall(r"\bconfig\.([a-z_]+\.[a-z_0-9.]+)", text)}
    missing = [key for key in named if key not in keys and key != "json"]
    assert missing == []


@pytest.mark.parametrize("name", [name for name in NAMES if name != "CHANGELOG.md"])  # which names what was, too
def test_files_on_pages_exist(name: str):
    """What stands between backticks and looks like a file of the repository: a path below one of its folders."""
    text = (ROOT / name).read_text(encoding="utf-8")
    folders = "|".join(path.parent.name for path in ROOT.glob("*/__init__.py"))
    paths = re.findall(rf"`((?:{folders}|tests|docs)/[\w/.-]+?)(?::[\w]+)?`", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", NAMES)
def test_settings_of_launchers_on_pages_exist(name: str):
    text = re.sub(r"\\\n\s*", "", (ROOT / name).read_text(encoding="utf-8"))
    for launcher, arguments in re.findall(r"scripts/launch/(\w+\.sh)([^\n`#]*)", text):
        printed = subprocess.run([str(ROOT / "scripts/launch" / launcher), "--help"], capture_output=True, text=True)
        settings = flags_in(arguments.partition(" -- ")[0])
        assert settings <= flags_in(printed.stdout) | {"--help"}, f"{launcher}{arguments}"


@pytest.mark.parametrize("name", NAMES)
def test_make_targets_on_pages_exist(name: str):
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    text = (ROOT / name).read_text(encoding="utf-8")
    assert set(re.findall(r"(?:^ *|`)make ([a-z][a-z-]*)", text, re.MULTILINE)) <= targets
