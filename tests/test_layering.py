"""The folder tree is the architecture: who may import whom, and what a file may be called.

Imports are read from the source of every file, those inside functions, under TYPE_CHECKING and through `importlib`
included; nothing is executed. The rules are tables below; the tests of the rules plant a violation of each.
"""

import ast
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Folder -> the folders of this project that its files may import, beside itself.
PROJECT_IMPORTS = {
    "cli": set(),
    "configs": set(),
    "models": set(),
    "diffusion": set(),
    "data": {"cli"},
    "weights": {"cli", "configs", "models", "data"},
    "sample": {"cli", "models", "diffusion", "data", "weights"},
    "evaluation": {"cli", "configs", "models", "diffusion", "data", "weights", "sample"},
    "train": {"cli", "configs", "models", "diffusion", "data", "weights", "sample", "evaluation"},
    "cost": {"cli", "configs", "models", "diffusion", "data", "weights", "sample", "evaluation", "train"},
    "scripts": {"cli", "configs", "models", "diffusion", "data", "weights", "sample", "evaluation", "train", "cost"},
    "tests": {
        *("cli", "configs", "models", "diffusion", "data", "weights", "sample", "evaluation", "train", "cost"),
        "scripts",
    },
}

# Folder -> the only libraries that its files may import, beside the standard library.
LIBRARIES = {
    "cli": {"etils", "fsspec", "ml_collections"},
    "configs": {"ml_collections"},
    "models": {"einops", "flax", "jax", "jaxtyping", "numpy"},
    "diffusion": {"einops", "jax", "jaxtyping", "numpy"},
}

# Library -> the paths (regular expressions, matched from the start) that may import it.
IMPORTERS = {
    "jax": r"(?!data/|cli/|configs/)",
    "jaxlib": r"(?!data/|cli/|configs/)",
    "flax": r"(?!data/|cli/|configs/)",
    "optax": r"(?!data/|cli/|configs/)",
    "orbax": r"weights/checkpoint\.py|tests/",
    "torch": r"tests/parity/",
    "dall_e": r"tests/parity/",
    "cleanfid": r"tests/parity/",
    "diffusers": r"tests/parity/",
    "lpips": r"tests/parity/",
    "open_clip": r"tests/parity/",
    "pytorch_fid": r"tests/parity/",
    "torch_fidelity": r"tests/parity/",
    "torchmetrics": r"tests/parity/",
    "torchvision": r"tests/parity/",
    "transformers": r"tests/parity/",
    "tensorflow": r"(?!)",
}

STANDARD_LIBRARY_OF_CONFIGS = {"math"}
# A file of weights/formats/ has the name of the project whose format it reads; inside a package it hides nothing. The
# distance LPIPS has no other name.
NAMED_AFTER_LIBRARIES = {
    *(Path(f"weights/formats/{name}.py") for name in ("diffusers", "lpips", "open_clip", "transformers")),
    Path("models/lpips.py"),
}
FORBIDDEN_NAMES = {"base", "helper", "helpers", "misc", "util", "utils"}


def sources(root: Path) -> list[Path]:
    """Every Python file of the project's folders, relative to `root`."""
    return sorted(path.relative_to(root) for folder in PROJECT_IMPORTS for path in (root / folder).rglob("*.py"))


