"""The loop over tokens: draws against closed forms, beam search against all sequences, stops, and the cache."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.dalle import Dalle
from sample.decoding import Decoding, Given, beam_search, decode, filter_logits, is_guided

from ..models.random_parameters import random_parameters

BATCH, VOCAB, LENGTH = 3, 4, 4
STOP, PAD = 2, 3


def keys(size, seed=0):
    """One key an example."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), jnp.arange(size))


def history_table(rows=BATCH, seed=0, scale=1.5):
    """Scores of the next token after every history of every row, [rows, histories, VOCAB]."""
    histories = sum(VOCAB**n for n in range(LENGTH))
    return np.random.default_rng(seed).normal(scale=scale, size=(rows, histories, VOCAB)).astype(np.float32)


def start(table):
    """What a network whose scores are `table` gives the loop: (step, logits, cache)."""
    scores = jnp.asarray(table)

    def step(token, position, cache):
        assert token.shape == cache["row"].shape and position.shape == ()
        history = cache["history"] * VOCAB + token + 1
        return scores[cache["row"], history], {"row": cache["row"], "history": history}

    rows = jnp.arange(len(table))
    return step, scores[:, 0], {"row": rows, "history": jnp.zeros_like(rows)}


@jax.jit
def compiled_search(table, settings):
    """`beam_search` over a table."""
    return beam_search(*start(table), LENGTH, settings)


@jax.jit
def compiled_decode(table, draws, settings):
    """`decode` over a table."""
    return decode(*start(table), draws, LENGTH, settings)


def search(table, **settings):
    """`beam_search` over a table, compiled once for each of the settings that are no numbers."""
    return compiled_search(table, Decoding(**settings))


def draw(table, draws, **settings):
    """`decode` over a table, compiled once for each of the settings that are no numbers."""
    return compiled_decode(table, draws, Decoding(**settings))


def log_probs(row, sequence):
    """The log probability of the token after `sequence`, of one row of a table, in float64."""
    history = functools.reduce(lambda history, token: history * VOCAB + token + 1, sequence, 0)
    scores = row[history].astype(np.float64)
    return scores - np.log(np.sum(np.exp(scores)))


def score(row, sequence, length_penalty):
    """The score of a finished sequence."""
    total = sum(log_probs(row, sequence[:i])[token] for i, token in enumerate(sequence))
    return total / len(sequence) ** length_penalty


def all_sequences(stop_tokens):
    """Every sequence that ends with its first stop token or at the last position."""
    for length in range(1, LENGTH + 1):
        for sequence in itertools.product(range(VOCAB), repeat=length):
            if not set(sequence[:-1]) & set(stop_tokens) and (length == LENGTH or sequence[-1] in stop_tokens):
                yield sequence


def reference_search(row, beams, length_penalty, early_stopping, finished_beams, stop_tokens):
    """Beam search over lists: [(score, sequence)], the best first."""
    running, finished = [(0.0, ())], []
    for length in range(1, LENGTH + 1):
        candidates = [
            (total + log_probs(row, sequence)[token], (*sequence, token))
            for total, sequence in running
            for token in range(VOCAB)
        ]
        candidates.sort(reverse=True)
        ended = [c for c in candidates if length == LENGTH or c[1][-1] in stop_tokens]
        if finished_beams == "apart":
            finished += [(total / length**length_penalty, s) for total, s in candidates[:beams] if (total, s) in ended]
            finished = sorted(finished, reverse=True)[:beams]
            running = [c for c in candidates if c not in ended][:beams]
            if not running:
                break
            hoped_for = LENGTH if early_stopping == "never" and length_penalty > 0 else length
            full = len(finished) == beams
            if full and (early_stopping is True or running[0][0] / hoped_for**length_penalty <= finished[-1][0]):
                break
        else:
            scored = [(total / length**length_penalty, total, s) for total, s in candidates]
            kept = sorted([*scored, *((value, None, s) for value, s in finished)], key=lambda c: c[0], reverse=True)
            finished = [(value, s) for value, total, s in kept[:beams] if total is None or (total, s) in ended]
            running = [(t, s) for _, t, s in kept[:beams] if t is not None and (t, s) not in ended]
            if not running:
                break
    return finished


def assert_sequences(found, i, expected):
    """Example i of `found` holds the expected [(score, sequence)] and nothing else."""
    places = found.scores.shape[1]
    values = np.full(places, -np.inf)
    tokens = np.full((places, LENGTH), PAD)
    for place, (value, sequence) in enumerate(expected):
        values[place], tokens[place, : len(sequence)] = value, sequence
    np.testing.assert_allclose(found.scores[i], values, rtol=1e-5)
    np.testing.assert_array_equal(found.tokens[i], tokens)
    np.testing.assert_array_equal(found.lengths[i], [len(s) for _, s in expected] + [0] * (places - len(expected)))


