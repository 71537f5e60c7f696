"""dalle_pytorch (`pip install --no-deps dalle-pytorch==1.6.6`) and minDALL-E compute what ours does of their weights.

minDALL-E is not on PyPI: its transformer is written here from the published layout, in PyTorch, with its names.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import models
from cli.errors import UserError
from sample.trained import TrainedSampler
from scripts.convert import main as convert
from weights.files.origin import Leniency, open_origin
from weights.formats import dalle_pytorch as layout
from weights.formats import mindall_e
from weights.run import Run

from ..weights.clip_samples import assert_same_trees
from .dalle_pytorch_imports import stand_ins

TOLERANCE = 1e-4  # float32
TEXT, CODES = 6, 11


@pytest.fixture(scope="module")
def theirs():
    """The package; what it imports for features that no test uses is a name here."""
    with stand_ins():
        import dalle_pytorch

        yield dalle_pytorch


def randomize(network):
    """Values that no initializer would give, of a size that keeps activations near 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in network.parameters():
            tensor.normal_(std=0.3 if tensor.ndim > 1 else 0.5)
    return network.eval()


def inputs(text_ids, length, codes=CODES):
    rng = np.random.default_rng(0)
    text, image = rng.integers(1, text_ids, (2, TEXT)), rng.integers(0, codes, (2, length))
    text[0, 3:] = 0
    return text, image


def ours_of(model, params, text, image):
    logits = model.apply({"params": params}, jnp.asarray(text, jnp.int32), jnp.asarray(image, jnp.int32))
    return np.asarray(logits.text), np.asarray(logits.image)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attn_types": ("full", "axial_row", "axial_col", "conv_like"), "depth": 4},
        {"share_input_output_emb": True, "heads": 3, "shared_attn_ids": (0, 0), "shared_ff_ids": (0, 0)},
    ],
    ids=["full", "sparse", "shared"],
)
def test_dalle_pytorch_in_and_out_again(theirs, options, tmp_path):
    vae = theirs.DiscreteVAE(image_size=32, num_layers=2, num_tokens=CODES, codebook_dim=4, hidden_dim=4)
    hparams = {"num_text_tokens": 13, "text_seq_len": TEXT, "dim": 24, "depth": 2, "heads": 2, "dim_head": 8}
    hparams |= {"shift_tokens": False, "rotary_emb": False, "stable": False, "loss_img_weight": 7} | options
    network = randomize(theirs.DALLE(vae=vae, **hparams))
    text, image = inputs(13, 64)
    with torch.no_grad():
        logits = network(torch.from_numpy(text.copy()), torch.from_numpy(image)).numpy()

    checkpoint = {"hparams": hparams, "vae_params": {"image_size": 32}, "epoch": 3, "version": "1.6.6"}
    optimizer = torch.optim.Adam(network.parameters())
    checkpoint |= {"weights": network.state_dict(), "opt_state": optimizer.state_dict(), "scheduler_state": None}
    torch.save(checkpoint, tmp_path / "dalle.pt")
    convert([f"--input={tmp_path}/dalle.pt", f"--output={tmp_path}/ours"])
    run = Run.open(tmp_path / "ours")
    model, params = models.create_model(**run.models()["dalle"]), run.load().params["dalle"]
    ours = ours_of(model, params, text, image)
    np.testing.assert_allclose(ours[0], logits[:, :TEXT, : 13 + TEXT], atol=TOLERANCE)
    np.testing.assert_allclose(ours[1], logits[:, TEXT:, 13 + TEXT :], atol=TOLERANCE)

    convert(["--to=dalle_pytorch", f"--run={tmp_path}/ours", f"--output={tmp_path}/back"])
    tensors = layout.to_dalle_pytorch(model, params)
    back = layout.from_dalle_pytorch(model, tensors)
    for tree in (back, params):  # row 0 is never read: id 0 is a pad
        tree["text_embedding"]["embedding"] = tree["text_embedding"]["embedding"].at[0].set(0)
    assert_same_trees(back, params)
    if "share_input_output_emb" in options:
        return
    # What their factors of channels become is not counted: they are part of the projections here.
    count = sum(p.numel() for name, p in network.named_parameters() if "vae." not in name and "scale" not in name)
    start = 24  # row 0 of theirs is the start token's: ours has it apart
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count
    assert tensors["text_pos_emb.weight"].shape == (TEXT + 1, start)
    state = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected and all(name.startswith("vae.") for name in missing)
    with torch.no_grad():
        again = network(torch.from_numpy(text.copy()), torch.from_numpy(image)).numpy()
    np.testing.assert_allclose(again, logits, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"shift_tokens": True}, "shift_tokens"),
        ({"sandwich_norm": True}, "sandwich_norm"),
        ({"stable": True}, "stable"),
        ({"reversible": True}, "reversible"),
    ],
)
def test_what_ours_has_not_is_refused_by_its_name(theirs, options, name, tmp_path):
    """Also where an older version's file does not say that it has it, but its tensors do."""
    vae = theirs.DiscreteVAE(image_size=16, num_layers=2, num_tokens=CODES, codebook_dim=4, hidden_dim=4)
    hparams = {"num_text_tokens": 13, "text_seq_len": TEXT, "dim": 24, "depth": 2, "heads": 2, "dim_head": 8}
    hparams |= {"shift_tokens": False, "rotary_emb": False} | options
    weights = theirs.DALLE(vae=vae, **hparams).state_dict()
    for said in (hparams, {key: value for key, value in hparams.items() if key not in options}):
        torch.save({"hparams": said, "vae_params": {}, "weights": weights}, tmp_path / "dalle.pt")
        if said is not hparams and name == "stable":
            continue  # its tensors are those of a network without it
        with pytest.raises(UserError) as error:
            convert([f"--input={tmp_path}/dalle.pt", f"--output={tmp_path}/{name}"])
        assert "\n" not in str(error.value)
        assert name in str(error.value) or said is not hparams


