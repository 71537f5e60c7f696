"""The loss of captioners: which tokens count, and what a frozen GPT-2 keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cli.config import load_config
from cli.errors import UserError
from configs.scenes import captioner
from models import create_model
from train.objectives import create_objective
from train.objectives.captioner import caption_targets
from train.trainable import trained_params
from weights.sources import load_frozen

START, END = 351, 352


def batch_of(rows):
    image = np.random.default_rng(0).integers(0, 255, (len(rows), 32, 32, 3), np.uint8)
    text = np.zeros((len(rows), 24), np.int32)
    for place, row in enumerate(rows):
        text[place, : len(row)] = row
    return {"image": jnp.asarray(image), "text": jnp.asarray(text), "index": jnp.arange(len(rows))}


def test_the_end_counts_and_neither_the_start_nor_pads_do():
    text = jnp.asarray([[START, 5, 6, END, 0, 0], [START, 7, END, END, 0, 0], [START, 1, 2, 3, 4, 5]])
    targets, counted = caption_targets(text, END)
    np.testing.assert_array_equal(targets, text[:, 1:])
    np.testing.assert_array_equal(counted, [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])


@pytest.mark.parametrize("argument", ["debug", "debug_mlp"])
def test_the_loss_is_the_cross_entropy_of_the_tokens_behind_the_prefix(argument):
    config = captioner.get_config(argument)
    objective, frozen = create_objective(config), load_frozen(config)
    batch = batch_of([[START, 5, 6, END], [START, 7, END]])

    @jax.jit
    def compute(frozen, batch):
        params, variables = objective.init(jax.random.key(0), batch)
        loss, aux = objective.loss(params, variables, frozen, batch, jax.random.key(1), jnp.array(0), True)
        features = objective.sampler.features(frozen, batch)
        means = []
        for row, tokens in enumerate(([5, 6, END], [7, END])):
            logits = objective.model.apply(
                {"params": params["captioner"]}, jnp.asarray([tokens[:-1]]), features[row : row + 1]
            )
            chosen = jax.nn.log_softmax(logits[0])[jnp.arange(len(tokens)), jnp.asarray(tokens)]
            means.append(-jnp.mean(chosen))
        return loss, aux.metrics["nats"][1], jnp.stack(means)

    loss, counted, means = compute(frozen, batch)
    assert float(loss) == pytest.approx(float(means.mean()), rel=1e-5)
    assert counted == 5


def test_what_follows_the_end_of_a_caption_changes_nothing():
    config = captioner.get_config("debug")
    objective, frozen = create_objective(config), load_frozen(config)
    one, other = batch_of([[START, 5, END]]), batch_of([[START, 5, END, 9, 9, 9]])
    features = jax.jit(objective.sampler.features)
    np.testing.assert_array_equal(features(frozen, one), features(frozen, other))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("models.captioner.feature_width=31", "the captioner's prefix_length and feature_width are 24, 31"),
        ("models.captioner.text_vocab_size=400", "set config.models.captioner.text_vocab_size and text_end_id"),
        ("sample.caption_length=60", "the captioner has 64 positions, 24 of them for the prefix"),
        ("sample.beams=-1", "beams=-1 is impossible"),
        ("data.text_ends=False", "captions are framed"),
    ],
)
def test_what_does_not_go_together_is_one_line(override, said):
    config = load_config(["--config=configs/scenes/captioner.py:debug", f"--config.{override}"])
    with pytest.raises(UserError, match=said):
        create_objective(config)


def test_gpt2_is_held_by_its_path_and_starts_from_a_network_of_its_own():
    config = captioner.get_config("debug_mlp")
    objective = create_objective(config)
    params = jax.eval_shape(lambda: objective.init(jax.random.key(0), {})[0])
    trained = trained_params(params, (r"^captioner/(?!language/)",))["captioner"]
    assert set(trained) == {"mapper_up", "mapper_down"}
    within = create_model(**objective.model.network_at("language"))
    alone = jax.eval_shape(within.init, jax.random.key(0), *within.example_inputs(1))["params"]
    assert jax.tree.map(lambda leaf: leaf.shape, alone) == jax.tree.map(
        lambda leaf: leaf.shape, params["captioner"]["language"]
    )
