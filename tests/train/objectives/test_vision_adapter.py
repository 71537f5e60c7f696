"""The objectives of the language model and of the adapter: what is counted, what is trained, and how both begin."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

from cli.config import load_config
from cli.errors import EXIT_OK, UserError
from data import folder
from data.dialogues import encode_dialogue
from data.pipeline import load_tokenizer
from data.preprocess import center_square
from data.scenes.questions import Dialogue
from data.tiles import picture_fields
from data.tokenizer import Tokenizer
from evaluation.answer_perplexity import answer_perplexity
from evaluation.text_perplexity import text_perplexity
from models import create_model
from sample.trained import TrainedSampler
from scripts.convert import main as convert
from train.distributed.mesh import make_mesh
from train.distributed.sharding import path_name
from train.loop import train
from train.objectives import create_objective
from train.objectives.llama import token_loss
from train.objectives.packing import Row, pack
from train.program import create_program
from train.state import create_state
from train.trainable import count_parameters, trained_params
from train.transfer import initialize_parts
from weights.files.layout import model_shapes
from weights.pretrained import write_pretrained
from weights.run import Run
from weights.starts import pin_bases

from ...models.random_parameters import random_parameters

ROOT = Path(__file__).resolve().parents[3]
KEY = jax.random.key(0)


def config_of(name, *overrides):
    return load_config([f"--config={ROOT}/configs/scenes/{name}:debug", *overrides])


@pytest.fixture(scope="module")
def adapter():
    """The objective of the debug variant, its parameters, and two pictures with questions and answers."""
    objective = create_objective(config_of("vision_adapter.py"))
    params, _ = jax.jit(objective.init)(KEY, {})
    tokenizer = Tokenizer.train(["which color is the circle? it is red"], 300).with_ends()
    vocabulary = objective.model.text_vocab_size
    rows, masks = [], []
    for answer in ("red", "a red circle"):
        row, mask, _ = encode_dialogue(tokenizer, Dialogue("which color is it?", answer), 30)
        masks.append(mask)
        # The ends of this small vocabulary are those of the run's.
        ends = {tokenizer.start_id: vocabulary - 2, tokenizer.end_id: objective.sampler.end_id}
        rows.append([ends.get(int(token), int(token)) for token in row])
    image = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    batch = {"text": jnp.asarray(rows, jnp.int32), "image": jnp.asarray(image), "index": jnp.arange(2)}
    batch["text_mask"] = jnp.asarray(masks)
    return objective, params, batch


def loss_of(objective, params, batch):
    return jax.jit(lambda params, batch: objective.loss(params, {}, {}, batch, KEY, jnp.int32(0), True))(params, batch)


def test_the_loss_is_of_the_answers_tokens_alone(adapter):
    objective, params, batch = adapter
    loss, aux = loss_of(objective, params, batch)
    text, end = np.array(batch["text"]), objective.sampler.end_id
    model = objective.model
    tokens = np.concatenate([np.full((2, 1), model.image_token), text], axis=1)
    tiles = jnp.asarray(batch["image"] / 127.5 - 1, jnp.float32)[:, None, None]
    canvas = jnp.ones((2, 1), jnp.int32)
    logits = jax.jit(model.apply)({"params": params["vision_adapter"]}, jnp.asarray(tokens), tiles, canvas)
    logs = np.asarray(jax.nn.log_softmax(logits))
    means = []
    for row, token_logs in zip(text, logs, strict=True):
        first, last = np.flatnonzero(row == end)
        means.append(np.mean([-token_logs[place, row[place]] for place in range(first + 1, last + 1)]))
    np.testing.assert_allclose(loss, np.mean(means), rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["nats"][1], sum(np.diff(np.flatnonzero(row == end))[0] for row in text))


def test_the_first_loss_is_the_language_model_s_and_its_parameters_are_not_trained(adapter):
    objective, params, batch = adapter
    # The picture's token is one more, which the language model reads: give it the embedding of a word.
    tree = dict(params["vision_adapter"])
    table = tree["language"]["embedding"]["embedding"]
    tree["extra_embedding"] = {"embedding": table[5:6]}
    text = np.concatenate([np.full((2, 1), 5), np.array(batch["text"])], axis=1)
    language = objective.model.network_at("language")
    language.pop("name")
    from models.llama import Llama

    expected = jax.jit(Llama(**language).apply)({"params": tree["language"]}, jnp.asarray(text, jnp.int32))
    tokens = jnp.asarray(text).at[:, 0].set(objective.model.image_token)
    tiles = jnp.asarray(batch["image"] / 127.5 - 1, jnp.float32)[:, None, None]
    logits = jax.jit(objective.model.apply)({"params": tree}, tokens, tiles, jnp.ones((2, 1), jnp.int32))
    np.testing.assert_array_equal(logits, expected)

    trained = trained_params(params, config_of("vision_adapter.py").trainable)["vision_adapter"]
    assert set(trained) == set(params["vision_adapter"]) - {"language"}


def test_a_language_model_learns_answers_as_much_as_it_is_told(adapter):
    objective, params, batch = adapter
    language = create_objective(config_of("llama.py", "--config.loss.answer_weight=2.0"))
    params = {"llama": params["vision_adapter"]["language"]}
    loss, aux = loss_of(language, params, batch)
    plain, its_aux = loss_of(dataclasses.replace(language, answer_weight=0.0), params, batch)
    logits = jax.jit(language.model.apply)({"params": params["llama"]}, batch["text"][:, :-1])
    answers, _ = token_loss(logits, Row.of_texts(batch["text"], batch["text_mask"], objective.sampler.end_id))
    np.testing.assert_allclose((loss, aux.metrics["loss"][0] / 2), plain + 2 * answers, rtol=1e-5)
    assert set(aux.metrics) - set(its_aux.metrics) == {"exact_answers"} and aux.metrics["exact_answers"][1] == 2
    for wrong in ("--config.data.dialogues=", "--config.loss.answer_weight=-1.0"):
        with pytest.raises(UserError, match="answer_weight=.* must be 0, or positive for texts that are questions"):
            create_objective(config_of("llama.py", wrong))


def perplexity_of_text(run):
    return text_perplexity(TrainedSampler.open(run, chunk=2), "validation", 4)["values"]["text_perplexity"]


def answers_of(run, count=2):
    trained = TrainedSampler.open(run, chunk=2)
    rows = {**trained.encode(["how many shapes are there?"] * count), "image": np.zeros((count, 32, 32, 3), np.uint8)}
    return trained.decode(trained(rows, seed=0, indices=range(count))["text"])


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["debug", "debug_prefix", "debug_full"])
def test_a_language_model_is_read_stays_as_it_is_and_answers(variant, debug_run, scenes_dir, tmp_path):
    """The same bits after 100 updates, and of texts alone; or others, where it is trained too."""
    source = debug_run("scenes/llama.py")
    overrides = f"--config.data.data_dir={scenes_dir}", f"--config.initialize.language.source={source}"
    name, steps = f"vision_adapter.py:{variant}", 100 if variant == "debug" else 4
    config = load_config([f"--config={ROOT}/configs/scenes/{name}", *overrides, f"--config.steps={steps}"])
    assert train(config, tmp_path / "run") == EXIT_OK
    before = flatten_dict(Run.open(source).load(ema=False).params["llama"], sep="/")
    run = Run.open(tmp_path / "run")
    after = run.load(ema=False).params["vision_adapter"]
    same = {path: np.array_equal(leaf, before[path]) for path, leaf in flatten_dict(after["language"], sep="/").items()}
    assert len(same) == len(before) and set(same.values()) == {variant != "debug_full"}
    assert (perplexity_of_text(run.folder) == perplexity_of_text(source)) == (variant != "debug_full")
    gates = [leaf for path, leaf in flatten_dict(after).items() if path[-1] == "attention_gate"]
    assert all(np.abs(gate).max() > 0 for gate in gates)
    assert len(answers_of(run.folder)) == 2
    assert np.isfinite(
        list(answer_perplexity(TrainedSampler.open(run.folder), "validation", 3)["values"].values())
    ).all()
    wrong = config_of("vision_adapter.py", *overrides)
    with wrong.unlocked():
        wrong.models.vision_adapter.mlp_hidden = 40
    with pytest.raises(UserError, match="mlp_hidden: 48, not 40"):
        train(wrong, tmp_path / "other")


@pytest.mark.slow
def test_the_language_model_has_pairs_beside_an_adapter(debug_run, scenes_dir, tmp_path):
    """Its kernels stay as they are and out of the checkpoint; pairs and adapter are trained, and join in a folder."""
    source = debug_run("scenes/llama.py")
    overrides = f"--config.data.data_dir={scenes_dir}", f"--config.initialize.language.source={source}"
    pairs = "--config.lora.rank=2", "--config.lora.paths=('language/.*attention/.*kernel',)"
    assert train(config_of("vision_adapter.py", *overrides, *pairs), tmp_path / "run") == EXIT_OK
    before = flatten_dict(Run.open(source).load(ema=False).params["llama"], sep="/")
    loaded = Run.open(tmp_path / "run").load(ema=False).params["vision_adapter"]
    after = flatten_dict(loaded["language"], sep="/")
    moved = {path for path, leaf in after.items() if not np.array_equal(leaf, before[path])}
    assert moved == {path for path in after if "attention/" in path and path.endswith("kernel")}
    assert np.abs(loaded["cross_blocks_0"]["attention_gate"]).max() > 0
    assert perplexity_of_text(tmp_path / "run") != perplexity_of_text(source)
    convert(["--to=pretrained", f"--run={tmp_path}/run", f"--output={tmp_path}/whole"])
    (tmp_path / "moved").mkdir()
    whole = (tmp_path / "whole").rename(tmp_path / "moved" / "whole")
    assert answers_of(whole) == answers_of(tmp_path / "run")
    assert perplexity_of_text(whole) == pytest.approx(perplexity_of_text(tmp_path / "run"), rel=1e-6)


def test_the_encoder_starts_from_a_clip_of_smaller_pictures(tmp_path):
    config = config_of("vision_adapter.py")
    ours = create_model(**config.models.vision_adapter)
    fields = {"name": "clip", "embed_dim": 8, "image_tower": "vit", "image_size": 16, "patch_size": ours.patch_size}
    fields |= {"image_width": ours.image_width, "image_layers": ours.image_layers + 1, "image_heads": ours.image_heads}
    fields |= {"image_mlp_ratio": ours.image_mlp_ratio, "text_vocab_size": 9, "text_length": 4, "text_end_id": 8}
    fields |= {"text_width": 64, "text_layers": 1}

    def start(**changes):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        theirs = random_parameters(create_model(**{**fields, **changes}))
        clip = {"objective": "clip", "models": {"clip": {**fields, **changes}}}
        write_pretrained(folder, clip, {"clip": theirs}, {}, provenance={})
        with config.unlocked():
            config.initialize.encoder.source = str(folder)
        params = random_parameters(ours, seed=1)
        before = flatten_dict(params["encoder"], sep="/")
        state = create_state({"vision_adapter": params}, {}, {}, averaged={})
        after = initialize_parts(config, state, lambda params: {}).params["vision_adapter"]
        jax.tree.map(np.testing.assert_array_equal, after["language"], params["language"])
        return flatten_dict(theirs["image"], sep="/"), before, flatten_dict(after["encoder"], sep="/")

    theirs, before, after = start()
    assert {path: leaf.shape for path, leaf in before.items()} == {path: leaf.shape for path, leaf in after.items()}
    np.testing.assert_array_equal(after["last_norm/scale"], theirs["final_norm/scale"])
    kernel = "blocks_1/attention/query_key_value/kernel"
    np.testing.assert_array_equal(after[kernel], theirs[kernel])
    kept = {path for path in before if np.array_equal(before[path], after[path])}
    assert {path.split("/")[0].removesuffix("_gate") for path in kept} == {
        *("first_tile", "last_tile", "tile_position", "position", "global_blocks_0")
    }
    positions = jax.image.resize(theirs["position/embedding"][1:].reshape(4, 4, -1), (8, 8, ours.image_width), "cubic")
    np.testing.assert_allclose(after["position/embedding"][1:], positions.reshape(64, -1), atol=1e-6)
    with pytest.raises(
        UserError, match="does not fit: its tower has another image_width 48, image_mlp_ratio 3, 1 layers"
    ):
        start(image_width=48, image_layers=1)


def test_the_clip_of_the_scenes_fits_the_encoder_of_the_scenes():
    ours = create_model(**load_config([f"--config={ROOT}/configs/scenes/vision_adapter.py"]).models.vision_adapter)
    clip = [f"--config={ROOT}/configs/scenes/clip.py:vit"]
    fits = create_model(**load_config([*clip, "--config.models.clip.image_mlp_ratio=3"]).models.clip)
    begun = flatten_dict(ours.adopt("encoder", random_parameters(fits), fits), sep="/")
    encoder = model_shapes(ours)
    assert all(leaf.shape == encoder[f"params/encoder/{path}"].shape for path, leaf in begun.items())
    assert "blocks_2/mlp/up/kernel" in begun
    with pytest.raises(ValueError, match="another image_mlp_ratio 4 than"):
        other = create_model(**load_config(clip).models.clip)
        ours.adopt("encoder", {}, other)


@pytest.mark.slow
def test_the_language_model_takes_no_memory_but_its_own():
    """Of the compiler's plan of a step: with it trained there are its gradients too, and both moments."""
    wide = ("width=128", "mlp_hidden=1024", "head_dim=32")
    sizes, programs = {}, {}
    for name, pattern in {"all": ".*", "adapter": "^vision_adapter/(?!language/)"}.items():
        fields = [f"--config.models.vision_adapter.{field}" for field in wide]
        adam = ("--config.optimizer.rules=({'pattern': '.*'},)", "--config.ema.decay=0.0")  # two moments of each
        overrides = (*fields, *adam, "--config.batch_size=2", f"--config.trainable=({pattern!r},)")
        config = config_of("vision_adapter.py", *overrides)
        program = programs[name] = create_program(config, make_mesh(config.mesh, jax.devices()[:1]))
        with program.in_mesh():
            inputs = program.abstract_state, program.abstract_frozen, program.abstract_batch
            plan = program.train_step.lower(*inputs).compile().memory_analysis()
        sizes[name] = plan.temp_size_in_bytes, plan.argument_size_in_bytes
    state = programs["adapter"].abstract_state
    held = 4 * count_parameters(state.params["vision_adapter"]["language"])
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)]
    assert any("cross_blocks_0" in path for path in paths) and not any("language" in path for path in paths)
    saved = [sizes["all"][part] - sizes["adapter"][part] for part in (0, 1)]
    print(f"held {held:,} bytes; all: {sizes['all']}, adapter: {sizes['adapter']} (temporary, arguments)")
    assert saved[0] > 0.9 * held and abs(saved[1] - 2 * held) < 100


