"""Tokens one by one: the loop of every autoregressive network, by draws, by the most likely token, or by beam search.

The loop knows no network. It is given the scores of the first token and a cache, both from a parallel pass over the
prompt, and a function

    step(tokens [R], position [], cache) -> (logits [R V], cache)

that reads token `position` (0 is the first one made here) and scores the next. A network that attends to a prompt of
its own length in every row, or to a prefix of embeddings, keeps its masks and lengths in the cache. Every array of the
cache has the rows R as its leading axis; what is no row's own (parameters, the features that all beams of a batch
share) belongs into `step`.

Rows are B examples, or with guidance B pairs: the conditional row, then the unconditional. Pairs stay adjacent, so a
batch that is sharded over devices keeps both of a pair on one device. Beam search makes B K rows or B K pairs of them.

The distribution of a token is shaped in this order: guidance (Crowson's, for autoregressive models), temperature,
top-k (Fan et al. 2018), top-p (Holtzman et al. 2020). Beam search scores a sequence of n tokens, the stop token among
them, with sum(log p) / n**length_penalty (Wu et al. 2016 with the plainer penalty that transformers has).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from cli.errors import UserError

Cache = Any
Step = Callable[[Array, Array, Cache], tuple[Array, Cache]]
Number = float | int | Array

EARLY_STOPPING = (False, True, "never")
FINISHED_BEAMS = ("apart", "within")


@struct.dataclass
class Decoding:
    """How tokens are chosen. The numbers may be traced; a change of what is below them compiles a new program.

    Attributes:
      guidance: w of uncond + w (cond - uncond) on the logits, w = 1 meaning none; used if `guided`.
      temperature: divisor of the logits; 0 takes the most likely token. Not for beams, as top_k and top_p.
      top_k: number of most likely tokens to keep (ties are kept), 0 for all.
      top_p: probability that the kept tokens reach together, 1 for all.
      length_penalty: exponent of the length in a beam's score; 0 compares sums, 1 means, more prefers long ones.
      guided: whether rows are pairs.
      beams: width K of the beam search; 0 for none.
      early_stopping: when a search ends before the last position, in transformers' words. True: as soon as K sequences
        are finished. False: when no running beam would enter the best K if it ended where it is; a guess, since a score
        may rise. "never": when none can any more, whatever follows.
      finished_beams: "apart": K beams run on beside the K best finished sequences, as in transformers. "within":
        finished sequences keep their places among the K beams, and the search ends when all are finished, as in ClipCap
        (Mokady et al. 2021); `early_stopping` plays no part.
      stop_tokens: ids that end a sequence.
      pad_token: what follows the stop token.
    """

    guidance: Number = 1.0
    temperature: Number = 1.0
    top_k: Number = 0
    top_p: Number = 1.0
    length_penalty: Number = 1.0
    guided: bool = struct.field(pytree_node=False, default=False)
    beams: int = struct.field(pytree_node=False, default=0)
    early_stopping: bool | str = struct.field(pytree_node=False, default=False)
    finished_beams: str = struct.field(pytree_node=False, default="apart")
    stop_tokens: tuple[int, ...] = struct.field(pytree_node=False, default=())
    pad_token: int = struct.field(pytree_node=False, default=0)

    @property
    def rows(self) -> int:
        """Rows that one sequence takes in the network."""
        return 2 if self.guided else 1


@struct.dataclass
class Given:
    """The first tokens of every sequence where they are known.

    Attributes:
      tokens: [B L]; those from `count` on are not read.
      count: how many are given.
    """

    tokens: Int[Array, "b l"]
    count: Int[Array, ""]


@struct.dataclass
class Decoded:
    """One sequence an example.

    Attributes:
      tokens: [B L], the stop token included, pads after it.
      lengths: [B] tokens before the pads.
    """

    tokens: Int[Array, "b l"]
    lengths: Int[Array, "b"]


@struct.dataclass
class Beams:
    """The best K sequences of every example, the best first. Where there are fewer, the rest are pads.

    Attributes:
      tokens: [B K L], the stop token included, pads after it.
      lengths: [B K] tokens before the pads.
      scores: [B K] sum of log p over length**length_penalty; -inf for what is no sequence.
    """

    tokens: Int[Array, "b k l"]
    lengths: Int[Array, "b k"]
    scores: Float[Array, "b k"]


def decode(
    step: Step,
    logits: Float[Array, "r v"],
    cache: Cache,
    keys: Key[Array, "b"],
    length: int,
    settings: Decoding,
    given: Given | None = None,
) -> Decoded:
    """Makes one sequence an example: the best of a beam search where `settings.beams` asks for one, a draw otherwise.

    Args:
      step: see the top of this file.
      logits: scores of token 0, from the pass over the prompt; B rows, or 2 B with guidance.
      cache: from the same pass.
      keys: one an example, for the draws; a sequence depends on its own key and rows alone.
      length: tokens to make at most.
      settings: how they are chosen.
      given: known first tokens.

    Raises:
      ValueError: if a setting is none of its choices.
    """
    if settings.beams:
        best = beam_search(step, logits, cache, length, settings, given)
        return Decoded(best.tokens[:, 0], best.lengths[:, 0])
    batch = keys.shape[0]

    def choose(logits: Array, position: Array, state: tuple) -> tuple[tuple, Array, None]:
        tokens, lengths, running = state
        token = _draw(_model_logits(logits, position, settings, given), position, keys, settings)
        token = jnp.where(running, token, settings.pad_token)
        state = tokens.at[:, position].set(token), lengths + running, running & ~_stops(token, settings)
        return state, jnp.repeat(token, settings.rows, axis=0), None

    tokens = jnp.full((batch, length), settings.pad_token, jnp.int32)
    state = tokens, jnp.zeros(batch, jnp.int32), jnp.ones(batch, bool)
    tokens, lengths, _ = _loop(step, logits, cache, length, choose, state, lambda state: state[2], settings)
    return Decoded(tokens, lengths)


@struct.dataclass
class Progress:
    """Where the loop stands that is turned from outside, a token at a time.

    Attributes:
      position: of the last token.
      token: [B] the last token, pads behind the end.
      running: [B] whether there will be more.
      cache: of the network, which has read what stands before the last token.
    """

    position: Int[Array, ""]
    token: Int[Array, "b"]
    running: Bool[Array, "b"]
    cache: Cache


def first_token(logits: Float[Array, "b v"], cache: Cache, keys: Key[Array, "b"], settings: Decoding) -> Progress:
    """The first token of what `decode` makes without guidance, beams and given tokens; `next_token` makes the others.

    Arguments as in `decode`.
    """
    position = jnp.int32(0)
    token = _draw(logits.astype(jnp.float32), position, keys, settings)
    return Progress(position, token, ~_stops(token, settings), cache)


def next_token(step: Step, progress: Progress, keys: Key[Array, "b"], settings: Decoding) -> Progress:
    """Reads the last token and chooses the one behind it."""
    logits, cache = step(progress.token, progress.position, progress.cache)
    position = progress.position + 1
    token = _draw(logits.astype(jnp.float32), position, keys, settings)
    token = jnp.where(progress.running, token, settings.pad_token)
    return Progress(position, token, progress.running & ~_stops(token, settings), cache)


def _draw(logits: Array, position: Array, keys: Array, settings: Decoding) -> Array:
    """A token for every sequence, of scores of the model."""
    greedy = settings.temperature == 0
    scaled = logits / jnp.where(greedy, 1.0, settings.temperature)
    scaled = filter_logits(scaled, settings.top_k, settings.top_p)
    token_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, position)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(token_keys)
    return jnp.argmax(jnp.where(greedy, logits, scaled + noise), axis=-1).astype(jnp.int32)


@struct.dataclass
class _Search:
    """What a beam search knows: K running beams of one length and the K best finished sequences, -inf for none."""

    tokens: Array
    sums: Array
    finished: Beams
    open: Array


def beam_search(
    step: Step,
    logits: Float[Array, "r v"],
    cache: Cache,
    length: int,
    settings: Decoding,
    given: Given | None = None,
) -> Beams:
    """Looks for the sequences of the highest score with `settings.beams` beams; arguments as in `decode`.

    A sequence is finished by a stop token or by its last position. With as many beams as there are sequences, and
    `early_stopping` "never", it finds the best of all.

    Raises:
      ValueError: if there is no beam, or a setting is none of its choices.
    """
    beams, rows = settings.beams, settings.rows
    if beams < 1 or settings.early_stopping not in EARLY_STOPPING or settings.finished_beams not in FINISHED_BEAMS:
        raise ValueError(
            f"no beam search has beams={beams}, early_stopping={settings.early_stopping!r}, "
            f"finished_beams={settings.finished_beams!r}; choose 1 or more, one of {EARLY_STOPPING}, "
            f"one of {FINISHED_BEAMS}"
        )
    batch = logits.shape[0] // rows

    def choose(logits: Array, position: Array, state: _Search) -> tuple[_Search, Array, Array]:
        logits = _model_logits(logits, position, settings, given)
        sums = state.sums[..., None] + jax.nn.log_softmax(logits, axis=-1).reshape(batch, beams, -1)
        vocab_size = sums.shape[-1]
        # Each beam may end once for every stop token: of so many candidates at least K go on.
        count = min((1 + len(settings.stop_tokens)) * beams, beams * vocab_size)
        sums, candidate = jax.lax.top_k(sums.reshape(batch, -1), count)
        parent, token = jnp.divmod(candidate, vocab_size)
        tokens = _take(state.tokens, parent).at[:, :, position].set(token)
        scores = sums / _penalty(position + 1, settings)
        ends = _stops(token, settings) | (position == length - 1)

        finished = state.finished
        if settings.finished_beams == "within":
            kept = _rank(jnp.concatenate([finished.scores, scores], axis=1)) < beams
            finished = dataclasses.replace(finished, scores=jnp.where(kept[:, :beams], finished.scores, -jnp.inf))
            ending, running = ends & kept[:, beams:], ~ends & kept[:, beams:]
        else:
            # Candidates beyond the first K are there to keep K beams running; one of them may not end.
            ending, running = ends & (jnp.arange(count) < beams), ~ends
        ending &= state.open[:, None]
        finished = _best(finished, tokens, position + 1, jnp.where(ending, scores, -jnp.inf))
        sums, order = jax.lax.top_k(jnp.where(running, sums, -jnp.inf), beams)
        state = _Search(_take(tokens, order), sums, finished, state.open)
        may_improve = _may_improve(state, position + 1, length, settings)
        state = dataclasses.replace(state, open=state.open & may_improve)
        token = jnp.repeat(_take(token, order).reshape(-1), rows, axis=0)
        return state, token, _take(parent, order)

    def spread(x: Array) -> Array:
        grouped = jnp.broadcast_to(x.reshape(batch, 1, rows, *x.shape[1:]), (batch, beams, rows, *x.shape[1:]))
        return grouped.reshape(batch * beams * rows, *x.shape[1:])

    if given is not None:
        given = Given(jnp.repeat(given.tokens, beams, axis=0), given.count)
    tokens = jnp.full((batch, beams, length), settings.pad_token, jnp.int32)
    nothing = jnp.full((batch, beams), -jnp.inf)
    # All beams of an example are the same at first: only one of them may be extended.
    state = _Search(
        tokens,
        nothing.at[:, 0].set(0.0),
        Beams(tokens, jnp.zeros((batch, beams), jnp.int32), nothing),
        jnp.ones(batch, bool),
    )
    logits, cache = jax.tree.map(spread, (logits, cache))
    return _loop(step, logits, cache, length, choose, state, lambda state: state.open, settings).finished


def filter_logits(logits: Float[Array, "b v"], top_k: Number, top_p: Number) -> Float[Array, "b v"]:
    """Sets all but the likely tokens to -inf.

    Keeps the `top_k` highest scores (0 for all; ties with the last are kept), and of these the smallest set whose
    probabilities, renormalized after top-k, sum to at least `top_p` (1 for all; never empty; ties with the last are
    kept).
    """

    def keep_likely(logits: Array) -> Array:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        rank = jnp.arange(logits.shape[-1])
        ordered = jnp.where((rank < top_k) | (top_k == 0), ordered, -jnp.inf)
        probability = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        kept = ((before < top_p) | (top_p >= 1)) & jnp.isfinite(ordered)
        threshold = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(logits >= threshold, logits, -jnp.inf)

    # A sort of the vocabulary per token is worth skipping; the predicate is one scalar, so only one branch runs.
    return jax.lax.cond((top_k > 0) | (top_p < 1), keep_likely, lambda logits: logits, logits)


def is_guided(guidance: Any) -> bool:
    """Whether guidance changes anything; True where its value is not known while tracing."""
    try:
        return float(guidance) != 1.0
    except jax.errors.ConcretizationTypeError:
        return True


def check_numbers(numbers: Mapping[str, Any]) -> None:
    """Raises UserError unless guidance, temperature, top_k and top_p are possible."""
    guidance, temperature, top_k, top_p = (numbers[key] for key in ("guidance", "temperature", "top_k", "top_p"))
    if not 0 <= guidance < float("inf"):
        raise UserError(f"guidance={guidance} is impossible; 1 means none, more follows the caption more, 0 ignores it")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature={temperature} is impossible; use 0 (most likely token) or more")
    if top_k < 0 or top_k != int(top_k):
        raise UserError(f"top_k={top_k} is impossible; use a whole number of tokens, 0 for all")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p} is impossible; use a probability above 0, 1 for all tokens")


def _loop(
    step: Step,
    logits: Array,
    cache: Cache,
    length: int,
    choose: Callable[[Array, Array, Any], tuple[Any, Array, Array | None]],
    state: Any,
    running: Callable[[Any], Bool[Array, "b"]],
    settings: Decoding,
) -> Any:
    """Chooses, reads, chooses, ...: the last token is chosen and never read. Returns the last state.

    `choose(logits, position, state)` returns (state, the token that each row reads next, the beam that each beam [B K]
    came from or None where rows stay in place). The loop ends early when `running(state)` is True nowhere.
    """

    def advance(carry: tuple[Array, Any, Array, Cache]) -> tuple[Array, Any, Array, Cache]:
        position, state, token, cache = carry
        logits, cache = step(token, position, cache)
        return (position + 1, *turn(logits, position + 1, state, cache))

    def turn(logits: Array, position: Array, state: Any, cache: Cache) -> tuple[Any, Array, Cache]:
        state, token, parents = choose(logits, position, state)
        if parents is not None:
            cache = jax.tree.map(lambda x: _take(x.reshape(*parents.shape, -1), parents).reshape(x.shape), cache)
        return state, token, cache

    def unfinished(carry: tuple[Array, Any, Array, Cache]) -> Array:
        more = carry[0] < length - 1
        # Without a stop token the number of turns is known to the compiler.
        return more & jnp.any(running(carry[1])) if settings.stop_tokens else more

    start = jnp.int32(0)
    return jax.lax.while_loop(unfinished, advance, (start, *turn(logits, start, state, cache)))[1]


def _model_logits(logits: Array, position: Array, settings: Decoding, given: Given | None) -> Array:
    """Scores of one token for every sequence, from the scores of every row: guided, or certain of a given token."""
    if settings.guided:
        cond, uncond = jnp.moveaxis(logits.reshape(-1, 2, logits.shape[-1]), 1, 0)
        logits = uncond + settings.guidance * (cond - uncond)
    if given is None:
        return logits
    known = given.tokens[:, position, None] == jnp.arange(logits.shape[-1])
    return jnp.where(position < given.count, jnp.where(known, 0.0, -jnp.inf), logits)


def _stops(token: Array, settings: Decoding) -> Array:
    """Whether a token ends its sequence."""
    return jnp.isin(token, jnp.asarray(settings.stop_tokens, jnp.int32))


def _penalty(length: Array | int, settings: Decoding) -> Array:
    """What the sum of log p of a sequence is divided by."""
    return jnp.asarray(length, jnp.float32) ** settings.length_penalty


def _take(x: Array, index: Array) -> Array:
    """x[b, index[b, i]], of x [B K ...] and index [B I]."""
    return jax.vmap(lambda row, i: row[i])(x, index)


def _rank(scores: Array) -> Array:
    """The place of each score in its row, 0 for the highest; of equals the first."""
    return jnp.argsort(jnp.argsort(scores, axis=-1, descending=True, stable=True), axis=-1)


def _best(finished: Beams, tokens: Array, length: Array, scores: Array) -> Beams:
    """The K best of the finished sequences and of new ones, all `length` long; those of score -inf are none."""
    places = finished.scores.shape[1]
    scores, order = jax.lax.top_k(jnp.concatenate([finished.scores, scores], axis=1), places)
    lengths = jnp.concatenate([finished.lengths, jnp.full(tokens.shape[:2], length, jnp.int32)], axis=1)
    return Beams(_take(jnp.concatenate([finished.tokens, tokens], axis=1), order), _take(lengths, order), scores)


def _may_improve(state: _Search, position: Array, length: int, settings: Decoding) -> Array:
    """Whether the search of each example goes on, [B]; `position` tokens are chosen."""
    best = jnp.max(state.sums, axis=1)
    if settings.finished_beams == "within":
        return best > -jnp.inf
    worst = jnp.min(state.finished.scores, axis=1)
    # A sum below 0 weighs least at the longest length if the penalty is positive, at the shortest otherwise.
    longest = jnp.where(jnp.asarray(settings.length_penalty) > 0, length, position)
    hoped_for = longest if settings.early_stopping == "never" else position
    better = best / _penalty(hoped_for, settings) > worst
    return better & (worst == -jnp.inf) if settings.early_stopping is True else better
