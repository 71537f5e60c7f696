"""What a run folder keeps of the tokenizer, and of its config."""

import pytest

from cli.config import load_config, to_json
from cli.errors import UserError
from data.tokenizer import Tokenizer
from train.workdir import copy_tokenizers, open_workdir
from weights.run import TOKENIZER, WRITES_WITH, Run


def config_of(scenes_dir, *overrides):
    return load_config(["--config=configs/scenes/dalle.py:debug", f"--config.data.data_dir={scenes_dir}", *overrides])


def test_a_run_keeps_the_tokenizer_that_its_config_asks_for(scenes_dir, tmp_path):
    vocabulary = tmp_path / "merges.txt"
    vocabulary.write_text("#version: 0.2\nr e\nre d</w>\n")
    sizes = {}
    for name, overrides in {
        "plain": (),
        "framed": ("--config.data.text_ends=True",),
        "clip": (f"--config.data.tokenizer={vocabulary}",),
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        config = config_of(scenes_dir, *overrides)
        copy_tokenizers(config, folder, resuming=False)
        sizes[name] = Run(folder, config).tokenizer().vocab_size
    assert sizes == {"plain": 351, "framed": 353, "clip": 516}


def test_a_run_that_goes_on_keeps_its_own(scenes_dir, tmp_path):
    config = config_of(scenes_dir, "--config.data.text_ends=True")
    copy_tokenizers(config, tmp_path, resuming=False)
    before = (tmp_path / TOKENIZER).read_bytes()
    config = config_of(scenes_dir, f"--config.data.tokenizer={tmp_path}/gone")
    copy_tokenizers(config, tmp_path, resuming=True)
    assert (tmp_path / TOKENIZER).read_bytes() == before
    with pytest.raises(UserError, match="no CLIP vocabulary at .*gone"):
        copy_tokenizers(config, tmp_path, resuming=False)


def test_a_run_keeps_the_tokenizer_that_its_captioner_writes_with(scenes_dir, tmp_path, capsys):
    source = tmp_path / "pretrained"
    source.mkdir()
    config = load_config(["--config=configs/scenes/unidiffuser.py:debug", f"--config.data.data_dir={scenes_dir}"])
    (source / "config.json").write_text(to_json(config))
    words = Tokenizer.train(["a b c d e"], vocab_size=270)
    config.frozen.captioner.update({"source": str(source), "text_vocab_size": 270, "text_end_id": 269})
    for name in ("lacking", "run"):
        (tmp_path / name).mkdir(exist_ok=True)
        copy_tokenizers(config, tmp_path / name, resuming=False)
        words.save(source / WRITES_WITH)
        (tmp_path / "run").mkdir(exist_ok=True)
        Tokenizer.train(["f g h i j"], vocab_size=262).save(tmp_path / "run" / WRITES_WITH)  # of a start that failed
    assert f"warning: {source} has no {WRITES_WITH}" in capsys.readouterr().out
    assert not (tmp_path / "lacking" / WRITES_WITH).exists()
    assert Run(tmp_path / "run", config).tokenizer(WRITES_WITH).vocab_size == words.vocab_size
    assert Run(tmp_path / "run", config).tokenizer().vocab_size == 353


def test_a_run_goes_on_with_another_kernel_of_attention(scenes_dir, tmp_path):
    kernels = ("xla", "auto", "splash")
    for kernel in kernels:
        open_workdir(tmp_path, config_of(scenes_dir, f"--config.models.dalle.implementation={kernel}"), resuming=True)
        assert Run.open(tmp_path).config.models.dalle.implementation == kernel
    with pytest.raises(UserError, match="another config .models.dalle.conv_kernel: 5 -> 3"):
        open_workdir(tmp_path, config_of(scenes_dir, "--config.models.dalle.conv_kernel=3"), resuming=True)
