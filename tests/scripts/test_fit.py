"""The command that compiles for a TPU without one: its table, its errors, and the real compiler."""

import importlib.metadata
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cli.config import load_config
from cli.errors import UserError
from cost import gpu_memory, gpu_search
from cost.answering import fit_answers
from cost.chips import GIB
from cost.fit_report import COLUMNS, fit_table, format_report, row_hashes, table_row
from cost.scaling import COLUMNS as SCALING_COLUMNS
from cost.scaling import TURNS, Point, scaling_table, turns_table
from cost.search import NoAnswer
from scripts import fit
from scripts.describe import describe

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "tpu.md"
PAPERS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs" / "paper").glob("[a-z]*.py"))
CONFIG = "configs/paper/dalle_12b.py:debug"


def config_of(*overrides: str):
    return load_config([f"--config={ROOT / CONFIG}", *overrides])


def report_of(**changes):
    report = {
        "config": CONFIG,
        "topology": "v5e:2x2",
        "chips": 4,
        "devices": 4,
        "mesh": {"data": 2, "fsdp": 2, "tensor": 1, "microbatches": 3},
        "batch_size": 8,
        "parameters": {"trained": 12_293_853_056, "held": 0, "frozen": 97_616_006},
        "fits": True,
        "memory_bytes": 12 * GIB,
        "hbm_bytes": int(15.75 * GIB),
        "argument_bytes": 3 * GIB,
        "argument_bytes_without_padding": 2 * GIB,
        "matrix_flops_per_step": 2.5e15,
        "matrix_flops_with_recomputation": 3e15,
        "collectives": {
            "all-reduce": {"count": 7, "sent_bytes": 3_000_000_000},
            "all-gather": {"count": 2, "sent_bytes": 500_000_000},
        },
        "loops_of_unknown_length": 0,
        "bound": {
            "seconds": 3.8,
            "by": "compute",
            "compute_seconds": 3.8,
            "memory_seconds": 0.1,
            "interconnect_seconds": 0.2,
            "mfu": 0.834,
        },
        "compile_seconds": 61.2,
        "versions": {"jax": "1.2.3", "libtpu": "4.5.6"},
        "hashes": "aaaaaaaa bbbbbbbb",
    }
    return {**report, **changes}


REFUSED = {"fits": False, "memory_bytes": 96 * GIB, "argument_bytes": None, "collectives": None, "bound": None}


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.md"
    rule = "|---" * len(COLUMNS) + "|"
    path.write_text(f"# Title\n\nText.\n\n| {' | '.join(COLUMNS)} |\n{rule}\n\nMore text.\n")
    return path


def test_a_row_says_what_the_report_says():
    row = table_row(report_of())
    assert row["data x fsdp x tensor"] == "2 x 2 x 1" and row["microbatches"] == "3"
    assert row["parameters"] == "12.29 B" and row["memory / HBM, GiB"] == "12.00 / 15.75"
    assert (row["fits"], row["PFLOPs a step"], row["sent, GB"]) == ("yes", "2.5", "3.5")
    assert (row["bound"], row["MFU at bound"]) == ("3.8 s, compute", "83%")
    assert (row["compiled in"], row["jax, libtpu"]) == ("61 s", "1.2.3, 4.5.6")
    refused = table_row(report_of(**REFUSED))
    assert (refused["fits"], refused["memory / HBM, GiB"]) == ("no", "96.00 / 15.75")
    assert refused["bound"] == refused["sent, GB"] == refused["MFU at bound"] == "-"


def test_a_report_says_by_how_much_a_step_fits_or_not():
    text = format_report(report_of())
    assert "12.00 GiB of 15.75 GiB: fits, 3.75 GiB left" in text
    assert "3.8 s, by compute" in text and "83.4% (compiled, not run)" in text
    text = format_report(report_of(**REFUSED))
    assert "96.00 GiB of 15.75 GiB: does not fit: 80.25 GiB too much" in text and "MFU" not in text


