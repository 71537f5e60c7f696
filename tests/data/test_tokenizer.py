"""Byte-pair encoding: round trips, padding, truncation, seeded dropout, and the frame of a start and an end token."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from cli.errors import UserError
from data.tokenizer import PAD_ID, Tokenizer

TEXTS = ["a small red circle on black", "a large blue square on gray", "a big yellow star"] * 4


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 400)


def test_frequent_words_become_one_token(tokenizer):
    assert np.count_nonzero(tokenizer.encode("a small red circle on black", 12).ids) == 6


@pytest.mark.parametrize("text", ["a small red circle", "ünïcödé ☃ 数", "never-seen words, 123!", "a  b"])
def test_any_text_survives_the_round_trip(tokenizer, text):
    import unicodedata

    encoded = tokenizer.encode(text, 64)
    assert not encoded.truncated
    assert tokenizer.decode(encoded.ids) == unicodedata.normalize("NFKC", text.lower())


def test_case_does_not_matter(tokenizer):
    assert (tokenizer.encode("A Small RED circle", 8).ids == tokenizer.encode("a small red circle", 8).ids).all()


def test_ids_are_padded_or_cut_to_the_length(tokenizer):
    long = tokenizer.encode("a small red circle on black", 3)
    assert long.truncated and long.ids.shape == (3,)
    short = tokenizer.encode("a", 5)
    assert not short.truncated and (short.ids[1:] == PAD_ID).all() and short.ids.dtype == np.int32
    assert (tokenizer.encode("a small red circle on black", 6).ids[:3] == long.ids).all()


def test_an_empty_caption_is_all_padding(tokenizer):
    assert (tokenizer.encode("", 4).ids == PAD_ID).all()


def test_dropout_is_seeded_and_keeps_the_text(tokenizer):
    text = "a small red circle on black"
    draws = [tokenizer.encode(text, 64, 0.5, np.random.default_rng(seed)).ids for seed in (1, 1, 2, 3)]
    assert (draws[0] == draws[1]).all()
    assert any((draws[0] != other).any() for other in draws[2:])
    assert all(tokenizer.decode(ids) == text for ids in draws)
    assert np.count_nonzero(draws[0]) > np.count_nonzero(tokenizer.encode(text, 64).ids)


def test_each_merge_is_passed_over_with_the_published_probability():
    one = Tokenizer.train(["ab"] * 9, 300)
    assert np.count_nonzero(one.encode("ab", 4).ids) == 1
    lengths = [np.count_nonzero(one.encode("ab", 4, 0.1, np.random.default_rng((0, i))).ids) for i in range(3000)]
    # Two merges make the word: the second is only possible after the first, and what is passed over ends it.
    shares = np.bincount(lengths, minlength=4)[1:] / 3000
    np.testing.assert_allclose(shares, [0.81, 0.09, 0.1], atol=0.02)


def test_dropout_near_zero_gives_the_plain_encoding(tokenizer):
    for text in set(TEXTS):
        dropped = tokenizer.encode(text, 32, 1e-12, np.random.default_rng(0)).ids
        assert (dropped == tokenizer.encode(text, 32).ids).all()


def test_dropout_of_one_gives_bytes(tokenizer):
    ids = tokenizer.encode("red", 16, 1.0 - 1e-12, np.random.default_rng(0)).ids
    assert np.count_nonzero(ids) == len(" red")


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert again.vocab_size == tokenizer.vocab_size <= 400
    assert (again.encode(TEXTS[0], 8).ids == tokenizer.encode(TEXTS[0], 8).ids).all()


def test_a_word_without_end_is_learned_from_its_beginning(tmp_path):
    """Time would grow with the square of a word's length: the whole took minutes."""
    texts = ["a small red circle", "ab" * 200_000, "x" + " " * 200_000 + "y"]
    cut = ["a small red circle", "ab" * 500, "x" + " " * 1000 + "y"]
    for name, learned in (("whole", texts), ("cut", cut)):
        Tokenizer.train(learned, 300).save(tmp_path / name)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "cut").read_bytes()


def test_a_long_text_without_blanks_is_learned_whole(monkeypatch):
    """It is many words where a script has no blanks."""
    texts = ["".join(chr(0x4E00 + place % 97) + "。" * (place % 9 == 8) for place in range(3000)), "ab1_" * 900]
    trained = Tokenizer.train(texts, 600)
    monkeypatch.setattr("data.tokenizer._LONG_WORDS", re.compile("(?!)()()()()"))  # nothing is cut
    assert json.loads(trained._model.to_str()) == json.loads(Tokenizer.train(texts, 600)._model.to_str())


