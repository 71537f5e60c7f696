"""Captions become the ids that open_clip's own tokenizer gives, whichever of the published files is read."""

import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from open_clip.tokenizer import SimpleTokenizer, default_bpe
from transformers import CLIPTokenizer

from cli.errors import UserError
from data.tokenizer import PAD_ID, Tokenizer

LENGTH = 77

PICKED = [
    "",
    " ",
    "a photo of a cat.",
    "A PHOTO of a  CAT\n\tand\u00a0a dog\u2003!",
    "it's we'll they've I'm you'd don't we're 'S 'LL",
    "rock'n'roll 'tis ''quoted'' l'été d'or o'clock's'",
    "'\u017f \u017f '\u017fx K\u212a",  # a long s and a Kelvin sign, which fold to s and k
    "1234567890 3.14 1/2 ½ ² ٣ Ⅷ 10,000th 4k",
    "&lt;b&gt;bold&lt;/b&gt; &amp;amp; &amp;lt; &#233;t&#xe9; &nbsp;x&nbsp; &notanentity; &copy",
    "e&#769; &#x2126; &#0; &#xD800; &#128512;",
    "schÃ¶n doesnâ€™t cafÃ© âœ” ÃƒÂ©",  # mojibake, once and twice
    "ﬁne ﬀ ﬅ “curly” ‘quotes’ … – — ´ ｆｕｌｌ width ①",
    "İstanbul ΟΔΟΣ ΣΑΣ ß ẞ ǅ Ω",
    "e\u0301 \u0345 \u0391\u0345 a\u0345b n\u0303o \u200d \u200b \ufeff",
    "😀 👩‍👩‍👧‍👦 🇩🇪 👍🏽 ❤️ ☃ ✈️ 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "数学 日本語テキスト 한국어 हिन्दी العربية עברית ไทย Ελληνικά Русский",
    "\x1b[31mred\x1b[0m \x00 \x07 \x1c \x85 \x7f",
    "\ud800 lone \udfff",
    "!!! ?! @#$%^&*() _under_ -- a!b !a ! ~`|\\ <|> !@",
    "<|endoftext|>",
    "a <|endoftext|> b <|startoftext|>",
    "</w> <w> a</w>b",
    "https://example.com/a_b?c=d&e=f#g user@example.com",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaa hahahahaha zzzzzz",
    "word " * 75,
    "word " * 76,
    "long " * 300,
    "😀" * 60,
    "ab" * 500,
]

SIGNS = r"""
a photo of the small RED Cube on top Fluffy dog's isn't I'll NASA 2023 x86-64 1,299.00 $5 50% #1 C++ e.g.
naïve Straße Zürich façade Ωmega москва 北京 東京 서울 मुंबई القاهرة ไทย
&amp; &quot; &lt;3 &#39; &eacute; &amp;gt; &hearts; 😀 👩🚀 ✨ 🎨 🖼️ © ™ → ½ Ã© â€œ â€™ Ð¿Ñ€Ð¸Ð²ÐµÑ‚
... -- ?! (( )) [x] {y} ~ ^ _ __init__ a/b \ | 'em 'round o'er ''
"""
WORDS = SIGNS.split()


@pytest.fixture(scope="module")
def reference() -> SimpleTokenizer:
    return SimpleTokenizer()


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return Tokenizer.from_clip_vocabulary(default_bpe())


def captions(number: int) -> list[str]:
    """Words and signs of many languages, joined in every way."""
    rng = random.Random(0)
    joints = (" ", " ", " ", "", "  ", "\n", "\t", "-", "'", ", ", "\u00a0")
    texts = []
    for _ in range(number):
        chosen = rng.choices(WORDS, k=rng.choice((1, 3, 8, 20, 60)))
        texts.append("".join(word + rng.choice(joints) for word in chosen))
    return texts


def is_old(character: str) -> bool:
    """Whether a character is in every library's tables: they are of different versions of Unicode."""
    emoji = "\U0001f300" <= character <= "\U0001f64f"
    return emoji or unicodedata.ucd_3_2_0.category(character) not in ("Cn", "Cs", "Co")


OLD = [chr(code) for code in range(0x110000) if is_old(chr(code))]


def noise(number: int) -> list[str]:
    """Strings of any characters at all, and of neighbors in one script."""
    rng = random.Random(1)
    texts = []
    for place in range(number):
        start = rng.randrange(0, 6000, 100)
        pool = OLD if place % 2 else OLD[start : start + 300]
        texts.append("".join(rng.choice(pool) if rng.random() < 0.8 else rng.choice(" ' a1") for _ in range(30)))
    return texts


