"""Pipelines of Stable Diffusion in and out, and what is refused of them; tests/parity draws with them."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub import constants

from cli.errors import UserError
from sample.__main__ import main as sample
from sample.command import draw_samples
from sample.conditions import Condition, Made, Order, draw_outputs, make_conditions, order_rows
from sample.embedding import ClipEmbedder
from sample.samplers import create_sampler
from sample.sheets.attention import draw_attention, read_tokens
from sample.sheets.axes import Axis
from sample.sheets.sweep import make_cells
from sample.trained import CHUNK, TrainedSampler
from scripts.convert import main as convert
from weights.files.origin import Folder
from weights.files.tensors import read_tensors, write_tensors
from weights.formats.diffusers_pipeline import read_tokenizer
from weights.formats.diffusers_scheduler import SAMPLERS, read_scheduler, scheduler_config
from weights.run import Run

from ..stable_diffusion_samples import FIRST_STAGE, LENGTH, PROCESS, SAMPLE, TEXT, single_file, write_pipeline
from ..unet_samples import STABLE_DIFFUSION_1

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
EULER = {"_class_name": "EulerDiscreteScheduler"}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """(folder, {part: parameters})."""
    folder = tmp_path_factory.mktemp("pipeline") / "theirs"
    return folder, write_pipeline(folder)


@pytest.fixture(scope="module")
def ours(theirs):
    folder = theirs[0].parent / "ours"
    convert([f"--input={theirs[0]}", f"--output={folder}"])
    return folder


def test_all_parts_become_one_folder_that_samples(theirs, ours):
    run = Run.open(ours)
    assert run.config.models.denoiser.to_dict() == STABLE_DIFFUSION_1
    stage, text = (run.config.frozen[part].to_dict() for part in ("first_stage", "text"))
    assert FIRST_STAGE.items() <= stage.items() and TEXT.items() <= text.items() and stage["source"] == "."
    assert run.config.process.to_dict() == PROCESS and run.config.sample.to_dict() == SAMPLE
    assert (run.config.data.image_size, run.config.data.text_length) == (16, LENGTH)
    loaded = run.load(parts=tuple(theirs[1])).params
    jax.tree.map(np.testing.assert_array_equal, loaded, theirs[1])
    words = run.tokenizer()
    assert words is not None and words.encode("a cat", LENGTH).ids[-1] == words.end_id == words.pad_id
    sampler = create_sampler(run.config)
    assert sampler.text.blank[1:] == (words.end_id,) * (LENGTH - 1) and sampler.reads == ("text",)


def test_it_goes_back_file_by_file(theirs, ours, tmp_path):
    convert(["--to=diffusers", f"--run={ours}", f"--output={tmp_path}/back"])
    files = {path.relative_to(theirs[0]) for path in theirs[0].rglob("*") if path.is_file()}
    assert files == {path.relative_to(tmp_path / "back") for path in (tmp_path / "back").rglob("*") if path.is_file()}
    for file in files:
        assert (theirs[0] / file).read_bytes() == (tmp_path / "back" / file).read_bytes(), file


def test_large_pictures_are_drawn_in_smaller_chunks(ours, tmp_path):
    assert TrainedSampler.open(ours).chunk == CHUNK
    shutil.copytree(ours, tmp_path / "large")
    config = json.loads((tmp_path / "large" / "config.json").read_text())
    config["data"]["image_size"], config["models"]["denoiser"]["image_size"] = 512, 256
    (tmp_path / "large" / "config.json").write_text(json.dumps(config))
    assert TrainedSampler.open(tmp_path / "large").chunk == 1


def change_json(path, **changes):
    document = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not ...}))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("scheduler/scheduler_config.json", {"gamma": 1}, "gamma: not known here"),
        ("scheduler/scheduler_config.json", {**EULER, "use_karras_sigmas": True}, "use_karras_sigmas is True; it must"),
        ("scheduler/scheduler_config.json", {"timestep_spacing": "even"}, "timestep_spacing is 'even'; it must be one"),
        ("scheduler/scheduler_config.json", {**EULER, "final_sigmas_type": "sigma_min"}, "final_sigmas_type is"),
        ("scheduler/scheduler_config.json", {**EULER, "rescale_betas_zero_snr": True}, "where a chain ends in noise"),
        ("scheduler/scheduler_config.json", {"beta_end": 1.0}, "has the scheduler of no diffusion: .* end=1.0 is"),
        ("text_encoder/config.json", {"model_type": "t5"}, "the text encoder is of model_type 't5'"),
        ("text_encoder/config.json", {"vocab_size": 100}, "has 100 ids, and its tokenizer uses 5"),
        (
            "text_encoder/config.json",
            {"hidden_size": 8, "intermediate_size": 32},
            "text encoder has width 8|are not the",
        ),
        ("tokenizer/special_tokens_map.json", {"pad_token": 1}, "filled up with 1; it must be a token"),
        (
            "tokenizer/tokenizer_config.json",
            {"pad_token": "<pad>", "added_tokens_decoder": {}},
            "pad with '<pad>', which is none of its",
        ),
        ("unet/config.json", {"in_channels": 9}, "are not the weights|more than latents"),
        ("model_index.json", {"text_encoder_2": ["transformers", "CLIPTextModel"]}, "not converted: text_encoder_2"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(file, changes, message, theirs, tmp_path):
    shutil.copytree(theirs[0], tmp_path / "theirs")
    change_json(tmp_path / "theirs" / file, **changes)
    with pytest.raises(UserError, match=message):
        convert([f"--input={tmp_path}/theirs", f"--output={tmp_path}/ours"])
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("config", "special", "pad"),
    [
        ({"pad_token": ...}, {"pad_token": "!"}, "!"),
        ({"pad_token": "<|endoftext|>"}, {"pad_token": {"content": "!"}}, "!"),
        ({"pad_token": "<|endoftext|>", "added_tokens_decoder": {}}, {"pad_token": "!"}, "<|endoftext|>"),
        ({"pad_token": "!"}, {"pad_token": ...}, "!"),
        ({"pad_token": ...}, {"pad_token": ...}, "<|endoftext|>"),
    ],
)
def test_captions_are_filled_up_as_either_layout_of_a_folder_says(config, special, pad, theirs, tmp_path):
    """Old folders, such as the hub's version 2, say it in the map alone."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(theirs[0] / "tokenizer", folder)
    change_json(folder / "tokenizer_config.json", **config)
    change_json(folder / "special_tokens_map.json", **special)
    assert read_tokenizer(Folder(folder)).clip_vocabulary().pad == pad
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_config.json is not valid JSON"):
        read_tokenizer(Folder(folder))