@pytest.mark.parametrize("stop_tokens", [(), (STOP,), (0, STOP)])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -1.0])
def test_as_many_beams_as_sequences_find_and_order_all_of_them(stop_tokens, length_penalty):
    table = history_table()
    settings = {"length_penalty": length_penalty, "early_stopping": "never", "stop_tokens": stop_tokens}
    found = search(table, beams=VOCAB**LENGTH, pad_token=PAD, **settings)
    for i, row in enumerate(table):
        scored = [(score(row, s, length_penalty), s) for s in all_sequences(stop_tokens)]
        assert_sequences(found, i, sorted(scored, reverse=True))


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.5])
@pytest.mark.parametrize(
    ("finished_beams", "early_stopping"), [("apart", False), ("apart", True), ("apart", "never"), ("within", False)]
)
@pytest.mark.parametrize("stop_tokens", [(STOP,), (0, STOP)])
def test_few_beams_find_what_a_search_over_lists_finds(finished_beams, early_stopping, stop_tokens, length_penalty):
    settings = {"length_penalty": length_penalty, "early_stopping": early_stopping}
    settings |= {"finished_beams": finished_beams, "stop_tokens": stop_tokens}
    table = history_table(rows=30, seed=1, scale=0.7)
    for beams in (2, 5):
        found = search(table, beams=beams, pad_token=PAD, **settings)
        for i, row in enumerate(table):
            assert_sequences(found, i, reference_search(row, beams, **settings))


def test_rules_of_finishing_differ_where_they_should():
    table = history_table(rows=30, seed=1, scale=0.7)
    choices = [("apart", False), ("apart", True), ("apart", "never"), ("within", False)]
    found = [
        search(table, beams=2, stop_tokens=(STOP,), finished_beams=f, early_stopping=e, length_penalty=1.5)
        for f, e in choices
    ]
    for a, b in itertools.combinations(found, 2):
        assert np.any(a.tokens != b.tokens)
    # What ends early has no better sequences than what goes on.
    assert np.all(found[1].scores <= found[2].scores + 1e-6) and np.all(found[0].scores <= found[2].scores + 1e-6)


@pytest.mark.parametrize(
    ("settings", "turns"),
    [
        ({"temperature": 0.0}, 0),
        ({"beams": 2, "early_stopping": True}, 1),
        ({"beams": 2, "early_stopping": False}, 1),
        ({"beams": 2, "finished_beams": "within"}, 1),
        ({"beams": 2, "early_stopping": "never"}, 2),
    ],
)
def test_the_network_runs_no_longer_than_the_sequences_need(settings, turns):
    table = history_table()
    table[..., STOP] += 4.0
    step, logits, cache = start(table)
    read = []

    def counting(token, position, cache):
        jax.debug.callback(lambda position: read.append(int(position)), position)
        return step(token, position, cache)

    settings = Decoding(stop_tokens=(STOP,), length_penalty=1.0, **settings)
    jax.block_until_ready(decode(counting, logits, cache, keys(BATCH), LENGTH, settings))
    jax.effects_barrier()
    assert read == list(range(turns))


def test_one_beam_is_greedy():
    table = history_table(rows=20)
    for stop_tokens in ((), (STOP,)):
        found = search(table, beams=1, stop_tokens=stop_tokens, pad_token=PAD)
        greedy = draw(table, keys(20), temperature=0.0, stop_tokens=stop_tokens, pad_token=PAD)
        np.testing.assert_array_equal(found.tokens[:, 0], greedy.tokens)
        np.testing.assert_array_equal(found.lengths[:, 0], greedy.lengths)


def test_decode_returns_the_best_beam():
    table = history_table()
    best = draw(table, keys(BATCH), beams=3, stop_tokens=(STOP,), pad_token=PAD)
    found = search(table, beams=3, stop_tokens=(STOP,), pad_token=PAD)
    np.testing.assert_array_equal(best.tokens, found.tokens[:, 0])
    np.testing.assert_array_equal(best.lengths, found.lengths[:, 0])