def test_training_is_deterministic(tokenizer):
    again = Tokenizer.train(TEXTS, 400)
    assert again.vocab_size == tokenizer.vocab_size
    assert all((again.encode(text, 16).ids == tokenizer.encode(text, 16).ids).all() for text in TEXTS)


@pytest.fixture(scope="module")
def framed(tokenizer) -> Tokenizer:
    return tokenizer.with_ends()


@pytest.fixture(scope="module")
def clip(clip_file) -> Tokenizer:
    return Tokenizer.from_clip_vocabulary(clip_file)


def test_ends_have_the_two_highest_ids(tokenizer, framed):
    assert (framed.start_id, framed.end_id) == (tokenizer.vocab_size, tokenizer.vocab_size + 1)
    assert framed.vocab_size == tokenizer.vocab_size + 2
    assert (tokenizer.start_id, tokenizer.end_id) == (None, None)
    assert framed.with_ends() is framed


def test_a_framed_caption_is_the_same_between_its_ends(tokenizer, framed):
    for text in ("", "a small red circle", "never-seen words, 123!"):
        plain = tokenizer.encode(text, 40).ids
        count = np.count_nonzero(plain)
        expected = [framed.start_id, *plain[:count], framed.end_id, *[PAD_ID] * (40 - count - 2)]
        encoded = framed.encode(text, 40)
        assert encoded.ids.tolist() == expected and not encoded.truncated
        assert framed.decode(encoded.ids) == text


def test_a_caption_that_is_cut_keeps_its_end(framed):
    ids = framed.encode(TEXTS[0], 20).ids.tolist()
    count = ids.index(framed.end_id) + 1
    whole = framed.encode(TEXTS[0], count)
    assert whole.ids.tolist() == ids[:count] and not whole.truncated
    for length in range(1, count):
        cut = framed.encode(TEXTS[0], length)
        assert cut.truncated and cut.ids.tolist() == [*ids[: length - 1], framed.end_id]
        assert TEXTS[0].startswith(framed.decode(cut.ids)) or length == 1


def test_no_caption_spells_a_special_token(tokenizer, framed, clip):
    for each in (tokenizer, framed, clip):
        for text in ("<|endoftext|>", "a <|startoftext|> b<|endoftext|>", "<pad> <PAD>"):
            for dropout in (0.0, 0.2):
                ids = each.encode(text, 60, dropout, np.random.default_rng(0)).ids.tolist()
                assert ids.count(each.end_id) == (each.end_id is not None)
                assert ids.count(each.start_id) == (each.start_id is not None)
                decoded = each.decode(np.array(ids))
                assert decoded.replace(" ", "") == text.lower().replace(" ", "")


def test_a_framed_tokenizer_drops_merges_between_its_ends(tokenizer, framed):
    plain, ids = (each.encode(TEXTS[1], 64, 0.5, np.random.default_rng(4)).ids for each in (tokenizer, framed))
    count = np.count_nonzero(plain)
    assert ids[: count + 2].tolist() == [framed.start_id, *plain[:count], framed.end_id]


def test_what_follows_the_end_is_no_text(framed):
    ids = framed.encode("a red circle", 12).ids
    ids[-3:] = framed.encode("blue", 3).ids
    assert framed.decode(ids) == "a red circle"


def test_the_saved_file_says_whether_captions_are_framed(tokenizer, framed, clip, tmp_path):
    for number, each in enumerate((tokenizer, framed, clip)):
        path = tmp_path / f"{number}.json"
        each.save(path)
        again = Tokenizer.load(path)
        assert (again.vocab_size, again.start_id, again.end_id) == (each.vocab_size, each.start_id, each.end_id)
        for text in (*TEXTS, "cat &amp; dog!!", "ΟΔΟΣ é", ""):
            for length in (5, 40):
                assert again.encode(text, length).ids.tolist() == each.encode(text, length).ids.tolist()
        assert tokenizers.Tokenizer.from_file(str(path)).get_vocab_size() == each.vocab_size


