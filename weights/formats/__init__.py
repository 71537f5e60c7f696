"""Formats of other projects: one file each, which declares what it holds and how it is recognized, read and written."""

from weights.formats import diffusers, open_clip, transformers, uvit
from weights.formats.contract import Format

FORMATS: dict[str, Format] = {
    each.name: each
    for each in (transformers.FORMAT, diffusers.FORMAT, open_clip.FORMAT, open_clip.OPENAI_FORMAT, uvit.FORMAT)
}