def imports(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """Yields (line, dotted module) of everything the file `path` imports, wherever in the file that is.

    `from a.b import c` counts as `a.b`; a relative import is resolved; `import_module("a.b")` and `__import__("a.b")`
    count too.
    """
    package = path.parent.parts
    for node in ast.walk(ast.parse(text, str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            yield node.lineno, ".".join((*parents, *filter(None, [node.module])))
        elif isinstance(node, ast.Call) and node.args:
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            name = node.args[0]
            if function in ("import_module", "__import__") and isinstance(name, ast.Constant):
                yield node.lineno, str(name.value)


def import_violations(root: Path) -> list[str]:
    """One line for every import under `root` that the tables do not allow."""
    found = []
    for path in sources(root):
        folder = path.parts[0]
        for line, module in imports(path, (root / path).read_text(encoding="utf-8")):
            top = module.split(".")[0]
            if top in PROJECT_IMPORTS:
                allowed = top == folder or top in PROJECT_IMPORTS[folder]
            elif top in sys.stdlib_module_names:
                allowed = folder != "configs" or top in STANDARD_LIBRARY_OF_CONFIGS
            else:
                allowed = folder not in LIBRARIES or top in LIBRARIES[folder]
                allowed = allowed and re.match(IMPORTERS.get(top, ""), path.as_posix()) is not None
            if not allowed:
                found.append(f"{path}:{line} imports {module}")
    return found


def installed_modules() -> set[str]:
    """Top-level import names of the installed libraries that requirements.lock names."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    locked = {normalized(line.split("==")[0]) for line in lines if "==" in line and not line.startswith((" ", "#"))}
    return {
        module
        for module, distributions in importlib.metadata.packages_distributions().items()
        if any(normalized(name) in locked for name in distributions) and module != "tests"  # some leave theirs behind
    }


def normalized(name: str) -> str:
    """The name of a distribution as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def name_violations(root: Path, libraries: set[str]) -> list[str]:
    """One line for every file or folder under `root` with a name that says nothing, or that is a library's."""
    found = []
    files = sources(root)
    for path in sorted({*files, *(folder for file in files for folder in file.parents if folder.name)}):
        if path.stem in FORBIDDEN_NAMES:
            found.append(f"{path}: says nothing; a helper lives with its noun")
        elif path in NAMED_AFTER_LIBRARIES:
            continue
        elif path.stem in libraries | sys.stdlib_module_names and not path.stem.startswith("__"):
            found.append(f"{path}: shadows a library")
    return found


def plant(root: Path, path: str, text: str) -> None:
    """Writes a file under `root`."""
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text, encoding="utf-8")


def test_project_imports_only_what_its_tables_allow():
    assert import_violations(ROOT) == []


def test_project_names_are_nouns_of_its_own():
    assert name_violations(ROOT, installed_modules()) == []


def test_every_folder_of_the_project_is_held():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages <= set(PROJECT_IMPORTS)
    assert len(sources(ROOT)) > 5


@pytest.mark.parametrize(
    ("path", "text", "module"),
    [
        ("configs/a.py", "import jax", "jax"),
        ("configs/a.py", "import os", "os"),
        ("configs/a.py", "from models import create_model", "models"),
        ("cli/a.py", "import numpy as np", "numpy"),
        ("cli/a.py", "from data import pipeline", "data"),
        ("models/a.py", "import optax", "optax"),
        ("models/a.py", "from cli.errors import UserError", "cli.errors"),
        ("models/layers/a.py", "from diffusion.schedule import cosine", "diffusion.schedule"),
        ("diffusion/a.py", "import flax.linen as nn", "flax.linen"),
        ("diffusion/a.py", "from models.unet import UNet", "models.unet"),
        ("data/a.py", "import jax.numpy as jnp", "jax.numpy"),
        ("data/scenes/a.py", "def f():\n    import flax", "flax"),
        ("data/a.py", "from models import MODELS", "models"),
        ("weights/a.py", "import orbax.checkpoint", "orbax.checkpoint"),
        ("weights/a.py", "from sample import dalle", "sample"),
        ("weights/checkpoint.py", "from train.state import TrainState", "train.state"),
        ("sample/a.py", "from evaluation import fid", "evaluation"),
        ("sample/a.py", "from configs import common", "configs"),
        ("evaluation/a.py", "import train.loop", "train.loop"),
        ("train/a.py", "from orbax.checkpoint import v1", "orbax.checkpoint"),
        ("train/a.py", "from scripts.demo import main", "scripts.demo"),
        ("train/a.py", "from cost.flops import matrix_flops", "cost.flops"),
        ("cost/a.py", "from scripts.fit import main", "scripts.fit"),
        ("train/a.py", "if TYPE_CHECKING:\n    import torch", "torch"),
        ("train/objectives/a.py", "from ...scripts import demo", "scripts"),
        ("scripts/a.py", "import tensorflow as tf", "tensorflow"),
        ("scripts/a.py", "tf = importlib.import_module('tensorflow')", "tensorflow"),
        ("scripts/a.py", "torch = __import__('torch')", "torch"),
        ("scripts/a.py", "from tests.train import test_loop", "tests.train"),
        ("tests/models/test_a.py", "import torch", "torch"),
        ("tests/parity/test_a.py", "import tensorflow", "tensorflow"),
    ],
)
def test_planted_import_is_found(tmp_path: Path, path: str, text: str, module: str):
    plant(tmp_path, path, text)
    line = len(text.splitlines())
    assert import_violations(tmp_path) == [f"{path}:{line} imports {module}"]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("configs/scenes/a.py", "import math\nfrom ml_collections import ConfigDict\nfrom configs import common"),
        ("cli/a.py", "import signal\nfrom ml_collections import ConfigDict\nfrom cli.errors import UserError"),
        ("models/a.py", "import flax.linen as nn\nfrom einops import rearrange\nfrom .layers import attention"),
        ("diffusion/a.py", "import jax.numpy as jnp\nfrom diffusion import schedule"),
        ("data/a.py", "import grain\nimport numpy as np\nimport tensorflow_datasets as tfds\nimport cli.errors"),
        ("weights/checkpoint.py", "from orbax.checkpoint import v1\nfrom models import MODELS"),
        ("train/objectives/a.py", "from ..state import TrainState\nfrom sample import dalle\nimport wandb"),
        ("cost/a.py", "import train.program"),
        ("scripts/a.py", "import train.loop, sample.samplers.dalle, cost.flops\nimport matplotlib"),
        ("tests/a.py", "from scripts import demo\nimport orbax.checkpoint"),
        ("tests/parity/a.py", "import torch\nimport dall_e"),
    ],
)
def test_allowed_import_is_not_found(tmp_path: Path, path: str, text: str):
    plant(tmp_path, path, text)
    assert import_violations(tmp_path) == []


@pytest.mark.parametrize(
    "path",
    [
        "data/utils.py",
        "models/layers/helpers.py",
        "train/misc/step.py",
        "sample/base.py",
        "train/optax.py",
        "models/einops/a.py",
        "train/logging.py",
        "evaluation/statistics.py",
        "models/transformers.py",
        "weights/formats/optax.py",
        "weights/transformers.py",
    ],
)
def test_planted_name_is_found(tmp_path: Path, path: str):
    plant(tmp_path, path, "")
    violations = name_violations(tmp_path, {"optax", "einops", "transformers"})
    assert len(violations) == 1
    assert path.startswith(violations[0].split(":")[0])


def test_libraries_that_a_name_must_not_shadow_are_known():
    assert {"jax", "flax", "optax", "orbax", "grain", "PIL", "pytest", "ruff"} <= installed_modules()


def test_formats_may_be_named_as_their_projects_are(tmp_path: Path):
    plant(tmp_path, "weights/formats/open_clip.py", "")
    plant(tmp_path, "weights/formats/transformers.py", "")
    plant(tmp_path, "sample/__main__.py", "")
    assert name_violations(tmp_path, installed_modules() | {"open_clip", "transformers"}) == []
