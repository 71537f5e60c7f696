"""A converted Llama Vision with its tokenizer: it is asked about pictures at the terminal, and answers as it goes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from PIL import Image

from cli.config import load_config
from cli.errors import UserError
from data.llama_tokenizer import LlamaTokenizer
from data.pictures import read_picture
from data.tiles import canvases, tile_picture
from data.tokenizer import Tokenizer
from models import create_model
from sample.__main__ import main as sample
from sample.conditions import Order, make_conditions, order_rows, write_out
from sample.samplers import vision_adapter
from sample.trained import TrainedSampler
from scripts.convert import main as convert
from train.checks import check_parts
from weights.files.origin import open_origin
from weights.formats.contract import Network, write_files
from weights.formats.llama_runs import text_run
from weights.formats.meta_llama import write_meta
from weights.formats.transformers_mllama import mllama_files
from weights.run import Run

from ..data.llama_vocabulary import IMAGE, write_llama_vocabulary
from ..models.random_parameters import random_parameters

FIELDS = {"name": "vision_adapter", "width": 16, "depth": 2, "heads": 4, "kv_heads": 2, "mlp_hidden": 24}
FIELDS |= {"tile_size": 28, "patch_size": 14, "image_width": 8, "image_heads": 2, "image_layers": 1, "global_layers": 1}
FIELDS |= {"feature_layers": (0,), "max_tiles": 4, "cross_layers": (1,), "extra_tokens": 8, "rope_factor": 8.0}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A run folder, the ids of specials, and two picture files."""
    folder = tmp_path_factory.mktemp("llama")
    (folder / "theirs").mkdir()
    ids = write_llama_vocabulary(folder / "theirs" / "tokenizer.json")
    model = create_model(**FIELDS, text_vocab_size=ids[IMAGE], image_token=ids[IMAGE])
    params = random_parameters(model)
    write_files(folder / "theirs", mllama_files(model, params))
    ends = [ids[name] for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    (folder / "theirs" / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    convert([f"--input={folder}/theirs", f"--output={folder}/ours"])
    pictures = [folder / "red.png", folder / "blue.png"]
    for path, color, size in zip(pictures, ("red", "blue"), ((40, 30), (28, 80)), strict=True):
        Image.new("RGB", size, color).save(path)
    return folder / "ours", ids, pictures


def test_the_tokenizer_and_its_ends_come_along(converted):
    folder, ids, _ = converted
    run = Run.open(folder)
    tokenizer, model = run.tokenizer(), run.config.models.vision_adapter
    assert isinstance(tokenizer, LlamaTokenizer) and tokenizer.in_turns
    assert model.text_end_id == ids["<|eot_id|>"] and model.text_pad_id == ids["<|finetune_right_pad_id|>"]
    assert set(model.text_stop_ids) == {ids["<|end_of_text|>"], ids["<|eom_id|>"]}


def test_the_tokenizer_goes_out_and_comes_back(converted, tmp_path):
    folder, ids, _ = converted
    convert(["--to=transformers", f"--run={folder}", f"--output={tmp_path}/out"])
    convert([f"--input={tmp_path}/out", f"--output={tmp_path}/back"])
    first, again = Run.open(folder), Run.open(tmp_path / "back")
    for key in ("text_end_id", "text_stop_ids", "text_pad_id"):
        assert first.config.models.vision_adapter[key] == again.config.models.vision_adapter[key]
    rows = [run.tokenizer().encode("what is it?", 40).ids for run in (first, again)]
    np.testing.assert_array_equal(*rows)
    plain = LlamaTokenizer(tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")))
    assert not plain.in_turns and plain.encode("what", 9).ids[0] == ids["<|begin_of_text|>"]


def test_an_answer_is_printed_as_it_comes_and_is_what_a_batch_would_have(converted, capsys, monkeypatch, tmp_path):
    folder, ids, (red, blue) = converted
    trained = TrainedSampler.open(folder, chunk=1)
    order = Order(make_conditions(["what is it?"], (), [str(red)]), 0, {"answer_length": 6, "temperature": 1.0})
    rows = order_rows(trained, order)
    streamed = list(trained.stream(rows, seed=0, index=0, **order.settings))
    whole = trained(rows, seed=0, indices=[0], **order.settings)["text"][0]
    np.testing.assert_array_equal(streamed[-1], whole[: len(streamed)])
    assert [len(part) for part in streamed] == list(range(1, len(streamed) + 1))
    assert set(whole[len(streamed) :]) <= {trained.sampler.model.text_pad_id}
    parts: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(Run, "tokenizer", None)  # a file of megabytes is not parsed again for each token
        made = write_out(trained, order, rows, parts.append)
    assert len([part for part in parts if part.strip()]) > 1 and made.texts == ("".join(parts).removesuffix("\n"),)
    assert made.texts == trained.decode(whole[None])

    arguments = [f"--run={folder}", f"--image={red}", f"--image={blue}", "--prompt=what is it?", "--answer_length=6"]
    sample([*arguments, "--together", "--temperature=1", f"--out={tmp_path}/grid.png", f"--files={tmp_path}/files"])
    record = json.loads((tmp_path / "files" / "samples.json").read_text())["samples"][0]
    assert record["image"] == [str(red), str(blue)] and capsys.readouterr().out.startswith(record["text"])


def test_all_pictures_are_looked_at_and_stand_side_by_side_in_a_table(converted, tmp_path):
    folder, _, (red, blue) = converted
    trained = TrainedSampler.open(folder, chunk=1)
    asked = [order_rows(trained, Order(make_conditions(["a"], (), [str(red), str(two)], True))) for two in (red, blue)]
    params = trained.weights.params["vision_adapter"]
    first = jax.jit(lambda rows: vision_adapter._read(trained.sampler, 1, params, rows)[0])
    assert np.abs(first(asked[0]) - first(asked[1])).max() > 1e-4

    arguments = [f"--run={folder}", f"--image={red}", f"--image={blue}", "--together", "--prompt=what is it?"]
    sample([*arguments, "--answer_length=2", "--sweep=seed=0,1", f"--out={tmp_path}/grid.png"])
    assert len((tmp_path / "sweep.csv").read_text().splitlines()) == 3
    pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))
    assert all(np.any(np.all(pixels == color, axis=-1)) for color in ((255, 0, 0), (0, 0, 255)))


def test_pictures_of_any_shape_are_read_in_tiles_by_one_program(converted, tmp_path):
    folder, ids, _ = converted
    trained, length = TrainedSampler.open(folder, chunk=1), 4
    rng, files, places = np.random.default_rng(0), [], []
    for name, size in {"wide": (100, 27), "tall": (30, 84), "square": (50, 50), "small": (9, 9)}.items():
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize(size).save(tmp_path / f"{name}.png")
        files.append(str(tmp_path / f"{name}.png"))
    model, params = trained.sampler.model, trained.weights.params["vision_adapter"]
    params["projection"] = {name: 20 * leaf for name, leaf in params["projection"].items()}  # pictures count
    question = trained.encode(["what is it?"])["text"][0]
    prompt = question[question != model.text_pad_id]
    assert (prompt == ids[IMAGE]).sum() == 1
    score = jax.jit(model.apply)

    def directly(file):
        tiles, canvas = tile_picture(read_picture(file), model.tile_size, model.max_tiles)
        places.append(canvases(4)[canvas - 1])
        row = np.full(len(prompt) + length, model.text_pad_id)
        row[: len(prompt)] = prompt
        for place in range(len(prompt), len(row)):
            inputs = jnp.asarray(row)[None], jnp.asarray(tiles / 127.5 - 1, jnp.float32)[None, None]
            row[place] = score({"params": params}, *inputs, jnp.array([[canvas]]))[0, place - 1].argmax()
            if row[place] in (model.text_end_id, *model.text_stop_ids):
                break
        return row[len(prompt) :]

    expected = np.stack([directly(file) for file in files])
    assert places == [(1, 4), (3, 1), (2, 2), (1, 1)] and len({tuple(row) for row in expected.tolist()}) > 1
    order = Order(make_conditions(["what is it?"], (), files), 0, {"answer_length": length})
    programs = vision_adapter._answer._cache_size(), vision_adapter._begin._cache_size()
    rows = order_rows(trained, order)
    answers = trained(rows, seed=0, indices=[0] * 4, answer_length=length)["text"]
    np.testing.assert_array_equal(answers, expected)
    for place, row in enumerate(expected):
        one = {name: value[place : place + 1] for name, value in rows.items()}
        *_, streamed = trained.stream(one, seed=0, index=0, answer_length=length)
        np.testing.assert_array_equal(streamed, row[: len(streamed)])
    more = vision_adapter._answer._cache_size(), vision_adapter._begin._cache_size()
    assert more == (programs[0] + 1, programs[1] + 1)


def test_an_answer_ends_at_any_of_the_ends(converted):
    folder, ids, (red, _) = converted
    trained = TrainedSampler.open(folder, chunk=1)
    head = np.array(trained.weights.params["vision_adapter"]["language"]["text_head"]["kernel"])
    for name in ("<|eom_id|>", "<|eot_id|>"):
        head[:], wanted = 0, ids[name]
        head[:, wanted] = 1
        for sign in (1, -1):  # the state's sum may be of either
            trained.weights.params["vision_adapter"]["language"]["text_head"]["kernel"] = jax.numpy.asarray(sign * head)
            order = Order(make_conditions(["what is it?"], (), [str(red)]), 0, {"answer_length": 6})
            text = trained(order_rows(trained, order), seed=0, indices=[0], answer_length=6)["text"][0].tolist()
            if text[0] == wanted:
                assert text[1:] == [trained.sampler.model.text_pad_id] * 5 and trained.decode(np.array([text])) == ("",)
                break
        else:
            raise AssertionError("no sign leads to the end")


def test_one_picture_is_not_together(converted):
    folder, _, (red, _) = converted
    with pytest.raises(UserError, match="--together shows several"):
        sample([f"--run={folder}", f"--image={red}", "--prompt=a", "--together"])


def meta_folder(folder, **changes):
    """A Llama as Meta publishes it, with a tokenizer; returns the ids of its specials."""
    folder.mkdir()
    ids = write_llama_vocabulary(folder / "tokenizer.json", picture=False)
    fields = {name: FIELDS[name] for name in ("width", "depth", "heads", "kv_heads", "mlp_hidden", "rope_factor")}
    model = create_model("llama", **{**fields, "text_vocab_size": len(ids) + max(ids.values()), **changes})
    write_files(folder, write_meta(Network(model, random_parameters(model), {})))
    return ids


def test_whether_a_llama_of_meta_s_is_asked_in_turns_is_said(tmp_path, capsys):
    ids = meta_folder(tmp_path / "theirs")
    convert([f"--input={tmp_path}/theirs", f"--output={tmp_path}/base"])
    assert "a text that it goes on with" in (said := capsys.readouterr().out) and "give --prompts=turns" in said
    assert Run.open(tmp_path / "base").config.models.llama.text_end_id == ids["<|end_of_text|>"]
    convert([f"--input={tmp_path}/theirs", f"--output={tmp_path}/instructed", "--prompts=turns"])
    assert "a turn of a conversation" in capsys.readouterr().out
    assert Run.open(tmp_path / "instructed").config.models.llama.text_end_id == ids["<|eot_id|>"]
    with pytest.raises(UserError, match="choose one of turns, texts"):
        convert([f"--input={tmp_path}/theirs", f"--output={tmp_path}/other", "--prompts=chat"])
    # Eight answers at temperature 0 would be the same one.
    sample([f"--run={tmp_path}/base", "--prompt=a", "--answer_length=2", f"--out={tmp_path}/grid.png"])
    assert "1 text" in capsys.readouterr().out.splitlines()[-1]


def test_another_tokenizer_than_llama_3_s_is_left_behind_and_a_damaged_one_is_an_error(tmp_path, capsys):
    meta_folder(tmp_path / "theirs")
    file = tmp_path / "theirs" / "tokenizer.json"
    whole = file.read_text()
    file.write_text(whole.replace("<|begin_of_text|>", "<s>"))
    convert([f"--input={tmp_path}/theirs", f"--output={tmp_path}/ours"])
    assert "it is not Llama 3's (no <|begin_of_text|>)" in capsys.readouterr().out
    run = Run.open(tmp_path / "ours")
    assert run.tokenizer() is None and run.load().params["llama"]
    file.write_text(whole[:99])
    with pytest.raises(UserError, match="tokenizer.json cannot be read"):
        convert([f"--input={tmp_path}/theirs", f"--output={tmp_path}/damaged"])


def test_a_network_predicts_all_ids_but_the_picture_s(tmp_path):
    ids = write_llama_vocabulary(tmp_path / "tokenizer.json")
    origin, fields = open_origin(str(tmp_path)), {**FIELDS, "image_token": ids[IMAGE]}
    assert text_run(origin, {**fields, "text_vocab_size": ids[IMAGE]}, {}, {}, "turns").tokenizer
    with pytest.raises(UserError, match=f"has {ids[IMAGE]} ids, and the network {ids[IMAGE] - 1}"):
        text_run(origin, {**fields, "text_vocab_size": ids[IMAGE] - 1}, {}, {}, "turns")
    with pytest.raises(UserError, match=f"has {ids[IMAGE]} for a picture, and the network 5"):
        text_run(origin, {**fields, "text_vocab_size": 999, "image_token": 5}, {}, {}, "turns")

    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    config = load_config(["--config=configs/scenes/vision_adapter.py:debug"])
    with config.unlocked():
        model = config.models.vision_adapter
        model.text_end_id, model.text_pad_id = tokenizer.end_id, tokenizer.pad_id
        model.text_vocab_size, model.image_token = ids[IMAGE], ids[IMAGE]
    check_parts(config, tokenizer)
    with config.unlocked():
        model.text_vocab_size = model.image_token = ids[IMAGE] - 1
    with pytest.raises(UserError, match=f"text_vocab_size is {ids[IMAGE] - 1}, but the tokenizer has {ids[IMAGE] + 1}"):
        check_parts(config, tokenizer)
