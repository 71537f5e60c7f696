"""Schedulers of diffusers: which keys a class reads, and which processes there are none of."""

import pytest

from cli.errors import UserError
from weights.formats.diffusers_scheduler import _OWN, SAMPLERS, read_scheduler, scheduler_config
from weights.formats.runs import denoiser_run

from ..stable_diffusion_samples import PROCESS, SAMPLE

ZERO = "rescale_betas_zero_snr"
# Each would change what is computed, or be refused, if a class read it.
ODD = {
    **{"clip_sample": True, "clip_sample_range": 2.0, "thresholding": True, "variance_type": "fixed_large", ZERO: True},
    **{"set_alpha_to_one": False, "skip_prk_steps": False, "use_karras_sigmas": True, "solver_order": 3},
    **{"algorithm_type": "sde-dpmsolver++", "solver_type": "heun", "final_sigmas_type": "sigma_min", "sigma_max": 9.0},
    **{"lower_order_final": False, "predict_x0": False, "timestep_values": [1], "interpolation_type": "log_linear"},
}


@pytest.mark.parametrize("kind", SAMPLERS)
def test_keys_that_a_class_does_not_read_are_said_and_change_nothing(kind, capsys):
    plain = read_scheduler({"_class_name": kind})
    capsys.readouterr()
    others = {key: value for key, value in ODD.items() if key not in _OWN[kind]}
    assert read_scheduler({"_class_name": kind, **others}) == plain
    (said,) = (line for line in capsys.readouterr().out.splitlines() if "is left out: " in line)
    assert kind in said and said.partition("is left out: ")[2].split(", ") == list(others)
    with pytest.raises(UserError, match="gamma: not known here; .* give --ignore_keys=gamma"):
        read_scheduler({"_class_name": kind, "gamma": 1})


def test_a_solver_s_type_is_the_class_s_own_where_another_class_s_stands():
    for kind, taken, refused in (
        ("UniPCMultistepScheduler", "midpoint", "bh1"),
        ("DPMSolverMultistepScheduler", "bh2", "heun"),
    ):
        document = {"_class_name": kind}
        assert read_scheduler({**document, "solver_type": taken}) == read_scheduler(document)
        with pytest.raises(UserError, match=f"solver_type is '{refused}'; it must be"):
            read_scheduler({**document, "solver_type": refused})


@pytest.mark.parametrize("kind", [kind for kind in SAMPLERS if ZERO in _OWN[kind]])
def test_a_chain_that_ends_in_noise_alone_is_of_no_network_that_predicts_noise(kind):
    document = {"_class_name": kind, ZERO: True}
    with pytest.raises(UserError, match=f"prediction_type is 'epsilon' and {ZERO} is True.*--ignore_keys={ZERO} if"):
        read_scheduler(document)
    for theirs, ours in (("v_prediction", "v"), ("sample", "x0")):
        process, _ = read_scheduler({**document, "prediction_type": theirs})
        assert process["schedule"]["zero_terminal_snr"] and process["prediction"] == ours


@pytest.mark.parametrize(
    ("sampler", "change", "kind"),
    [
        ("plms", {}, "PNDMScheduler"),
        ("plms", {"prediction": "x0"}, "DDIMScheduler"),
        ("euler_ancestral", {"prediction": "x0"}, "DDIMScheduler"),
        ("euler", {"prediction": "x0"}, "EulerDiscreteScheduler"),
        ("heun", {"clip": True}, "HeunDiscreteScheduler"),
        ("heun", {"zero": True, "prediction": "v"}, "DDIMScheduler"),
    ],
)
def test_a_class_is_written_that_computes_the_process(sampler, change, kind, capsys):
    zero = {"zero_terminal_snr": True} if change.get("zero") else {}
    process = {**PROCESS, **change, "schedule": {**PROCESS["schedule"], **zero}}
    process.pop("zero", None)
    document = scheduler_config(process, {**SAMPLE, "sampler": sampler})
    assert document["_class_name"] == kind
    assert ("the pipeline gets DDIMScheduler" in capsys.readouterr().out) == (kind == "DDIMScheduler")
    assert read_scheduler(document)[0] == process


@pytest.mark.parametrize(("sampler", "said"), [("euler", True), ("plms", True), ("ddim", False), ("heun", False)])
def test_estimates_that_a_class_does_not_cut_off_are_said(sampler, said, capsys):
    document = scheduler_config({**PROCESS, "clip": True}, {**SAMPLE, "sampler": sampler})
    line = f"warning: a {document['_class_name']} cuts no estimates off at -1 and 1"
    assert (line in capsys.readouterr().out, "clip_sample" in document) == (said, not said)
    scheduler_config(PROCESS, {**SAMPLE, "sampler": sampler})
    assert "cuts no estimates" not in capsys.readouterr().out


def test_channels_tell_of_learned_variances_whatever_the_scheduler_reads():
    fields = {"image_size": 8, "num_classes": 0, "in_channels": 3, "out_channels": 6}
    process, sample = read_scheduler({"_class_name": "DDIMScheduler", "variance_type": "learned_range"})
    assert process["variance"] == "small"
    assert denoiser_run(fields, {}, process, sample).config["process"]["variance"] == "learned"
    assert denoiser_run({**fields, "out_channels": 3}, {}, process, sample).config["process"]["variance"] == "small"