def test_an_example_is_searched_the_same_alone_and_among_others():
    table = history_table(rows=12, seed=3)
    table[::2, :, STOP] += 4.0  # some end early
    settings = {"beams": 3, "stop_tokens": (STOP,)}
    among = search(table, **settings)
    for i in range(12):
        alone = search(table[i : i + 1], **settings)
        np.testing.assert_array_equal(alone.tokens[0], among.tokens[i])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_follows_a_stop_token_is_padding(temperature):
    table = history_table(rows=40)
    plain = draw(table, keys(40), temperature=temperature)
    stopped = draw(table, keys(40), temperature=temperature, stop_tokens=(0, STOP), pad_token=PAD)
    np.testing.assert_array_equal(plain.lengths, LENGTH)
    lengths = []
    for tokens, ended in zip(np.asarray(plain.tokens), np.asarray(stopped.tokens), strict=True):
        length = next((i + 1 for i, token in enumerate(tokens) if token in (0, STOP)), LENGTH)
        np.testing.assert_array_equal(ended, [*tokens[:length], *[PAD] * (LENGTH - length)])
        lengths.append(length)
    np.testing.assert_array_equal(stopped.lengths, lengths)
    assert len(set(lengths)) > 2


def guided_pair(guidance, seed=5):
    """(table of pairs, table of what guidance makes of them)."""
    pairs = history_table(rows=2 * BATCH, seed=seed)
    cond, uncond = pairs[::2], pairs[1::2]
    return pairs, uncond + np.float32(guidance) * (cond - uncond)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"beams": 3, "stop_tokens": (STOP,)}])
@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5])
def test_guidance_decodes_the_guided_scores(settings, guidance):
    pairs, combined = guided_pair(guidance)
    guided = draw(pairs, keys(BATCH), guided=True, guidance=guidance, **settings)
    np.testing.assert_array_equal(guided.tokens, draw(combined, keys(BATCH), **settings).tokens)
    if guidance == 1.0:
        np.testing.assert_array_equal(guided.tokens, draw(pairs[::2], keys(BATCH), **settings).tokens)
    else:
        assert np.any(guided.tokens != draw(pairs[::2], keys(BATCH), **settings).tokens)


def test_guidance_of_one_is_none():
    assert not is_guided(1.0) and not is_guided(np.float32(1))
    assert is_guided(0.0) and is_guided(1.5)
    assert jax.jit(lambda w: jnp.asarray(is_guided(w)))(1.0)  # not known while tracing


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"beams": 3}])
def test_given_tokens_are_kept_and_continued(settings):
    table = history_table()
    step, logits, cache = start(table)
    tokens = np.random.default_rng(2).integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)
    run = jax.jit(
        lambda tokens, count: (
            decode(step, logits, cache, keys(BATCH), LENGTH, Decoding(**settings), Given(tokens, count)).tokens
        )
    )
    out = np.asarray(run(tokens, jnp.int32(2)))
    np.testing.assert_array_equal(out[:, :2], tokens[:, :2])
    np.testing.assert_array_equal(run(out, jnp.int32(3)), out)
    np.testing.assert_array_equal(run(tokens, jnp.int32(LENGTH)), tokens)
    np.testing.assert_array_equal(run(tokens, jnp.int32(0)), draw(table, keys(BATCH), **settings).tokens)
    if settings.get("temperature") == 0:
        for row, sequence in zip(table, out, strict=True):
            assert [np.argmax(log_probs(row, sequence[:i])) for i in (2, 3)] == sequence[2:].tolist()


def reference_filter(logits, top_k, top_p):
    """Which of one row of logits are kept, written out token by token."""
    order = list(np.argsort(-logits))[: top_k or None]
    probability = np.exp(logits[order]) / np.sum(np.exp(logits[order]))
    kept, total = set(), 0.0
    for token, p in zip(order, probability, strict=True):
        kept.add(token)
        total += p
        if total >= top_p:
            break
    return kept


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.5), (0, 0.95), (6, 0.7), (40, 0.9), (3, 0.01)])
def test_filters_keep_the_smallest_sufficient_set(top_k, top_p):
    logits = np.random.default_rng(1).normal(scale=2, size=(6, 20)).astype(np.float32)
    filtered = jax.jit(filter_logits)(logits, np.int32(top_k), np.float32(top_p))
    for row, out in zip(logits, np.asarray(filtered), strict=True):
        kept = set(np.flatnonzero(np.isfinite(out)).tolist())
        assert kept == reference_filter(row, top_k, top_p)
        np.testing.assert_array_equal(out[sorted(kept)], row[sorted(kept)])


