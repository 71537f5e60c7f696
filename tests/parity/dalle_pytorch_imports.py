"""What dalle-pytorch imports for features that nothing here uses, as empty modules: the packages are not installed."""

import contextlib
import sys
import types
from collections.abc import Iterator

_NAMES = {
    "pkg_resources": ("get_distribution",),
    "omegaconf": ("OmegaConf",),
    "rotary_embedding_torch": ("RotaryEmbedding", "broadcat", "apply_rotary_emb"),
    "taming": (),
    "taming.models": (),
    "taming.models.vqgan": ("VQModel", "GumbelVQ"),
}


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Has an empty module for each of them, in which every name is None.

    What is imported meanwhile stays in `sys.modules` when they go: torch.compile looks modules up by their names, and
    would import dalle-pytorch again, without them.
    """
    missing = [name for name in _NAMES if name not in sys.modules]
    for name in missing:
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(dict.fromkeys(_NAMES[name]))
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]
