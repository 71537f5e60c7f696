"""How few GPUs are found to hold a step, with made-up arithmetic."""

from ml_collections import ConfigDict

from cli.errors import UserError
from configs.common import get_defaults
from cost.chips import GIB, gpu_of
from cost.gpu_search import gpu_candidates, search_gpus


class Shapes:
    """40 GiB of state that can be split, and so many of activations."""

    def __init__(self, activations, most):
        self.activations, self.most = activations, most

    def argument_bytes(self, config, devices):
        assert config.mesh.topology == ""
        return 40 * GIB // config.mesh.fsdp

    def temporary_bytes(self, config, devices):
        if config.mesh.microbatches > self.most:
            raise UserError("too many parts")
        kept = {"none": 1, "dots": 0.5, "full": 0.1}[config.models.net.remat]
        return int(self.activations * GIB * kept / devices / config.mesh.microbatches)

    def state_bytes(self):
        return 40 * GIB

    def step_flops(self):
        raise AssertionError


def search(asked, activations, most=16):
    config = get_defaults()
    config.batch_size = 16
    config.models.net = ConfigDict({"name": "net", "remat": "none"})
    config.mesh.rules = ((".*", ("fsdp",)),)
    gpu, said = gpu_of(asked), []
    found = search_gpus(
        config,
        gpu_candidates(config, gpu.count or 8),
        gpu=gpu,
        shapes=Shapes(activations, most),
        say=lambda way, outcome: said.append((way, outcome)),
    )
    return found, said


def test_the_fewest_gpus_come_first_and_what_computes_least_again():
    found, said = search("24", activations=10)
    assert found is not None
    way, sure = found  # 20 GiB of state leave 2 of 22.08: 10 / 2 in four parts are 1.25
    assert (way.chips, way.fsdp, way.microbatches, way.remat, sure) == (2, 2, 4, "none", True)
    assert way.overrides()[0] == "--config.mesh.data=-1"
    assert said[0][1].startswith("no way fits: weights and optimizer alone are 40.00 of 22.08 GiB of each device")
    assert [way.chips for way, _ in said].count(1) == 1 and len(said) == len(set(said))
    assert said[1][1] == "does not fit: 40.00 of 22.08 GiB, arguments alone"
    assert "does not fit: 25.00 of 22.08 GiB, by an estimate" in [outcome for _, outcome in said]
    assert dict(said)[way] == "fits: 21.25 of 22.08 GiB, by an estimate"


def test_ways_that_are_impossible_rule_out_no_others():
    """As microbatches of what has batch statistics."""
    found, said = search("24:2", activations=10, most=1)
    assert found is not None and (found[0].microbatches, found[0].remat) == (1, "full")
    assert "impossible: too many parts" in [outcome for _, outcome in said]


def test_an_estimate_that_could_be_wrong_is_told():
    found, said = search("24", activations=14)
    assert found is not None and found[1] is False
    assert dict(said)[found[0]] == "fits: 21.75 of 22.08 GiB, by an estimate that is too close to be sure of"


def test_too_few_gpus_hold_nothing():
    found, said = search("24:1", activations=1)
    assert found is None and {way.chips for way, _ in said} == {1}
