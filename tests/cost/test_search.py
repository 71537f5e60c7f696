"""Which ways to run a step are compiled, in which order, and which is chosen: with a made-up compiler."""

import pytest
from ml_collections import ConfigDict

from cli.errors import UserError
from configs.common import get_defaults
from cost.chips import CHIPS, GIB
from cost.search import NoAnswer, Store, candidates, cheapest, fastest, search

CHIP = CHIPS["v5e"]


def config_of(batch_size=16, splits=True):
    config = get_defaults()
    config.batch_size = batch_size
    config.models.net = ConfigDict({"name": "net", "remat": "none"})
    config.models.plain = ConfigDict({"name": "plain"})
    config.mesh.rules = ((".*", ("fsdp",)),) if splits else ((".*", ()),)
    return config


class Machine:
    """Memory and time of a step, in the place of arithmetic and compiler: gibibytes and seconds."""

    def __init__(self, state, activations, by="compute", products=3):
        self.state, self.activations, self.by, self.products = state, activations, by, products
        self.compiled = []

    def argument_bytes(self, config, devices):
        return int(self.state * GIB / config.mesh.fsdp)

    def temporary_bytes(self, config, devices):
        kept = {"none": 1, "dots": 0.5, "full": 0.1}[config.models.net.remat]
        return int(self.activations * GIB * kept / devices / config.mesh.microbatches)

    def state_bytes(self):
        return int(self.state * GIB)

    def step_flops(self):
        return int(self.products * CHIP.flops)

    def compile(self, way):
        config, devices = way.apply(self.config), way.devices
        self.compiled.append((way.topology, config.mesh.fsdp, config.mesh.microbatches, config.models.net.remat))
        memory = self.argument_bytes(config, devices) + self.temporary_bytes(config, devices)
        again = {"none": 3, "dots": 3.5, "full": 4}[config.models.net.remat]
        seconds = again / devices + 0.01 * config.mesh.fsdp
        fits = memory <= CHIP.hbm_bytes
        bound = {"seconds": seconds, "by": self.by} if fits else None
        report = {"fits": fits, "memory_bytes": memory, "hbm_bytes": CHIP.hbm_bytes, "compile_seconds": 1.0}
        return {**report, "bound": bound}


def run(machine, path, most=16, **options):
    said = []
    config = machine.config = config_of(**options)
    fitting = search(
        config,
        candidates(config, CHIP, most),
        chip=CHIP,
        shapes=machine,
        compile_step=machine.compile,
        key=lambda changed: str((changed.mesh.to_dict(), changed.models.to_dict())),
        store=Store(path),
        say=lambda way, outcome: said.append((way, outcome)),
    )
    return fitting, said


def test_ways_begin_with_small_slices_and_little_recomputation():
    slices = candidates(config_of(), CHIP, 16)
    assert [each[0].topology for each in slices] == ["v5e:1x1", "v5e:2x2", "v5e:2x4", "v5e:4x4"]
    first = [(way.remat, way.microbatches, way.fsdp) for way in slices[1]]
    assert first == [(remat, parts, fsdp) for remat in ("none", "dots", "full") for parts in (1, 4) for fsdp in (1, 4)]
    assert {way.microbatches for way in slices[0]} == {1, 4, 16} and {way.microbatches for way in slices[3]} == {1}
    assert {way.fsdp for each in candidates(config_of(splits=False), CHIP, 16) for way in each} == {1}
    assert candidates(config_of(batch_size=3), CHIP, 16)[-1][0].chips == 1
    changed = slices[1][-1].apply(config_of())
    assert (changed.mesh.topology, changed.mesh.fsdp, changed.models.net.remat) == ("v5e:2x2", 4, "full")
    assert slices[1][-1].overrides() == (
        *("--config.mesh.topology=v5e:2x2", "--config.mesh.data=-1", "--config.mesh.fsdp=4"),
        *("--config.mesh.microbatches=4", "--config.models.net.remat=full"),
    )


def test_what_arithmetic_rules_out_is_not_compiled(tmp_path):
    """40 GiB of state fit four chips if they are split; 30 of activations do not at once."""
    machine = Machine(state=40, activations=30)
    fitting, said = run(machine, tmp_path / "answers.json")
    assert machine.compiled[:2] == [("v5e:2x2", 4, 1, "none"), ("v5e:2x2", 4, 4, "none")]
    assert all(fsdp > 1 for _, fsdp, _, _ in machine.compiled)
    assert cheapest(fitting)[0].chips == 4 and cheapest(fitting)[0].microbatches == 4
    assert fastest(fitting)[0].chips == 16
    outcomes = [outcome for _, outcome in said]
    assert "does not fit: 40.00 of 15.75 GiB, arguments alone; not compiled" in outcomes
    assert "does not fit: 17.50 of 15.75 GiB; compiled in 1 s" in outcomes
    machine = Machine(state=1, activations=100)
    _, said = run(machine, tmp_path / "others.json", most=1)
    assert said[0][1] == "does not fit: 101.00 of 15.75 GiB, by an estimate; not compiled"
    assert machine.compiled[0] == ("v5e:1x1", 1, 16, "none")