def test_words_of_clip_end_where_its_pieces_say(clip):
    ids = clip.encode("Cat's &amp; DOGS,  dog!! cats café", 40).ids
    pieces = [clip._model.id_to_token(i) for i in ids[1 : ids.tolist().index(clip.end_id)]]
    assert pieces == [
        *("cat</w>", "'s</w>", "&</w>", "do", "g", "s</w>", ",</w>", "dog</w>", "!!</w>"),
        *("ca", "t", "s</w>", "ca", "f", "Ã", "©</w>"),
    ]
    assert clip.decode(ids) == "cat 's & dogs , dog !! cats café"


def test_the_padding_of_clip_is_an_exclamation_mark_inside_a_caption(clip):
    ids = clip.encode("!~ cat !", 12).ids
    assert ids[1] == PAD_ID and (ids[-5:] == PAD_ID).all()
    assert clip.decode(ids) == "!~ cat !"


def test_captions_may_be_filled_up_with_another_piece(clip, tmp_path):
    ends = clip.padded_with("<|endoftext|>")
    ids = clip.encode("a cat", 8).ids
    filled = ends.encode("a cat", 8).ids
    used = clip.count("a cat")
    np.testing.assert_array_equal(filled[:used], ids[:used])
    assert set(ids[used:]) == {0} and set(filled[used:]) == {ends.end_id} == {ends.pad_id}
    assert ends.decode(filled) == "a cat" and clip.pad_id == 0
    ends.save(tmp_path / "tokenizer.json")
    for again in (Tokenizer.load, Tokenizer.from_clip_vocabulary):
        np.testing.assert_array_equal(again(tmp_path / "tokenizer.json").encode("a cat", 8).ids, filled)
    with pytest.raises(UserError, match="none of its"):
        clip.padded_with("<|pad|>")


def test_clip_drops_merges_too(clip):
    text = "cat and dog!!"
    assert (clip.encode(text, 30, 1e-12, np.random.default_rng(0)).ids == clip.encode(text, 30).ids).all()
    dropped = clip.encode(text, 30, 1.0 - 1e-12, np.random.default_rng(0)).ids
    assert dropped.tolist().index(clip.end_id) == 1 + len("catanddog!!")
    assert clip.decode(dropped) == "cat and dog !!"


def test_ends_that_are_not_the_highest_ids_are_refused(framed, tmp_path):
    framed.save(tmp_path / "tokenizer.json")
    grown = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    grown.add_special_tokens(["<one more>"])
    grown.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="not its highest ids"):
        Tokenizer.load(tmp_path / "tokenizer.json")


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match="at least 257"):
        Tokenizer.train(TEXTS, 100)
    with pytest.raises(UserError, match="no tokenizer"):
        Tokenizer.load(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match="not a tokenizer file"):
        Tokenizer.load(tmp_path / "broken.json")
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a")).save(str(tmp_path / "other.json"))
    with pytest.raises(UserError, match="not made by Tessera"):
        Tokenizer.load(tmp_path / "other.json")


class Counting(np.random.Generator):
    """A generator that counts its draws."""

    draws = 0

    def random(self, *args, **kwargs):
        self.draws += 1
        return super().random(*args, **kwargs)


