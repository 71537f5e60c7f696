"""Beam search and greedy decoding against `generate` of transformers, on the scores of a tiny GPT-2."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from sample.decoding import Decoding, beam_search, decode

VOCAB, LENGTH, STOP, PAD = 5, 5, 3, 1  # transformers takes a pad id of 0 for none, and fills with the stop token


@functools.cache
def gpt2():
    """A network that prefers no token by much, so that beams change places."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "n_positions": LENGTH + 1, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**sizes, initializer_range=0.4, bos_token_id=None, eos_token_id=STOP, pad_token_id=PAD)
    return GPT2LMHeadModel(config).eval()


@functools.cache
def start():
    """(step, logits, cache): after each prompt of one token, the network's scores by history."""
    histories = [h for n in range(LENGTH) for h in itertools.product(range(VOCAB), repeat=n)]
    scores = []
    with torch.no_grad():
        for length in range(LENGTH):
            read = torch.tensor([[prompt, *h] for prompt in range(VOCAB) for h in histories if len(h) == length])
            scores.append(gpt2()(input_ids=read).logits[:, -1].reshape(VOCAB, -1, VOCAB).numpy())
    table = jnp.asarray(np.concatenate(scores, axis=1))

    def step(token, position, cache):
        history = cache["history"] * VOCAB + token + 1
        return table[cache["prompt"], history], {"prompt": cache["prompt"], "history": history}

    prompts = jnp.arange(VOCAB)
    return step, table[:, 0], {"prompt": prompts, "history": jnp.zeros_like(prompts)}


def generate(**settings):
    """What transformers makes after each prompt: (tokens [rows LENGTH], output)."""
    config = GenerationConfig(
        max_new_tokens=LENGTH, do_sample=False, eos_token_id=STOP, pad_token_id=PAD,
        return_dict_in_generate=True, output_scores=True, **settings,
    )  # fmt: skip
    prompts = torch.arange(VOCAB)[:, None]
    out = gpt2().generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=config)
    tokens = out.sequences[:, 1:].numpy()
    return np.pad(tokens, ((0, 0), (0, LENGTH - tokens.shape[1])), constant_values=PAD), out


@pytest.mark.parametrize("beams", [2, 3, 5])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -0.5])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_beam_search_is_that_of_transformers(beams, length_penalty, early_stopping):
    settings = {"length_penalty": length_penalty, "early_stopping": early_stopping}
    tokens, out = generate(num_beams=beams, num_return_sequences=beams, **settings)
    search = jax.jit(functools.partial(beam_search, start()[0]), static_argnums=2)
    found = search(*start()[1:], LENGTH, Decoding(beams=beams, stop_tokens=(STOP,), pad_token=PAD, **settings))
    np.testing.assert_allclose(found.scores.reshape(-1), out.sequences_scores.numpy(), rtol=1e-4)
    np.testing.assert_array_equal(found.tokens.reshape(-1, LENGTH), tokens)


def test_greedy_decoding_is_that_of_transformers():
    tokens, _ = generate()
    keys = jax.random.split(jax.random.key(0), VOCAB)
    settings = Decoding(temperature=0.0, stop_tokens=(STOP,), pad_token=PAD)
    np.testing.assert_array_equal(decode(*start(), keys, LENGTH, settings).tokens, tokens)
