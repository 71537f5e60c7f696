"""A run that was trained elsewhere: written, opened, and used as the source of initialized and of frozen parts."""

import copy
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from cli.config import flatten, from_json, load_config, to_json
from cli.errors import UserError
from configs.common import get_defaults
from data.tokenizer import Tokenizer
from train.state import create_state
from train.transfer import initialize_parts
from train.workdir import open_workdir
from weights.files.tensors import read_tensors, write_tensors
from weights.pretrained import write_pretrained
from weights.run import WEIGHTS, Run
from weights.sources import abstract_frozen, differing_fields, load_frozen, resolve_frozen

from .clip_samples import FIELDS, RESNET, assert_same_trees, tiny


def write(folder, fields=FIELDS, seed: int = 0, part: str = "clip", **more):
    _, params, variables = tiny(fields, seed)
    config = {"objective": "clip", "models": {part: fields}}
    trees = {part: params}, {part: variables} if variables else {}
    write_pretrained(folder, config, *trees, provenance={"format": "made up"}, **more)
    return params, variables


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pretrained") / "clip"
    write(path, RESNET)
    return path


def test_what_is_written_is_read(folder):
    _, params, variables = tiny(RESNET)
    opened = Run.open(folder)
    assert opened.config.models.clip.to_dict() == RESNET
    assert json.loads((folder / "provenance.json").read_text())["format"] == "made up" and len(opened.identity()) == 64
    weights = opened.load()
    assert_same_trees(weights.params["clip"], params)
    assert_same_trees(weights.variables["clip"], variables)
    assert not weights.ema and opened.tokenizer() is None


def test_the_same_weights_have_the_same_identity_and_others_have_not(folder, tmp_path):
    write(tmp_path / "again", RESNET)
    write(tmp_path / "other", RESNET, seed=1)
    identity = Run.open(folder).identity()
    assert Run.open(tmp_path / "again").identity() == identity != Run.open(tmp_path / "other").identity()


def test_keys_that_a_folder_lacks_have_their_defaults(folder):
    config = Run.open(folder).config
    assert config.data.validation_split == "validation" and config.data.dataset == "" and not config.frozen.keys()


def test_frozen_parts_lie_in_the_same_folder(tmp_path):
    """As a text encoder does beside the denoiser that reads with it."""
    parts = {"tower": tiny(RESNET), "clip": tiny(FIELDS)}
    config = {
        "objective": "clip",
        "models": {"tower": RESNET},
        "frozen": {"clip": {**FIELDS, "source": ".", "part": "clip"}},
    }
    trees = ({part: network[place] for part, network in parts.items()} for place in (1, 2))
    write_pretrained(tmp_path / "both", config, *trees, provenance={})
    run = Run.open(tmp_path / "both")
    assert run.load().params.keys() == {"tower"}  # what it trains
    resolve_frozen(run.config, near=run.folder)
    assert_same_trees(load_frozen(run.config)["clip"]["params"], parts["clip"][1])
    moved = (tmp_path / "both").rename(tmp_path / "moved")
    other = frozen_config(moved)  # another run may name it too
    resolve_frozen(other)
    assert_same_trees(load_frozen(other)["clip"]["params"], parts["clip"][1])
    assert_same_trees(initialize(moved, RESNET, part="tower").params["tower"], parts["tower"][1])


def test_nothing_trains_in_a_folder_of_converted_weights(folder):
    config = load_config(["--config=configs/scenes/clip.py:debug"])
    before = (folder / "config.json").read_bytes()
    with pytest.raises(UserError, match="trained elsewhere; choose another --workdir"):
        open_workdir(folder, config, resuming=False)
    assert (folder / "config.json").read_bytes() == before


def frozen_config(folder, **fields) -> ConfigDict:
    entry = {**FIELDS, "source": str(folder), "part": "clip", "step": 0, **fields}
    return ConfigDict({"frozen": {"clip": entry}}).lock()


def test_a_frozen_part_is_the_network_that_its_folder_describes(folder):
    config = frozen_config(folder, image_mlp_ratio=3)
    resolve_frozen(config)
    entry = config.frozen.clip
    assert entry.image_tower == "resnet" and entry.image_layers == (1, 2, 1, 1) and entry.activation == "gelu"
    assert "patch_size" not in entry  # of the network that the config described before
    assert (entry.step, entry.run) == (0, Run.open(folder).identity())
    config = from_json(to_json(config))  # as a run keeps it
    resolve_frozen(config)
    loaded, abstract = load_frozen(config), abstract_frozen(config)
    _, params, variables = tiny(RESNET)
    assert_same_trees(loaded["clip"], {"params": params, "variables": variables})
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), loaded)
    assert shapes == abstract


def test_how_a_frozen_part_computes_is_the_config_s_to_say(folder):
    config = frozen_config(folder, dtype="bfloat16", implementation="xla")
    resolve_frozen(config)
    assert config.frozen.clip.dtype == "bfloat16" and config.frozen.clip.implementation == "xla"


