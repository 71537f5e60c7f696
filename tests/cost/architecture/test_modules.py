"""What a description says of networks is what they have: parameters, FLOPs, order, roles."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from cli.config import load_config
from cost.architecture import roles
from cost.architecture.modules import Module, fold, natural, read_network, read_tree
from cost.architecture.roles import role_of_part
from cost.architecture.traced import trace_network
from cost.flops import matrix_flops
from models import MODELS, create_model
from scripts.describe import describe, format_description
from weights.run import model_of

ROOT = Path(__file__).resolve().parents[3]
CHOICES = ("image_tower", "mapper", "attention", "time", "resampler")  # fields that make other modules
CONFIGS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").glob("*/[a-z]*.py"))
PARAMETERS = {
    **{"paper/uvit.py": 44_255_328, "paper/first_stage.py": 83_653_863},
    **{"paper/dit.py": 674_834_720, "paper/stable_diffusion.py": 859_520_964},
}


def config_of(name):
    return load_config([f"--config={ROOT / 'configs' / name}"])


def network(name, part, kind="models"):
    config = config_of(name)
    return read_network(trace_network(model_of(config[kind][part]), config))


def assert_adds_up(module: Module):
    """A module has what those within it have, and products of its own at most."""
    for _, one in [(0, module), *module.walk(9)]:
        if one.children:
            assert one.parameters == sum(child.parameters * child.count for child in one.children), one.path
            assert one.flops >= sum(child.flops * child.count for child in one.children), one.path


@pytest.fixture(scope="module")
def described():
    """The kinds of networks of all configs, [(name of a config, network, its tree)], as small as in debug variants.

    Of networks of one kind, which differ in numbers alone, there is one.
    """
    networks = {}
    for name in CONFIGS:
        config = config_of(f"{name.removeprefix('configs/')}:debug")
        for part, entry in (*config.models.items(), *config.frozen.items()):
            model = model_of(entry)
            assert role_of_part(config.objective, part, model["name"])
            kind = model["name"], *(str(model.get(key)) for key in CHOICES), bool(model.get("context_width"))
            if kind not in networks:
                networks[kind] = (name, model["name"], read_network(trace_network(model, config)))
    return list(networks.values())


def test_networks_of_every_config_add_up_and_have_roles(described):
    assert len({name for name, *_ in described}) > 8
    for name, network, tree in described:
        assert tree.parameters > 0 and tree.flops > 0
        assert_adds_up(tree)
        assert_adds_up(fold(tree))
        placed = sum(child.flops for child in tree.children)
        # Distances to codes are the tokenizer's own.
        assert placed >= (0.7 if network in ("vqvae", "autoencoder_vq") else 0.99) * tree.flops, name
        assert not [child.path for child in tree.children if not child.role], name


def test_every_objective_says_what_its_parts_are_for():
    from train.objectives import OBJECTIVES

    assert set(roles._PARTS) == set(OBJECTIVES) and set(roles._NETWORKS) == set(MODELS)


@pytest.mark.parametrize(
    ("name", "kind", "part", "module", "products"),
    [
        ("paper/uvit.py", "models", "denoiser", "", 12.20e9),
        ("paper/first_stage.py", "models", "autoencoder", "encoder", 136.4e9),
        ("paper/first_stage.py", "models", "autoencoder", "decoder", 311.1e9),
        pytest.param("paper/dit.py", "models", "denoiser", "", 118.62e9, marks=pytest.mark.slow),
        pytest.param("paper/stable_diffusion.py", "models", "denoiser", "", 90.05e9, marks=pytest.mark.slow),
    ],
)
def test_published_networks_cost_what_the_authors_code_costs(name, kind, part, module, products, published):
    """Multiply-adds, measured by running the reference implementations (at 32 x 32 latents for Stable Diffusion)."""
    tree = published(name, kind, part)
    assert tree.parameters == PARAMETERS[name]
    found = {one.path: one for _, one in [(0, tree), *tree.walk(1)]}[module]
    assert found.flops / 2 == pytest.approx(products, rel=2e-3)


@pytest.fixture(scope="module")
def published():
    cache = {}

    def read(name, kind, part):
        key = name, kind, part
        if key not in cache:
            cache[key] = network(name, part, kind)
        return cache[key]

    return read


def test_equal_layers_are_one_line_and_numbers_count_as_numbers():
    config = config_of("scenes/dalle.py:debug")
    model = {**model_of(config.models.dalle), "depth": 12}
    tree = read_network(trace_network(model, config))
    names = [child.name for child in tree.children if child.name.startswith("blocks")]
    assert names == [f"blocks_{n}" for n in range(12)]
    folded = {child.title: child for child in fold(tree).children}
    assert folded["12 x blocks_0 ... blocks_11"].count == 12
    assert sum(child.parameters * child.count for child in folded.values()) == tree.parameters
    assert sorted(["up_10", "up_2", "up_1"], key=natural) == ["up_1", "up_2", "up_10"]


def test_layers_of_other_shapes_or_costs_are_not_folded():
    config = config_of("scenes/ddpm_unet.py")
    folded = fold(read_network(trace_network(model_of(config.models.denoiser), config)))
    titles = [child.title for child in folded.children]
    # The second half of a U: joined with what the way down left, each of other widths.
    assert not any("up_" in title and "down_" in title for title in titles)
    for child in folded.children:
        assert child.count == 1 or len({name.rpartition("_")[0] for name in child.copies}) == 1


def test_modules_come_in_the_order_in_which_data_pass_them(described):
    paths = next([one.path for one in m.children] for _, name, m in described if name == "unet")
    assert paths.index("input") < paths.index("down_0_residual_0") < paths.index("mid_residual_0")
    assert paths.index("mid_residual_0") < paths.index("up_0_residual_0") < paths.index("output")


def test_a_branch_that_is_called_through_its_parent_keeps_its_cost():
    """The adapter's layers stand between those of the language model, which it calls one by one."""
    config = config_of("scenes/vision_adapter.py:debug")
    tree = read_network(trace_network(model_of(config.models.vision_adapter), config))
    costs = {one.path: one.flops for _, one in tree.walk(2)}
    assert costs["language"] > costs["language/blocks_0"] > 0 and costs["cross_blocks_0"] > 0


def test_a_description_reads_as_its_networks(capsys):
    config = config_of("scenes/latent_uvit.py:debug")
    description = describe(config, depth=2)
    denoiser = description["trained"]["denoiser"]
    model = create_model(**model_of(config.models.denoiser))
    inputs = model.example_inputs(1)
    variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    assert denoiser["flops"] == matrix_flops(lambda v: model.apply(v, *map_zeros(inputs)), variables)
    text = format_description(description)
    for words in ("guidance enters here", "text encoder tau_theta", "first stage: E makes latents", "long skip"):
        assert words in text
    level = [entry for entry in denoiser["tree"] if entry["level"] == 1]
    assert sum(entry["parameters"] * entry["count"] for entry in level) == denoiser["parameters"]
    assert json.loads(json.dumps(description)) == description


def test_parameters_of_an_objective_itself_are_described_too():
    tree = read_tree("output", {"log_variance": jax.ShapeDtypeStruct((), jnp.float32)})
    assert tree.parameters == 1 and [child.path for child in tree.children] == ["log_variance"]


def map_zeros(inputs):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), inputs)