@pytest.mark.parametrize(
    ("probability", "top_k", "top_p", "expected"),
    [
        ((0.5, 0.25, 0.125, 0.125), 0, 1.0, (0.5, 0.25, 0.125, 0.125)),
        ((0.5, 0.25, 0.125, 0.125), 2, 1.0, (2 / 3, 1 / 3, 0, 0)),
        ((0.5, 0.25, 0.125, 0.125), 3, 1.0, (0.5, 0.25, 0.125, 0.125)),  # a tie with the last is kept
        ((0.5, 0.25, 0.125, 0.125), 9, 1.0, (0.5, 0.25, 0.125, 0.125)),  # more than there are
        ((0.5, 0.25, 0.125, 0.125), 0, 0.4, (1, 0, 0, 0)),
        ((0.5, 0.25, 0.125, 0.125), 0, 0.5, (1, 0, 0, 0)),  # reached exactly
        ((0.5, 0.25, 0.125, 0.125), 0, 0.7, (2 / 3, 1 / 3, 0, 0)),
        ((0.25, 0.25, 0.25, 0.25), 1, 0.1, (0.25, 0.25, 0.25, 0.25)),
        ((0.4, 0.3, 0.2, 0.1), 3, 0.7, (4 / 7, 3 / 7, 0, 0)),  # 7/9 of the three that top-k leaves
        ((0.0, 0.5, 0.0, 0.5), 0, 0.99, (0, 0.5, 0, 0.5)),
    ],
)
def test_draws_have_the_filtered_distribution(probability, top_k, top_p, expected):
    with np.errstate(divide="ignore"):
        logits = np.log(np.array(probability, np.float32))
    number = 4000
    rows = jnp.asarray(np.tile(logits, (number, 1)))
    settings = Decoding(top_k=top_k, top_p=top_p)
    out = decode(lambda token, position, cache: (rows, cache), rows, (), keys(number), 3, settings)
    frequency = np.bincount(out.tokens.ravel(), minlength=VOCAB) / out.tokens.size
    assert np.all(frequency[np.array(expected) == 0] == 0)
    np.testing.assert_allclose(frequency, expected, atol=4 * np.sqrt(0.25 / out.tokens.size))


def test_temperature_sharpens_before_the_filters():
    logits = np.log(np.array([[0.4, 0.3, 0.2, 0.1]], np.float32))
    number = 4000
    rows = jnp.asarray(np.repeat(logits, number, axis=0))
    settings = Decoding(temperature=0.5, top_p=0.8)
    tokens = decode(lambda token, position, cache: (rows, cache), rows, (), keys(number), 3, settings).tokens
    # Squared: 16 9 4 1 of 30; the first two have 25/30. At temperature 1 it would take three to reach 0.8.
    np.testing.assert_allclose(np.bincount(tokens.ravel(), minlength=4) / tokens.size, [0.64, 0.36, 0, 0], atol=0.02)


@functools.cache
def dalle():
    """(a small DALL-E with every kind of mask, its parameters, pairs of captions)."""
    model = Dalle(
        text_vocab_size=11, text_length=4, image_vocab_size=7, image_grid=(3, 3), width=16, depth=3, heads=2,
        conv_kernel=3,
    )  # fmt: skip
    text = np.random.default_rng(0).integers(1, 11, (BATCH, 2, 4))
    text[:, 1] = 0
    return model, random_parameters(model), jnp.asarray(text.reshape(-1, 4), jnp.int32)


@pytest.mark.parametrize(
    "settings",
    [
        Decoding(temperature=0.7, top_k=5, top_p=0.9),
        Decoding(temperature=0.7, guided=True, guidance=2.0),
        Decoding(beams=4, stop_tokens=(3,)),
        Decoding(beams=4, stop_tokens=(3,), guided=True, guidance=2.0),
        Decoding(beams=4, finished_beams="within", stop_tokens=(3,), early_stopping=True),
    ],
)
def test_cached_equals_uncached(settings):
    model, params, text = dalle()
    text = text if settings.guided else text[::2]

    def cached(token, position, cache):
        return model.apply({"params": params}, token, position, cache, method="decode_step")

    def uncached(token, position, cache):
        tokens = cache["tokens"].at[:, position].set(token)
        scores = model.apply({"params": params}, cache["text"], tokens).image[:, position + 1]
        return scores, {"text": cache["text"], "tokens": tokens}

    length = model.image_length
    logits, cache = model.apply({"params": params}, text, method="prefill")
    tokens = jnp.zeros((len(text), length), jnp.int32)
    whole = model.apply({"params": params}, text, tokens).image[:, 0]
    starts = {cached: (logits, cache), uncached: (whole, {"text": text, "tokens": tokens})}
    draws = keys(BATCH)

    def run(step):
        logits, cache = starts[step]
        if settings.beams:
            return beam_search(step, logits, cache, length, settings)
        return decode(step, logits, cache, draws, length, settings)

    a, b = run(cached), run(uncached)
    if settings.beams:
        np.testing.assert_allclose(a.scores, b.scores, rtol=1e-4)
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.lengths, b.lengths)


@pytest.mark.parametrize(
    "settings", [{"beams": -1}, {"beams": 2, "early_stopping": "soon"}, {"beams": 2, "finished_beams": "away"}]
)
def test_searches_that_do_not_exist_are_refused(settings):
    with pytest.raises(ValueError, match="choose 1 or more"):
        search(history_table(), **settings)