def test_every_scheduler_draws_in_as_many_steps_as_the_pipeline(theirs, tmp_path):
    shutil.copytree(theirs[0], tmp_path / "theirs")
    change_json(
        tmp_path / "theirs/scheduler/scheduler_config.json",
        **{"_class_name": "UniPCMultistepScheduler", "set_alpha_to_one": ..., "skip_prk_steps": ...},
    )
    convert([f"--input={tmp_path}/theirs", f"--output={tmp_path}/ours"])
    sampling = Run.open(tmp_path / "ours").config.sample
    assert (sampling.sampler, sampling.steps) == ("unipc", 50)


@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_the_variance_of_ancestral_steps_goes_out_and_comes_back(variance):
    process = {**PROCESS, "variance": variance}
    assert read_scheduler(scheduler_config(process, {**SAMPLE, "sampler": "ddpm"}))[0] == process
    for sampler, _ in SAMPLERS.values():
        if variance == "learned" and sampler != "ddpm":
            with pytest.raises(UserError, match="learned, which DDPMScheduler alone reads, and its sampler is"):
                scheduler_config(process, {**SAMPLE, "sampler": sampler})


def test_what_no_file_of_a_pipeline_says_is_said(ours, tmp_path, capsys):
    arguments = ["--to=diffusers", f"--run={tmp_path}/run"]
    shutil.copytree(ours, tmp_path / "run")
    convert([*arguments, f"--output={tmp_path}/one"])
    assert "warning" not in capsys.readouterr().out
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["sample"] |= {"steps": 20, "guidance_stop": 0.5, "eta": 1.0}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    convert([*arguments, f"--output={tmp_path}/two"])
    assert "files of a pipeline do not say steps 20, eta 1.0, guidance_stop 0.5, which" in capsys.readouterr().out


def test_parts_that_are_left_out_are_named(theirs, tmp_path, capsys):
    shutil.copytree(theirs[0], tmp_path / "theirs")
    change_json(tmp_path / "theirs" / "model_index.json", safety_checker=["stable_diffusion", "SafetyChecker"])
    convert([f"--input={tmp_path}/theirs", f"--output={tmp_path}/ours"])
    assert "safety checker is left out" in capsys.readouterr().out


