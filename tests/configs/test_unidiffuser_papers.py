"""Configs of UniDiffuser and captioners as published: parameters to the unit, stages, and what is known of training."""

import math

import jax
import jax.numpy as jnp
import pytest

from cli.config import load_config
from models import create_model
from train.objectives import create_objective
from train.optimizer import create_optimizer


def read(name):
    return load_config([f"--config=configs/paper/{name}"])


def layered(entry):
    """As `sizes`, of all together: layers are alike, and thirty take long to trace: two and four are."""
    two, four = (sum(sizes({**entry, "depth": depth}).values()) for depth in (2, 4))
    return two + (entry["depth"] - 2) // 2 * (four - two)


def sizes(entry):
    model = create_model(**entry)
    params = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs(1))["params"]
    return {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in params.items()}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("v0_256", 952_504_912 - (1024 - 256) * 1536),
        ("v0_512", 952_504_912),
        ("v0_aesthetics", 952_504_912),
        ("v1_512", 952_509_520),
        ("v1_aesthetics", 952_509_520),
    ],
)
def test_unidiffusers_have_the_published_parameters(name, parameters):
    assert layered(read(f"unidiffuser.py:{name}").models.unidiffuser) == parameters


@pytest.mark.parametrize(
    ("name", "whole", "language"),
    [
        ("text", 124_539_712, 124_440_576),
        pytest.param("clipcap", 124_439_808 + 31_468_800, 124_439_808, marks=pytest.mark.slow),
        pytest.param("clipcap_transformer", 178_027_776, 124_439_808, marks=pytest.mark.slow),
    ],
)
def test_captioners_have_the_published_parameters(name, whole, language):
    counted = sizes(read(f"captioner.py:{name}").models.captioner)
    assert (sum(counted.values()), counted["language"]) == (whole, language)


def test_stages_follow_one_another_and_fit_their_slices():
    for version, kinds in (("v0", 0), ("v1", 2)):
        stages = [read(f"unidiffuser.py:{version}_{stage}") for stage in ("256", "512", "aesthetics")]
        assert [(config.steps, config.batch_size) for config in stages] == [
            (250_000, 11_264),
            (200_000, 2112),
            (220_000, 2112),
        ]
        starts = [config.initialize.unidiffuser.source for config in stages]
        own = "runs/unidiffuser" + ("_v1" if kinds else "")
        assert starts == ["", f"{own}_256", f"{own}_512"]
        for config in stages:
            assert config.models.unidiffuser.data_types == kinds
            objective = create_objective(config)  # parts go together, settings are possible
            sampler, web = objective.sampler, 0 if kinds else -1
            assert (objective.data_type, sampler.data_type) == (web, web)
            assert float(sampler.process.network_time(jnp.float32(999))) == 1000
            devices = math.prod(map(int, config.mesh.topology.split(":")[1].split("x")))
            assert config.batch_size % (devices * config.mesh.microbatches) == 0 and devices % config.mesh.fsdp == 0
    optimizer = stages[0].optimizer
    assert (optimizer.b1, optimizer.b2, optimizer.weight_decay) == (0.9, 0.9, 0.03)
    _, schedule = create_optimizer(optimizer, {"unidiffuser": {"kernel": jnp.ones(3)}}, stages[0].steps)
    assert [float(schedule(step)) for step in (0, 2500, 5000, 249_999)] == pytest.approx([0, 1e-4, 2e-4, 2e-4])


def test_clipcap_with_a_transformer_leaves_gpt2_as_it_is():
    config = read("captioner.py:clipcap_transformer")
    assert tuple(config.trainable) == ("^captioner/(?!language/)",)
    assert config.initialize.language.at == "captioner/language"
    assert (config.data.split, config.data.validation_split) == ("train+restval", "val")
    for argument in ("text", "clipcap", "clipcap_transformer"):
        objective = create_objective(read(f"captioner.py:{argument}"))
        assert objective.sampler.writes_with == "caption_tokenizer.json"
