"""One deterministic stream: what an example is depends on its index alone."""

import hashlib
import itertools

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds

from cli.errors import UserError
from configs.scenes.dalle import get_config
from data.batch_reader import BatchReader
from data.pipeline import ExampleStream, batch_spec, load_tokenizer
from data.preprocess import choose_caption, transform_pair
from data.records import RecordSource
from data.tally import TRUNCATED

from .made_up import NAME, prepare_made_up


@pytest.fixture(scope="module")
def data_config(scenes_dir):
    config = get_config("debug")
    with config.unlocked():
        config.data.data_dir = str(scenes_dir)
        config.data.bpe_dropout = 0.3
        config.data.text_length = 48
        config.data.transform = "dalle_training"
    return config.data


@pytest.fixture(scope="module")
def tokenizer(data_config):
    return load_tokenizer(data_config)


def make_stream(config, tokenizer, **options):
    return ExampleStream(config, tokenizer, **{"split": "train", "seed": 0, "train": True, **options})


def equal(first, second) -> bool:
    return first.keys() == second.keys() and all((first[name] == second[name]).all() for name in first)


def test_an_example_depends_on_its_index_alone(data_config, tokenizer):
    one, other = make_stream(data_config, tokenizer), make_stream(data_config, tokenizer)
    for index in (5, 0, 700, 5):  # any order, beyond one epoch, twice
        assert equal(one[index], other[index])
    assert one[700]["index"] == 700


def test_the_stream_is_what_it_always_was(data_config, tokenizer):
    """A run that goes on under a newer version of a library must not see another order or other captions."""
    plain = data_config.copy_and_resolve_references()
    with plain.unlocked():
        plain.transform, plain.bpe_dropout = "center_square", 0.0
    summary = hashlib.sha256()
    for split, train in (("train", True), ("validation", False)):
        stream = make_stream(plain, tokenizer, split=split, train=train, seed=7)
        for index in (0, 1, 2, 299, 300, 301, 4000):
            example = stream[index]
            # Neither resized pixels nor ids: those are another library's to change.
            summary.update(example["image"].tobytes() + tokenizer.decode(example["text"]).encode())
    assert summary.hexdigest()[:16] == "88b9f3f98796cea6"


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
@pytest.mark.parametrize("split", ["train", "train[:1]", "train[:37]"])
def test_the_order_is_the_one_that_grain_shuffles(data_config, seed, split):
    stream = make_stream(data_config, None, seed=seed, split=split)
    order = grain.MapDataset.source(range(stream.epoch_size)).seed(seed).shuffle().repeat(None)
    for index in (*range(50), 299, 300, 601, 10**6, 2**40):  # the last wraps the seed of an epoch
        assert stream.place(index) == order[index]


@pytest.mark.parametrize("transform", ["center_square", "dvae_training", "dalle_training", "clip_training"])
def test_crop_caption_and_merges_draw_in_turn_from_one_generator(data_config, tokenizer, transform):
    config = data_config.copy_and_resolve_references()
    with config.unlocked():
        config.transform = transform
    stream = make_stream(config, tokenizer, seed=5)
    for index in range(20):
        record, rng = stream.source[stream.place(index)], np.random.default_rng((5, index))
        image = transform_pair(transform).training(record["image"], 32, rng)
        text = tokenizer.encode(record["captions"][choose_caption(record["captions"], rng)], 48, 0.3, rng).ids
        assert equal(stream[index], {"image": image, "index": np.int32(index), "text": text})


def test_text_does_not_change_the_pictures(data_config, tokenizer):
    with_text, without = make_stream(data_config, tokenizer), make_stream(data_config, None)
    assert "text" not in without[3]
    assert all((with_text[index]["image"] == without[index]["image"]).all() for index in range(8))


