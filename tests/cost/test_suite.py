"""A suite's order of events, with rows of our own in place of processes."""

import json
from typing import Any

import pytest

from cli.errors import UserError
from cost import suite as suites
from cost.commands import OutOfTime
from cost.suite import run_suite
from cost.suite_parts import Part

ON = {"suite": "cpu", "toy": False, "clock": "wall", "compiled": True, "commit": "abc", "dirty": False}
ON |= {"machine": {"device": "a chip", "cores": 2}, "versions": {"jax": "1.2"}}
MARKS = ("<!-- benchmark:cpu -->", "<!-- end of benchmark:cpu -->")


def record(name, ratio=1.5, noise=False):
    seconds = {"median": 0.1, "low": 0.09, "high": 0.2}
    return {
        **ON,
        **{"row": name, "what": f"the {name}", "date": "2026-01-02", "spread": 1.1, "noise": noise, "attempts": 1},
        "sides": {"jax": {"seconds": seconds, "flops_per_second": 2e9}, "torch": {"seconds": seconds}},
        "failed": {},
        "ratios": {"torch": {"median": ratio, "low": 1.0, "high": 2.0}},
        "load_average": [0.5, 0.75],
    }


@pytest.fixture
def suite(tmp_path):
    """Runs it over rows one, two, three; `suite.asked` are those that were measured, `suite.said` what was said."""

    class Suite:
        asked, said, limits = [], [], []
        answers: dict[str, Any] = {"one": record("one"), "two": record("two"), "three": record("three")}
        plan: dict[str, Any] = {}
        page = tmp_path / "page.md"
        file = tmp_path / "cpu.jsonl"
        now, takes = 0.0, 1.0

        def run(self, **options):
            self.asked.clear()
            options = {"results": tmp_path, "page": self.page, "say": self.said.append, **options}
            return run_suite("cpu", start=self.start, now=lambda: self.now, **options)

        def start(self, arguments, seconds):
            self.limits.append(seconds)
            if "--list" in arguments:
                return {"rows": list(self.answers), "plan": self.plan, "on": ON}
            name = next(each for each in arguments if each.startswith("--row=")).removeprefix("--row=")
            self.asked.append(name)
            if isinstance(self.answers[name], Exception):
                raise self.answers[name]
            self.now += self.takes
            return {**self.answers[name], "compiled": "--compiled" in arguments}

    suite = Suite()
    suite.page.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n")
    return suite


def test_rows_are_saved_as_they_come_and_the_next_start_goes_on(suite):
    suite.answers["two"] = UserError("out of memory")
    assert suite.run() == 1
    assert [json.loads(line)["row"] for line in suite.file.read_text().splitlines()] == ["one", "three"]
    assert any("two: failed: out of memory" in line for line in suite.said)

    suite.answers["two"] = record("two", ratio=0.9, noise=True)
    assert suite.run() == 0 and suite.asked == ["two"]
    assert [json.loads(line)["row"] for line in suite.file.read_text().splitlines()] == ["one", "two", "three"]
    text = suite.page.read_text()
    assert (
        text.startswith(f"before\n{MARKS[0]}\n| row |") and text.endswith(f"{MARKS[1]}\nafter\n") and "old" not in text
    )
    assert (
        "| the two | 100 (90 to 200) | torch | 100 (90 to 200) | 0.90 (1.00 to 2.00), noise | 2 | 0.5 to 0.8 | a |"
        in text
    )
    assert "a: a chip, 2 cores; by the clock; jax 1.2; commit abc; 2026-01-02." in text

    suite.run()
    assert suite.asked == ["two"]  # noise is measured again
    suite.run(again=True, pattern="^(one|two)$")
    assert suite.asked == ["one", "two"]


def test_another_machine_is_another_measurement_and_a_line_cut_short_is_none(suite):
    other = {**record("one"), "machine": {"device": "another", "cores": 2}}
    suite.file.write_text(json.dumps(other) + "\n" + json.dumps(record("two")) + "\n" + '{"row": "thr')
    suite.run()
    assert suite.asked == ["one", "three"]
    assert [json.loads(line)["machine"]["device"] for line in suite.file.read_text().splitlines()] == [
        "another",
        "a chip",
        "a chip",
        "a chip",
    ]  # rows of each machine stay
    lines = suite.page.read_text().splitlines()
    assert [line[-4:] for line in lines if line.startswith("| the one")] == [" a |", " b |"]


@pytest.mark.parametrize("change", [{"dirty": True}, {"failed": {"torch, torch.compile": "no|compiler"}}])
def test_code_with_changes_and_failed_peers_are_measured_again(suite, change):
    suite.answers = {"one": {**record("one"), **change}}
    suite.run()
    suite.run()
    assert suite.asked == ["one"]
    if "failed" in change:
        row = "|  |  | torch, torch.compile | failed: no\\|compiler |  | 2 | 0.5 to 0.8 | a |"
        assert row in suite.page.read_text().splitlines()