@pytest.mark.parametrize(
    ("overrides", "scale"),
    [
        ([], (0.25, 0.5)),  # the folder's
        (["latent_scale=0.3"], (0.0, 0.3)),
        (["latent_scale=0.3", "latent_shift=0.1"], (0.1, 0.3)),
    ],
)
def test_published_factors_of_a_first_stage_can_be_given(overrides, scale, tmp_path):
    write(tmp_path / "stage", {**STAGE, "latent_shift": 0.25, "latent_scale": 0.5}, part="autoencoder")
    options = [f"--config.frozen.first_stage.{each}" for each in (f"source={tmp_path}/stage", *overrides)]
    config = load_config(["--config=configs/scenes/latent_dit.py", *options])
    resolve_frozen(config)
    entry = config.frozen.first_stage
    assert (entry.latent_shift, entry.latent_scale) == scale
    if not overrides:
        config = load_config(["--config=configs/scenes/latent_dit.py", *options])
        config.frozen.first_stage.latent_shift = 0.1
        with pytest.raises(UserError, match="latent_shift is 0.1 without a latent_scale, .* set latent_scale too"):
            resolve_frozen(config)


STAGE = {"name": "autoencoder_kl", "image_size": 8, "width": 4, "multipliers": (1,), "blocks": 1, "groups": 2}


@pytest.mark.parametrize("theirs", [{"latent_scale": 0.5, "latent_shift": 0.1}, {}])  # as published, or as measured
def test_a_scale_of_latents_that_the_config_says_is_the_one_that_is_used(theirs, tmp_path, caplog):
    params, variables = write(tmp_path / "stage", {**STAGE, **theirs}, part="autoencoder")
    entry = {**STAGE, "source": str(tmp_path / "stage"), "part": "autoencoder", "step": 0}
    entries = ({**entry, "latent_scale": scale} for scale in (0.25, None))
    said, unsaid = (ConfigDict({"frozen": {"stage": each}}).lock() for each in entries)
    for config in (said, unsaid):
        resolve_frozen(config)
    (warning,) = caplog.messages
    assert "latent_scale is 0.25 as the config says, not " in warning
    assert said.frozen.stage.latent_scale == 0.25
    assert unsaid.frozen.stage.get("latent_scale") == theirs.get("latent_scale")
    assert said.frozen.stage.get("latent_shift") == theirs.get("latent_shift")
    again = from_json(to_json(said))  # as a run keeps it
    resolve_frozen(again)
    assert again.frozen.stage.latent_scale == 0.25 and len(caplog.messages) == 1
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for config, collections in ((said, {}), (unsaid, variables)):
        placed = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract_frozen(config)
        )
        assert_same_trees(load_frozen(config, 0, placed)["stage"], {"params": params, "variables": collections})


def test_a_frozen_part_is_placed_as_the_program_wants_it(folder):
    config = frozen_config(folder)
    resolve_frozen(config)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=sharding), abstract_frozen(config)
    )
    loaded = load_frozen(config, 0, placed)["clip"]
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(jnp.bfloat16)}
    assert_same_trees(loaded["params"]["text"], jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny(RESNET)[1]["text"]))


def test_a_folder_has_no_steps_and_only_its_parts(folder):
    config = frozen_config(folder, step=3)
    resolve_frozen(config)
    with pytest.raises(UserError, match="has no checkpoint 3; set `step` to 0"):
        load_frozen(config)
    with pytest.raises(UserError, match="has no part 'dvae'; it has clip"):
        resolve_frozen(frozen_config(folder, part="dvae"))


def initialize(folder, fields, part: str = "clip", trainable: tuple[str, ...] = (".*",)):
    """A new state of part `tower` that starts from `folder`."""
    defaults = {key: get_defaults()[key] for key in ("ema", "lora")}
    config = ConfigDict({"seed": 0, "models": {"tower": fields}, "trainable": trainable, **defaults})
    config.initialize = ConfigDict({"tower": {"source": str(folder), "part": part}})
    _, params, variables = tiny(fields, seed=5)
    state = create_state({"tower": params}, {"tower": variables} if variables else {}, {}, averaged={"tower": params})
    return initialize_parts(config, state, lambda params: {})


def test_training_starts_from_a_pretrained_folder(folder):
    # How a network computes may differ from the source: dtype of the computation, recomputation, the first temperature.
    state = initialize(folder, {**RESNET, "scan": True, "remat": "full", "logit_scale_init": 1.0, "dtype": "bfloat16"})
    _, params, variables = tiny(RESNET)
    assert_same_trees(state.params["tower"], params)
    assert_same_trees(state.ema_params["tower"], params)
    assert_same_trees(state.variables["tower"], variables)


def test_what_is_held_starts_from_the_folder_too_without_an_average(folder):
    state = initialize(folder, RESNET, trainable=("tower/text/",))
    _, params, _ = tiny(RESNET)
    assert_same_trees(state.params["tower"], params)
    assert_same_trees(state.ema_params, {"tower": {"text": params["text"]}})
    assert_same_trees(state.inference_params["tower"], params)