@pytest.mark.parametrize(("changes", "code"), [({}, 0), (REFUSED, 1)])
def test_a_row_that_still_holds_is_not_compiled_again(page, capsys, changes, code):
    arguments = [f"--config={CONFIG}", "--config.mesh.fsdp=2"]
    hashes = row_hashes(load_config(arguments))
    name = f"{CONFIG} --config.mesh.fsdp=2"
    fit_table(page).write(table_row(report_of(config=name, hashes=hashes, **changes)))
    before = page.read_text()
    assert fit.main([*arguments, f"--table={page}"]) == code
    assert capsys.readouterr().out.startswith("cached: ")
    assert fit.main([*arguments, f"--table={page}", "--json"]) == code
    assert json.loads(capsys.readouterr().out)["cached"] is True
    assert page.read_text() == before


KERNELS = ("auto", "xla", "splash")


def test_a_hash_follows_what_the_compiled_step_depends_on():
    hashes = row_hashes(config_of())
    apart = ("log.every=7", "seed=3", "data.data_dir=/d", "frozen.dvae.source=runs/x", "checkpoint.keep=9")
    assert row_hashes(config_of(*(f"--config.{each}" for each in apart))) == hashes
    for each in ("batch_size=8", "models.dalle.width=64", "mesh.fsdp=2", "data.image_size=64", "optimizer.b1=0.5"):
        of_config, of_all = row_hashes(config_of(f"--config.{each}")).split()
        assert of_config not in hashes and of_all not in hashes
    kernels = {name: row_hashes(config_of(f"--config.models.dalle.implementation={name}")) for name in KERNELS}
    assert kernels["auto"] == kernels["xla"] == hashes != kernels["splash"]  # the choice on a TPU is the plain one
    topology = row_hashes(config_of("--config.mesh.topology=v6e:2x2"))
    assert topology != hashes


def test_a_hash_follows_the_compilers_versions(monkeypatch):
    of_config, of_all = row_hashes(config_of()).split()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9")
    new_config, new_all = row_hashes(config_of()).split()
    assert new_config == of_config and new_all != of_all


def test_mistakes_are_one_line(page, monkeypatch):
    with pytest.raises(UserError, match="unknown GPU 'b9000'"):
        fit.main([f"--config={CONFIG}", "--gpu=b9000"])
    with pytest.raises(UserError, match="--gpu goes without --topology and --table"):
        fit.main([f"--config={CONFIG}", "--gpu=24", f"--table={page}"])
    with pytest.raises(UserError, match="unknown --search=v9; choose one of v3, v4, v5e"):
        fit.main([f"--config={CONFIG}", "--search=v9"])
    with pytest.raises(UserError, match="--search goes without --topology, --table and --json"):
        fit.main([f"--config={CONFIG}", "--search=v5e", "--json"])
    for arguments in (("--decode", "--gpu=24"), ("--decode", f"--table={page}"), ("--decode=-1",)):
        with pytest.raises(UserError, match="of 0 or more questions, goes without --gpu, --search and --table"):
            fit.main([f"--config={CONFIG}", *arguments])
    for minutes in ("0", "nan", "inf"):
        with pytest.raises(UserError, match=f"--minutes={minutes} is not above 0 and at most 10000"):
            fit.main([f"--config={CONFIG}", "--search=v5e", f"--minutes={minutes}"])
    with pytest.raises(UserError, match="unknown --search=v5e:few; choose one of v3, v4, v5e"):
        fit.main([f"--config={CONFIG}", "--search=v5e:few"])
    with pytest.raises(UserError, match="--scaling goes without --gpu, --search, --table, --json and --decode"):
        fit.main([f"--config={CONFIG}", f"--scaling={page}", "--json"])
    with pytest.raises(UserError, match="--chips and --examples are of --scaling"):
        fit.main([f"--config={CONFIG}", "--examples=4"])
    with pytest.raises(UserError, match="--chips=4x4 is not a list of numbers, such as 1,4,16"):
        fit.main([f"--config={CONFIG}", f"--scaling={page}", "--chips=4x4"])
    with pytest.raises(UserError, match="page.md has no table with the columns config, topology, examples"):
        fit.main([f"--config={CONFIG}", f"--scaling={page}"])
    with pytest.raises(UserError, match="unknown topology 'v5litepod:2x2'; choose one of v3:2x2 .* v5e:4x4"):
        fit.main([f"--config={CONFIG}", "--topology=v5litepod:2x2"])
    with pytest.raises(UserError, match="config.mesh.topology names no slice"):
        fit.main(["--config=configs/scenes/dvae.py"])
    with pytest.raises(UserError, match="there is no page .*none.md"):
        fit.main([f"--config={CONFIG}", f"--table={page.parent / 'none.md'}"])
    page.write_text("no table")
    with pytest.raises(UserError, match="has no table with the columns config, topology"):
        fit.main([f"--config={CONFIG}", f"--table={page}"])
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(UserError, match="the TPU compiler is missing: pip install libtpu"):
        fit.main([f"--config={CONFIG}"])


