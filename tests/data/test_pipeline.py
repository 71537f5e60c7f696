"""One deterministic stream: what an example is depends on its index alone."""

import itertools

import numpy as np
import pytest

from cli.errors import UserError
from configs.scenes.dalle import get_config
from data.pipeline import BatchReader, ExampleStream, RecordSource, dataset_folder, load_tokenizer


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
def tokenizer(scenes_dir):
    return load_tokenizer("scenes/single32", str(scenes_dir))


def make_stream(config, tokenizer, **options):
    return ExampleStream(config, tokenizer, **{"split": "train", "seed": 0, "train": True, **options})


def equal(first, second) -> bool:
    return first.keys() == second.keys() and all((first[name] == second[name]).all() for name in first)


def test_an_example_depends_on_its_index_alone(data_config, tokenizer):
    one, other = make_stream(data_config, tokenizer), make_stream(data_config, tokenizer)
    for index in (5, 0, 700, 5):  # any order, beyond one epoch, twice
        assert equal(one[index], other[index])
    assert one[700]["index"] == 700


def test_an_epoch_holds_each_record_once_and_the_next_has_another_order(data_config, tokenizer):
    stream = make_stream(data_config, tokenizer)
    size = stream.epoch_size
    order = [int(stream._order[index]) for index in range(2 * size)]
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


def test_captions_take_turns(data_config, tokenizer):
    stream = make_stream(data_config, tokenizer)
    size = stream.epoch_size
    place = int(stream._order[0])
    texts = set()
    for epoch in range(12):
        index = next(i for i in range(epoch * size, (epoch + 1) * size) if int(stream._order[i]) == place)
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
        assert stream.truncated == 6
        assert capsys.readouterr().out.count("warning") == 1
    finally:
        with data_config.unlocked():
            data_config.text_length = length


def test_a_damaged_record_is_replaced_and_counted(scenes_dir, capsys):
    source = RecordSource("scenes/single32", "train", str(scenes_dir))
    healthy = source[4]

    class Damaged:
        def __len__(self):
            return len(inner)

        def __getitem__(self, index):
            if index == 3:
                raise OSError("broken PNG")
            return inner[index]

    inner, source._source = source._source, Damaged()
    assert (source[3]["image"] == healthy["image"]).all()
    assert source.damaged == {3}
    assert "broken PNG" in capsys.readouterr().out


def test_cached_records_are_the_same(scenes_dir):
    plain, cached = (RecordSource("scenes/single32", "train", str(scenes_dir), cache=cache) for cache in (False, True))
    assert (plain[7]["image"] == cached[7]["image"]).all()
    assert cached[7] is cached[7]


def test_mistakes(scenes_dir, tmp_path):
    with pytest.raises(UserError, match="scripts.prepare"):
        dataset_folder("scenes/single32", str(tmp_path))
    with pytest.raises(UserError, match="it has .*held_out"):
        RecordSource("scenes/single32", "test", str(scenes_dir))