def test_keys_of_a_checkpoint_are_let_pass_at_any_depth(tmp_path):
    hparams = {"dim": 1, "note": 2, "loss": {"note": 1, "weight": 7}}
    torch.save({"hparams": hparams, "vae_params": None, "weights": {"a": torch.ones(1)}}, tmp_path / "dalle.pt")
    origin = open_origin(f"{tmp_path}/dalle.pt", Leniency(frozenset({"note"})))
    assert layout._read_checkpoint(origin)[0]["hparams"] == {"dim": 1, "loss": {"weight": 7}}


def test_with_openai_s_tokenizer_a_checkpoint_draws_pictures(theirs, tmp_path):
    import dall_e

    torch.manual_seed(0)
    vae = nn.Module.__new__(theirs.OpenAIDiscreteVAE)
    nn.Module.__init__(vae)
    vae.enc = dall_e.Encoder(n_hid=8, n_blk_per_group=1, vocab_size=CODES)
    vae.dec = dall_e.Decoder(n_hid=8, n_blk_per_group=1, n_init=4, vocab_size=CODES)
    vae.image_size, vae.num_layers, vae.num_tokens = 256, 3, CODES
    hparams = {"num_text_tokens": 514, "text_seq_len": TEXT, "dim": 16, "depth": 1, "heads": 1, "dim_head": 8}
    hparams |= {"shift_tokens": False, "rotary_emb": False}
    network = randomize(theirs.DALLE(vae=vae, **hparams))
    torch.save({"hparams": hparams, "vae_params": None, "weights": network.state_dict()}, tmp_path / "dalle.pt")
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", "r e", "re d</w>", ""]))
    command = [f"--input={tmp_path}/dalle.pt", f"--output={tmp_path}/ours"]
    convert([*command, f"--tokenizer={tmp_path}/merges.txt"])
    trained = TrainedSampler.open(tmp_path / "ours", chunk=1)
    assert trained.tokenizer is not None
    text = trained.tokenizer.encode("red", TEXT).ids[None]
    assert text.tolist() == [[513, 0, 0, 0, 0, 0]]
    request = trained.sampler.request(text, temperature=0)
    keys = jax.random.split(jax.random.key(0), 1)
    weights = trained.weights
    drawn = trained.sampler(weights.params, weights.variables, trained.frozen, request, keys)
    tokens = torch.from_numpy(np.array(drawn["image_tokens"], np.int64).reshape(1, -1))
    with torch.no_grad():
        picture = vae.decode(tokens).permute(0, 2, 3, 1).numpy()
        logits = network(torch.from_numpy(np.array(text, np.int64)), tokens).numpy()[:, TEXT:, 514 + TEXT :]
    np.testing.assert_allclose((np.asarray(drawn["image"]) + 1) / 2, picture, atol=TOLERANCE)
    best = logits.max(-1) - np.take_along_axis(logits, tokens.numpy()[..., None], -1)[..., 0]
    assert best.max() < TOLERANCE  # every token is the most likely one in theirs


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        for name in ("key", "query", "value", "proj"):
            setattr(self, name, nn.Linear(width, width))
        self.heads = heads

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = (
            layer(x).view(batch, length, self.heads, -1).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(-1, -2) / math.sqrt(width // self.heads)
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = torch.softmax(scores.masked_fill(hidden, -math.inf), -1) @ v
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, width))


