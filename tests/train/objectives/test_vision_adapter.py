"""The objectives of the language model and of the adapter: what is counted, what is trained, and how both begin."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from cli.config import load_config
from cli.errors import EXIT_OK, UserError
from data.dialogues import encode_dialogue
from data.scenes.questions import Dialogue
from data.tokenizer import Tokenizer
from sample.trained import TrainedSampler
from train.loop import train
from train.objectives import create_objective
from train.trainable import trained_params
from weights.run import Run

ROOT = Path(__file__).resolve().parents[3]
KEY = jax.random.key(0)


def config_of(name, *overrides):
    return load_config([f"--config={ROOT}/configs/scenes/{name}:debug", *overrides])


@pytest.fixture(scope="module")
def adapter():
    """The objective of the debug variant, its parameters, and two pictures with questions and answers."""
    objective = create_objective(config_of("vision_adapter.py"))
    params, _ = jax.jit(objective.init)(KEY, {})
    tokenizer = Tokenizer.train(["which color is the circle? it is red"], 300).with_ends()
    vocabulary = objective.model.text_vocab_size
    rows, masks = [], []
    for answer in ("red", "a red circle"):
        row, mask, _ = encode_dialogue(tokenizer, Dialogue("which color is it?", answer), 30)
        masks.append(mask)
        # The ends of this small vocabulary are those of the run's.
        ends = {tokenizer.start_id: vocabulary - 2, tokenizer.end_id: objective.sampler.end_id}
        rows.append([ends.get(int(token), int(token)) for token in row])
    image = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    batch = {"text": jnp.asarray(rows, jnp.int32), "image": jnp.asarray(image), "index": jnp.arange(2)}
    batch["text_mask"] = jnp.asarray(masks)
    return objective, params, batch


def loss_of(objective, params, batch):
    return jax.jit(lambda params, batch: objective.loss(params, {}, {}, batch, KEY, jnp.int32(0), True))(params, batch)


def test_the_loss_is_of_the_answers_tokens_alone(adapter):
    objective, params, batch = adapter
    loss, aux = loss_of(objective, params, batch)
    text, end = np.array(batch["text"]), objective.sampler.end_id
    model = objective.model
    tokens = np.concatenate([np.full((2, 1), model.image_token), text], axis=1)
    tiles = jnp.asarray(batch["image"] / 127.5 - 1, jnp.float32)[:, None, None]
    canvas = jnp.ones((2, 1), jnp.int32)
    logits = jax.jit(model.apply)({"params": params["vision_adapter"]}, jnp.asarray(tokens), tiles, canvas)
    logs = np.asarray(jax.nn.log_softmax(logits))
    means = []
    for row, token_logs in zip(text, logs, strict=True):
        first, last = np.flatnonzero(row == end)
        means.append(np.mean([-token_logs[place, row[place]] for place in range(first + 1, last + 1)]))
    np.testing.assert_allclose(loss, np.mean(means), rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["nats"][1], sum(np.diff(np.flatnonzero(row == end))[0] for row in text))


def test_the_first_loss_is_the_language_model_s_and_its_parameters_are_not_trained(adapter):
    objective, params, batch = adapter
    # The picture's token is one more, which the language model reads: give it the embedding of a word.
    tree = dict(params["vision_adapter"])
    table = tree["language"]["embedding"]["embedding"]
    tree["extra_embedding"] = {"embedding": table[5:6]}
    text = np.concatenate([np.full((2, 1), 5), np.array(batch["text"])], axis=1)
    language = objective.model.network_at("language")
    language.pop("name")
    from models.llama import Llama

    expected = jax.jit(Llama(**language).apply)({"params": tree["language"]}, jnp.asarray(text, jnp.int32))
    tokens = jnp.asarray(text).at[:, 0].set(objective.model.image_token)
    tiles = jnp.asarray(batch["image"] / 127.5 - 1, jnp.float32)[:, None, None]
    logits = jax.jit(objective.model.apply)({"params": tree}, tokens, tiles, jnp.ones((2, 1), jnp.int32))
    np.testing.assert_array_equal(logits, expected)

    trained = trained_params(params, config_of("vision_adapter.py").trainable)["vision_adapter"]
    assert set(trained) == set(params["vision_adapter"]) - {"language"}


@pytest.mark.slow
def test_a_language_model_is_read_stays_as_it_is_and_answers(debug_run, scenes_dir, tmp_path):
    source = debug_run("scenes/llama.py")
    data = f"--config.data.data_dir={scenes_dir}"
    config = config_of("vision_adapter.py", data, f"--config.initialize.language.source={source}")
    assert train(config, tmp_path / "run") == EXIT_OK
    before = Run.open(source).load(ema=False).params["llama"]
    after = Run.open(tmp_path / "run").load(ema=False).params["vision_adapter"]
    jax.tree.map(np.testing.assert_array_equal, before, after["language"])
    gates = [leaf for path, leaf in flatten_dict(after).items() if path[-1] == "attention_gate"]
    assert all(np.abs(gate).max() > 0 for gate in gates)
    trained = TrainedSampler.open(tmp_path / "run", chunk=2)
    rows = {**trained.encode(["how many shapes are there?"] * 2), "image": np.zeros((2, 32, 32, 3), np.uint8)}
    assert len(trained.decode(trained(rows, seed=0, indices=range(2))["text"])) == 2
    wrong = config_of("vision_adapter.py", data, f"--config.initialize.language.source={source}")
    with wrong.unlocked():
        wrong.models.vision_adapter.mlp_hidden = 40
    with pytest.raises(UserError, match="mlp_hidden: 48, not 40"):
        train(wrong, tmp_path / "other")


def test_pictures_that_are_no_square_of_tiles_are_refused():
    with pytest.raises(UserError, match="is no square of tiles of 32 pixels; the network takes 32"):
        create_objective(config_of("vision_adapter.py", "--config.data.image_size=64"))