@pytest.mark.parametrize("text_length", [0, 9])
@pytest.mark.parametrize("train", [True, False])
def test_the_spec_is_that_of_a_real_batch(data_config, tokenizer, text_length, train):
    config = data_config.copy_and_resolve_references()
    with config.unlocked():
        config.text_length, config.image_size = text_length, 24
    batch = make_stream(config, tokenizer if text_length else None, train=train).batch(range(3))
    assert batch_spec(config) == {name: (value.shape[1:], value.dtype) for name, value in batch.items()}
    assert list(batch_spec(config)) == list(batch)


def test_an_epoch_holds_each_record_once_and_the_next_has_another_order(data_config, tokenizer):
    stream = make_stream(data_config, tokenizer)
    size = stream.epoch_size
    order = [stream.place(index) for index in range(2 * size)]
    assert sorted(order[:size]) == sorted(order[size:]) == list(range(size))
    assert order[:size] != order[size:]
    assert order[:size] != list(range(size))


def test_the_seed_changes_order_and_augmentation(data_config, tokenizer):
    assert not equal(make_stream(data_config, tokenizer)[3], make_stream(data_config, tokenizer, seed=1)[3])


def test_an_evaluation_stream_has_no_chance(data_config, tokenizer):
    stream = make_stream(data_config, tokenizer, split="validation", train=False)
    record = stream.source[0]
    assert (stream[0]["image"] == record["image"]).all()
    assert tokenizer.decode(stream[0]["text"]) == record["captions"][0]
    again = stream[stream.epoch_size]
    assert (again["image"] == record["image"]).all()


def test_evaluation_sees_pictures_as_the_training_transform_asks(data_config):
    config = data_config.copy_and_resolve_references()
    for transform in ("dvae_training", "clip_training"):
        with config.unlocked():
            config.transform, config.image_size = transform, 20
        stream = make_stream(config, None, split="validation", train=False)
        for index in range(4):
            expected = transform_pair(transform).evaluation(stream.source[index]["image"], 20, None)
            assert (stream[index]["image"] == expected).all()
    assert transform_pair("dvae_training").evaluation is not transform_pair("clip_training").evaluation


def test_the_config_says_which_tokenizer(data_config, tokenizer, clip_file):
    config = data_config.copy_and_resolve_references()
    text = "a small red circle"
    with config.unlocked():
        config.text_ends = True
    framed = load_tokenizer(config)
    assert framed.vocab_size == tokenizer.vocab_size + 2 and tokenizer.end_id is None
    assert framed.encode(text, 20).ids[1:5].tolist() == tokenizer.encode(text, 20).ids[:4].tolist()
    with config.unlocked():
        config.tokenizer = str(clip_file)
    clip = load_tokenizer(config)
    with config.unlocked():
        config.text_ends = False
    assert clip.end_id == load_tokenizer(config).end_id == 522
    with config.unlocked():
        config.tokenizer = "nowhere"
    with pytest.raises(UserError, match="no CLIP vocabulary at nowhere"):
        load_tokenizer(config)


def test_captions_of_a_stream_are_framed(data_config, clip_file):
    config = data_config.copy_and_resolve_references()
    with config.unlocked():
        config.tokenizer, config.text_length = str(clip_file), 10
    clip = load_tokenizer(config)
    stream = make_stream(config, clip)
    texts = stream.batch(range(8))["text"]
    assert (texts[:, 0] == clip.start_id).all() and (texts == clip.end_id).any(axis=1).all()
    assert len(stream.tally.places(TRUNCATED)) == 8 and (texts[:, -1] == clip.end_id).all()
    assert (texts.argmax(axis=1) == 9).all()  # where CLIP reads a caption's feature
    assert batch_spec(config)["text"] == (texts.shape[1:], texts.dtype)


TABLE = tfds.features.Sequence({"id": tfds.features.Scalar(np.int64), "text": tfds.features.Text()})