@pytest.mark.parametrize("name", ["llama", "vision_adapter", "vision_prefix"])
def test_texts_in_a_row_are_learned_as_if_each_were_alone(adapter, name):
    objective, _, batch = adapter
    # Gates are open, and the second text is of the first one's pads.
    if name == "vision_prefix":
        objective = create_objective(load_config([f"--config={ROOT}/configs/scenes/vision_adapter.py:debug_prefix"]))
    params = {"vision_adapter": random_parameters(objective.model)}
    if name == "llama":
        objective = create_objective(config_of("llama.py"))
        params = {"llama": params["vision_adapter"]["language"]}
    batch = {**batch, "image": batch["image"].at[1].set(0)}
    packed = dataclasses.replace(objective, packing=(2, 44))  # 62 with all pads

    def run(objective):
        loss = lambda params: objective.loss(params, {}, {}, batch, KEY, jnp.int32(0), True)  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    (loss, aux), slope = run(objective)
    (other, its_aux), its_slope = run(packed)
    np.testing.assert_allclose(other, loss, rtol=1e-5)
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-5), its_aux.metrics, aux.metrics)
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, atol=1e-5), its_slope, slope)
    assert aux.metrics["cut"] == (0, 2)
    # Of the second text nothing is left that is learned, which is not to be right in it.
    short = dataclasses.replace(objective, packing=(2, 8 if name == "llama" else 12))
    _, cut = loss_of(short, params, batch)
    alone, first = loss_of(objective, params, {name: rows[:1] for name, rows in batch.items()})
    np.testing.assert_allclose(cut.metrics["loss"], (alone, 1), rtol=1e-5)
    assert cut.metrics["exact"] == first.metrics["exact"] == (0, 1) and cut.metrics["cut"] == (1, 2)
    assert cut.metrics["nats"][1] == first.metrics["nats"][1]
    with pytest.raises(ValueError, match="must divide the 2 examples"):
        run(dataclasses.replace(objective, packing=(3, 0)))


