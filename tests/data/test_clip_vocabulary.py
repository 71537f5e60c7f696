"""CLIP's files of a vocabulary, and how its text is cleaned."""

import gzip
import json

import pytest

from cli.errors import UserError
from data.clip_vocabulary import END, START, clean_caption, read_clip_vocabulary
from data.tokenizer import Tokenizer


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("  A\tPhoto\n of\u00a0 IT ", "a photo of it"),
        ("fish &amp;amp; chips &lt;3", "fish & chips <3"),
        ("<b>fish &amp;amp; chips</b>", "<b>fish & chips</b>"),  # ftfy leaves entities alone where there are tags
        ("schÃ¶n, doesnâ€™t", "schön, doesn't"),
        ("ΟΔΟΣ", "οδος"),  # a final sigma, which depends on what follows
        ("", ""),
    ],
)
def test_captions_are_cleaned_as_clip_cleans_them(text, clean):
    assert clean_caption(text) == clean


def test_ids_are_bytes_then_bytes_that_end_words_then_merges_then_ends(clip_file):
    ids, merges, _ = read_clip_vocabulary(clip_file)
    assert (ids["!"], ids["~"], ids["¡"], ids["Ā"], ids["Ń"]) == (0, 93, 94, 188, 255)
    assert (ids["!</w>"], ids["a</w>"], ids["ca"], ids["cat</w>"]) == (256, 256 + ord("a") - ord("!"), 512, 513)
    assert (ids[START], ids[END], len(ids)) == (521, 522, 523)
    assert merges[:2] == [("c", "a"), ("ca", "t</w>")] and len(merges) == 9


def test_the_published_list_is_cut_where_clip_cut_it(tmp_path):
    """OpenAI's file has 262,144 merges; CLIP has the first 48,894 of them."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    two = [first + second for first in letters for second in letters]
    lines = [f"{first} {second}" for first in letters for second in letters]
    lines += [f"{pair} {other}" for pair in two for other in two][: 262_144 - len(lines)]
    path = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    path.write_bytes(gzip.compress("\n".join(['"bpe_simple_vocab_16e6.txt#version: 0.2', *lines, ""]).encode()))
    for place in (path, tmp_path):
        ids, merges, _ = read_clip_vocabulary(place)
        assert (len(ids), len(merges), ids[START], ids[END]) == (49_408, 48_894, 49_406, 49_407)


def test_ids_beside_the_merges_are_taken(clip_file, tmp_path):
    ids, merges, _ = read_clip_vocabulary(clip_file)
    names = list(ids)
    names[300], names[512] = names[512], names[300]
    other = {name: place for place, name in enumerate(names)}
    (tmp_path / "merges.txt").write_bytes(clip_file.read_bytes())
    (tmp_path / "vocab.json").write_text(json.dumps(other), encoding="utf-8")
    assert read_clip_vocabulary(tmp_path) == (other, merges, None)


def test_a_saved_tokenizer_is_a_vocabulary_too(clip_file, tmp_path):
    Tokenizer.from_clip_vocabulary(clip_file).save(tmp_path / "tokenizer.json")
    assert read_clip_vocabulary(tmp_path) == read_clip_vocabulary(clip_file)


def test_id_0_fills_up_where_the_end_that_did_is_left_out(clip_file, tmp_path):
    framed = Tokenizer.from_clip_vocabulary(clip_file).padded_with(END)
    framed.save(tmp_path / "tokenizer.json")
    assert Tokenizer.from_clip_vocabulary(tmp_path).pad_id == framed.end_id
    bare = Tokenizer.from_clip_vocabulary(tmp_path, ends=False)
    assert bare.pad_id == 0 and bare.encode("cat", 3).ids.tolist() == [*framed.pieces("cat"), 0, 0]


def test_what_is_no_vocabulary_is_named(clip_file, tmp_path):
    def refused(name: str, content: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_clip_vocabulary(tmp_path / name)
        (tmp_path / name).unlink()

    with pytest.raises(UserError, match="there is no CLIP vocabulary at .*nowhere"):
        read_clip_vocabulary(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no CLIP vocabulary; give a folder with one of tokenizer.json"):
        read_clip_vocabulary(tmp_path)
    refused("merges.txt", b"a b\nc d\n", "names no #version")
    refused("merges.txt", b"#version\na b c\n", "'a b c' is not a pair")
    refused("merges.txt", b"#version\nx yz\n", "1 pieces have no id, such as 'yz'")
    refused("merges.txt", b"#version\n\xff\n", "utf-8")
    refused("words.txt.gz", b"#version", "gzip")
    damaged = gzip.compress(b"#version: 0.2", mtime=0)
    refused("words.txt.gz", damaged[:10] + b"\xff" + damaged[11:], "Error -3 while decompressing")
    refused("tokenizer.json", b"[" * 100_000, "recursion")
    refused("tokenizer.json", b"{", "line 1")
    refused("vocab.json", b'{"a": 0}', "has no 'model'")
    refused("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "do not end in </w>")
    ids, merges, _ = read_clip_vocabulary(clip_file)

    def stored(vocabulary: dict[str, int]) -> bytes:
        model = {"vocab": vocabulary, "merges": merges, "end_of_word_suffix": "</w>"}
        return json.dumps({"model": model, "added_tokens": []}).encode()

    refused("tokenizer.json", stored({**ids, "more": len(ids)}), "two highest ids")
    refused("tokenizer.json", stored({**ids, "more": len(ids) + 1}), "ids are not 0, 1, 2")
    refused("tokenizer.json", stored({"zz" if name == "cat</w>" else name: i for name, i in ids.items()}), "'cat</w>'")
