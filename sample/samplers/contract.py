"""The contract of a sampler: what it reads, what it makes, and its settings. Commands and evaluation follow from these.

Rows that a request may hold, one for each thing to be made:

    text      int32 [b l]          ids of a prompt, by the run's tokenizer
    label     int32 [b]            the number of a class
    image     uint8 [b H W C]      a picture of the run's size; [b T H W C] in tiles, with its canvas int32 [b]
    mask      bool [b H W]         where a picture is to be drawn anew
    negative  int32 [b l]          ids of a prompt that guidance leads away from

What may be made, under the same names in a sampler's outputs:

    image     float [b H W C] in [-1, 1]
    text      int32 [b l]          ids of a text, 0 after its end; see `writes_with`
    tokens    int32 [b ...]        of an image tokenizer
    point     float [b n]          of a space without pictures
    features  float [b E]          in a joint embedding, as "<row>_features" of each row that was given

The run's `tokenizer.json` reads the text that is made, too. A sampler that reads with one tokenizer and writes with
another has an attribute `writes_with`: the name of the other one's file in the run folder.

A sampler that reads rows and may be told none of them has an attribute `needs_none`, which is True.

A sampler that may be told more than what makes its data has an attribute `may_read`: see `besides`.

A sampler of which not every call reads every setting and row has a method

    idle(told, overrides) -> {name: reason}     settings and rows that a request with these rows does not read

and one that makes pictures of texts and texts of pictures in one call

    made_of(request) -> {"image" or "text": "given" or "made"}      of which text or picture each of them is made, where
                                                                    it is made of one: that in the row, or the output

A sampler that can say how far it is has `evaluations(request)`, how many steps it says, and its calls take `moved`,
which is told how many of them are done.
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Key

Tree = Any


@runtime_checkable
class Sampler(Protocol):
    """One paper's way from weights to outputs: a frozen dataclass without state, built by `from_config(config)`."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Rows that a request may hold and records may have. Those without a default in `request` it must hold."""
        ...

    @property
    def makes(self) -> tuple[str, ...]:
        """What outputs may hold; which of it a call makes may hang on what it was told."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """Every key of `config.sample` with its value, for those that the config lacks the sampler's own default."""
        ...

    def request(self, *args: Any, **overrides: Any) -> Mapping[str, Any]:
        """What `__call__` takes: rows by their names, and overrides of `settings`; numpy values.

        Raises:
          UserError: on rows that it does not read or that do not go together, or an impossible setting.
        """
        ...

    def __call__(
        self, params: Tree, variables: Tree, frozen: Tree, request: Any, keys: Key[Array, "b"]
    ) -> dict[str, Array]:
        """Makes one output for each key; output i depends on its row and key alone."""
        ...


def besides(sampler: Any) -> Mapping[str, Mapping[str, Any]]:
    """Rows that a sampler may be told beside those that it `reads`, each with the settings that it brings.

    Only a user gives them: previews and evaluation, which tell it what records hold, leave them out. The settings have
    their defaults and are none of `config.sample`, since without the row they mean nothing.
    """
    return getattr(sampler, "may_read", {})