def test_pictures_of_several_shapes_are_learned_in_tiles():
    objective = create_objective(load_config([f"--config={ROOT}/configs/paper/vision_adapter.py:debug"]))
    model, rng = objective.model, np.random.default_rng(0)
    params = {"vision_adapter": random_parameters(model)}
    shapes = ((12, 60, 3), (44, 16, 3))
    fields = [
        picture_fields(rng.integers(0, 256, shape, dtype=np.uint8), model.tile_size, center_square, model.max_tiles)
        for shape in shapes
    ]
    batch = {name: jnp.asarray(np.stack([one[name] for one in fields])) for name in fields[0]}
    assert batch["image"].shape == (2, 4, 16, 16, 3) and batch["canvas"].tolist() == [4, 7]
    text, mask = rng.integers(3, 90, (2, 9)), np.zeros((2, 9), bool)
    text[1, 7:], mask[0, 5:], mask[1, 4:7] = model.text_pad_id, True, True
    batch |= {"text": jnp.asarray(text, jnp.int32), "text_mask": jnp.asarray(mask), "index": jnp.arange(2)}

    def loss(params):
        return objective.loss(params, {}, {}, batch, KEY, jnp.int32(0), True)[0]

    value, slope = jax.jit(jax.value_and_grad(loss))(params)
    tokens = np.concatenate([np.full((2, 1), model.image_token), text], axis=1)[:, :-1]
    tiles = jnp.asarray(batch["image"] / 127.5 - 1, jnp.float32)[:, None]
    inputs = jnp.asarray(tokens, jnp.int32), tiles, batch["canvas"][:, None]
    logs = jax.nn.log_softmax(jax.jit(model.apply)({"params": params["vision_adapter"]}, *inputs))
    nats = -np.take_along_axis(np.asarray(logs), text[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(value, np.mean([nats[row][mask[row]].mean() for row in (0, 1)]), rtol=1e-5)
    of_tiles = np.asarray(slope["vision_adapter"]["encoder"]["tile_position"]["embedding"])
    assert set(np.flatnonzero(of_tiles.reshape(9, -1).any(axis=1))) == {4, 7}  # the table of each canvas


@pytest.mark.slow
def test_a_run_learns_and_is_measured_in_tiles(tmp_path):
    """Of files of several shapes, from their reading to a picture for the log and the perplexity of answers."""
    source, rng = tmp_path / "pictures", np.random.default_rng(0)
    source.mkdir()
    for index in range(12):
        size = ((40, 9), (9, 40), (24, 24))[index % 3]
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(source / f"{index}.png")
        (source / f"{index}.txt").write_text(f"what is it?\tpicture {index}")
    request = folder.Request("questions", str(source), validation=4)
    folder.prepare(request, folder.list_source(str(source), request.fields), tmp_path / "data")
    Tokenizer.train(["what is it? picture"], 300).save(tmp_path / "tokenizer.json")
    data = {"data_dir": tmp_path / "data", "dataset": "folder/questions", "dialogues": "tabs", "text_length": 40}
    data["tokenizer"] = tmp_path / "tokenizer.json"
    overrides = [f"--config.data.{key}={value}" for key, value in data.items()]
    config = load_config([f"--config={ROOT}/configs/paper/vision_adapter.py:debug", *overrides])
    vocabulary = load_tokenizer(config.data).vocab_size
    with config.unlocked():
        model = config.models.vision_adapter
        model.text_vocab_size, model.text_end_id, model.image_token = vocabulary, vocabulary - 1, vocabulary
    assert train(config, tmp_path / "run") == EXIT_OK
    assert list((tmp_path / "run" / "samples").glob("*_answers.png"))
    values = answer_perplexity(TrainedSampler.open(tmp_path / "run", chunk=2), "validation", 3)["values"]
    assert np.isfinite(list(values.values())).all() and len(values) == 3


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("image_size=64", "config.data.image_size is 64, but config.models.vision_adapter.tile_size is 32"),
        ("max_tiles=4", "config.data.max_tiles is 4, but config.models.vision_adapter.max_tiles is 1"),
    ],
)
def test_pictures_that_are_cut_otherwise_than_the_network_takes_them_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        create_objective(config_of("vision_adapter.py", f"--config.data.{setting}"))