@pytest.mark.parametrize(
    ("name", "feature", "value"),
    [
        ("captions", tfds.features.Sequence(tfds.features.Text()), ["one", "zwölf", "three"]),
        ("captions", TABLE, [{"id": 7, "text": "one"}, {"id": 3, "text": "zwölf"}, {"id": 5, "text": "three"}]),
        ("caption", tfds.features.Text(), "zwölf"),
        ("text", tfds.features.Text(), "zwölf"),
    ],
)
def test_captions_of_other_datasets_are_found(data_config, tokenizer, tmp_path, name, feature, value):
    prepare_made_up(tmp_path, {name: feature}, {"train": [{name: value}] * 3})
    config = data_config.copy_and_resolve_references()
    with config.unlocked():
        config.dataset, config.data_dir = NAME, str(tmp_path)
    captions = ("one", "zwölf", "three") if name == "captions" else ("zwölf",)
    source = RecordSource(NAME, "train", str(tmp_path))
    assert [source[index]["captions"] for index in range(3)] == [captions] * 3
    texts = {tokenizer.decode(ids) for ids in make_stream(config, tokenizer).batch(range(60))["text"]}
    assert texts == set(captions)


def test_labels_are_the_records_classes(data_config):
    config = data_config.copy_and_resolve_references()
    with config.unlocked():
        config.label_field = "background"
    stream = make_stream(config, None)
    batch = stream.batch(range(20))
    assert batch["label"].dtype == np.int32
    assert [int(label) for label in batch["label"]] == [
        int(stream.source[stream.place(index)]["background"]) for index in range(20)
    ]
    assert len(set(batch["label"].tolist())) == stream.classes == 3
    assert batch_spec(config)["label"] == ((), np.dtype(np.int32))
    for field, message in (
        ("breed", "no class number in its field 'breed' .fields of class numbers: background, relation."),
        ("id", "'id'"),
    ):
        with config.unlocked():
            config.label_field = field
        with pytest.raises(UserError, match=message):
            make_stream(config, None)


def test_captions_take_turns(data_config, tokenizer):
    stream = make_stream(data_config, tokenizer)
    size = stream.epoch_size
    place = stream.place(0)
    texts = set()
    for epoch in range(12):
        index = next(i for i in range(epoch * size, (epoch + 1) * size) if stream.place(i) == place)
        texts.add(tokenizer.decode(stream[index]["text"]))
    assert len(texts) > 2
    assert texts <= set(stream.source[place]["captions"])


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_are_rows_of_the_stream(data_config, tokenizer, workers):
    stream = make_stream(data_config, tokenizer)
    reader = BatchReader(stream, batch_size=8, rows=(2, 3, 7), examples_seen=16, workers=workers, read_ahead=3)
    batches = list(itertools.islice(reader, 5))
    reader.close()
    for number, batch in enumerate(batches):
        assert batch["index"].tolist() == [16 + 8 * number + row for row in (2, 3, 7)]
        assert equal(batch, stream.batch(batch["index"].tolist()))


def test_another_batch_size_continues_the_same_stream(data_config, tokenizer):
    stream = make_stream(data_config, tokenizer)
    small = BatchReader(stream, batch_size=4, rows=range(4), examples_seen=8)
    large = BatchReader(stream, batch_size=8, rows=range(8), examples_seen=8)
    two = [next(small), next(small)]
    joined = {name: np.concatenate([batch[name] for batch in two]) for name in two[0]}
    assert equal(joined, next(large))
    small.close()
    large.close()


def test_long_captions_are_cut_and_counted(data_config, tokenizer, capsys):
    with data_config.unlocked():
        length, data_config.text_length = data_config.text_length, 2
    try:
        stream = make_stream(data_config, tokenizer)
        assert stream.batch(range(6))["text"].shape == (6, 2)
        assert len(stream.tally.places(TRUNCATED)) == 6
        assert capsys.readouterr().out.count("warning") == 1
    finally:
        with data_config.unlocked():
            data_config.text_length = length
