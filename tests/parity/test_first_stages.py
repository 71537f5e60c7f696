"""First stages of diffusers, LPIPS of the lpips package and a discriminator in torch compute what ours compute.

No weights are downloaded but the linear layers that the lpips package brings along: the rest is random.
"""

import importlib.resources
import json
import warnings

import jax
import jax.numpy as jnp
import lpips
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, VQModel

import models
from models.autoencoder import posterior
from scripts.convert import main as convert
from train.objectives.autoencoder import AutoencoderObjective, kl_to_standard_normal
from train.objectives.contract import example_keys
from weights.files.tensors import write_tensors
from weights.formats.compvis import discriminator_from_compvis
from weights.formats.diffusers_autoencoder import (
    autoencoder_fields,
    autoencoder_from_diffusers,
    autoencoder_to_diffusers,
)
from weights.run import Run

from .taming import taming_names

SMALL = {
    **{"block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1, "sample_size": 16},
    **{"down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), "latent_channels": 4},
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
}
VARIANTS = {"kl": (AutoencoderKL, SMALL), "vq": (VQModel, {**SMALL, "num_vq_embeddings": 20, "scaling_factor": 1.0})}
STABLE_DIFFUSION = {
    **{"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4, "sample_size": 512},
    **{"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4},
}


def randomized(network, seed=1):
    """A network with random values everywhere, features kept at scale."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if name == "quantize.embedding.weight":
                tensor.copy_(noise)
            elif tensor.ndim > 1:
                tensor.copy_(noise / np.prod(tensor.shape[1:]) ** 0.5)
            else:
                tensor.copy_(0.1 * noise + (name.endswith("weight")))
    return network.eval()


def numpy_of(network):
    return {name: tensor.detach().numpy() for name, tensor in network.state_dict().items()}


def pictures(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (*shape, 3)).astype(np.float32)


def to_torch(images):
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).contiguous()


def from_torch(images):
    return images.detach().permute(0, 2, 3, 1).numpy()


def assert_close(ours, theirs, atol=1e-4):
    difference = float(np.abs(np.asarray(ours) - theirs).max())
    print(f"largest difference {difference:.1e} of values up to {np.abs(theirs).max():.1f}")
    assert difference < atol and theirs.std() > 0.1


def compare(network, model, params, images):
    """Moments or vectors, and what is decoded of them."""
    tree = {"params": params}
    ours = jax.jit(lambda x: model.apply(tree, x, method="encode"))(images)
    with torch.no_grad():
        if isinstance(network, AutoencoderKL):
            distribution = network.encode(to_torch(images)).latent_dist
            theirs = torch.cat([distribution.mean, distribution.logvar], dim=1)
            decoded = network.decode(distribution.mean).sample
            mean, log_variance = posterior(ours)
            ours, z = jnp.concatenate([mean, log_variance], axis=-1), from_torch(distribution.mean)
        else:
            theirs = network.encode(to_torch(images)).latents
            decoded = network.decode(theirs).sample
            tokens = network.quantize(theirs)[2][2].reshape(theirs.shape[0], *theirs.shape[2:]).numpy()
            np.testing.assert_array_equal(model.apply(tree, jnp.asarray(from_torch(theirs)), method="quantize"), tokens)
            assert len(np.unique(tokens)) > 3
            z = model.apply(tree, jnp.asarray(tokens, jnp.int32), method="lookup")
    assert_close(ours, from_torch(theirs))
    assert_close(jax.jit(lambda z: model.apply(tree, z, method="decode"))(z), from_torch(decoded))


@pytest.mark.parametrize("variant", VARIANTS)
def test_small_first_stages_through_the_command_and_back(variant, tmp_path):
    kind, config = VARIANTS[variant]
    network = randomized(kind(**config))
    network.save_pretrained(tmp_path / "theirs")
    convert([f"--input={tmp_path}/theirs", f"--output={tmp_path}/ours"])
    run = Run.open(tmp_path / "ours")
    params, model = run.load().params["autoencoder"], models.create_model(**run.config.models.autoencoder)
    assert model.latent_scale == network.config.scaling_factor
    for size in ((16, 16), (19, 23)):
        compare(network, model, params, pictures(2, *size))

    convert(["--to=diffusers", f"--run={tmp_path}/ours", f"--output={tmp_path}/back"])
    back, report = kind.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report.values()), report
    said = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "back")]
    assert {key: said[0][key] for key in said[1] if not key.startswith("_")} == {
        key: value for key, value in said[1].items() if not key.startswith("_")
    }
    for name, tensor in network.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_stable_diffusion_s_first_stage_and_an_odd_picture():
    """Both in the shapes of the published one, with the old names of its attention."""
    network = randomized(AutoencoderKL(**STABLE_DIFFUSION))
    assert sum(tensor.numel() for tensor in network.parameters()) == 83_653_863
    model = models.create_model(**autoencoder_fields({**network.config, "_class_name": "AutoencoderKL"}))
    tensors = numpy_of(network)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in tensors.items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        renamed[name] = tensor
    assert len(renamed) == 248 and "encoder.mid_block.attentions.0.proj_attn.weight" in renamed
    params = autoencoder_from_diffusers(model, renamed)
    compare(network, model, params, pictures(1, 65, 71))
    back = autoencoder_to_diffusers(model, params)
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[name], tensor) for name, tensor in tensors.items())


@pytest.fixture(scope="module")
def published_lpips():
    """The package's network with its own linear layers on a random VGG-16."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's, of an argument that the package still gives
        network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in network.net.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(noise * (2 / np.prod(tensor.shape[1:])) ** 0.5 if name.endswith("weight") else 0.1 * noise)
    return network.eval()


@pytest.mark.parametrize("files", ["two", "whole"])
def test_lpips(files, published_lpips, tmp_path):
    tensors = numpy_of(published_lpips)
    if files == "whole":
        torch.save(published_lpips.state_dict(), tmp_path / "lpips.pth")
        arguments = [f"--input={tmp_path}/lpips.pth"]
    else:
        vgg = {f"features.{n.split('.', 2)[2]}": t for n, t in tensors.items() if n.startswith("net.slice")}
        torch.save({name: torch.from_numpy(tensor) for name, tensor in vgg.items()}, tmp_path / "vgg16-397923af.pth")
        lins = importlib.resources.files(lpips) / "weights" / "v0.1" / "vgg.pth"
        arguments = [f"--input={tmp_path}/vgg16-397923af.pth", f"--lins={lins}"]
    convert([*arguments, f"--output={tmp_path}/ours"])
    run = Run.open(tmp_path / "ours")
    model, params = models.create_model(**run.config.models.lpips), run.load().params["lpips"]
    sums = [float(np.sum(params[f"lin_{stage}"]["kernel"])) for stage in range(1, 6)]
    assert sums == pytest.approx([6.92599, 8.85833, 17.51501, 51.52132, 47.03485], abs=1e-4)

    one, other = jnp.asarray(pictures(2, 40, 36)), jnp.asarray(pictures(2, 40, 36, seed=1))

    def distances(y):
        found = model.apply({"params": params}, one, y)
        return jnp.sum(found), found

    (_, ours), gradient = jax.jit(jax.value_and_grad(distances, has_aux=True))(other)
    y = to_torch(other).requires_grad_()
    theirs = published_lpips(to_torch(one), y)
    assert theirs.shape == (2, 1, 1, 1)
    theirs.sum().backward()
    np.testing.assert_allclose(ours, theirs.detach().numpy().ravel(), rtol=1e-4)
    expected = from_torch(y.grad)
    np.testing.assert_allclose(gradient, expected, atol=1e-4 * np.abs(expected).max())


def torch_discriminator(layers, width, seed=2):
    """The published discriminator, by its description, with random values."""
    modules = [torch.nn.Conv2d(3, width, 4, 2, 1), torch.nn.LeakyReLU(0.2)]
    widths = [width * min(2**i, 8) for i in range(layers + 1)]
    for i in range(1, layers + 1):
        stride = 2 if i < layers else 1
        modules += [
            torch.nn.Conv2d(widths[i - 1], widths[i], 4, stride, 1, bias=False),
            *(torch.nn.BatchNorm2d(widths[i]), torch.nn.LeakyReLU(0.2)),
        ]
    network = torch.nn.Module()
    network.main = torch.nn.Sequential(*modules, torch.nn.Conv2d(widths[-1], 1, 4, 1, 1))
    network.forward = network.main.forward
    return randomized(network, seed)


def of_unbiased_variances(stats, counts):
    """Running variances that PyTorch moved once from 1, as if the biased ones had moved them."""
    moved = {
        name: {"mean": leaf["mean"], "var": 0.9 + (leaf["var"] - 0.9) * (counts[name] - 1) / counts[name]}
        for name, leaf in stats["batch_stats"].items()
    }
    return {"batch_stats": moved}


@pytest.mark.parametrize(("layers", "side"), [(3, 6), (2, 14)])
def test_discriminator(layers, side):
    network = torch_discriminator(layers, 8)
    model = models.create_model("discriminator", layers=layers, width=8)
    params, variables = discriminator_from_compvis(model, numpy_of(network))
    images = pictures(2, 64, 64)
    still = jax.jit(model.apply)({"params": params, **variables}, images)
    assert still.shape == (2, side, side, 1)
    with torch.no_grad():
        assert_close(still, from_torch(network(to_torch(images))))
        trained = from_torch(network.train()(to_torch(images)))
    run = jax.jit(lambda tree, x: model.apply(tree, x, train=True, mutable=["batch_stats"]))
    logits, moved = run({"params": params, **variables}, images)
    assert_close(logits, trained)
    _, theirs = discriminator_from_compvis(model, numpy_of(network))
    sides = [64 // 2 ** (i + 1) for i in range(layers)]
    counts = {f"norm_{i}": 2 * (sides[i] if i < layers else sides[-1] - 1) ** 2 for i in range(1, layers + 1)}
    expected = of_unbiased_variances(theirs, counts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), dict(moved), expected)


TERMS = ("nll", "kl", "codebook", "generator", "discriminator", "logits_real", "logits_fake", "adaptive_weight")


@pytest.mark.parametrize("variant", ["kl", "kl with LPIPS", "vq", "vq, corrected"])
def test_a_step_of_both_sides(variant, published_lpips):
    """Each term, the adaptive weight, and the gradient of every parameter, of the published lines in torch."""
    kind, config = VARIANTS[variant[:2]]
    network, judge = randomized(kind(**config)), torch_discriminator(1, 8).train()
    model = models.create_model(**autoencoder_fields({**network.config, "_class_name": kind.__name__}))
    params = {"autoencoder": autoencoder_from_diffusers(model, numpy_of(network))}
    discriminator = models.create_model("discriminator", layers=1, width=8)
    params["discriminator"], stats = discriminator_from_compvis(discriminator, numpy_of(judge))
    quantized, perceptual = kind is VQModel, variant.endswith("LPIPS")
    distance, frozen = None, {}
    if perceptual:
        from weights.formats.lpips import lpips_fields, lpips_from_torch

        tensors = numpy_of(published_lpips)
        distance = models.create_model(**lpips_fields(tensors))
        frozen["lpips"] = {"params": lpips_from_torch(distance, tensors), "variables": {}}
    objective = AutoencoderObjective(
        *(model, discriminator, distance),
        reduction="mean" if quantized else "sum",
        output_variance=not quantized,
        perceptual_weight=0.8 if perceptual else 0.0,
        kl_weight=1e-3,
        codebook_weight=0.9,
        legacy_commitment=variant != "vq, corrected",
        discriminator_weight=0.75,
        discriminator_start=3,
    )
    if not quantized:
        params["output"] = {"log_variance": jnp.asarray(-0.4)}
    image = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    batch = {"image": jnp.asarray(image), "index": jnp.arange(2)}
    key, variables = jax.random.key(4), {"discriminator": stats}

    def loss(params, step):
        return objective.loss(params, variables, frozen, batch, key, step, True)

    (total, aux), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, jnp.asarray(3))
    ours = {name: float(value / count) for name, (value, count) in aux.metrics.items()}

    x = to_torch(image.astype(np.float32) / 127.5 - 1)
    s = torch.tensor(0.0 if quantized else -0.4, requires_grad=True)
    theirs = {}
    if quantized:
        h = network.encode(x).latents
        codes = network.quantize.embedding.weight
        nearest = ((h.permute(0, 2, 3, 1)[..., None, :] - codes) ** 2).sum(-1).argmin(-1)
        z_q = codes[nearest].permute(0, 3, 1, 2)
        to_outputs, to_codes = (0.25, 1.0) if variant == "vq, corrected" else (1.0, 0.25)
        q = to_outputs * ((z_q.detach() - h) ** 2).mean() + to_codes * ((z_q - h.detach()) ** 2).mean()
        if variant == "vq":
            assert q.item() == pytest.approx(network.quantize(h)[1].item(), rel=1e-5)  # the library's own
        theirs["codebook"] = q
        z, bottleneck = h + (z_q - h).detach(), 0.9 * q
        outputs = network.decode(z, force_not_quantize=True).sample
    else:
        distribution = network.encode(x).latent_dist
        noise = jax.vmap(lambda key: jax.random.normal(key, (8, 8, 4)))(example_keys(key, batch))
        outputs = network.decode(distribution.mean + distribution.std * to_torch(noise)).sample
        theirs["kl"] = distribution.kl().sum() / 2
        bottleneck = 1e-3 * theirs["kl"]
    errors = (x - outputs).abs()
    if perceptual:
        errors = errors + 0.8 * published_lpips(x, outputs)
    nll = errors.mean() if quantized else (errors / torch.exp(s) + s).sum() / 2
    g = -judge(outputs).mean()
    last = network.decoder.conv_out.weight
    norms = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (nll, g)]
    weight = torch.clamp(norms[0] / (norms[1] + 1e-4), 0, 1e4).detach() * 0.75
    real, fake = judge(x), judge(outputs.detach())
    hinge = 0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())
    theirs |= {"nll": nll, "generator": g, "discriminator": hinge, "adaptive_weight": weight}
    theirs |= {"logits_real": real.mean(), "logits_fake": fake.mean()}
    for name in TERMS:
        if name in theirs:
            assert ours[name] == pytest.approx(theirs[name].item(), rel=1e-4, abs=1e-5), name
    assert [ours["nll_gradient_norm"], ours["generator_gradient_norm"]] == pytest.approx(
        [norm.item() for norm in norms], rel=1e-4
    )
    side = nll + bottleneck + weight * g
    assert float(total) == pytest.approx((side + hinge).item(), rel=1e-4)

    names, tensors = zip(*network.named_parameters(), strict=True)
    *own, to_s = torch.autograd.grad(side, (*tensors, s), retain_graph=True, allow_unused=quantized)
    expected = autoencoder_from_diffusers(model, {n: grad.numpy() for n, grad in zip(names, own, strict=True)})

    def check(a, b):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()) + 1e-6)

    jax.tree.map(check, gradients["autoencoder"], expected)
    names, tensors = zip(*judge.named_parameters(), strict=True)
    grads = {n: grad.numpy() for n, grad in zip(names, torch.autograd.grad(hinge, tensors), strict=True)}
    grads |= {n: t.numpy() for n, t in judge.named_buffers()}  # which it wants to see
    expected, _ = discriminator_from_compvis(discriminator, grads)
    jax.tree.map(check, gradients["discriminator"], expected)
    # The published loop has three passes, each of which moves them; here each side's move is half of one.
    halves = []
    for pictures in (x, outputs.detach()):
        fresh = torch_discriminator(1, 8).train()
        fresh(pictures)
        _, moved = discriminator_from_compvis(discriminator, numpy_of(fresh))
        halves.append(of_unbiased_variances(moved, {"norm_1": 2 * 7**2}))
    jax.tree.map(
        lambda a, one, other: np.testing.assert_allclose(a, (one + other) / 2, rtol=1e-4, atol=1e-5),
        *(aux.variables["discriminator"], *halves),
    )
    if not quantized:
        assert float(gradients["output"]["log_variance"]) == pytest.approx(float(to_s), rel=1e-4)


def test_kl_is_the_library_s():
    moments = np.random.default_rng(0).normal(size=(2, 4, 4, 8)).astype(np.float32) * 12
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    theirs = DiagonalGaussianDistribution(to_torch(moments)).kl().numpy()
    np.testing.assert_allclose(kl_to_standard_normal(*posterior(jnp.asarray(moments))), theirs, rtol=1e-4)


def test_a_checkpoint_of_compvis(tmp_path):
    """Names as in the table of two implementations: what diffusers computes with its own is computed with theirs."""
    network = randomized(AutoencoderKL(**{**SMALL, "block_out_channels": (32, 64), "norm_num_groups": 32}))
    tensors = taming_names(numpy_of(network))
    tensors["loss.logvar"] = np.zeros((), np.float32)
    write_tensors(tmp_path / "model.safetensors", tensors)
    arguments = ["--source=compvis", f"--input={tmp_path}/model.safetensors", "--latent_scale=0.18215"]
    convert([*arguments, f"--output={tmp_path}/ours"])
    run = Run.open(tmp_path / "ours")
    model = models.create_model(**run.config.models.autoencoder)
    compare(network, model, run.load().params["autoencoder"], pictures(2, 16, 16))
