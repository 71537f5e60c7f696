"""Extractors by name: what their identity tells apart, and that a picture is measured alone."""

import dataclasses

import jax
import numpy as np
import pytest

import evaluation.features.extractors as feature_extractors
import models
from cli.errors import UserError
from evaluation.features.extractors import InceptionExtractor, create_extractor, hash_tree, resize_clean
from weights.files.tensors import write_tensors
from weights.formats.inception import to_torch


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Files of two tiny networks' weights."""
    model = models.create_model("inception", width_divisor=16, image_size=75)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs(1))
    files = []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        path = tmp_path_factory.mktemp("weights") / "inception.safetensors"
        write_tensors(path, to_torch(jax.tree.map(lambda leaf, rng=rng: rng.uniform(0, 0.2, leaf.shape), shapes)))
        files.append(str(path))
    return files


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """The network at a sixteenth of its width, on pictures of 75 x 75."""
    create = feature_extractors.create_model
    monkeypatch.setattr(feature_extractors, "create_model", lambda name: create(name, width_divisor=16, image_size=75))


def test_identity_names_kind_resize_and_weights(weights):
    identities = [
        create_extractor(f"inception:{weights[0]}").identity,
        create_extractor(f"inception:{weights[0]}", "tf1").identity,
        create_extractor(f"inception:{weights[1]}", "clean").identity,
    ]
    assert len(set(identities)) == 3
    assert identities[0] == create_extractor(f"inception:{weights[0]}", "clean").identity
    assert identities[0].startswith("inception/clean/") and identities[1].startswith("inception/tf1/")


def load(file, resize) -> InceptionExtractor:
    """One compiled program for each resize: all tests give pictures of one size."""
    return dataclasses.replace(InceptionExtractor.load(file, resize), chunk=4)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (5, 20, 30, 3), np.uint8)


@pytest.mark.parametrize("resize", InceptionExtractor.RESIZES)
def test_a_picture_s_features_do_not_depend_on_its_company(resize, weights, images):
    extractor = load(weights[0], resize)
    features, logits = extractor.features_and_logits(images)
    assert features.shape == (5, 128) and logits.shape == (5, 1008) and features.dtype == np.float32
    assert features.std(axis=0).max() > 0
    np.testing.assert_array_equal(extractor.features(images[4:]), features[4:])
    np.testing.assert_array_equal(extractor.features(images[1:3]), features[1:3])


def test_the_two_resizes_differ(weights, images):
    clean, tf1 = (load(weights[0], resize).features(images) for resize in InceptionExtractor.RESIZES)
    assert abs(clean - tf1).max() > 1e-3 * abs(clean).max()


def test_random_weights_are_labelled_and_always_the_same(images):
    first, second = (InceptionExtractor.load("random", "tf1") for _ in range(2))
    assert first.identity == second.identity and first.identity.startswith("inception-random/tf1/")
    features = dataclasses.replace(first, chunk=4).features(images)
    assert 1e-2 < features.std() < 1e2


def test_clean_resize_smooths_clips_and_keeps_what_fits():
    images = np.random.default_rng(0).integers(0, 256, (1, 60, 60, 3), np.uint8)
    np.testing.assert_array_equal(resize_clean(images, 60), images)
    small = resize_clean(images, 6)
    assert small.shape == (1, 6, 6, 3) and small.std() < 0.25 * images.std()  # averages of noise
    edge = np.zeros((1, 8, 8, 3), np.uint8)
    edge[:, :, 4:] = 255
    large = resize_clean(edge, 40)
    assert large.min() == 0 and large.max() == 255  # the filter overshoots beside an edge


def test_a_hash_sees_values_paths_and_dtypes():
    tree = {"a": np.ones(3, np.float32), "b": np.zeros(2, np.float32)}
    others = [
        {"a": np.ones(3, np.float32), "b": np.array([0, 1e-30], np.float32)},
        {"a": np.ones(3, np.float32), "c": np.zeros(2, np.float32)},
        {"a": np.ones(3, np.float32), "b": np.zeros(2, np.int32)},
        {"a": np.ones((3, 1), np.float32), "b": np.zeros(2, np.float32)},
    ]
    assert len({hash_tree(each) for each in (tree, *others)}) == 5
    assert hash_tree(dict(reversed(tree.items()))) == hash_tree(tree)


def test_mistakes(weights, tmp_path):
    for spec in ("inceptoin:file", "inception", "inception:", ""):
        with pytest.raises(UserError, match="NAME:FILE, NAME clip, inception"):
            create_extractor(spec)
    with pytest.raises(UserError, match="--resize=bilinear is unknown to inception; choose clean or tf1"):
        create_extractor(f"inception:{weights[0]}", "bilinear")
    with pytest.raises(UserError, match="no file of weights"):
        create_extractor(f"inception:{tmp_path}/none.pth")
    write_tensors(tmp_path / "other.safetensors", {"w": np.zeros(2, np.float32)})
    with pytest.raises(UserError, match="not the weights of the Inception network"):
        create_extractor(f"inception:{tmp_path}/other.safetensors")
