"""Image tokenizers of public DALL-Es compute what theirs do: VQGANs of three layouts, and dalle_pytorch's own VAE.

taming-transformers, minDALL-E and vqgan-jax are not on PyPI: diffusers' network computes in their place, by their names
(`taming.py`). dalle-pytorch is installed, and its classes around the networks are run as they are.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import VQModel
from flax.serialization import msgpack_serialize
from flax.traverse_util import unflatten_dict
from torch import nn

import models
from sample.trained import TrainedSampler
from scripts.convert import main as convert
from weights.formats import dalle_mini
from weights.formats.taming import from_flax
from weights.run import Run

from .dalle_pytorch_imports import stand_ins
from .taming import SMALL, TamingVQGAN
from .test_dalle import MinDallE
from .test_first_stages import from_torch, pictures, randomized, to_torch

CODES, TEXT = 20, 6


@pytest.fixture(scope="module")
def theirs():
    """The package; what it imports for features that no test uses is a name here."""
    with stand_ins():
        import dalle_pytorch

        yield dalle_pytorch


def vqgan(gumbel=False):
    network = TamingVQGAN(randomized(VQModel(**SMALL, num_vq_embeddings=CODES)), gumbel)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in network.quantize.parameters():
            tensor.normal_(generator=generator)
    return network.eval()


def compare(trained, tokens, drawn, count=None):
    """Tokens of pictures, and pictures of tokens, with those of a reference; and how many parameters there are."""
    stage, frozen = trained.sampler.image_tokens, trained.frozen
    side = stage.picture_shape[0]
    images = pictures(2, side, side)
    ours = jax.jit(lambda x: stage.encode(frozen, x))(images)
    expected = tokens(to_torch(images)).reshape(ours.shape).numpy()
    np.testing.assert_array_equal(ours, expected)
    assert len(np.unique(expected)) > 5
    decoded = from_torch(drawn(torch.from_numpy(expected.reshape(2, -1)))).astype(np.float32)
    np.testing.assert_allclose(jax.jit(lambda x: stage.decode(frozen, x))(ours), decoded, atol=1e-4)
    assert decoded.std() > 0.1
    if count is not None:
        assert sum(leaf.size for leaf in jax.tree.leaves(frozen["dvae"]["params"])) == count


def test_mindall_e_draws_with_its_vqgan(tmp_path):
    network = vqgan()
    torch.manual_seed(0)
    transformer = MinDallE(13, CODES, TEXT, 64, width=64, layers=1, heads=1, quick=False)
    (tmp_path / "theirs").mkdir()
    torch.save({"state_dict": transformer.state_dict()}, tmp_path / "theirs" / "stage2_last.ckpt")
    torch.save({"state_dict": network.tensors()}, tmp_path / "theirs" / "stage1_last.ckpt")
    convert([f"--input={tmp_path}/theirs", f"--output={tmp_path}/one"])
    stage1 = f"embed_dim: 4, n_embed: {CODES}, hparams: {{z_channels: 4, resolution: 16, ch: 32, ch_mult: [1, 2]"
    stage1 += ", num_res_blocks: 1, attn_resolutions: [8]}"
    hparams = "embed_dim: 64, n_layers: 1, n_heads: 1, n_dense_layers: 1, ctx_len_img: 64, ctx_len_txt: 6"
    stage2 = f"vocab_size_txt: 13, vocab_size_img: {CODES}, hparams: {{{hparams}}}"
    (tmp_path / "theirs" / "config.yaml").write_text(f"stage1: {{{stage1}}}\nstage2: {{{stage2}}}\n")
    convert([f"--input={tmp_path}/theirs", f"--output={tmp_path}/two"])
    told = [Run.open(tmp_path / name).config.frozen.dvae.to_dict() for name in ("one", "two")]
    assert told[0] == told[1]

    def drawn(tokens):
        codes = network.quantize.embedding(tokens).reshape(2, 8, 8, 4).permute(0, 3, 1, 2)
        return torch.clamp(network.decode(codes), -1, 1)

    trained = TrainedSampler.open(tmp_path / "two", chunk=1)
    with torch.no_grad():
        count = sum(tensor.numel() for tensor in network.tensors().values())
        compare(trained, lambda x: network.encode(x)[2][2], drawn, count)
    made = trained.sampler(
        trained.weights.params,
        *({}, trained.frozen, trained.sampler.request(np.ones((1, TEXT), np.int32), temperature=0)),
        jax.random.split(jax.random.key(0), 1),
    )
    assert made["image"].shape == (1, 16, 16, 3)


@pytest.mark.parametrize("kind", ["vqgan", "gumbel", "own", "own with blocks"])
def test_image_tokenizers_of_dalle_pytorch(theirs, kind, tmp_path):
    arguments, own = None, kind.startswith("own")
    normalization = ((0.4, 0.5, 0.6, 0), (0.5, 0.25, 0.5, 1))
    if own:
        arguments = {"image_size": 16, "num_layers": 1, "num_tokens": CODES, "codebook_dim": 6, "hidden_dim": 8}
        arguments |= {"num_resnet_blocks": 2 if kind.endswith("blocks") else 0}
        if kind.endswith("blocks"):
            arguments["normalization"] = normalization
        torch.manual_seed(0)
        vae = theirs.DiscreteVAE(**arguments).eval()
        with torch.no_grad():
            for tensor in vae.parameters():
                tensor.mul_(2.0)
    else:
        vae = nn.Module.__new__(theirs.VQGanVAE)
        nn.Module.__init__(vae)
        vae.model, vae.is_gumbel = vqgan(kind == "gumbel"), kind == "gumbel"
        vae.image_size, vae.num_layers, vae.num_tokens, vae.channels = 16, 1, CODES, 3
    hparams = {"num_text_tokens": 13, "text_seq_len": TEXT, "dim": 16, "depth": 1, "heads": 1, "dim_head": 8}
    hparams |= {"shift_tokens": False, "rotary_emb": False}
    network = theirs.DALLE(vae=vae, **hparams)
    weights = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("vae.")}
    tensors = vae.state_dict() if own else {f"model.{name}": tensor for name, tensor in vae.model.tensors().items()}
    weights |= {f"vae.{name}": tensor for name, tensor in tensors.items()}
    torch.save({"hparams": hparams, "vae_params": arguments, "weights": weights}, tmp_path / "dalle.pt")
    convert([f"--input={tmp_path}/dalle.pt", f"--output={tmp_path}/ours"])
    trained = TrainedSampler.open(tmp_path / "ours", chunk=1)

    def drawn(tokens):
        images = vae.decode(tokens)
        if own and kind.endswith("blocks"):  # it draws pixels as it reads them
            mean, std = (torch.tensor(row[:3]).reshape(1, 3, 1, 1) for row in normalization)
            images = 2 * (images * std + mean) - 1
        return images.clamp(-1, 1) if own else 2 * images - 1

    with torch.no_grad():
        count = sum(tensor.numel() for tensor in tensors.values())
        compare(trained, lambda x: vae.get_codebook_indices((x + 1) / 2), drawn, count)


def test_dalle_mini_s_vqgan(tmp_path):
    network = vqgan()
    flat = {}
    for name, tensor in network.tensors().items():
        *modules, leaf = name.split(".")
        path = []
        for part in modules:
            numbered = part.isdigit()
            path[-1:] = [f"{path[-1]}_{part}"] if numbered else [*path[-1:], part]
        array = tensor.numpy()
        if leaf == "weight":
            leaf = "kernel" if array.ndim == 4 else "embedding" if array.ndim == 2 else "scale"
        flat[(*path, leaf)] = np.ascontiguousarray(array.transpose(2, 3, 1, 0)) if array.ndim == 4 else array
    assert ("encoder", "down_1", "block_0", "norm1", "scale") in flat and (
        "decoder",
        "mid",
        "attn_1",
        "q",
        "bias",
    ) in flat
    tree = unflatten_dict(flat)
    for name, array in from_flax(tree).items():
        np.testing.assert_array_equal(array, network.tensors()[name])
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "flax_model.msgpack").write_bytes(msgpack_serialize(tree))
    (folder / "config.json").write_text(
        f'{{"n_embed": {CODES}, "embed_dim": 4, "z_channels": 4, "resolution": 16, "ch": 32, "ch_mult": [1, 2], '
        '"num_res_blocks": 1, "attn_resolutions": [8], "give_pre_end": false, "architectures": ["VQModel"]}'
    )
    convert([f"--input={folder}", f"--output={tmp_path}/ours"])
    run = Run.open(tmp_path / "ours")
    model, params = models.create_model(**run.config.models.autoencoder), run.load().params["autoencoder"]
    images = pictures(2, 16, 16)
    with torch.no_grad():
        expected = network.encode(to_torch(images))[2][2].reshape(2, 8, 8).numpy()
        decoded = from_torch(network.decode(network.quantize.embedding(torch.from_numpy(expected)).permute(0, 3, 1, 2)))
    tokens = jax.jit(lambda x: model.apply({"params": params}, x, method="tokenize"))(images)
    np.testing.assert_array_equal(tokens, expected)
    drawn = jax.jit(lambda x: model.apply({"params": params}, x, method="decode_tokens"))(jnp.asarray(tokens))
    np.testing.assert_allclose(drawn, decoded, atol=1e-4)


def test_the_published_vqgan_has_as_many_parameters():
    with torch.device("meta"):
        sizes = {"block_out_channels": (128, 128, 256, 256, 512), "layers_per_block": 2, "latent_channels": 256}
        sizes |= {"down_block_types": ("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",)}
        sizes |= {"up_block_types": ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 4}
        network = VQModel(**sizes, num_vq_embeddings=16384)
    model = models.create_model(**dalle_mini.config_fields({"n_embed": 16384}))
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs(1))["params"]
    counts = [
        sum(leaf.size for leaf in jax.tree.leaves(shapes)),
        sum(tensor.numel() for tensor in network.parameters()),
    ]
    assert counts == [76_073_859, 76_073_859]