def assert_same(ours: Tokenizer, reference: SimpleTokenizer, texts: list[str]) -> None:
    expected = reference(texts, context_length=LENGTH).numpy()
    for text, ids in zip(texts, expected, strict=True):
        assert ours.encode(text, LENGTH).ids.tolist() == ids.tolist(), repr(text)


@pytest.mark.parametrize("texts", [PICKED, captions(600), noise(1500)], ids=["picked", "captions", "noise"])
def test_captions_have_the_published_ids(ours, reference, texts):
    assert (ours.vocab_size, ours.start_id, ours.end_id) == (49_408, 49_406, 49_407)
    assert_same(ours, reference, texts)


def test_every_character_by_itself_has_the_published_ids(ours, reference):
    scripts = [character for character in OLD if not "\u3400" <= character <= "\ud7a3"]  # Han and Hangul take a minute
    assert len(scripts) > 8000
    assert_same(ours, reference, [f"x{character}{character} 1{character}" for character in scripts])


@pytest.mark.parametrize("length", [1, 2, 3, 5, 16])
def test_long_captions_are_cut_as_published(ours, reference, length):
    texts = [*PICKED, *captions(50)]
    expected = reference(texts, context_length=length).numpy()
    for text, ids in zip(texts, expected, strict=True):
        assert ours.encode(text, length).ids.tolist() == ids.tolist(), repr(text)


def test_decoded_text_is_the_published_one(ours, reference):
    for text in [*PICKED, *captions(200)]:
        ids = ours.encode(text, 4000).ids
        body = ids[1 : ids.tolist().index(ours.end_id)].tolist()
        assert ours.decode(ids) == reference.decode(body).strip(), repr(text)


def test_a_published_end_that_is_spelled_in_a_caption_is_text_here(ours, reference):
    """The reference takes its own spelling of the end token for the token; a picture's caption must not end there."""
    text = "a <end_of_text> b"
    assert reference(text)[0].tolist().count(49_407) == 2
    ids = ours.encode(text, LENGTH).ids.tolist()
    assert ids.count(49_407) == 1 and ours.decode(np.array(ids)) == "a < end _ of _ text > b"


def test_dropout_near_zero_gives_the_published_ids(ours, reference):
    texts = [*PICKED[:-5], *captions(40)]
    expected = reference(texts, context_length=LENGTH).numpy()
    for text, ids in zip(texts, expected, strict=True):
        dropped = ours.encode(text, LENGTH, 1e-12, np.random.default_rng(0)).ids
        assert dropped.tolist() == ids.tolist(), repr(text)


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory) -> Path:
    """What transformers keeps of CLIP's tokenizer."""
    path = tmp_path_factory.mktemp("transformers")
    ids = {**reference.encoder, "<|startoftext|>": 49_406, "<|endoftext|>": 49_407}
    del ids["<start_of_text>"], ids["<end_of_text>"]
    merges = sorted(reference.bpe_ranks, key=reference.bpe_ranks.get)
    CLIPTokenizer(vocab=ids, merges=merges).save_pretrained(path)
    (path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["", "tokenizer.json", "merges.txt"])
def test_every_published_file_gives_the_same_ids(reference, folder, name):
    assert_same(Tokenizer.from_clip_vocabulary(folder / name), reference, [*PICKED, *captions(100)])


def test_another_projects_file_in_place_of_a_runs_own_gives_the_same_ids(reference, folder):
    assert_same(Tokenizer.load(folder / "tokenizer.json"), reference, PICKED)


def test_a_saved_tokenizer_gives_the_same_ids(ours, reference, tmp_path):
    ours.save(tmp_path / "tokenizer.json")
    for again in (Tokenizer.load(tmp_path / "tokenizer.json"), Tokenizer.from_clip_vocabulary(tmp_path)):
        assert_same(again, reference, [*PICKED, *captions(100)])


def test_tokens_that_somebody_added_are_refused(ours, tmp_path):
    path = tmp_path / "tokenizer.json"
    ours.save(path)
    grown = tokenizers.Tokenizer.from_file(str(path))
    grown.add_special_tokens(["<my cat>"])
    grown.save(str(path))
    with pytest.raises(UserError, match="two highest ids"):
        Tokenizer.from_clip_vocabulary(path)


def test_padding_is_also_an_exclamation_mark(ours):
    ids = ours.encode("!@ wow !", LENGTH).ids
    assert ours.decode(ids) == "!@ wow !"
    assert ours.decode(np.array([ours.start_id, PAD_ID, 320, PAD_ID, PAD_ID], np.int32)) == "!a"