def without_a_file(folder, rng):
    files = ["unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"]
    files += ["tokenizer/merges.txt", *(f"{part}/{name}" for part, name in WEIGHTS.items())]
    (folder / files[rng.integers(len(files))]).unlink()


def with_other_tensors(folder, rng):
    part = sorted(WEIGHTS)[rng.integers(3)]
    tensors = dict(read_tensors(folder / part / WEIGHTS[part]))
    name = sorted(tensors)[rng.integers(len(tensors))]
    array = tensors.pop(name)
    kind = rng.integers(4)
    tensors |= ({}, {f"{name}_": array}, {name: np.zeros((*array.shape, 1), np.float32)}, {name: array * np.nan})[kind]
    write_tensors(folder / part / WEIGHTS[part], tensors)


def with_damaged_bytes(folder, rng):
    part = sorted(WEIGHTS)[rng.integers(3)]
    path = folder / part / WEIGHTS[part]
    content = bytearray(path.read_bytes())
    if rng.integers(2):
        path.write_bytes(content[: rng.integers(len(content) - 1)])
        return
    for place in rng.integers(0, 200, 8):
        content[place] = rng.integers(256)
    path.write_bytes(content)


def with_a_hostile_index(folder, rng):
    part = sorted(WEIGHTS)[rng.integers(3)]
    names = list(read_tensors(folder / part / WEIGHTS[part]))
    (folder / part / WEIGHTS[part]).unlink()
    shards = ("../../secret.safetensors", "/etc/passwd", "gone.safetensors", "", "..", "a\\b", 3, None, ["x"], {"a": 1})
    places = [*({name: shard for name in names} for shard in shards), {}, [], "x", None]
    index = {"metadata": {}, "weight_map": places[rng.integers(len(places))]}
    (folder / part / f"{WEIGHTS[part]}.index.json").write_text(json.dumps(index))


def with_a_wrong_key(folder, rng):
    files = ("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json")
    path = folder / files[rng.integers(len(files))]
    document = json.loads(path.read_text())
    values = (None, "x", [], {"a": 1}, -1, 10**30, 1e400, [1, "x"], True)
    keys = [*sorted(document), "surprise", "use_karras_sigmas"]
    document[keys[rng.integers(len(keys))]] = values[rng.integers(len(values))]
    path.write_text(json.dumps(document))


def with_a_broken_vocabulary(folder, rng):
    file = ("vocab.json", "merges.txt")[rng.integers(2)]
    contents = (b"", b"{}", b"\xff\xfe", b"[1]", b'{"a": 0}', b"#version\na b c\n", b"#version\nq q\n")
    (folder / "tokenizer" / file).write_bytes(contents[rng.integers(len(contents))])


FAULTS = (
    *(without_a_file, with_other_tensors, with_damaged_bytes, with_a_hostile_index, with_a_wrong_key),
    with_a_broken_vocabulary,
)


def refuse(folder, theirs, seed):
    """Whether a pipeline with a fault of a seed is refused: in one line, and nothing is written."""
    rng = np.random.default_rng(seed)
    shutil.copytree(theirs, folder / "theirs")
    FAULTS[seed % len(FAULTS)](folder / "theirs", rng)
    try:
        convert(["--source=diffusers", f"--input={folder}/theirs", f"--output={folder}/ours"])
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000, str(error)
        assert not (folder / "ours").exists()
        return True
    return False


