"""CLIPs that were trained here or converted, on a dataset of photographs, classes and captions that has no grader."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import ImageColor

from cli.errors import UserError
from data.tokenizer import Tokenizer
from evaluation.__main__ import main
from evaluation.caption_accuracy import captioned_pictures
from evaluation.clip import linear_probe, reranking
from evaluation.clip import metrics as clip_evaluation
from evaluation.report import headline_records
from models import create_model
from sample.embedding import ClipEmbedder
from sample.sheets.grid import to_uint8
from scripts.convert import main as convert
from weights.files.tensors import write_tensors
from weights.formats import open_clip
from weights.pretrained import write_pretrained
from weights.sources import random_part

from ...data.made_up import NAME, prepare_made_up
from ...weights.clip_samples import FIELDS, RESNET, tiny

COLORS = ("red", "green", "blue", "white", "yellow", "black")
MERGES = ("r e", "re d</w>", "b l")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Six colors, of which `hidden` knows no labels, in pictures of several captions, one of them blank."""
    folder = tmp_path_factory.mktemp("datasets")
    records = [
        {"image": color, "label": number, "captions": [" ", f"{color} number {turn}", f"all {color}"]}
        for turn in range(4)
        for number, color in enumerate(COLORS)
    ]
    features = {
        "label": tfds.features.ClassLabel(names=list(COLORS)),
        "captions": tfds.features.Sequence(tfds.features.Text()),
    }
    unknown = [{**record, "label": -1 if number % 2 else record["label"]} for number, record in enumerate(records)]
    blank = [{**record, "captions": [" "]} for record in records]
    splits = {"train": records, "validation": records[:20], "hidden": unknown, "blank": blank}
    prepare_made_up(folder, features, splits)
    return folder


@pytest.fixture(scope="module")
def classes_dir(tmp_path_factory):
    """Classes without captions, and no split called validation."""
    folder = tmp_path_factory.mktemp("classes")
    records = [{"image": color, "label": number} for number, color in enumerate(COLORS)] * 4
    prepare_made_up(
        folder, {"label": tfds.features.ClassLabel(names=list(COLORS))}, {"train": records, "test": records}
    )
    return folder


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A pretrained folder as `scripts.convert` makes it of OpenAI's weights and vocabulary."""
    folder = tmp_path_factory.mktemp("converted")
    vocabulary = folder / "merges.txt"
    vocabulary.write_text("\n".join(["#version: 0.2", *MERGES, ""]), encoding="utf-8")
    size = 2 * 256 + len(MERGES) + 2
    fields = {**FIELDS, "text_vocab_size": size, "text_end_id": size - 1, "text_length": 40}
    _, params, _ = tiny(fields)
    write_tensors(folder / "clip.safetensors", open_clip.clip_to_open_clip(params, {}))
    weights = ["--source=openai", f"--input={folder}/clip.safetensors"]
    convert([*weights, f"--tokenizer={vocabulary}", f"--output={folder}/clip"])
    convert([*weights, f"--output={folder}/without"])
    return folder / "clip"


def evaluate(folder, *arguments):
    """The records that the command adds, by metric and split."""
    path = folder / "evaluation.json"
    before = json.loads(path.read_text()) if path.is_file() else []
    main([f"--run={folder}", *arguments])
    new = [record for record in json.loads(path.read_text()) if record not in before]
    records = {(record["metric"], record["split"]): record for record in new}
    assert len(records) == len(new)
    return records


@pytest.mark.parametrize("tower", [FIELDS, RESNET], ids=["vit", "resnet"])
def test_a_converted_clip_embeds_as_its_network_does(tower, tmp_path):
    tokenizer = Tokenizer.train(["a small red circle"] * 3, 298).with_ends()
    ids = {"text_vocab_size": tokenizer.vocab_size, "text_end_id": tokenizer.end_id, "text_length": 12}
    fields = {**tower, **ids}
    trees = jax.jit(lambda: random_part(fields, seed=0).trees())()
    data = {"image_size": fields["image_size"], "text_length": 12, "transform": "clip_training"}
    config = {"objective": "clip", "models": {"clip": fields}, "data": data}
    variables = {"clip": trees["variables"]} if trees["variables"] else {}
    write_pretrained(
        tmp_path / "clip", config, {"clip": trees["params"]}, variables, provenance={}, tokenizer=tokenizer
    )
    clip = ClipEmbedder.open(tmp_path / "clip")
    model = create_model(**fields)
    images = np.random.default_rng(0).integers(0, 256, (3, model.image_size, model.image_size, 3)).astype(np.uint8)
    texts = ["a red circle", "small", "circle"]
    text = jnp.stack([tokenizer.encode(text, 12).ids for text in texts])
    weights = {"params": trees["params"], **trees["variables"]}
    out = jax.jit(model.apply)(weights, jnp.asarray(images, jnp.float32) / 127.5 - 1, text)
    np.testing.assert_allclose(clip.images(images), out.image, atol=1e-4)
    np.testing.assert_allclose(clip.texts(texts), out.text, atol=1e-4)
    assert np.abs(clip.texts(texts)[0] - clip.texts(texts)[1]).max() > 1e-3