@pytest.mark.parametrize(("name", "word"), [("tokenizer", "circle"), ("clip", "cat")])
def test_dropout_costs_what_is_asked_for_and_at_most_the_length(name, word, request):
    tokenizer = request.getfixturevalue(name)

    def cost(letters: int, length: int) -> int:
        tokenizer.encode(word * (letters // len(word)), length, 0.1, rng := Counting(np.random.PCG64(0)))
        return rng.draws

    assert cost(12_000, 20_000) < 2.5 * cost(6_000, 20_000)
    assert cost(12_000, 16) == cost(6_000, 16) > 0


def test_a_long_word_under_dropout_keeps_its_text_and_is_cut_as_usual(tokenizer):
    word = "largebluesquare" * 20
    encoded = tokenizer.encode(word, 400, 0.3, np.random.default_rng(0))
    assert tokenizer.decode(encoded.ids) == word and not encoded.truncated
    cut = tokenizer.encode(word, 40, 0.3, np.random.default_rng(0))
    assert cut.truncated and (cut.ids == encoded.ids[:40]).all()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_long_captions_are_not_kept(tokenizer, dropout):
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefgh "), 5_000)) for _ in range(20)]
    tokenizer.encode("a blue star", 8, dropout, rng)
    before = tokenizer._known_ids.num_bytes, tokenizer._known_words.num_bytes
    for text in texts:
        tokenizer.encode(text, 8, dropout, rng)
    assert (tokenizer._known_ids.num_bytes, tokenizer._known_words.num_bytes) == before
    assert before[dropout > 0] > 0


@pytest.fixture(scope="module")
def letters(tmp_path_factory) -> tuple[tokenizers.CharBPETokenizer, Path, Path]:
    """The library's own tokenizer of letters, as minDALL-E sets it up, and its two files."""
    folder = tmp_path_factory.mktemp("letters")
    trained = tokenizers.CharBPETokenizer(unk_token="[UNK]", lowercase=True)
    trained.train_from_iterator(TEXTS, 60, special_tokens=["[PAD]", "[UNK]"], show_progress=False)
    vocabulary, merges = (Path(file) for file in trained.save_model(str(folder)))
    theirs = tokenizers.CharBPETokenizer.from_file(str(vocabulary), str(merges), unk_token="[UNK]", lowercase=True)
    theirs.add_special_tokens(["[PAD]"])
    theirs.enable_padding(length=16, pad_id=theirs.token_to_id("[PAD]"))
    theirs.enable_truncation(max_length=16)
    return theirs, vocabulary, merges


@pytest.mark.parametrize("pad", ["[PAD]", "e"])  # the published one's id need not be 0
def test_a_vocabulary_of_letters_encodes_as_the_library_s(letters, pad, tmp_path):
    theirs, vocabulary, merges = letters
    ours = Tokenizer.from_letter_vocabulary(vocabulary, merges, "[UNK]", pad)
    ours.save(tmp_path / "tokenizer.json")
    assert ours.vocab_size == theirs.get_vocab_size() and ours.end_id is None
    theirs.enable_padding(length=16, pad_id=theirs.token_to_id(pad))
    for each in (ours, Tokenizer.load(tmp_path / "tokenizer.json")):
        for text in ("A Small RED circle", "a ☃ qé, star!", "small " * 20):
            assert each.encode(text, 16).ids.tolist() == theirs.encode(text).ids
            assert each.encode(text, 16, 1e-9, np.random.default_rng(0)).ids.tolist() == theirs.encode(text).ids
        assert each.pad_id == theirs.token_to_id(pad) and not each.reads_as_clip
    plain = Tokenizer.from_letter_vocabulary(vocabulary, merges, "[UNK]", "[PAD]")
    assert plain.decode(plain.encode("a big star", 16).ids) == "a big star"


def test_what_is_no_vocabulary_of_letters_is_one_line(letters, tmp_path):
    _, vocabulary, merges = letters
    with pytest.raises(UserError, match="vocab.json has no piece '<none>'"):
        Tokenizer.from_letter_vocabulary(vocabulary, merges, "[UNK]", "<none>")
    (tmp_path / "vocab.json").write_text("[1]")
    with pytest.raises(UserError, match="are no vocabulary") as error:
        Tokenizer.from_letter_vocabulary(tmp_path / "vocab.json", merges, "[UNK]", "[PAD]")
    assert "\n" not in str(error.value)


def test_gpt2_s_vocabulary_keeps_letters_and_ends_captions_without_a_start(tmp_path):
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())  # "!" is the first, as in GPT-2's
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(["a Red circle"] * 9, trainer)
    model.add_special_tokens(["<|endoftext|>"])
    size = model.get_vocab_size()
    (tmp_path / "vocab.json").write_text(json.dumps(model.get_vocab()))
    merges = json.loads(model.to_str())["model"]["merges"]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]))
    files = tmp_path / "vocab.json", tmp_path / "merges.txt"
    for ids, end in ((size, size - 1), (size + 1, size)):
        tokenizer = Tokenizer.from_gpt2_vocabulary(*files, ids)
        assert (tokenizer.start_id, tokenizer.end_id, tokenizer.vocab_size) == (None, end, ids)
        row, truncated = tokenizer.encode("a Red circle!", 20)
        assert not truncated and row[tokenizer.count("a Red circle!") - 1] == end and row[-1] == 0
        tokenizer.save(tmp_path / "tokenizer.json")
        again = Tokenizer.load(tmp_path / "tokenizer.json")
        assert again.end_id == end and again.decode(row) == tokenizer.decode(row) == "a Red circle!"
        assert tokenizer.decode(tokenizer.encode("a <|endoftext|> <|EOS|>", 40).ids) == "a <|endoftext|> <|EOS|>"
    with pytest.raises(UserError, match=f"has {size} pieces, and GPT-2's with <.endoftext.> are 99 or one less"):
        Tokenizer.from_gpt2_vocabulary(*files, 99)