@pytest.mark.parametrize(
    "seeds", [range(30), pytest.param(range(30, 230), marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_faults_of_every_kind_end_in_a_line(seeds, theirs, tmp_path):
    refused = sum(refuse(tmp_path / str(seed), theirs[0], seed) for seed in seeds)
    assert refused > 0.85 * len(seeds)  # some keys may have the value that they are given


@pytest.fixture(scope="module")
def authors():
    """{name: tensor} of one file as its authors have it."""
    return single_file()


@pytest.fixture
def convert_file(authors, tmp_path):
    """Converts the authors' file without the tensors of some names, and with others."""

    def change_and_convert(*flags, without=(), **more):
        kept = {name: tensor for name, tensor in authors.items() if not name.startswith(tuple(without))}
        write_tensors(tmp_path / "sd-v1.safetensors", kept | more)
        convert([f"--input={tmp_path}/sd-v1.safetensors", f"--output={tmp_path}/ours", *flags])
        return Run.open(tmp_path / "ours")

    return change_and_convert


BLOCKS = "model.diffusion_model.input_blocks"
NOTHING = np.zeros((1, 1, 1, 1), np.float32)


def test_one_file_comes_in(convert_file):
    run = convert_file("--image_size=16")
    assert set(run.models()) == {"denoiser", "first_stage", "text"} and run.config.sample.steps == 50


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{BLOCKS}.0.0.op.weight", "resamples at .0, 2., which no UNet of ours has"),
        (f"{BLOCKS}.400000000.0.x", "has 5 input_blocks and"),
        (f"{BLOCKS}.{'9' * 5000}.0.x", "unexpected|are not"),
    ],
    ids=["one that is the first", "very high", "too long a number"],
)
def test_blocks_that_no_unet_has_are_a_line(name, message, convert_file):
    with pytest.raises(UserError, match=message):
        convert_file(**{name: NOTHING})


def test_a_file_of_which_the_first_stage_alone_is_known(convert_file):
    """Such as SDXL's, or one of classes."""
    changes = {"without": ["cond_stage_model."], "conditioner.embedders.0.x": NOTHING}
    with pytest.raises(UserError, match="without a text encoder that is known, .*; give --only=first_stage for"):
        convert_file(**changes)
    assert set(convert_file("--only=first_stage", **changes).models()) == {"autoencoder"}


def test_a_file_whose_unet_sees_more_than_latents_is_refused(convert_file, authors):
    name = f"{BLOCKS}.0.0.weight"
    with pytest.raises(UserError, match="UNet reads 9 channels and its first stage makes 4: pipelines"):
        convert_file(**{name: np.zeros((authors[name].shape[0], 9, 3, 3), np.float32)})


@pytest.mark.parametrize("option", ["prediction=v", "image_size=512", "tokenizer=merges.txt"])
def test_options_that_a_first_stage_does_not_read_are_refused(option, convert_file):
    with pytest.raises(UserError, match=f"--{option.partition('=')[0]} says nothing of a first stage; leave it out"):
        convert_file("--only=first_stage", f"--{option}")


@pytest.mark.parametrize(
    ("subfolder", "without", "option", "what"),
    [
        ("vae", (), "tokenizer", "a first stage"),
        ("", ("text_encoder",), "tokenizer", "a UNet without a text encoder"),
        ("", ("text_encoder", "vae"), "latent_scale", "a network without a first stage"),
    ],
)
def test_options_that_a_folder_does_not_read_are_refused(subfolder, without, option, what, theirs, tmp_path):
    shutil.copytree(theirs[0], tmp_path / "theirs")
    for folder in without:
        shutil.rmtree(tmp_path / "theirs" / folder)
    with pytest.raises(UserError, match=f"--{option} says nothing of {what}; leave it out"):
        convert(
            [f"--subfolder={subfolder}", f"--{option}=1", f"--input={tmp_path}/theirs", f"--output={tmp_path}/ours"]
        )


def refuse_file(folder, authors, seed):
    """Whether one file with a fault of a seed is refused, in one line."""
    rng = np.random.default_rng(seed)
    tensors, name = dict(authors), sorted(authors)[rng.integers(len(authors))]
    array = tensors.pop(name)
    wild = str((7, 65, 10**8, 10**30)[rng.integers(4)])
    tensors |= (
        *({}, {f"{name}_": array}, {name: np.zeros((*array.shape, 1), np.float32)}, {name: array * np.nan}),
        *({name: array[:0]}, {re.sub(r"\d+", wild, name, count=1) + ("" if re.search(r"\d", name) else "_"): array}),
    )[rng.integers(6)]
    path = folder / "sd-v1.safetensors"
    write_tensors(path, tensors)
    if rng.integers(6) == 0:
        path.write_bytes(path.read_bytes()[: rng.integers(path.stat().st_size - 1)])
    try:
        convert([f"--input={path}", f"--output={folder}/ours", "--image_size=16"])
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000, str(error)
        assert not (folder / "ours").exists()
        return True
    return False


@pytest.mark.parametrize("seeds", [range(8), pytest.param(range(8, 108), marks=pytest.mark.slow)], ids=["few", "many"])
def test_faults_of_one_file_end_in_a_line(seeds, authors, tmp_path):
    for seed in seeds:
        folder = tmp_path / str(seed)
        folder.mkdir()
        assert refuse_file(folder, authors, seed), seed


def test_half_precision_leaves_the_first_stage_as_it_is(ours):
    """Networks compute in bfloat16, states and pictures stay float32, and samples are near those of float32."""
    single, half = (TrainedSampler.open(ours, chunk=2, dtype=dtype) for dtype in ("", "bfloat16"))
    models = half.sampler.model, half.sampler.text.model, half.sampler.first_stage.model
    assert [jnp.dtype(model.dtype).name for model in models] == ["bfloat16", "bfloat16", "float32"]
    assert half.describe(0, {})["dtype"] == "bfloat16" and "dtype" not in single.describe(0, {})
    features, exact = (
        each.sampler.text(each.weights.params, each.frozen, jnp.asarray(each.encode(["a red cat"])["text"]))
        for each in (half, single)
    )
    assert features.dtype == jnp.bfloat16 and exact.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(features, np.float32), exact, atol=0.05)
    assert np.abs(np.asarray(features, np.float32) - exact).max() > 0


