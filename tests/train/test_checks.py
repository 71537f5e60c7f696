"""What is wrong with a config itself or with where it starts, found before anything is built."""

import json
import re
from unittest import mock

import pytest
from ml_collections import ConfigDict

from cli.config import load_config, to_json
from cli.errors import UserError
from configs.common import get_defaults
from data.tokenizer import Tokenizer
from train.checks import check_config, check_parts, check_starts


@pytest.mark.parametrize(
    ("group", "key", "value", "message"),
    [
        ("ema", "paths", "(", r"config.ema.paths: '\(' is not a pattern of paths"),
        ("mesh", "rules", (("(", ()),), r"config.mesh.rules\[0\]: '\(' is not a pattern of paths"),
        ("mesh", "rules", ((".*", ()), 3), r"config.mesh.rules\[1\] is 3; it must be \(pattern, "),
        ("mesh", "rules", ((".*", (1,)),), r"config.mesh.rules\[0\] is \('\.\*', \(1,\)\)"),
    ],
)
def test_patterns_are_checked(group, key, value, message):
    config = get_defaults()
    config.steps = config.batch_size = config.log.every = config.evaluate.every = config.checkpoint.every = 1
    check_config(config)
    config[group][key] = value
    with pytest.raises(UserError, match=message):
        check_config(config)


def test_a_process_is_learned_anew_by_keys():
    with pytest.raises(UserError, match=r"config.relearn names 1, which is no key; name some, such as \('process',\)"):
        check_config(load_config(["--config=configs/scenes/latent_uvit.py", "--config.relearn=(1,)"]))


WORDS = mock.Mock(spec=Tokenizer, vocab_size=353, end_id=352, pad_id=0)


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        ("captioner", ("frozen.clip.text_end_id=5",), "frozen.clip.text_end_id is 5, but the tokenizer ends captions"),
        (
            "captioner",
            ("frozen.clip.text_vocab_size=100",),
            "frozen.clip.text_vocab_size is 100, but the tokenizer has",
        ),
        (
            "captioner",
            ("models.captioner.text_vocab_size=500", "initialize.language.source=pretrained/gpt2"),
            "500 ids with the end 352.* give its tokenizer as config.data.writes_with",
        ),
    ],
)
def test_captions_are_read_and_written_with_the_vocabulary_of_the_tokenizer(config, overrides, message):
    arguments = [f"--config=configs/scenes/{config}.py:debug"]
    check_parts(load_config([*arguments, "--config.frozen.clip.image_size=64"]), WORDS)  # pictures are resized for it
    with pytest.raises(UserError, match=message):
        check_parts(load_config([*arguments, *(f"--config.{override}" for override in overrides)]), WORDS)


def test_a_frozen_captioner_may_write_with_a_vocabulary_of_its_own():
    other = ("--config.frozen.captioner.text_vocab_size=200", "--config.frozen.captioner.text_end_id=199")
    check_parts(load_config(["--config=configs/scenes/unidiffuser.py:debug", *other]), WORDS)


TUNED = "paper/stable_diffusion_tuning"
OF_V = ("process.prediction=v", "process.schedule.zero_terminal_snr=True")


def started(folder, name, theirs=(), ours=(), part="denoiser", argument=":debug"):
    """A config, and as its source a folder (whose weights nobody asks for) of a run of the same one, both changed."""
    source, config = (
        load_config([f"--config=configs/{name}.py{argument}", *(f"--config.{each}" for each in changes)])
        for changes in (theirs, ours)
    )
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(to_json(source))
    (folder / "provenance.json").write_text(json.dumps({"sha256": "made up"}))
    with config.unlocked():
        config.initialize[part] = ConfigDict({"source": str(folder), "part": part})
    return config


