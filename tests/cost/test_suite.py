"""A suite's order of events, with rows of our own in place of processes."""

import json
from typing import Any

import pytest

from cli.errors import UserError
from cost import suite as suites
from cost.suite import run_suite

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
        asked, said = [], []
        answers: dict[str, Any] = {"one": record("one"), "two": record("two"), "three": record("three")}
        page = tmp_path / "page.md"
        file = tmp_path / "cpu.jsonl"

        def run(self, **options):
            self.asked.clear()
            return run_suite("cpu", results=tmp_path, page=self.page, say=self.said.append, start=self.start, **options)

        def start(self, arguments):
            if "--list" in arguments:
                return {"rows": list(self.answers), "on": {**ON, "compiled": "--compiled" in arguments}}
            name = next(each for each in arguments if each.startswith("--row=")).removeprefix("--row=")
            self.asked.append(name)
            if isinstance(self.answers[name], Exception):
                raise self.answers[name]
            return self.answers[name]

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