# For one GPU; docs/tpu.md says so.
WITHOUT_ROW = ("configs/paper/stable_diffusion_tuning.py",)


@pytest.mark.parametrize("name", PAPERS)
def test_every_paper_config_names_a_slice_and_fits_there(name):
    """The row is of the config as it is now: `python -m scripts.fit --config=... --table=docs/tpu.md` renews it."""
    config = load_config([f"--config={ROOT / name}"])
    row = fit_table(PAGE).find(name, config.mesh.topology)
    if name in WITHOUT_ROW:
        assert row is None and f"`{name}`" in PAGE.read_text()
        return
    assert row is not None, f"docs/tpu.md has no row of {name} on {config.mesh.topology}"
    assert row["hashes"].split()[0] == row_hashes(config).split()[0], f"the row of {name} is out of date"
    assert row["fits"] == "yes"


def test_rows_of_scaling_are_of_the_configs_as_they_are_now():
    """`python -m scripts.fit --config=... --scaling=docs/scaling.md` renews them."""
    rows = scaling_table(ROOT / "docs" / "scaling.md").read()
    assert rows
    for row in rows:
        config = load_config([f"--config={ROOT / row['config'].split()[0]}", *row["config"].split()[1:]])
        devices = math.prod(map(int, row["data x fsdp x tensor"].split(" x ")))
        changed = Point(row["topology"], devices, int(row["examples a device"])).apply(config)
        assert row["hashes"].split()[0] == row_hashes(changed).split()[0], f"out of date: {row}"


def test_the_12_billion_transformer_does_not_fit_16_chips():
    """Both answers are on the page, and arithmetic gives the second too."""
    name = "configs/paper/dalle_12b.py"
    row = fit_table(PAGE).find(f"{name} --config.mesh.fsdp=16", "v5e:4x4")
    assert row is not None and row["fits"] == "no"
    needed, available = (float(part) for part in row["memory / HBM, GiB"].split(" / "))
    # Parameters, two moments and the moving average, 4 bytes each; a layer's input for each of 64 layers, in bfloat16.
    state = 16 * 12_293_853_056 / 16 / GIB
    inputs = 64 * (1024 / 16) * 1280 * 3968 * 2 / GIB
    assert needed > state + inputs > available


def run_command(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    command = [sys.executable, "-m", "scripts.fit", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**environment, **variables}, capture_output=True, text=True, timeout=600
    )


@pytest.mark.slow
def test_the_real_compiler_answers(page):
    arguments = (f"--config={CONFIG}", "--config.frozen.dvae.source=runs/nowhere", f"--table={page}")
    result = run_command(*arguments, "--json")
    assert result.returncode == 0 and result.stderr == ""
    report = json.loads(result.stdout)
    expected = describe(config_of("--config.models.dalle.remat=none"), depth=1)
    assert report["parameters"]["trained"] == expected["trained"]["dalle"]["parameters"]
    assert report["matrix_flops_per_step"] == expected["matrix_flops_per_step"]
    assert (report["chips"], report["devices"], report["mesh"]["data"]) == (4, 4, 4)
    assert report["fits"] and report["loops_of_unknown_length"] == 0
    # Tiles pad small arrays to many times their size; activations of one example are small too.
    assert report["argument_bytes_without_padding"] < report["argument_bytes"] < report["memory_bytes"] < 64 * 2**20
    # Data parallel: float32 gradients of all parameters are summed over 4 devices, and a few metrics.
    gradients = 2 * 4 * report["parameters"]["trained"] * 3 // 4
    assert set(report["collectives"]) == {"all-reduce"}
    assert gradients / 2 <= report["collectives"]["all-reduce"]["sent_bytes"] < 1.1 * gradients
    again = run_command(*arguments)
    assert again.returncode == 0 and again.stdout.startswith("cached: ")


@pytest.mark.slow
def test_what_does_not_fit_exits_with_1():
    # The pictures alone, 2^25 of 32 x 32 bytes x 3, are 24 GiB on each of four devices.
    result = run_command("--config=configs/paper/dvae.py:debug", "--config.batch_size=33554432")
    assert result.returncode == 1 and result.stderr == "", result.stderr
    assert "of 15.75 GiB: does not fit: " in result.stdout


