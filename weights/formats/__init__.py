"""Formats of other projects: one file each, which declares what it holds and how it is recognized, read and written."""

from weights.formats import (
    compvis,
    dall_e,
    dalle_mini,
    dalle_pytorch,
    diffusers,
    diffusers_lora,
    dit,
    lpips,
    meta_llama,
    mindall_e,
    open_clip,
    peft_lora,
    transformers,
    unidiffuser,
    uvit,
)
from weights.formats.contract import Format

FORMATS: dict[str, Format] = {
    each.name: each
    for each in (
        *(transformers.FORMAT, open_clip.FORMAT, open_clip.OPENAI_FORMAT, diffusers.FORMAT, uvit.FORMAT, dit.FORMAT),
        *(compvis.FORMAT, lpips.FORMAT),
        *(dall_e.FORMAT, dalle_pytorch.FORMAT, mindall_e.FORMAT, dalle_mini.FORMAT),
        *(meta_llama.FORMAT, unidiffuser.FORMAT),
        *(diffusers_lora.FORMAT, peft_lora.FORMAT),
    )
}
