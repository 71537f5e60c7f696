"""Other people's pictures with captions, as a dataset: folders and tables, read as they lie and kept as ArrayRecord."""

from data.folder.examination import JPEG_QUALITY, RESIZES, PictureSettings
from data.folder.items import REASONS
from data.folder.preparation import (
    DATASET,
    REPORT,
    VERSION,
    Request,
    name_of_source,
    prepare,
    prepared_before,
    read_report,
)
from data.folder.sources import list_source
from data.folder.tables import Fields

__all__ = [
    "DATASET",
    "JPEG_QUALITY",
    "REASONS",
    "REPORT",
    "RESIZES",
    "VERSION",
    "Fields",
    "PictureSettings",
    "Request",
    "list_source",
    "name_of_source",
    "prepare",
    "prepared_before",
    "read_report",
]