def test_prompts_with_weights_and_beyond_the_context(ours, tmp_path, capsys):
    """Chunks are read one by one, the negative prompt in as many, and the command says what counts how much."""
    trained = TrainedSampler.open(ours, chunk=2)
    long = "red cat red cat red cat (red:2) cat"  # 8 tokens, of which a chunk holds 6
    order = Order((Condition(long),), 0, {}, "a cat", prompt_weights=True, long_prompts=True)
    rows = order_rows(trained, order)
    assert rows["text"].shape == rows["negative"].shape == rows["text_weights"].shape == (1, 2 * LENGTH)
    assert rows["text_weights"][0, LENGTH + 1] == 2 and rows["text_weights"].sum() == 2 * LENGTH + 1

    def features(text, **more):
        told = {"text": jnp.asarray(text), **{name: jnp.asarray(row) for name, row in more.items()}}
        return np.asarray(trained.sampler.conditioning(trained.weights.params, trained.frozen, told).tokens)

    both = features(rows["text"])
    apart = [features(rows["text"][:, place : place + LENGTH]) for place in (0, LENGTH)]
    np.testing.assert_allclose(both, np.concatenate(apart, axis=1), atol=1e-6)
    weighed = both * rows["text_weights"][..., None]
    expected = weighed * both.mean() / weighed.mean()
    np.testing.assert_allclose(features(rows["text"], weights=rows["text_weights"]), expected, atol=1e-4)

    settings = ["--negative_prompt=a cat", "--num=1", "--steps=1", "--sampler=ddim"]
    flags = ["--prompt_weights", "--long_prompts"]
    sample([f"--run={ours}", f"--prompt={long}", *settings, *flags, f"--out={tmp_path}/grid.png"])
    said = capsys.readouterr().out
    assert "'red' 2, ' cat' 1" in said and '"prompt_weights": true' in said and (tmp_path / "grid.png").is_file()
    cut = order_rows(trained, Order((Condition(long),), 0, {}, prompt_weights=True))
    assert cut["text"].shape == (1, LENGTH) and "only the first 8 tokens count" in capsys.readouterr().out
    # In parts it has 8 tokens, and together, as "cat", 6.
    parts = make_conditions(["red cat red cat red (c:2)at", "red cat red cat red (c:3)at", "red (cat:2)"])
    order_rows(trained, Order(parts, prompt_weights=True))
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert warnings == ["warning: only the first 8 tokens count of 'red cat red cat red cat'"]


def test_a_prompt_draws_the_same_picture_beside_a_longer_one(ours, monkeypatch):
    """Empty chunks that fill its text up are seen neither by the denoiser nor in the mean that weights keep."""
    trained = TrainedSampler.open(ours, chunk=2)
    short, long = "a (red:1.5) cat", "red cat red cat red cat red cat"
    settings = {"sampler": "ddim", "steps": 2}

    def drawn(*prompts):
        order = Order(make_conditions(prompts), 3, settings, "a cat", prompt_weights=True, long_prompts=True)
        rows = order_rows(trained, order)
        return order, rows, draw_outputs(trained, order, rows, 1, attention=True)

    (_, rows, alone), (order, padded, both) = drawn(short), drawn(short, long)
    assert rows["text"].shape == (1, LENGTH) and "contexts" not in rows
    assert padded["text"].shape == (2, 2 * LENGTH) and padded["contexts"].tolist() == [1, 2]
    np.testing.assert_allclose(both["image"][0], alone["image"][0], atol=1e-4)
    np.testing.assert_allclose(both["attention"][0, ..., :LENGTH], alone["attention"][0], atol=1e-5)
    assert not both["attention"][0, ..., LENGTH:].any() and both["attention"][1, ..., LENGTH:].all()
    # The sheet of maps has no cells for what is not seen, and a cell of a sweep is drawn as the prompt alone.
    read = []
    monkeypatch.setattr(
        "sample.sheets.attention.read_tokens", lambda *told: read.append(len(told[1])) or read_tokens(*told)
    )
    draw_attention(trained, order, 1)
    assert read == [LENGTH, 2 * LENGTH]
    cells = make_cells(trained, order, (Axis("prompt", (short, long)),))
    assert [cell.rows["text"].shape[1] for cell in cells] == [LENGTH, 2 * LENGTH]


