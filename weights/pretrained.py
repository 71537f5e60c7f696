"""A pretrained folder: networks that were converted from another project's weights, ready to be used or fine-tuned.

    config.json           {"models": {part: {name, fields}}, "provenance": {...}}
    weights.safetensors   tensors "params/<part>/<path>" and "variables/<part>/<collection>/<path>"
    tokenizer.json        of its captions, if there is one
    evaluation.json, samples/   of a CLIP, once it was evaluated

The fields stand beside the weights, all of them: the activation too, which weights cannot tell.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from cli.errors import UserError
from data.tokenizer import Tokenizer
from models import create_model
from weights.files.layout import check_tensors, model_shapes
from weights.files.tensors import read_tensors, write_tensors
from weights.run import CONFIG, PROVENANCE, TOKENIZER, RunWeights, read_config

Tree = Any

WEIGHTS = "weights.safetensors"


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A pretrained folder that exists; to whoever uses it like a run that has ended (`weights.run.Run`)."""

    folder: Path
    config: ConfigDict

    @classmethod
    def open(cls, folder: str | Path) -> "Pretrained":
        """Opens a pretrained folder.

        Raises:
          UserError: if it is none.
        """
        config = read_config(folder)
        if PROVENANCE not in config:
            raise UserError(f"{folder} is a run folder, not one that `python -m scripts.convert` wrote")
        return cls(Path(folder), config)

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that came with the weights, or None."""
        path = self.folder / TOKENIZER
        return Tokenizer.load(path) if path.is_file() else None

    def identity(self) -> str:
        """The hash of the weights, as it was when they were written."""
        return self.config[PROVENANCE].get("sha256", "")

    def latest_step(self) -> int:
        """0: there are no checkpoints to choose from."""
        return 0

    def load(self, step: int | None = None, ema: bool = True) -> RunWeights:
        """Reads the weights onto the first device.

        Args:
          step: None or 0.
          ema: has no meaning here.

        Raises:
          UserError: if a step is asked for, or the weights are missing, damaged, or not those of the config.
        """
        del ema
        if step:
            raise UserError(f"{self.folder} is a pretrained folder, which has no checkpoint {step}; set `step` to 0")
        tensors = read_tensors(self.folder / WEIGHTS)
        wanted = {}
        for part, fields in self.config.models.items():
            for path, leaf in model_shapes(create_model(**fields)).items():
                collection, _, rest = path.partition("/")
                wanted[_tensor_name(part, collection, rest)] = leaf
        shapes = {name: leaf.shape for name, leaf in wanted.items()}
        check_tensors(f"{self.folder / CONFIG}", shapes, {name: array.shape for name, array in tensors.items()})
        trees: dict[str, Tree] = unflatten_dict(
            {tuple(name.split("/")): jnp.asarray(array, wanted[name].dtype) for name, array in tensors.items()}
        )
        return RunWeights(trees["params"], trees.get("variables", {}), step=0, ema=False)


def write_pretrained(
    folder: str | Path,
    model: Mapping[str, Any],
    params: Tree,
    variables: Tree,
    *,
    part: str,
    provenance: Mapping[str, Any],
    tokenizer: Tokenizer | None = None,
) -> None:
    """Writes a pretrained folder of one network; its config comes last, so that a folder with one is whole.

    Args:
      folder: a new or empty one.
      model: {name, fields}, as `models.create_model` takes them.
      params: of the network.
      variables: {collection: tree}; may be empty.
      part: what the network is called.
      provenance: where the weights are from; a hash of them is added.
      tokenizer: of its captions.

    Raises:
      UserError: if the folder has something in it or cannot be written.
    """
    folder = new_folder(folder)
    tensors = {}
    for collection, tree in {"params": params, **variables}.items():
        for path, leaf in flatten_dict(tree).items():
            tensors[_tensor_name(part, collection, "/".join(path))] = np.asarray(leaf)
    write_tensors(folder / WEIGHTS, tensors)
    with (folder / WEIGHTS).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if tokenizer is not None:
        tokenizer.save(folder / TOKENIZER)
    config = {"models": {part: dict(model)}, PROVENANCE: {**provenance, "sha256": digest}}
    write_json(folder / CONFIG, config)


def new_folder(folder: str | Path) -> Path:
    """Makes a folder for results.

    Raises:
      UserError: if it has something in it or cannot be made.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"{folder} is not empty; choose another --output or empty it")
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; choose another --output") from error
    return folder


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object, whole or not at all."""
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    draft.replace(path)


def _tensor_name(part: str, collection: str, path: str) -> str:
    return f"params/{part}/{path}" if collection == "params" else f"variables/{part}/{collection}/{path}"
