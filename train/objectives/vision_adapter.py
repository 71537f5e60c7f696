"""The vision adapter of Llama 3.2 (Dubey et al. 2024, section 7): next-token prediction of answers about pictures.

    loss = mean over the tokens of answers of -ln p

Questions and the pictures' tokens are read and not predicted. The language model stays as it is where
`config.trainable` leaves it out, as the paper has it: nothing of it is in the gradient or the optimizer.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key
from ml_collections import ConfigDict

from cli.errors import UserError
from data.dialogues import SOURCES
from data.tiles import show_tiles
from models.picture_reader import PictureReader
from sample.samplers.llama import prompt_lengths
from sample.samplers.vision_adapter import (
    PICTURE,
    VisionAdapterSampler,
    answers_behind_pictures,
    tiles_of,
)
from train.objectives.contract import Aux, Batch, Preview, Tree, example_keys
from train.objectives.llama import token_loss
from train.objectives.packing import Row, pack, read_packing


@dataclasses.dataclass(frozen=True)
class VisionAdapterObjective:
    """Trains part `vision_adapter`, a `models.picture_reader.PictureReader`.

    Attributes:
      sampler: holds the network, and answers in the previews.
      packing: texts in a row, each with its picture, and tokens of such a row; see `train.objectives.packing`.
    """

    sampler: VisionAdapterSampler
    packing: tuple[int, int] = (1, 0)

    @classmethod
    def from_config(cls, config: ConfigDict) -> "VisionAdapterObjective":
        """Reads `config.models.vision_adapter`, pictures of `config.data`, `config.sample` and `config.loss`.

        Of the last `pack` and `packed_length`, where it has them.

        Raises:
          UserError: if texts are no questions with answers, or as the sampler and `read_packing`.
        """
        if not config.data.get("dialogues", ""):
            raise UserError(
                "config.data.dialogues is empty, and the vision adapter learns answers to questions; choose one of "
                f"{', '.join(SOURCES)}"
            )
        return cls(VisionAdapterSampler.from_config(config), read_packing(config.loss))

    @property
    def model(self) -> PictureReader:
        """The network that is trained."""
        return self.sampler.model

    def init(self, rng: Key[Array, ""], batch: Batch) -> tuple[Tree, Tree]:
        """Returns ({"vision_adapter": parameters}, {})."""
        del batch
        inputs = [jnp.zeros(x.shape, x.dtype) for x in self.model.example_inputs(1)]
        return {"vision_adapter": self.model.init(rng, *inputs)["params"]}, {}

    def loss(
        self, params: Tree, variables: Tree, frozen: Tree, batch: Batch, rng: Key[Array, ""], step: Array, train: bool
    ) -> tuple[Float[Array, ""], Aux]:
        """The cross-entropy of answers, mean over examples of the mean over their tokens; see `token_loss`.

        Metrics: as of `train.objectives.llama.token_loss`, over the answers' tokens. `batch` holds `PICTURE`,
        a picture each, text int32 [b t] and text_mask bool [b t], rows of `data.dialogues`.
        """
        del frozen, rng, step, train
        model = self.model
        tiles, canvas = tiles_of(batch)
        text, answer = answers_behind_pictures(batch["text"], batch["text_mask"], model)
        read = jnp.arange(1, text.shape[1]) < prompt_lengths(text, model.text_pad_id)[:, None]
        row = pack(Row.of_texts(text, answer, self.sampler.end_id), read, *self.packing)
        tiles, canvas = (x.reshape(len(row.tokens), -1, *x.shape[2:]) for x in (tiles, canvas))
        inputs = row.tokens, tiles, canvas, row.positions, row.segments
        loss, metrics = token_loss(model.apply({"params": params["vision_adapter"]}, *inputs), row)
        return loss, Aux(metrics=metrics, variables=variables)

    def preview(
        self, params: Tree, variables: Tree, frozen: Tree, batch: Batch, rng: Key[Array, ""]
    ) -> dict[str, Preview]:
        """Pictures, each with the question and what is answered."""
        text, pictures = np.asarray(batch["text"]), {name: np.asarray(batch[name]) for name in PICTURE if name in batch}
        end, pad = self.sampler.end_id, self.model.text_pad_id
        questions = np.where(np.cumsum(batch["text_mask"], axis=1) == 0, text, pad)
        request = self.sampler.request(questions, **pictures)
        answers = np.asarray(self.sampler(params, variables, frozen, request, example_keys(rng, batch))["text"])
        # One row a picture: a tokenizer reads no further than an end, so that the question loses its own.
        rows = np.concatenate([np.where(questions == end, pad, questions), answers], axis=1)
        image = show_tiles(pictures["image"], pictures["canvas"]) if "canvas" in pictures else pictures["image"]
        return {"answers": Preview(images=image, columns=len(image), labels=rows)}
