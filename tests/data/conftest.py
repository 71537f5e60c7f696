"""A vocabulary of CLIP's form that is small enough to be written down."""

from pathlib import Path

import pytest

MERGES = ("c a", "ca t</w>", "d o", "do g</w>", "! !</w>", "a n", "an d</w>", "' s</w>", "Ã ©")


@pytest.fixture(scope="session")
def clip_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of merges as transformers writes it; ids 512 on are the merges', and the last two the ends'."""
    path = tmp_path_factory.mktemp("clip") / "merges.txt"
    path.write_text("\n".join(["#version: 0.2", *MERGES, ""]), encoding="utf-8")
    return path