def test_rows_without_torch_compile_are_other_rows(suite):
    suite.file.write_text(json.dumps({**record("one"), "compiled": False}) + "\n")
    suite.run(compiled=False, pattern="one")
    assert suite.asked == []
    suite.run(pattern="one")
    assert suite.asked == ["one"]


def test_results_elsewhere_leave_the_page_alone(suite, tmp_path, monkeypatch):
    monkeypatch.setattr(suites, "PAGE", suite.page)
    monkeypatch.setattr(suites, "RESULTS", tmp_path)
    for results, written in ((tmp_path / "elsewhere", False), (tmp_path, True)):
        run_suite("cpu", results=results, say=suite.said.append, start=suite.start)
        assert (results / "cpu.jsonl").is_file() and ("| row |" in suite.page.read_text()) == written


def test_what_cannot_be_is_said(suite):
    with pytest.raises(UserError, match="--rows=four matches none of one, two, three"):
        suite.run(pattern="four")
    suite.page.write_text("no marks")
    with pytest.raises(UserError, match="has no place for the table"):
        suite.run()
    assert suite.asked == []


def test_what_no_longer_fits_is_left_out_and_torch_compile_comes_last(suite):
    suite.plan = {
        "one": {"seconds": 30.0, "compiles": True},
        "two": {"seconds": 50.0, "compiles": False},
        "three": {"seconds": 20.0, "compiles": True},
    }
    suite.takes = 30.0
    assert suite.run(minutes=2.0) == 0
    # Behind 90 s without torch.compile, one with it would take 60 of 30 s, and three 40.
    assert suite.asked == ["one", "two", "three"] and suite.limits[1:] == [120.0, 90.0, 60.0]
    assert any(line.startswith("4 of 5  one, torch.compile too: left out: it takes about 60 s") for line in suite.said)
    assert suite.said[-1] == "2 of 5 left out for lack of time; the same command goes on with them"

    assert suite.run(minutes=2.0) == 0  # the next start finds what is there, and has time for the rest
    assert suite.asked == ["one", "three"]
    assert [json.loads(line)["compiled"] for line in suite.file.read_text().splitlines()] == [True, False, True]
    suite.said.clear()
    suite.run(minutes=2.0)
    assert suite.asked == [] and all("there already" in line for line in suite.said)


def test_less_time_than_a_row_takes_goes_to_shorter_ones_behind_it(suite):
    suite.plan = {name: {"seconds": seconds} for name, seconds in (("one", 50.0), ("two", 500.0), ("three", 60.0))}
    suite.takes = 50.0
    suite.answers["three"] = OutOfTime("stopped after 70 s")
    assert suite.run(minutes=2.0, compiled=False) == 0
    assert suite.asked == ["one", "three"]
    assert "3 of 3  three: stopped after 70 s" in suite.said and suite.said[-1].startswith("2 of 3 left out")


def test_parts_stand_where_they_say_and_below_the_table(suite):
    def run(result, failed):
        def found(toy, seconds):
            suite.limits.append((toy, seconds))
            suite.now += 7
            return {"result": result, "figures": {}, "failed": failed, "noise": False, "date": "2026-01-02"}

        return found

    parts = [
        Part("tests", "the tests", "", 10.0, run("2 passed, 1 failed", {"attention": "too far"})),
        Part("trained", "a training", "two", 10.0, run("all right", {})),
    ]
    assert suite.run(parts=parts, minutes=60.0, compiled=False) == 1
    names = [json.loads(line)["row"] for line in suite.file.read_text().splitlines()]
    assert names == ["tests", "one", "two", "trained", "three"]
    assert suite.limits[1] == (False, 3600.0)
    text = suite.page.read_text()
    assert "- the tests: 2 passed, 1 failed; attention failed: too far; 7 s (a)." in text
    assert "- a training: all right; 7 s (a)." in text
    suite.run(parts=parts, compiled=False)
    assert suite.asked == [] and suite.limits[-1] == (False, None)  # what failed is done again
    assert suite.run(parts=parts, compiled=False, pattern="trained") == 0


def test_figures_that_only_some_rows_have_get_a_column(suite):
    figures = {"mfu": 0.5, "memory_rate_share": 0.25, "memory_bytes": 2**31, "compile_seconds": 12.3}
    suite.answers["two"]["sides"]["jax"].update(figures)
    suite.run()
    lines = suite.page.read_text().splitlines()
    assert lines[2].endswith("| MFU | of the memory's rate | peak memory, MiB | compilation, s | load | on |")
    assert any("| 50.0% | 25.0% | 2,048 | 12 | 0.5 to 0.8 | a |" in line for line in lines)
