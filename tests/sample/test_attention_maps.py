"""Which pixels read which token: the weights are those that attention uses, and asking for them changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cli.errors import UserError
from data.tokenizer import Tokenizer
from diffusion.process import Process
from diffusion.schedule import DiscreteSchedule
from diffusion.solver_choice import make_plan
from models import create_model
from models.conditioning import Conditioning
from models.layers.attention import KeyLengths
from models.layers.self_attention import SelfAttention
from models.layers.spatial_transformer import ContextAttention
from sample.__main__ import main
from sample.attention_maps import caption_maps
from sample.conditions import Order, make_conditions
from sample.sheets.attention import draw_attention, read_tokens
from sample.sheets.grid import to_uint8
from sample.trained import TrainedSampler

from ..models.random_parameters import random_parameters

NETWORKS = {
    "unet": {
        **{"name": "unet", "image_size": 8, "in_channels": 3, "width": 8, "multipliers": (1, 2), "blocks": 1},
        **{"attention_levels": (0,), "attention": "transformer", "heads": 2, "context_width": 6, "groups": 4},
    },
    "dit": {
        **{"name": "dit", "image_size": 8, "patch_size": 2, "width": 8, "depth": 2, "heads": 2, "context_width": 6},
    },
    "uvit": {
        **{"name": "uvit", "image_size": 8, "patch_size": 2, "width": 8, "depth": 2, "heads": 2},
        **{"context_length": 5, "context_width": 6},
    },
}
RNG = np.random.default_rng(0)
TOKENS = RNG.normal(size=(2, 5, 6)).astype(np.float32)
X = RNG.normal(size=(3, 2, 8, 8, 3)).astype(np.float32)  # states of three steps


def softmax(scores):
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return shares / shares.sum(axis=-1, keepdims=True)


def test_weights_are_those_that_a_hand_computes():
    x, context = (jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in ((2, 4, 6), (2, 3, 5)))
    layer = ContextAttention(heads=2)
    params = layer.init(jax.random.key(0), x, context)
    assert set(params) == {"params"}
    output, kept = layer.apply(params, x, context, mutable=["intermediates"])
    np.testing.assert_array_equal(output, layer.apply(params, x, context))
    query, key = params["params"]["query"]["kernel"], params["params"]["key_value"]["kernel"][:, 0]
    heads = []
    for head in range(2):
        scores = (x @ query[:, head]) @ (context @ key[:, head]).transpose(0, 2, 1) / np.sqrt(3)
        heads.append(softmax(scores))
    np.testing.assert_allclose(kept["intermediates"]["weights"][0], np.mean(heads, axis=0), atol=1e-5)

    hidden = jnp.array([[True, True, False], [True, False, False]])
    for mask in (hidden, KeyLengths(jnp.array([2, 1]))):
        _, kept = layer.apply(params, x, context, mask, mutable=["intermediates"])
        weights = np.asarray(kept["intermediates"]["weights"][0])
        assert np.all(weights[0, :, 2] == 0) and np.all(weights[1, :, 0] == 1)


def test_a_network_that_is_not_asked_does_none_of_it():
    layer = SelfAttention(width=4, heads=2, head_dim=2)
    x = jnp.asarray(RNG.normal(size=(1, 3, 4)), jnp.float32)
    params = layer.init(jax.random.key(0), x)
    plain = str(jax.make_jaxpr(layer.apply)(params, x))
    asked = str(jax.make_jaxpr(lambda p, y: layer.apply(p, y, mutable=["intermediates"]))(params, x))
    assert plain.count("exp") == 1 and asked.count("exp") == 2
    other = str(jax.make_jaxpr(lambda p, y: layer.apply(p, y, mutable=["batch_stats"])[0])(params, x))
    assert other.count("exp") == 1


@pytest.mark.parametrize("name", NETWORKS)
def test_maps_are_averages_over_layers_and_steps(name):
    """Against the loop over layers and steps, written out; they sum to 1 over tokens."""
    model = create_model(**NETWORKS[name])
    params = random_parameters(model, seed=3)
    told = Conditioning(tokens=jnp.asarray(TOKENS))
    process = Process(DiscreteSchedule("linear", 1000, 1e-4, 2e-2))
    plan = make_plan(process.schedule, "ddim", 3)
    maps = np.asarray(jax.jit(lambda p, x: caption_maps(model, process, p, told, plan, x))(params, X))
    assert maps.shape == (2, 8, 8, 5)
    np.testing.assert_allclose(maps.sum(axis=-1), 1, atol=1e-5)

    watch = jax.jit(lambda p, x, t: model.apply({"params": p}, x, t, told, mutable=["intermediates"])[1])
    expected = np.zeros_like(maps)
    for x_t, t in zip(X, plan.t, strict=True):
        time = process.network_time(jnp.full(2, t))
        kept = watch(params, x_t, time)
        layers = []
        for path, weights in jax.tree_util.tree_leaves_with_path(kept["intermediates"]):
            names = jax.tree_util.keystr(path, simple=True, separator="/")
            if name == "uvit":
                share = weights[:, 6:, 1:6]  # patches read [time, 5 tokens, 16 patches]
                share = share / share.sum(axis=-1, keepdims=True)
            elif "context_attention" in names:
                share = weights
            else:
                continue
            side = int(share.shape[1] ** 0.5)
            layers.append(jax.image.resize(share.reshape(2, side, side, 5), (2, 8, 8, 5), "linear"))
        assert len(layers) == {"unet": 4, "dit": 2, "uvit": 3}[name]
        expected += np.mean(layers, axis=0) / len(X)
    np.testing.assert_allclose(maps, expected, atol=1e-5)
    assert maps.std() > 1e-4  # not the same everywhere

    # How layers are compiled and recomputed changes nothing.
    if name != "unet":
        packed = model.clone(scan=True, remat="full")
        again = jax.jit(lambda p, x: caption_maps(packed, process, p, told, plan, x))(params, X)
        np.testing.assert_allclose(again, maps, atol=1e-6)


def test_tokens_are_called_what_they_say():
    tokenizer = Tokenizer.train(["a small red circle", "a large blue star"], 300)
    ids = tokenizer.encode("a red star", 6).ids
    tokens = read_tokens(tokenizer, ids, 6)
    assert [token.text for token in tokens if token.word] == ["a", "red", "star"]
    assert tokens[-1].text == "padding" and tokens[-1].places == (3, 4, 5)
    assert not any(token.text == "padding" for token in read_tokens(tokenizer, ids[:3], 3))


def test_pictures_are_drawn_with_their_maps(diffusion_run, tmp_path, capsys, monkeypatch):
    folder = diffusion_run("captions")
    told = [f"--run={folder}", "--steps=2", "--num=1", f"--out={tmp_path}/grid.png"]
    maps = f"--attention_maps={tmp_path}/maps.png"
    main([*told, "--prompt=a small red circle", "--prompt=a star", maps, f"--files={tmp_path}/files"])
    assert "attention to each token" in capsys.readouterr().out
    with Image.open(tmp_path / "maps.png") as sheet:
        assert sheet.width > 5 * 128 and sheet.height > 2 * 128
    # The pictures are those that are drawn without maps.
    trained = TrainedSampler.open(folder, chunk=8)
    rows = trained.encode(["a small red circle", "a star"])
    plain = to_uint8(trained(rows, seed=0, indices=[0, 0], steps=2)["image"])
    for number, file in enumerate(sorted((tmp_path / "files").glob("*.png"))):
        with Image.open(file) as picture:
            np.testing.assert_array_equal(np.asarray(picture), plain[number])

    # No more of them at once than the run's memory is for.
    chunks = []

    def draw_nothing(self, *_, **__):
        chunks.append(self.chunk)
        raise UserError("seen enough")

    monkeypatch.setattr(TrainedSampler, "__call__", draw_nothing)
    with pytest.raises(UserError, match="seen enough"):
        draw_attention(dataclasses.replace(trained, chunk=1), Order(make_conditions(["a star"])), num=1)
    assert chunks == [1]
    monkeypatch.undo()

    for arguments, message in (
        ([*told, maps], "takes captions; give --prompt"),
        ([f"--run={diffusion_run('nothing')}", f"--out={tmp_path}/grid.png", maps], "denoiser that reads"),
        ([*told, "--prompt=a star", maps, "--sweep=seed=1,2"], "leave out --sweep, --rerank"),
        ([*told, "--prompt=a star", "--attention_maps=maps.txt"], "no kind of picture"),
        ([*told, "--prompt=a star", maps, "--round_trip=0"], "leave out --sweep, --rerank"),
        ([*told, "--prompt=a star", f"--attention_maps={tmp_path}/grid.png"], "give each a file of its own"),
    ):
        with pytest.raises(UserError, match=message):
            main(arguments)
