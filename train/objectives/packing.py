"""Several texts in a row of tokens, so that fewer of them are pads. Each text sees itself alone."""

import dataclasses

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int
from ml_collections import ConfigDict

from cli.errors import UserError


@struct.dataclass
class Row:
    """Texts, one or several in a row.

    Attributes:
      tokens: [r l] what is read.
      targets: [r l] the token behind each.
      counted: [r l] which targets are learned.
      whole: [texts of all rows] whether what is learned of a text is there to its end.
      positions: [r l] of each token in its text; None for one text a row.
      segments: [r l] which text of the row a token is of, the texts' number for pads; None for one text a row.
      texts: of a row.
    """

    tokens: Int[Array, "r l"]
    targets: Int[Array, "r l"]
    counted: Bool[Array, "r l"]
    whole: Bool[Array, "n"]
    positions: Int[Array, "r l"] | None = None
    segments: Int[Array, "r l"] | None = None
    texts: int = struct.field(pytree_node=False, default=1)

    @classmethod
    def of_texts(cls, text: Int[Array, "n t"], learned: Bool[Array, "n t"], end_id: int) -> "Row":
        """Texts, one in a row, of which each token is read and the next one is the target.

        Args:
          text: ids.
          learned: which of them are targets to learn.
          end_id: the last of these in a text that was not cut off where its row ends.
        """
        targets, counted = text[:, 1:], learned[:, 1:]
        last = jnp.max(jnp.where(counted, jnp.arange(targets.shape[1]), -1), axis=1)
        ends = jnp.take_along_axis(targets, jnp.maximum(last, 0)[:, None], axis=1)[:, 0] == end_id
        return cls(text[:, :-1], targets, counted, whole=ends & (last >= 0))

    def per_text(self, values: Array) -> Array:
        """The sum over the tokens of each text, [texts of all rows]."""
        if self.segments is None:
            return jnp.sum(values, axis=1)
        is_of = self.segments[..., None] == jnp.arange(self.texts)
        return jnp.sum(values[..., None] * is_of, axis=1).reshape(-1)


def read_packing(loss: ConfigDict) -> tuple[int, int]:
    """(texts in a row, tokens of such a row) of `config.loss`; 0 tokens for as many as the texts have at most.

    Raises:
      UserError: if a number is impossible.
    """
    texts, length = loss.get("pack", 1), loss.get("packed_length", 0)
    if type(texts) is not int or type(length) is not int or texts < 1 or length < 0:
        raise UserError(f"config.loss.pack={texts} and packed_length={length} must be at least 1 and 0")
    return texts, length


def pack(row: Row, kept: Bool[Array, "b l"], texts: int, length: int) -> Row:
    """Puts neighboring texts of a batch into one row, without the tokens between that nothing is learned behind.

    Args:
      row: one text a row.
      kept: the tokens of each text, which come first.
      texts: of a row, k.
      length: tokens of a row; 0 for all. Those beyond are cut off: texts that lose some are not whole.

    Raises:
      ValueError: if the texts do not make whole rows.
    """
    batch, each = row.tokens.shape
    if texts == 1:
        return row
    if batch % texts:
        raise ValueError(f"config.loss.pack={texts} must divide the {batch} examples of a batch (or part of one)")
    whole = (batch // texts, texts * each)
    place = jnp.arange(texts * each)
    kept = kept.reshape(whole)
    order = jnp.argsort(~kept, axis=1, stable=True)[:, : length or None]

    def packed(values: Array, nothing: int | bool) -> Array:
        there = jnp.take_along_axis(kept, order, axis=1)
        values = jnp.take_along_axis(values, order, axis=1)
        return jnp.where(there, values, jnp.asarray(nothing, values.dtype))

    learned = row.per_text(row.counted)
    row = Row(
        tokens=jnp.take_along_axis(row.tokens.reshape(whole), order, axis=1),  # between are pads
        targets=packed(row.targets.reshape(whole), 0),
        counted=packed(row.counted.reshape(whole), False),
        whole=row.whole,
        positions=packed(jnp.broadcast_to(place % each, whole), 0),
        segments=packed(jnp.broadcast_to(place // each, whole), texts),
        texts=texts,
    )
    return dataclasses.replace(row, whole=row.whole & (row.per_text(row.counted) == learned))
