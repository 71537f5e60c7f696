"""Low-rank adaptation (Hu et al. 2022, section 4.1) of the networks of any objective: see `weights.lora`.

The objective is the one that trained the networks, and is given them with their pairs added. So the gradient of a pair
goes through that of its kernel, [in, out], which the paper's form, with the two products apart, does not need; in
return every network and every way that it uses its kernels is adapted as it is.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array, Float, Key
from ml_collections import ConfigDict

from models import create_model
from train.objectives.contract import Aux, Batch, Objective, Preview, Tree
from train.trainable import matching_paths
from weights.lora import LORA, Kernel, init_pairs, kernels_of, merge, scale_of
from weights.run import model_of

# Pairs are small, and each device has all of them, whatever the rules say of the kernels.
PAIR_RULES = ((rf"(^|/){LORA}/", ()),)

_RNG = 2**31 - 2  # of pairs, apart from networks'


@dataclasses.dataclass(frozen=True)
class LoraObjective:
    """Another objective, whose networks have pairs in `params["lora"]`.

    Attributes:
      objective: the other one; what is asked of this one beside the contract, it answers.
      kernels: that have a pair, by "<part>/<path of the module>/kernel".
      rank: of the pairs.
      scale: alpha / rank.
    """

    objective: Any
    kernels: Mapping[str, Kernel]
    rank: int
    scale: float

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "objective":  # while it is copied
            raise AttributeError(name)
        return getattr(self.objective, name)

    def init(self, rng: Key[Array, ""], batch: Batch) -> tuple[Tree, Tree]:
        """Returns (params with pairs, variables); without the pairs they are the other objective's of this key."""
        params, variables = self.objective.init(rng, batch)
        return {**params, LORA: init_pairs(jax.random.fold_in(rng, _RNG), self.kernels, self.rank)}, variables

    def loss(
        self, params: Tree, variables: Tree, frozen: Tree, batch: Batch, rng: Key[Array, ""], step: Array, train: bool
    ) -> tuple[Float[Array, ""], Aux]:
        """The other objective's loss."""
        return self.objective.loss(merge(params, self.scale), variables, frozen, batch, rng, step, train)

    def preview(
        self, params: Tree, variables: Tree, frozen: Tree, batch: Batch, rng: Key[Array, ""]
    ) -> dict[str, Preview]:
        """The other objective's pictures."""
        return self.objective.preview(merge(params, self.scale), variables, frozen, batch, rng)

    def measure(
        self, params: Tree, variables: Tree, frozen: Tree, batch: Batch, rng: Key[Array, ""], number: Array
    ) -> Tree:
        """What the other objective finds out, if it has to; see the contract."""
        return self.objective.measure(merge(params, self.scale), variables, frozen, batch, rng, number)


def with_pairs(objective: Objective, config: ConfigDict) -> Objective:
    """The objective of a config with the pairs of its `config.lora`; itself where that has no rank.

    Raises:
      UserError: if a pattern of `config.lora.paths` matches no kernel.
    """
    if not config.lora.rank:
        return objective
    kernels = {
        f"{part}/{path}": kernel
        for part, entry in config.models.items()
        for path, kernel in kernels_of(create_model(**model_of(entry))).items()
    }
    chosen = matching_paths("config.lora.paths", config.lora.paths, kernels, "kernel that can have a pair")
    kept = {path: kernel for path, kernel in kernels.items() if path in chosen}
    return LoraObjective(objective, kept, config.lora.rank, scale_of(config))