def test_a_converted_clip_is_evaluated(converted, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(linear_probe, "STRENGTHS", (1e-2, 1.0))
    monkeypatch.setattr(clip_evaluation, "BLOCK", 8)
    where = [f"--dataset={NAME}", f"--data_dir={data_dir}", "--num=20"]
    records = evaluate(converted, *where)
    assert set(records) == {(name, "validation") for name in ("zero_shot", "retrieval", "similarity")}
    zero_shot, retrieval = records["zero_shot", "validation"], records["retrieval", "validation"]
    assert set(zero_shot["values"]) == {"top_1", "top_5"} and zero_shot["classes"] == 6 and zero_shot["num"] == 20
    assert zero_shot["dataset"] == f"{NAME}/1.0.0"
    assert (retrieval["pictures"], retrieval["captions"]) == (20, 40)  # blank ones describe nothing
    assert (converted / "samples" / f"{NAME}_similarity_validation.png").is_file()

    (tmp_path / "classes").write_text("\n".join(f"something {color}" for color in COLORS))
    (tmp_path / "templates").write_text("a photo of {}\na drawing of {}\n")
    own = [f"--classes={tmp_path}/classes", f"--templates={tmp_path}/templates", "--num_train=24", "--num=24"]
    records = evaluate(converted, *where, *own, "--splits=hidden", "--metrics=zero_shot,linear_probe")
    zero_shot, probe = records["zero_shot", "hidden"], records["linear_probe", "hidden"]
    assert zero_shot["counted"]["top_5"] == 12 and zero_shot["classes"][0] == "something red"
    assert zero_shot["templates"] == ["a photo of {}", "a drawing of {}"]
    assert probe["counted"] == {"label": 12} and probe["num_train"] == 24


def test_what_is_read_in_blocks_is_what_is_read_at_once(clip_run, data_dir, monkeypatch):
    monkeypatch.setitem(clip_run.config.data, "dataset", NAME)
    monkeypatch.setitem(clip_run.config.data, "data_dir", str(data_dir))
    clip, sizes = ClipEmbedder(clip_run), []
    whole = clip_evaluation.read_pictures(clip, "validation", 20)
    assert len(whole.features) == len(whole.labels["label"]) == 20 and len(whole.shown) == 12
    for image, label in zip(whole.shown, whole.labels["label"], strict=False):
        assert tuple(image[0, 0]) == ImageColor.getrgb(COLORS[label])
    images = ClipEmbedder.images
    monkeypatch.setattr(ClipEmbedder, "images", lambda self, x: sizes.append(len(x)) or images(self, x))
    monkeypatch.setattr(clip_evaluation, "BLOCK", 8)
    parts = clip_evaluation.read_pictures(clip, "validation", 20)
    assert sizes == [8, 8, 4]
    np.testing.assert_allclose(parts.features, whole.features, atol=1e-6)
    np.testing.assert_array_equal(parts.shown, whole.shown)


def test_a_dataset_has_what_it_has(converted, classes_dir):
    """Classes and no captions; metrics that are named, on splits that are named."""
    where = [f"--dataset={NAME}", f"--data_dir={classes_dir}", "--num=20", "--splits=test"]
    assert set(evaluate(converted, *where)) == {("zero_shot", "test")}
    named = evaluate(converted, *where, "--metrics=linear_probe", "--num_train=24")
    assert named["linear_probe", "test"]["label"] == "label"
    with pytest.raises(UserError, match="name what to compute with --metrics; this run of clip has zero_shot"):
        main([f"--run={converted}", *where, "--label=breed"])


def test_a_run_is_evaluated_on_another_dataset_and_keeps_its_own_results(clip_run, data_dir, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(clip_run.run.folder, folder)
    own = evaluate(folder, "--num=12", "--splits=validation", "--metrics=retrieval,similarity", "--seed=1")
    picture = (folder / "samples" / "similarity_validation.png").read_bytes()
    where = [f"--dataset={NAME}", f"--data_dir={data_dir}", "--num=12", "--splits=validation"]
    records = evaluate(folder, *where, "--metrics=retrieval,similarity")
    assert records["retrieval", "validation"]["captions"] == 24
    assert (folder / "samples" / "similarity_validation.png").read_bytes() == picture
    assert (folder / "samples" / f"{NAME}_similarity_validation.png").is_file()
    assert own["retrieval", "validation"] in headline_records(folder)
    assert records["retrieval", "validation"] not in headline_records(folder)


def test_a_converted_clip_judges_and_compares(converted, stage2, tmp_path, monkeypatch):
    monkeypatch.setattr(reranking, "BLOCK", 5)
    folder = tmp_path / "run"
    shutil.copytree(stage2.run.folder, folder)
    arguments = ["--metrics=clip_score,rerank,cmmd", "--splits=validation", "--num=8", "--candidates=2"]
    arguments += [f"--clip={converted}", f"--features=clip:{converted}", f"--features_dir={tmp_path}"]
    records = evaluate(folder, *arguments)
    captions = captioned_pictures(stage2.config, "validation", 8).captions
    images = to_uint8(stage2(stage2.encode(captions), seed=0, indices=range(8))["image"])
    expected = ClipEmbedder.open(converted).cosines(images, captions).mean()
    assert records["clip_score", "validation"]["values"]["clip_score"] == pytest.approx(expected, abs=1e-5)
    assert records["rerank", "validation"]["clip"] == str(converted)
    assert records["cmmd", "validation"]["values"]["cmmd"] > 0
    assert "clip/clip_evaluation/" in json.dumps(records["cmmd", "validation"])


def test_mistakes_are_named(converted, data_dir, tmp_path):
    where = [f"--dataset={NAME}", f"--data_dir={data_dir}", "--num=20"]
    (tmp_path / "two").write_text("one\ntwo\n")
    without = converted.with_name("without")
    for arguments, message in [
        ([f"--run={converted}"], "was converted, and knows no dataset; give --dataset"),
        ([f"--run={converted}", *where, "--splits=test"], "no split 'test'"),
        ([f"--run={converted}", *where, f"--classes={tmp_path}/two"], "names 2 classes, and the field label has 6"),
        (
            [f"--run={converted}", *where, "--metrics=zero_shot", "--label=breed"],
            "no field 'breed' of class numbers .it has label",
        ),
        ([f"--run={converted}", *where, "--splits=blank"], f"record 0 of {NAME} has no caption .20 have none"),
        ([f"--run={converted}", *where, "--step=3"], "has no checkpoint 3"),
        ([f"--run={without}", *where], "takes no captions; it has no tokenizer; convert it again, with --tokenizer"),
    ]:
        with pytest.raises(UserError, match=message):
            main(arguments)
    with pytest.raises(UserError, match="holds something else"):
        main([f"--run={converted}", "--dataset=points/swiss_roll"])
    fields = {"name": "uvit", "image_size": 4, "patch_size": 2, "width": 64, "depth": 2, "heads": 1}
    _, params, _ = tiny(fields)
    config = {"objective": "diffusion", "models": {"denoiser": fields}}
    write_pretrained(tmp_path / "uvit", config, {"denoiser": params}, {}, provenance={})
    with pytest.raises(UserError, match="does not tell on which process the denoiser was trained"):
        main([f"--run={tmp_path}/uvit", *where])


def test_pictures_without_labels_have_no_accuracy(clip_run, data_dir, monkeypatch):
    monkeypatch.setitem(clip_run.config.data, "dataset", NAME)
    monkeypatch.setitem(clip_run.config.data, "data_dir", str(data_dir))
    pictures = clip_evaluation.read_pictures(ClipEmbedder(clip_run), "validation", 3)
    pictures.labels["label"][:] = -1
    monkeypatch.setattr(clip_evaluation, "read_pictures", lambda *_: pictures)
    with pytest.raises(UserError, match="no picture of this split has a class"):
        clip_evaluation.clip_makers(clip_run, "validation", 3, clip_evaluation.ClipSettings())["zero_shot"]()


def test_one_picture_has_no_others(clip_run):
    record = clip_evaluation.clip_makers(clip_run, "validation", 1, clip_evaluation.ClipSettings())["similarity"]()
    assert set(record["values"]) == {"own_cosine"} and record["pictures"] == 1
