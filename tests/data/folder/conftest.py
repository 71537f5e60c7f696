"""What a source gives, without a dataset being written."""

from collections.abc import Callable

import numpy as np
import pytest

from data import folder
from data.folder.items import Item

from .damaged import encode


@pytest.fixture(scope="session")
def png() -> bytes:
    return encode(np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3))


@pytest.fixture(scope="session")
def read_source() -> Callable[..., tuple[dict[str, Item], dict[str, str]]]:
    """`read_source(source)`: the items that a source gives, and the reason of each thing that is left out, by name."""

    def read(source: object, **fields: str) -> tuple[dict[str, Item], dict[str, str]]:
        listing = folder.list_source(str(source), folder.Fields(**fields))
        items = [item for portion in listing.portions for item in portion.read()]
        kept = {item.name: item for item in items if item.rejected is None}
        left_out = [*listing.ignored, *(item for item in items if item.rejected is not None)]
        reasons = {item.name: item.rejected.reason for item in left_out}
        assert len(kept) + len(reasons) == len(items) + len(listing.ignored)
        return kept, reasons

    return read