def test_a_part_that_starts_random_stays_as_it_is(folder):
    _, params, _ = tiny(FIELDS, seed=5)
    assert_same_trees(initialize("random", FIELDS).params["tower"], params)


def test_training_does_not_start_from_another_network(folder):
    other = {**RESNET, "activation": "quick_gelu", "text_end_id": 3, "image_heads": 8}
    with pytest.raises(UserError) as error:
        initialize(folder, other)
    assert "config.initialize.tower" in str(error.value) and "\n" not in str(error.value)
    for line in ("activation: 'gelu', not 'quick_gelu'", "text_end_id: 39, not 3", "image_heads: 4, not 8"):
        assert line in str(error.value)


def test_fields_that_are_left_out_are_what_the_network_takes_them_for():
    shorter = {key: value for key, value in FIELDS.items() if key not in ("image_heads", "text_heads")}
    assert differing_fields(FIELDS, shorter) == []  # 64 / 64 heads
    assert differing_fields(FIELDS, {**shorter, "image_width": 128}) == [
        "image_width: 64, not 128",
        "image_heads: 1, not 2",
    ]
    assert differing_fields({**FIELDS, "image_mean": [0.4, 0.5, 0.6]}, FIELDS) == []
    del shorter["activation"]
    assert differing_fields(FIELDS, shorter) == ["activation: 'gelu', not 'quick_gelu'"]
    assert differing_fields({"name": "dvae"}, FIELDS) == ["name: 'dvae', not 'clip'"]


def test_weights_of_another_config_and_damaged_ones_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    tensors = read_tensors(folder / WEIGHTS)
    name = "variables/clip/batch_stats/image/stem_1/norm/mean"
    write_tensors(tmp_path / "copy" / WEIGHTS, {key: array for key, array in tensors.items() if key != name})
    with pytest.raises(UserError, match=f"missing: {name}"):
        Run.open(tmp_path / "copy").load()
    (tmp_path / "copy" / WEIGHTS).unlink()
    with pytest.raises(UserError, match="no file of weights"):
        Run.open(tmp_path / "copy").load()


def test_a_folder_with_something_in_it_stays_as_it_is(folder, tmp_path):
    before = (folder / WEIGHTS).read_bytes()
    with pytest.raises(UserError, match="is not empty"):
        write(folder, seed=3)
    assert (folder / WEIGHTS).read_bytes() == before
    with pytest.raises(UserError, match="cannot write"):
        write("/proc/nowhere/clip")


def test_a_tokenizer_comes_along(tmp_path):
    tokenizer = Tokenizer.train(["a small red circle"] * 3, 270).with_ends()
    write(tmp_path / "clip", tokenizer=tokenizer)
    back = Run.open(tmp_path / "clip").tokenizer()
    assert back is not None and back.end_id == tokenizer.end_id
    assert back.encode("a red star", 12).ids.tolist() == tokenizer.encode("a red star", 12).ids.tolist()


def test_values_that_are_no_numbers_are_not_trained_on_unless_they_were_let_pass(folder, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    name = "params/clip/text/projection/kernel"
    tensors = {key: np.array(array) for key, array in read_tensors(copy / WEIGHTS).items()}
    tensors[name][1, 2] = np.nan
    write_tensors(copy / WEIGHTS, tensors)
    config = frozen_config(copy)
    resolve_frozen(config)
    for use in (lambda: load_frozen(config), lambda: initialize(copy, RESNET), lambda: Run.open(copy).load()):
        with pytest.raises(UserError, match=f"{WEIGHTS}: {name} has 1 of .* NaN or infinite"):
            use()
    provenance = json.loads((copy / "provenance.json").read_text())
    (copy / "provenance.json").write_text(json.dumps({**provenance, "allow_nonfinite": True}))
    assert initialize(copy, RESNET)
    assert f"warning: {copy / WEIGHTS}: {name}" in capsys.readouterr().out


@pytest.mark.parametrize("value", [None, "x", {"a": 1}, True, [None]])
def test_a_key_of_another_type_is_a_line_that_names_it(value, folder, tmp_path):
    """Of every key of a run's config.json; a few of a network may be null."""
    document = json.loads(to_json(Run.open(folder).config))
    read = set()
    for path, before in flatten(document).items():
        *groups, key = path.split(".")
        changed = copy.deepcopy(document)
        functools.reduce(dict.__getitem__, groups, changed)[key] = value
        (tmp_path / "config.json").write_text(json.dumps(changed))
        try:
            Run.open(tmp_path)
            read.add(path)
        except UserError as error:
            said = str(error)
            assert f"{tmp_path}/config.json is not a config of a run: {path} is " in said and "\n" not in said
        assert path not in read or value is None or type(value) is type(before)
    assert value is not None or read == {"models.clip.image_heads", "models.clip.text_heads"}
    for text in ("[]", "null", '"x"', "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match="is not the JSON of a config"):
            Run.open(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"models": {"clip": {**FIELDS, "more": 1}}}))
    with pytest.raises(UserError, match="models.clip.more is no field of clip"):
        Run.open(tmp_path)
