"""Checkpoints: exact, atomic, and honest about what does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cli.errors import UserError
from weights import checkpoint
from weights.checkpoint import CheckpointStore, UnreadableCheckpoint

from ..object_store import ObjectStore

TREES = {
    "params": {"net": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3, jnp.bfloat16)}},
    "variables": {},
    "progress": {"step": jnp.int32(7)},
}


def abstract(trees):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), trees)


@pytest.fixture
def store(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    yield store
    store.close()


def test_what_is_saved_is_restored(store):
    store.save(7, TREES)
    store.wait()
    restored = store.restore(7, abstract(TREES))
    assert restored["variables"] == {}
    assert restored["params"]["net"]["bias"].dtype == jnp.bfloat16
    for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(TREES), strict=True):
        np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(theirs, np.float32))


def test_trees_are_read_by_name_without_the_code_that_wrote_them(store):
    store.save(1, TREES)
    store.wait()
    loaded = CheckpointStore(store.folder).load(1, ("params", "variables"))
    np.testing.assert_array_equal(loaded["params"]["net"]["kernel"], TREES["params"]["net"]["kernel"])
    assert loaded["variables"] == {}


def test_the_newest_are_kept(store):
    for step in (1, 2, 3, 4):
        store.save(step, TREES)
    store.close()
    assert store.steps() == [4, 3]


def test_every_difference_is_listed(store):
    store.save(1, TREES)
    store.wait()
    wanted = abstract(TREES)
    wanted["params"] = {"net": {"kernel": jax.ShapeDtypeStruct((2, 4), jnp.float32), "scale": jnp.ones(1)}}
    with pytest.raises(UserError) as error:
        store.restore(1, wanted)
    for part in (
        "missing params/net/scale",
        "unexpected params/net/bias",
        "params/net/kernel has shape (2, 3), not (2, 4)",
    ):
        assert part in str(error.value)


def test_an_empty_folder_is_no_checkpoint(store):
    store.save(1, TREES)
    store.wait()
    (store.folder / "9").mkdir()
    assert store.steps() == [1]
    store.save(9, TREES)
    store.wait()
    assert store.steps() == [9, 1]


def test_a_broken_checkpoint_says_so(store):
    store.save(1, TREES)
    store.wait()
    for path in sorted(store.folder.rglob("*"), reverse=True):
        if path.is_file() and path.name != "keep":
            path.write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        store.restore(1, abstract(TREES))


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot save"):
        CheckpointStore(tmp_path / "file" / "checkpoints").save(1, TREES)


def test_what_a_cut_short_save_left_is_no_checkpoint_but_is_known(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(1, TREES)
    store.close()
    (tmp_path / "2").mkdir()
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()
    assert store.steps() == [1] and store.unfinished() == ["2", "3.orbax-checkpoint-tmp"]
    store.set_aside(1)
    store.set_aside(1)  # another process was quicker
    assert store.steps() == [] and (tmp_path / "1.unreadable").is_dir()


@pytest.mark.parametrize("message", ["PERMISSION_DENIED: no", "RESOURCE_EXHAUSTED: out of memory"])
def test_trouble_of_the_machine_is_not_taken_for_damage(tmp_path, monkeypatch, message):
    store = CheckpointStore(tmp_path)
    store.save(1, TREES)
    store.close()

    def load(*arguments):
        raise ValueError(message)

    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", load)
    with pytest.raises(UserError, match="cannot be read here") as raised:
        store.load(1, ("params",))
    assert not isinstance(raised.value, UnreadableCheckpoint)


def test_a_failed_save_in_the_background_is_one_line_at_the_next(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    store.save(1, TREES)
    store.wait()

    def save(*arguments, **settings):
        raise ValueError("OUT_OF_RANGE: No space left on device")

    monkeypatch.setattr(store._writer, "save_checkpointables_async", save)
    with pytest.raises(UserError, match="cannot save a checkpoint in .*No space left"):
        store.save(2, TREES)
    monkeypatch.undo()
    store.close()


def test_in_a_store_a_checkpoint_is_one_when_its_mark_is_there(object_store: ObjectStore, bucket: str):
    place = f"{bucket}/run/checkpoints"
    store = CheckpointStore(f"gs://{place}", keep=2)
    assert store.steps() == store.unfinished() == []
    for step in (1, 2, 3):
        store.save(step, TREES)
    store.close()
    assert store.steps() == [3, 2] and store.unfinished() == []
    restored = store.restore(3, abstract(TREES))
    assert jax.tree.map(np.asarray, restored["params"]).keys() == TREES["params"].keys()
    np.testing.assert_array_equal(restored["params"]["net"]["kernel"], TREES["params"]["net"]["kernel"])

    # A process that was killed while it saved step 4 leaves all but the mark.
    for name in object_store.names(f"{place}/3/"):
        if name != "commit_success.txt":
            object_store.put(f"{place}/4/{name}", object_store[f"{place}/3/{name}"])
    assert store.steps() == [3, 2] and store.unfinished() == ["4"]
    store.save(4, TREES)
    store.close()
    assert store.steps() == [4, 3] and store.unfinished() == []

    store.remove_after(3)
    assert store.steps() == [3] and not object_store.names(f"{place}/4/")
    store.save(4, TREES)  # which a run that goes on from 3 makes again
    store.close()
    assert store.steps() == [4, 3]

    store.set_aside(4)
    store.set_aside(4)  # another process was quicker
    assert store.steps() == [3] and f"{place}/4/_CHECKPOINT_METADATA" in object_store.objects


def test_what_a_store_refuses_of_a_checkpoint_is_one_line(object_store: ObjectStore, bucket: str):
    store = CheckpointStore(f"gs://{bucket}/run")
    object_store.forbidden = "POST"
    with pytest.raises(UserError, match=f"cannot save a checkpoint in gs://{bucket}/run: .*storage.objects.create"):
        store.save(1, TREES)
        store.close()