@pytest.mark.parametrize(
    ("name", "part", "theirs", "ours", "said"),
    [
        (TUNED, "denoiser", OF_V[:1], (), r"process.prediction: 'v', not 'eps'; set --config.process.prediction=v, or"),
        (TUNED, "denoiser", ("process.schedule.steps=500",), (), "process.schedule.steps: 500, not 1000"),
        (TUNED, "denoiser", ("process.schedule.end=0.02",), (), "process.schedule.end: 0.02, not 0.012"),
        (TUNED, "denoiser", OF_V, OF_V[:1], "process.schedule.zero_terminal_snr: True, not False"),
        (TUNED, "denoiser", OF_V[:1], ("lora.rank=0",), "process.prediction: 'v', not 'eps'"),
        ("scenes/ddpm_uvit", "denoiser", ("process.prediction=v",), (), "process.prediction: 'v', not 'x0'"),
        ("scenes/unidiffuser", "unidiffuser", ("process.prediction=v",), (), "process.prediction: 'v', not 'x0'"),
        ("scenes/latent_unet", "denoiser", ("process.prediction=flow",), (), "process.prediction: 'flow', not 'x0'"),
        # What says nothing of what the network learned.
        (TUNED, "denoiser", ("process.weighting=min_snr", "sample.sampler=ddim"), (), ""),
        (TUNED, "denoiser", ("process.schedule.kind=cosine",) * 2, ("process.schedule.kind=cosine",), ""),
        ("scenes/ddpm_uvit", "text", ("process.prediction=v",), (), ""),
        ("scenes/clip", "clip", (), (), ""),
    ],
)
def test_a_network_goes_on_with_the_process_that_it_was_trained_on(name, part, theirs, ours, said, tmp_path, capsys):
    config = started(tmp_path / "source", name, theirs, ours, part)
    if not said:
        check_starts(config)
        assert capsys.readouterr().out == ""
        return
    with pytest.raises(UserError, match=said) as error:
        check_starts(config)
    assert f"config.initialize.{part}: {tmp_path}/source was trained on another process" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_flags_that_are_named_take_the_source_s_process_or_learn_the_other_anew(tmp_path, capsys):
    with pytest.raises(UserError) as error:
        check_starts(started(tmp_path, TUNED, OF_V))
    said = str(error.value)
    flags = re.findall(r"--config\.(process\.[^ ,]*)", said)
    assert sorted(flags) == list(OF_V)
    check_starts(started(tmp_path, TUNED, OF_V, flags))
    assert capsys.readouterr().out == ""
    (relearn,) = re.findall(r'--config\.(relearn=)"(.*)"$', said)
    check_starts(started(tmp_path, TUNED, OF_V, ["".join(relearn)]))
    assert "learned anew: process.schedule.zero_terminal_snr: True, not False; process" in capsys.readouterr().out
    check_starts(started(tmp_path, TUNED, OF_V, ["relearn=('process',)"]))
    capsys.readouterr()
    with pytest.raises(UserError, match=r"this run's: process.schedule.zero_terminal_snr: True, not False; set"):
        check_starts(started(tmp_path, TUNED, OF_V, ["relearn=('process.prediction',)"]))
    check_starts(started(tmp_path, TUNED, (), ["relearn=('process.predict',)"]))
    assert "config.relearn names process.predict, in which no source differs" in capsys.readouterr().out


def test_another_kind_of_schedule_takes_another_config(tmp_path):
    vp, edm = (started(tmp_path, "toy/swiss_roll", argument=each) for each in (":vp", ":edm"))
    (tmp_path / "config.json").write_text(to_json(vp))
    said = "process.schedule.name: 'vp', not 'edm'; .* set the same in the config's file, or learn"
    with pytest.raises(UserError, match=said):
        check_starts(edm)


@pytest.mark.parametrize("name", ["paper/ddpm", "paper/uvit", "paper/latent_diffusion", "scenes/ddpm_uvit"])
def test_every_recipe_of_a_chain_has_the_keys_that_are_named(name, tmp_path):
    """Those of every field in which a chain's process may differ."""
    argument = ":coco_s" if name == "paper/uvit" else ":debug"
    config = started(tmp_path, name, OF_V, argument=argument)
    with pytest.raises(UserError, match="set --config.process.schedule.zero_terminal_snr=True --config.process.pred"):
        check_starts(config)