def test_slices_that_are_too_small_for_the_state_are_one_line_each(tmp_path):
    """100 GiB take seven chips: one and four are passed over, however they would split or recompute."""
    fitting, said = run(Machine(state=100, activations=1), tmp_path / "answers.json")
    small = {way.chips: outcome for way, outcome in said if way.chips < 8}
    assert sum(way.chips < 8 for way, _ in said) == len(small) == 2
    least = "no way fits: weights and optimizer alone are 25.00 of 15.75 GiB of each device, divided over all"
    assert small[4] == least and cheapest(fitting)[0].chips == 8


def test_a_slice_is_done_once_nothing_can_be_faster_on_it(tmp_path):
    machine = Machine(state=1, activations=1)
    run(machine, tmp_path / "a.json", most=4)
    assert machine.compiled == [("v5e:1x1", 1, 1, "none"), ("v5e:2x2", 1, 1, "none")]
    machine = Machine(state=1, activations=1, by="interconnect")  # another split might send less
    fitting, _ = run(machine, tmp_path / "b.json", most=4)
    assert machine.compiled[1:] == [("v5e:2x2", 1, 1, "none"), ("v5e:2x2", 4, 1, "none")]
    assert fastest(fitting)[0].fsdp == 1


def test_the_largest_slice_follows_the_fewest_and_spares_what_cannot_be_faster(tmp_path):
    """16 chips take 3.01 / 16 s or more; products alone take 3 / 8 on 8, and hardly anything if there are few."""
    fitting, said = run(machine := Machine(state=1, activations=1), tmp_path / "a.json")
    assert [topology for topology, *_ in machine.compiled] == ["v5e:1x1", "v5e:4x4"]
    assert (cheapest(fitting)[0].chips, fastest(fitting)[0].chips) == (1, 16)
    assert said[-1][0].topology == "v5e:2x4" and said[-1][1].startswith("no way is faster: products alone take 0.375 s")
    run(machine := Machine(state=1, activations=1, products=0.5), tmp_path / "b.json")
    assert [topology for topology, *_ in machine.compiled] == ["v5e:1x1", "v5e:4x4", "v5e:2x4", "v5e:2x2"]


def test_a_search_that_was_cut_goes_on(tmp_path):
    path, machine = tmp_path / "deep" / "answers.json", Machine(state=40, activations=60, products=0)
    compile_step, budget = machine.compile, 2

    def cut(way):
        if len(machine.compiled) == budget:
            raise KeyboardInterrupt
        return compile_step(way)

    machine.compile = cut
    with pytest.raises(KeyboardInterrupt):
        run(machine, path)
    machine.compile = compile_step
    fitting, said = run(machine, path)
    assert len(machine.compiled) == len(set(machine.compiled))  # none twice
    assert sum("kept from before" in outcome for _, outcome in said) == budget
    assert [way for way, _ in fitting] == [way for way, _ in run(Machine(40, 60, products=0), tmp_path / "new.json")[0]]
    path.write_text("[1]")
    with pytest.raises(UserError, match="not a search's file of answers"):
        Store(path)


def test_a_way_that_is_impossible_is_told_and_passed_over(tmp_path):
    machine = Machine(state=1, activations=1)
    arguments = machine.argument_bytes

    def refuse(config, devices):
        if devices == 4:
            raise UserError("dimension 2 does not divide")
        return arguments(config, devices)

    machine.argument_bytes = refuse
    fitting, said = run(machine, tmp_path / "answers.json", most=4)
    assert [way.chips for way, _ in fitting] == [1]
    assert said[-1][1] == "impossible: dimension 2 does not divide"


def test_what_the_compiler_was_stopped_at_is_told_passed_over_and_asked_again(tmp_path):
    """40 GiB of state: four chips would hold it, eight are known to."""
    machine, path = Machine(state=40, activations=1), tmp_path / "answers.json"
    compile_step = machine.compile

    def stop(way):
        if way.chips == 4:
            raise NoAnswer("stopped")
        return compile_step(way)

    machine.compile = stop
    fitting, said = run(machine, path, most=8)
    assert {outcome for way, outcome in said if way.chips == 4 and way.fsdp == 4} == {"not known: stopped"}
    assert cheapest(fitting)[0].chips == 8
    machine.compile = compile_step
    assert cheapest(run(machine, path, most=8)[0])[0].chips == 4