def test_a_text_tower_that_is_tuned_reads_weights_and_long_prompts_too(ours, tmp_path):
    tuned = shutil.copytree(ours, tmp_path / "tuned")
    config = json.loads((tuned / "config.json").read_text())
    text = config["frozen"].pop("text")
    config["models"]["text"] = {name: text[name] for name in text if name not in ("source", "part", "step", "run")}
    change_json(tuned / "config.json", **config)
    order, features = Order((Condition("red cat red cat red (cat:2) cat"),), prompt_weights=True, long_prompts=True), []
    for folder in (ours, tuned):
        trained = TrainedSampler.open(folder)
        rows = {name.replace("text_", ""): jnp.asarray(row) for name, row in order_rows(trained, order).items()}
        features.append(trained.sampler.conditioning(trained.weights.params, trained.frozen, rows).tokens)
    assert features[0].shape[1] == 2 * LENGTH
    np.testing.assert_array_equal(*features)


@pytest.mark.parametrize("asked", ["long_prompts", "prompt_weights"])
def test_prompts_that_nothing_reads_get_a_line(ours, asked):
    trained = TrainedSampler.open(ours)
    with pytest.raises(UserError, match="the prompt is empty"):
        order_rows(trained, Order((Condition(" "),), **{asked: True}))
    without = dataclasses.replace(trained, tokenizer=None)
    with pytest.raises(UserError, match="has no tokenizer; convert it again, with --tokenizer"):
        order_rows(without, Order((Condition("a cat"),), **{asked: True}))


def test_pictures_are_compared_with_prompts_without_brackets(ours, monkeypatch):
    trained, compared = TrainedSampler.open(ours), []
    monkeypatch.setattr(ClipEmbedder, "cosines", lambda _, __, captions: compared.extend(captions) or np.zeros(4))
    monkeypatch.setattr("sample.command.draw", lambda *_: Made(np.zeros((4, 16, 16, 3), np.uint8), None))
    order = Order(make_conditions(["a (red:1.3) cat", r"[a] \(cat\)"]), prompt_weights=True)
    drawn = draw_samples(trained, order, 2, ClipEmbedder(trained))
    assert compared == ["a red cat", "a red cat", "a (cat)", "a (cat)"]
    assert drawn.records[0]["prompt"] == "a (red:1.3) cat"


@pytest.mark.parametrize(
    ("missing", "flags", "message"),
    [
        ("unet/config.json", (), "none of the formats by its files in the hub's cache, and HF_HUB_OFFLINE is set"),
        ("unet/config.json", ("--source=diffusers",), "has none of unet/config.json, config.json in the hub's cache"),
        ("unet", ("--source=diffusers",), "has none of unet/config.json, config.json in the hub's cache"),
        (f"unet/{WEIGHTS['unet']}", (), "unet/ has none of diffusion_pytorch_model.safetensors, .* in the hub's cache"),
        ("vae/config.json", (), "names vae in model_index.json, .* converted in the hub's cache, and HF_HUB_OFFLINE"),
        ("tokenizer", (), "tokenizer/ has no merges.txt and no tokenizer.json in the hub's cache"),
        ("model_index.json", (), "has no model_index.json in the hub's cache, .* says what parts it has"),
    ],
)
def test_what_the_hub_s_cache_lacks_is_named(missing, flags, message, theirs, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository, commit = tmp_path / "models--tiny--sd", "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(theirs[0], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    gone = repository / "snapshots" / commit / missing
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    with pytest.raises(UserError, match=message):
        convert(["--input=hf:tiny/sd", f"--output={tmp_path}/ours", *flags])
