"""Objectives by name. One paper's loss a file; the contract is in `contract.py`."""

from typing import Any

from ml_collections import ConfigDict

from cli.errors import UserError
from train.objectives.autoencoder import AutoencoderObjective
from train.objectives.captioner import CaptionerObjective
from train.objectives.clip import ClipObjective
from train.objectives.contract import Objective
from train.objectives.dalle import DalleObjective
from train.objectives.diffusion import DiffusionObjective
from train.objectives.dvae import DiscreteVAEObjective
from train.objectives.llama import LlamaObjective
from train.objectives.lora import with_pairs
from train.objectives.unidiffuser import UniDiffuserObjective
from train.objectives.vision_adapter import VisionAdapterObjective
from train.objectives.vqvae import VectorQuantizedVAEObjective

OBJECTIVES: dict[str, Any] = {
    "autoencoder": AutoencoderObjective,
    "captioner": CaptionerObjective,
    "clip": ClipObjective,
    "dalle": DalleObjective,
    "diffusion": DiffusionObjective,
    "dvae": DiscreteVAEObjective,
    "llama": LlamaObjective,
    "unidiffuser": UniDiffuserObjective,
    "vision_adapter": VisionAdapterObjective,
    "vqvae": VectorQuantizedVAEObjective,
}


def create_objective(config: ConfigDict) -> Objective:
    """Builds the objective that `config.objective` names, of low-rank pairs where `config.lora` has a rank.

    Raises:
      UserError: if there is no such objective; lists the choices.
    """
    if config.objective not in OBJECTIVES:
        raise UserError(f"config.objective={config.objective!r} is unknown; choose one of {', '.join(OBJECTIVES)}")
    try:
        return with_pairs(OBJECTIVES[config.objective].from_config(config), config)
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:  # what building a network or reading a key raises
        reason = error.args[0] if error.args else error
        raise UserError(f"objective {config.objective!r} cannot be built from this config: {reason}") from error
