"""A small tokenizer.json of the form of Llama 3's: byte-level BPE whose special ids stand behind all merges."""

from pathlib import Path

import tokenizers

SPECIALS = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"),
)
IMAGE = "<|image|>"
# Runs of letters with one sign before them, up to three digits, signs, line ends, and space.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
WORDS += r"|\s*[\r\n]+|\s+(?!\S)|\s+"


def write_llama_vocabulary(path: Path, picture: bool = True) -> dict[str, int]:
    """Writes tokenizer.json, whose texts have a start before them; returns the ids of the specials."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=True))
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(WORDS), behavior="isolated")
    bytes_alone = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, bytes_alone])
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(["user\n\nwhat is it?", "assistant\n\nwhich color is the circle?"] * 9, trainer)
    model.add_special_tokens([*SPECIALS, *([IMAGE] if picture else [])])
    ids = {name: model.token_to_id(name) for name in (*SPECIALS, *([IMAGE] if picture else []))}
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{SPECIALS[0]} $A", special_tokens=[(SPECIALS[0], ids[SPECIALS[0]])]
    )
    path.write_text(model.to_str())
    return ids