@pytest.mark.parametrize(("memory", "code"), [("80:2", 0), ("24:2", 1)])
def test_gpus_are_answered_with_an_estimate(monkeypatch, capsys, memory, code):
    def fit_gpus(config, gpu):
        mesh = {**dict.fromkeys(("data", "fsdp", "tensor"), 1), "microbatches": 1}
        return gpu_memory.GpuFit(gpu, mesh, config.batch_size, {"trained": 1}, {"batch": 40 * GIB}, GIB, None)

    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(gpu_memory, "fit_gpus", fit_gpus)
    arguments = [f"--config={CONFIG}", f"--gpu={memory}"]
    assert fit.main([*arguments, "--json"]) == code
    report = json.loads(capsys.readouterr().out)
    assert (report["gpus"], report["fits"], report["estimated"]) == (2, code == 0, True)
    assert os.environ["XLA_FLAGS"].endswith("--xla_force_host_platform_device_count=2")
    assert fit.main(arguments) == code and "ESTIMATE" in capsys.readouterr().out


def test_kinds_of_gpus_are_searched_with_one_program(capsys):
    arguments = [f"--config={CONFIG}", "--config.frozen.dvae.source=runs/nowhere"]
    assert fit.main([*arguments, "--search=1,24:1"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("1 GPU(s), fsdp 1, 1 microbatch(es), remat none: fits: 0.") == 2
    assert "cheapest of 1: 1 GPU(s), by an estimate\n    python -m train --config=" + CONFIG in printed
    assert "cheapest of 24: " in printed and "--config.mesh.topology" not in printed


@pytest.mark.parametrize(("fitting", "code"), [((True, False), 0), ((False, True), 0), ((False, False), 1)])
def test_a_search_of_gpus_ends_well_if_any_fits(fitting, code, monkeypatch, capsys):
    """Its commands can be copied, and say each key once."""
    found = iter(fitting)

    def first(_, machines, **__):
        return (machines[0][0], True) if next(found) else None

    monkeypatch.setattr(gpu_search, "search_gpus", first)
    given = [f"--config={CONFIG}", "--config.trainable=('decoder/',)", "--config.mesh.fsdp=8"]
    assert fit.main([*given, "--search=80:1,24:1"]) == code
    commands = [line for line in capsys.readouterr().out.splitlines() if "python -m train" in line]
    assert len(commands) == sum(fitting)
    for command in commands:
        _, _, _, *arguments = shlex.split(command)
        assert arguments[:2] == given[:2]
        assert [each for each in arguments if "mesh.fsdp" in each] == ["--config.mesh.fsdp=1"]


@pytest.mark.parametrize(
    ("code", "error", "said"),
    [(-9, NoAnswer, "was killed, as happens where memory runs out"), (1, UserError, "^of no use$")],
)
def test_a_search_outlives_its_compiler(monkeypatch, code, error, said):
    ended = subprocess.CompletedProcess([], code, stdout="", stderr="a warning\nof no use\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(UserError, match=said) as raised:
        fit._compile_apart([f"--config={CONFIG}"], 1.0)
    assert raised.type is error


@pytest.mark.slow
def test_a_search_of_gpus_needs_none_of_them():
    """Whatever the shell says to run on: shapes are all that is asked."""
    arguments = ("--config=configs/toy/swiss_roll.py", "--search=24:1")
    result = run_command(*arguments, JAX_PLATFORMS="cuda")
    assert result.returncode == 0 and "cheapest of 24: 1 GPU(s), by an estimate" in result.stdout, result.stderr


@pytest.mark.slow
def test_a_search_asks_the_real_compiler(tmp_path):
    answers = tmp_path / "answers.json"
    arguments = ("--config=configs/toy/swiss_roll.py", "--config.mesh.fsdp=8", "--search=v5e:4", f"--answers={answers}")
    result = run_command(*arguments)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    first, *_ = result.stdout.splitlines()
    assert re.fullmatch(
        r"v5e:1x1 fsdp 1, 1 microbatch\(es\): fits: 0.00 of 15.75 GiB; step .* compiled in \d+ s", first
    )
    assert "cheapest: 1 chip(s), v5e:1x1, " in result.stdout and "v5e:2x2 fsdp 1" in result.stdout
    chosen = re.search(r"python -m train --config=(.*) --workdir", result.stdout.split("cheapest: ")[1])
    assert (
        chosen and load_config([f"--config={chosen[1].split()[0]}", *chosen[1].split()[1:]]).mesh.topology == "v5e:1x1"
    )
    assert chosen[1].count("mesh.fsdp=") == 1  # its own in the place of the one above
    assert all(report["fits"] for report in json.loads(answers.read_text()).values())
    stopped = run_command(
        "--config=configs/toy/swiss_roll.py", "--search=v5e:1", "--minutes=0.01", f"--answers={tmp_path / 'none'}"
    )
    assert stopped.returncode == 1 and "not known: the compiler was stopped after 0.01 minutes" in stopped.stdout
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_scaling_asks_the_real_compiler_and_goes_on(tmp_path):
    page = tmp_path / "page.md"
    heads = (f"| {' | '.join(names)} |\n{'|---' * len(names)}|\n" for names in (SCALING_COLUMNS, TURNS))
    page.write_text("\n".join(heads))
    name = "configs/toy/swiss_roll.py"
    arguments = (f"--config={name}", "--topology=v5e:2x2", f"--scaling={page}", "--chips=1,4", "--examples=8")
    result = run_command(*arguments)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    rows, before = scaling_table(page).read(), page.read_text()
    keys = [(row["topology"], row["examples a device"], row["fits"]) for row in rows]
    assert keys == [("v5e:1x1", "8", "yes"), ("v5e:2x2", "8", "yes")]
    alone, together = (float(row["sent, GB"]) for row in rows)
    assert alone == 0 < together  # gradients
    assert run_command(*arguments).stdout == result.stdout and page.read_text() == before
    larger = run_command(*arguments[:3], "--chips=4", "--examples=64", "--minutes=0.01")
    assert larger.returncode == 0 and "64 | not known: the compiler was stopped after 0.01 minutes" in larger.stdout
    assert page.read_text() == before
    larger = run_command(*arguments[:3], "--chips=4", "--examples=64")
    assert float(scaling_table(page).read()[-1]["sent, GB"]) == together, larger.stderr  # whatever the batch
    (turn,) = turns_table(page).read()
    assert (turn["config"], turn["topology"]) == (name, "v5e:2x2")


UNROLLED = """
import json, os, sys
from scripts.fit import ENVIRONMENT
os.environ.update(ENVIRONMENT)
from cli.config import load_config
from cost.compiled import step_flops, topology_devices
from train.distributed.mesh import make_mesh
from train.program import create_program
config = load_config(sys.argv[1:])
mesh = make_mesh(config.mesh, topology_devices("v5e:2x2"))
program = create_program(config, mesh)
with program.in_mesh():
    step = program.train_step.lower(program.abstract_state, program.abstract_frozen, program.abstract_batch).compile()
print(json.dumps([step_flops(config, mesh), 4 * step.cost_analysis()["flops"]]))
"""


@pytest.mark.slow
def test_matrix_flops_are_what_the_compiler_counts_where_it_counts_right():
    sizes = {"width": 512, "heads": 8, "depth": 2, "remat": "none", "scan": "false", "dtype": "float32"}
    overrides = [f"--config.models.dalle.{name}={value}" for name, value in sizes.items()]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    result = subprocess.run(
        [sys.executable, "-c", UNROLLED, f"--config={CONFIG}", "--config.batch_size=64", *overrides],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    counted, compiled = json.loads(result.stdout)
    assert counted == pytest.approx(compiled, rel=0.05)


@pytest.mark.slow
def test_the_real_compiler_answers_questions():
    name = "configs/paper/vision_adapter.py:debug"
    result = run_command(f"--config={name}", "--decode=8", "--json")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    report = json.loads(result.stdout)
    assert report["fits"] and (report["questions"], report["answer_length"]) == (8, 4)
    parameters = describe(load_config([f"--config={ROOT / name}"]), depth=1)["trained"]["vision_adapter"]
    assert report["parameter_bytes"] == 4 * parameters["parameters"] < report["memory_bytes"] < 64 * 2**20


def test_what_answers_nothing_is_refused():
    with pytest.raises(UserError, match="a dalle answers no questions"):
        fit_answers(config_of(), "v5e:2x2", 0)
