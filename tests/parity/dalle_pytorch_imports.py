"""What dalle-pytorch imports for features that nothing here uses, as empty modules: the packages are not installed."""

import types

_NAMES = {
    "pkg_resources": ("get_distribution",),
    "omegaconf": ("OmegaConf",),
    "rotary_embedding_torch": ("RotaryEmbedding", "broadcat", "apply_rotary_emb"),
    "taming": (),
    "taming.models": (),
    "taming.models.vqgan": ("VQModel", "GumbelVQ"),
}


def stand_ins() -> dict[str, types.ModuleType]:
    """Modules by name, for `sys.modules`; each name in one is None."""
    modules = {name: types.ModuleType(name) for name in _NAMES}
    for name, attributes in _NAMES.items():
        for attribute in attributes:
            setattr(modules[name], attribute, None)
    return modules
