"""Configs of the published vision adapter: parameters to the unit, what is trained, and how devices share it."""

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from cli.config import load_config
from models import create_model
from train.distributed.sharding import shardings
from train.trainable import count_parameters, trained_params

AXES = ("data", "fsdp", "tensor")
LANGUAGE = {"11b": 8_030_261_248, "90b": 70_553_706_496}
WHOLE = {"11b": 10_670_220_835, "90b": 88_593_355_323}


def read(argument):
    return load_config([f"--config=configs/paper/vision_adapter.py:{argument}"])


@pytest.mark.parametrize("size", ["11b", pytest.param("90b", marks=pytest.mark.slow)])
def test_parameters_are_the_published_ones_and_split_over_the_slice(size):
    config = read(size)
    model = create_model(**config.models.vision_adapter)
    shapes = {"vision_adapter": jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs(1))["params"]}
    assert count_parameters(shapes) == WHOLE[size]
    held = WHOLE[size] - count_parameters(trained_params(shapes, config.trainable))
    assert held == LANGUAGE[size]
    sides = [int(side) for side in config.mesh.topology.split(":")[1].split("x")]
    devices = sides[0] * sides[1]
    sizes = (devices // config.mesh.fsdp, config.mesh.fsdp, 1)
    mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)
    placed = shardings(shapes, config.mesh.rules, mesh)
    parts = jax.tree.map(lambda leaf, to: jax.ShapeDtypeStruct(to.shard_shape(leaf.shape), leaf.dtype), shapes, placed)
    # All but norms, gates, biases and the positions of one tile.
    assert count_parameters(parts) - WHOLE[size] / config.mesh.fsdp < 3e6
    assert config.batch_size % (devices * config.mesh.microbatches) == 0


def test_the_second_stage_begins_with_the_first_and_talks_in_turns():
    first, second = configs = read("90b"), read("90b_answers")
    models = [config.models.vision_adapter.to_dict() for config in configs]
    assert [model.pop("text_end_id") for model in models] == [128_001, 128_009]
    assert [model.pop("text_stop_ids") for model in models] == [(128_001 + 7, 128_009), (128_001, 128_008)]
    assert models[0] == models[1] and (first.data.text_ends, second.data.text_ends) == (False, True)
    sources = [(config.initialize.language.source, config.initialize.vision_adapter.source) for config in configs]
    assert sources == [("pretrained/llama31_70b", ""), ("", "runs/vision_adapter_90b")]
    assert (first.data.dialogues, second.data.dialogues) == ("captions", "tabs")
    assert (second.data.image_size, second.data.max_tiles) == (560, 4)