class Layer(nn.Module):
    def __init__(self, width, heads, activation):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), activation, nn.Linear(4 * width, width))

    def forward(self, x):
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class QuickGelu(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class MinDallE(nn.Module):
    """minDALL-E's transformer: caption and image tokens in a row, each with a position of its own, without a start."""

    def __init__(self, text_ids, codes, text, image, width, layers, heads, quick):
        super().__init__()
        self.tok_emb_txt, self.tok_emb_img = nn.Embedding(text_ids, width), nn.Embedding(codes, width)
        self.pos_emb_txt, self.pos_emb_img = nn.Embedding(text, width), nn.Embedding(image, width)
        activation = QuickGelu() if quick else nn.GELU()
        self.blocks = nn.Sequential(*(Layer(width, heads, activation) for _ in range(layers)))
        self.ln_f = nn.LayerNorm(width)
        self.head_img, self.head_txt = nn.Linear(width, codes, bias=False), nn.Linear(width, text_ids, bias=False)

    def forward(self, text, image):
        tokens = [self.tok_emb_txt(text) + self.pos_emb_txt.weight, self.tok_emb_img(image) + self.pos_emb_img.weight]
        x = self.ln_f(self.blocks(torch.cat(tokens, 1)))
        length = text.shape[1]
        return self.head_txt(x[:, : length - 1]), self.head_img(x[:, length - 1 : -1])


@pytest.mark.parametrize("quick", [False, True])
def test_mindall_e(quick, tmp_path):
    network = randomize(MinDallE(13, CODES, TEXT, 16, width=128, layers=3, heads=2, quick=quick))
    with torch.no_grad():
        for tensor in network.parameters():
            tensor.mul_(0.4)
    text, image = inputs(13, 16)
    with torch.no_grad():
        expected = [x.numpy() for x in network(torch.from_numpy(text), torch.from_numpy(image))]
    folder = tmp_path / "theirs"
    folder.mkdir()
    torch.save({"state_dict": network.state_dict(), "epoch": 1}, folder / "stage2_last.ckpt")
    if quick:  # otherwise shapes and what was published tell
        sizes = "embed_dim: 128, n_layers: 3, n_heads: 2, n_dense_layers: 3, ctx_len_img: 16, ctx_len_txt: 6"
        text_yaml = f"stage2:\n  vocab_size_txt: 13\n  vocab_size_img: {CODES}\n  hparams: {{{sizes}"
        (folder / "config.yaml").write_text(text_yaml + ", gelu_use_approx: true, embd_pdrop: 0.0}\nstage1: {}\n")
    convert([f"--input={folder}", f"--output={tmp_path}/ours"])
    run = Run.open(tmp_path / "ours")
    model, params = models.create_model(**run.models()["dalle"]), run.load().params["dalle"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(p.numel() for p in network.parameters())
    for ours, theirs in zip(ours_of(model, params, text, image), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)

    # Token by token, with the cache.
    logits, cache = model.apply({"params": params}, jnp.asarray(text, jnp.int32), method="prefill")
    for position in range(16):
        np.testing.assert_allclose(logits, expected[1][:, position], atol=TOLERANCE)
        if position < 15:
            token = jnp.asarray(image[:, position], jnp.int32)
            step = token, jnp.int32(position), cache
            logits, cache = model.apply({"params": params}, *step, method="decode_step")

    convert(["--to=mindall_e", f"--run={tmp_path}/ours", f"--output={tmp_path}/back"])
    back = {name: torch.from_numpy(array) for name, array in mindall_e.to_mindall_e(model, params).items()}
    network.load_state_dict(back)
    convert([f"--input={tmp_path}/back", f"--output={tmp_path}/again"])
    assert_same_trees(Run.open(tmp_path / "again").load().params["dalle"], params)
