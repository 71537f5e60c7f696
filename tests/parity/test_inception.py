"""Inception-v3 of the Frechet distance computes what torch-fidelity's and pytorch-fid's networks compute.

No weights are downloaded: both packages are given a state dict of random values, through files that they load.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cleanfid.resize import make_resizer
from pytorch_fid import inception as pytorch_fid_inception
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

import models
from evaluation.features.extractors import InceptionExtractor, resize_clean
from models.inception import resize_tf1
from weights.files.tensors import read_tensors
from weights.formats.inception import from_torch, to_torch

TOLERANCE = 1e-4  # of features of size one: float32 sums in another order, through 94 convolutions


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A state dict in the published layout, as a file that PyTorch saved; activations keep a size near one."""
    model = models.create_model("inception")
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs(1))
    rng = np.random.default_rng(0)

    def leaf(path, leaf):
        if leaf.ndim > 1:
            return rng.normal(0, np.sqrt(2 / np.prod(leaf.shape[:-1])), leaf.shape).astype(np.float32)
        lowest, highest = (0.5, 1.5) if path[-1].key in ("scale", "var") else (-0.3, 0.3)
        return rng.uniform(lowest, highest, leaf.shape).astype(np.float32)

    state = to_torch(jax.tree_util.tree_map_with_path(leaf, shapes))
    path = tmp_path_factory.mktemp("weights") / "pt_inception-2015-12-05-random.pth"
    torch.save({name: torch.from_numpy(array) for name, array in state.items()}, path)
    return path


@pytest.fixture(scope="module")
def fidelity(published):
    features = ["2048", "logits_unbiased", "logits"]
    return FeatureExtractorInceptionV3("inception", features, feature_extractor_weights_path=str(published))


@pytest.fixture(scope="module")
def ours(published):
    model = models.create_model("inception")
    return model, from_torch(model, read_tensors(published))


def pictures(count: int, height: int, width: int) -> np.ndarray:
    """Noise over gradients, so that pictures differ on every scale."""
    rng = np.random.default_rng(height)
    ramp = np.linspace(0, 1, height)[:, None, None] * rng.uniform(0, 200, (count, 1, 1, 3))
    return np.clip(ramp + rng.uniform(0, 60, (count, height, width, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", [(32, 32), (299, 299), (320, 400)])
def test_torch_fidelity(size, ours, fidelity):
    """Features and both kinds of logits, of pictures that the network enlarges, leaves alone and shrinks."""
    model, variables = ours
    images = pictures(2, *size)
    outputs = jax.jit(model.apply)(variables, jnp.asarray(images, jnp.float32))
    expected = fidelity(torch.from_numpy(images).permute(0, 3, 1, 2))
    assert expected[0].abs().max() > 0.1
    for name, theirs in zip(("features", "logits_unbiased", "logits"), expected, strict=True):
        np.testing.assert_allclose(outputs[name], theirs.numpy(), atol=TOLERANCE * float(theirs.abs().max()))


def test_pytorch_fid(ours, published, monkeypatch):
    """Its network maps 0..1 to [-1, 1], where the graph has (x - 128) / 128: the same pictures are given to both."""
    state = torch.load(published, weights_only=True)
    monkeypatch.setattr(pytorch_fid_inception, "load_state_dict_from_url", lambda *_, **__: state)
    theirs = pytorch_fid_inception.InceptionV3([3], resize_input=False, normalize_input=False).eval()
    model, variables = ours
    images = pictures(2, 299, 299)
    features = jax.jit(model.apply)(variables, jnp.asarray(images, jnp.float32))["features"]
    with torch.no_grad():
        expected = theirs((torch.from_numpy(images).permute(0, 3, 1, 2).float() - 128) / 128)[0][:, :, 0, 0]
    np.testing.assert_allclose(features, expected.numpy(), atol=TOLERANCE * float(expected.abs().max()))


@pytest.mark.parametrize("resize", ["clean", "tf1"])
def test_the_extractor_that_evaluation_uses(resize, published, fidelity):
    images = pictures(3, 64, 48)
    features, logits = InceptionExtractor.load(str(published), resize).features_and_logits(images)
    if resize == "clean":
        resizer = make_resizer("PIL", False, "bicubic", (299, 299))
        resized = torch.from_numpy(np.stack([resizer(image) for image in images])).permute(0, 3, 1, 2)
        expected = through_layers(fidelity, (resized - 128) / 128)
    else:
        expected, unbiased, _ = fidelity(torch.from_numpy(images).permute(0, 3, 1, 2))
        np.testing.assert_allclose(logits, unbiased.numpy(), atol=TOLERANCE * float(unbiased.abs().max()))
    np.testing.assert_allclose(features, expected.numpy(), atol=TOLERANCE * float(expected.abs().max()))


def through_layers(network, x):
    """The layers alone, as clean-fid runs them on pictures that it has resized itself."""
    pools = {"Conv2d_2b_3x3": network.MaxPool_1, "Conv2d_4a_3x3": network.MaxPool_2}
    for name, layer in network.named_children():
        if name.startswith(("Conv2d", "Mixed")):
            x = pools.get(name, lambda x: x)(layer(x))
    return x.mean(dim=(2, 3))


def test_conversion_goes_both_ways(ours, published, fidelity):
    back = to_torch(ours[1])
    state = {name: tensor.numpy() for name, tensor in torch.load(published, weights_only=True).items()}
    assert back.keys() == state.keys() == fidelity.state_dict().keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(back[name], tensor)


@pytest.mark.parametrize("size", [(32, 32), (64, 100), (299, 299), (600, 450)])
def test_clean_resize_is_clean_fid_s(size):
    """To the last bit: both are Pillow's bicubic filter on float32 channels, clipped."""
    images = pictures(2, *size)
    resizer = make_resizer("PIL", False, "bicubic", (299, 299))
    np.testing.assert_array_equal(resize_clean(images, 299), np.stack([resizer(image) for image in images]))


@pytest.mark.parametrize("size", [(32, 32), (64, 100), (299, 299), (598, 450)])
def test_tf1_resize_is_torch_fidelity_s(size):
    images = pictures(2, *size).astype(np.float32)
    theirs = interpolate_bilinear_2d_like_tensorflow1x(
        torch.from_numpy(images).permute(0, 3, 1, 2), size=(299, 299), align_corners=False
    )
    np.testing.assert_allclose(resize_tf1(jnp.asarray(images), 299), theirs.permute(0, 2, 3, 1).numpy(), atol=1e-4)