@pytest.mark.parametrize(
    ("second", "length", "exact", "cut"),
    [
        ((1, 7, 3, 9), 0, (2, 2), (0, 2)),
        ((1, 7, 3, 9), 5, (1, 2), (1, 2)),  # its answer has no end
        ((1, 7, 3, 9), 4, (1, 1), (1, 2)),  # it has no answer
        ((1, 7, 3, 4), 0, (1, 2), (1, 2)),  # it was cut before it was packed
        ((1, 7, 7, 7), 0, (1, 1), (1, 2)),
    ],
)
def test_an_answer_that_is_cut_is_not_right(second, length, exact, cut):
    text = jnp.asarray([[1, 7, 2, 9], second])
    answers = (jnp.arange(4) >= 2) & (text != 7)
    row = Row.of_texts(text, answers, end_id=9)
    for packed in (pack(row, jnp.ones((2, 3), bool), 2, length), *([row] if not length else [])):
        _, metrics = token_loss(50 * jax.nn.one_hot(packed.targets, 10), packed)
        assert metrics["exact"] == exact and metrics["cut"] == cut and metrics["loss"][1] == exact[1]


def test_what_is_learned_has_questions():
    with pytest.raises(UserError, match="dialogues is empty.* choose one of scenes, scenes_in_words, captions, tabs"):
        create_objective(config_of("vision_adapter.py", "--config.data.dialogues="))


def test_pairs_do_not_leave_an_encoder_to_a_source_that_it_is_not_of():
    sources = [f"--config.initialize.{name}.source=runs/{name}" for name in ("vision_adapter", "encoder")]
    with pytest.raises(UserError, match="initialize.encoder.source would replace .*initialize.vision_adapter.source"):
        pin_bases(config_of("vision_adapter.py", "--config.lora.rank=2", *sources))


def test_packed_rows_are_of_one_device():
    config = config_of("vision_adapter.py", "--config.loss.pack=4", "--config.mesh.microbatches=4")
    with pytest.raises(UserError, match="loss.pack=4 does not divide the examples .* has of a microbatch, 2"):
        create_program(config, make_mesh(config.mesh, jax.devices()[:1]))
