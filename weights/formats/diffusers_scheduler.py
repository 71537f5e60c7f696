"""The scheduler of a diffusers pipeline: its config to `config.process` and `config.sample` of ours, and back.

A scheduler there is two things: the process that the network was trained on, and the sampler that the pipeline uses
unless told otherwise, with its choice of times. The traps of that format: what a class assumes of a key that is left
out differs from class to class, so that one sampler's file is another's with other numbers; and files carry keys of
the classes that they were made of.
"""

import math
from collections.abc import Mapping
from typing import Any

from cli.errors import UserError
from weights.files.fields import IDLE, Field, fixed, flag, read_fields, real, whole, word

# Class -> (our sampler, steps that are usual of it where no pipeline's own say; 0 for all of the chain).
SAMPLERS = {
    "DDPMScheduler": ("ddpm", 0),
    "DDIMScheduler": ("ddim", 50),
    "PNDMScheduler": ("plms", 50),
    "EulerDiscreteScheduler": ("euler", 50),
    "EulerAncestralDiscreteScheduler": ("euler_ancestral", 50),
    "HeunDiscreteScheduler": ("heun", 50),
    "DPMSolverMultistepScheduler": ("dpm_solver_multistep", 25),
    "UniPCMultistepScheduler": ("unipc", 25),
}
_BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
_PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
_VARIANCES = {
    **{"fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large", "fixed_large_log": "large"},
    "learned_range": "learned",
}
_WITH_VARIANCE = "DDPMScheduler"  # the one class whose steps have a variance that is named
_SPACINGS = ("leading", "linspace", "trailing")
_WITHOUT_ZERO = ("PNDMScheduler", "HeunDiscreteScheduler")  # classes that know no rescale_betas_zero_snr
# Keys of which ours computes these values only.
_FIXED: dict[str, Any] = {
    **{"trained_betas": None, "thresholding": False, "clip_sample_range": 1.0, "use_karras_sigmas": False},
    **{"use_exponential_sigmas": False, "use_beta_sigmas": False, "use_flow_sigmas": False, "use_lu_lambdas": False},
    **{"algorithm_type": "dpmsolver++", "solver_order": 2, "predict_x0": True},
    **{"interpolation_type": "linear", "lower_order_final": True, "euler_at_final": False},
    **{"use_dynamic_shifting": False, "shift_terminal": None, "timestep_values": None, "solver_p": None},
    **{"lambda_min_clipped": -math.inf, "timestep_type": "discrete", "final_sigmas_type": "zero"},
    **{"sigma_min": None, "sigma_max": None},
}
# What the keys above make idle.
_IDLE = {
    *("dynamic_thresholding_ratio", "sample_max_value", "rho", "rescale_sigmas", "flow_shift", "time_shift_type"),
    "tensor_format",  # of the library's first versions: which library's arrays
}


def _table(kind: str) -> dict[str, Field]:
    """What the config of a class may hold, with the library's defaults."""
    first, last = (0.00085, 0.012) if kind == "HeunDiscreteScheduler" else (1e-4, 0.02)
    solver_type = "bh2" if kind == "UniPCMultistepScheduler" else "midpoint"
    return {
        "num_train_timesteps": whole(1000, high=10**6),
        "beta_start": real(first, low=0, high=1, above=True),
        "beta_end": real(last, low=0, high=1, above=True),
        "beta_schedule": word("linear", tuple(_BETAS)),
        "prediction_type": word("epsilon", tuple(_PREDICTIONS)),
        "variance_type": word(choices=tuple(_VARIANCES)).or_null(),
        "clip_sample": flag(kind in ("DDPMScheduler", "DDIMScheduler")),
        "rescale_betas_zero_snr": flag(False),
        "timestep_spacing": word("leading", _SPACINGS),
        "steps_offset": whole(0, low=0, high=10**6),
        "set_alpha_to_one": flag(kind != "PNDMScheduler"),
        "skip_prk_steps": flag(False),
        **{key: fixed(value) for key, value in {**_FIXED, "solver_type": solver_type}.items()},
        "disable_corrector": Field("an empty list", lambda value: value == [], []),
        **dict.fromkeys(_IDLE, IDLE),
    }


def read_scheduler(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (`config.process`, what differs from the defaults in `config.sample`).

    Args:
      config: scheduler_config.json.

    Raises:
      UserError: if the class or a key is one that ours has nothing for; names all of them.
    """
    kind = config.get("_class_name")
    if not isinstance(kind, str) or kind not in SAMPLERS:
        raise UserError(f"the scheduler is a {kind}; those that are converted are {', '.join(SAMPLERS)}")
    given = read_fields(f"the scheduler {kind}", config, _table(kind))
    schedule = {
        "name": "discrete",
        "kind": _BETAS[given["beta_schedule"]],
        "steps": given["num_train_timesteps"],
        "start": given["beta_start"],
        "end": given["beta_end"],
    }
    if given["rescale_betas_zero_snr"]:
        schedule["zero_terminal_snr"] = True
    process = {
        "schedule": schedule,
        "prediction": _PREDICTIONS[given["prediction_type"]],
        "variance": _VARIANCES[given["variance_type"] or "fixed_small"],
        "clip": given["clip_sample"],
    }
    if kind == "PNDMScheduler" and not given["skip_prk_steps"]:
        print("warning: the scheduler begins with Runge-Kutta steps (skip_prk_steps is false), and plms with none")
    sampler, usual = SAMPLERS[kind]
    return process, {
        "sampler": sampler,
        "steps": usual or given["num_train_timesteps"],
        # One that is not said is each class's own, also where another sampler takes the place of this one.
        "spacing": given["timestep_spacing"] if "timestep_spacing" in config else "",
        "times": "published",
        "offset": given["steps_offset"],
        "end": "clean" if given["set_alpha_to_one"] else "first",
    }


def scheduler_config(process: Mapping[str, Any], sample: Mapping[str, Any]) -> dict[str, Any]:
    """Returns scheduler_config.json of the process and the sampler of a run.

    Args:
      process: `config.process`.
      sample: `config.sample`.

    Raises:
      UserError: if the library has no such process; says all reasons. Where it has no such sampler, or has other times
        for it, a line says so.
    """
    schedule = {"kind": "linear", "steps": 1000, "start": 1e-4, "end": 2e-2, **process["schedule"]}
    betas = {ours: theirs for theirs, ours in _BETAS.items()}
    predictions = {ours: theirs for theirs, ours in _PREDICTIONS.items()}
    prediction = process.get("prediction", "eps")
    problems = []
    if schedule["name"] != "discrete" or schedule["kind"] not in betas:
        problems.append(f"its schedule is {schedule['name']!r}, {schedule['kind']!r}")
    if prediction not in predictions:
        problems.append(f"its prediction is {prediction!r}")
    if process.get("time_shift", 0):
        problems.append(f"its time_shift is {process['time_shift']}, theirs is 0")
    kinds = {ours: theirs for theirs, (ours, _) in SAMPLERS.items()}
    wanted, zero = sample.get("sampler", ""), schedule.get("zero_terminal_snr", False)
    kind, variance = kinds.get(wanted, ""), process.get("variance", "small")
    if variance == "learned" and kind != _WITH_VARIANCE:
        problems.append(f"its variance is learned, which {_WITH_VARIANCE} alone reads, and its sampler is {wanted!r}")
    if problems:
        raise UserError(f"this process cannot be written for diffusers: {'; '.join(problems)}")
    if not kind or (zero and kind in _WITHOUT_ZERO):
        of = " of a chain that ends in noise alone" if kind else ""
        kind = "DDIMScheduler"
        print(f"warning: diffusers has no sampler {wanted!r}{of}; the pipeline gets {kind}")
    if sample.get("times", "even") != "published":
        print("warning: where the steps do not divide the chain, the pipeline's times are others than the run's")
    spacing = sample.get("spacing", "")
    if spacing not in ("", *_SPACINGS):
        print(f"warning: diffusers has no spacing {spacing!r} for this sampler; the pipeline gets its usual times")
    config = {
        "_class_name": kind,
        "num_train_timesteps": schedule["steps"],
        "beta_start": schedule["start"],
        "beta_end": schedule["end"],
        "beta_schedule": betas[schedule["kind"]],
        "prediction_type": predictions[prediction],
        "trained_betas": None,
        "steps_offset": sample.get("offset", 0),
    }
    if spacing in _SPACINGS:
        config["timestep_spacing"] = spacing
    if kind not in _WITHOUT_ZERO:
        config["rescale_betas_zero_snr"] = zero
    if kind in ("DDIMScheduler", "PNDMScheduler"):
        config["set_alpha_to_one"] = sample.get("end", "clean") == "clean"
    if kind == "PNDMScheduler":
        config["skip_prk_steps"] = True
    if kind == _WITH_VARIANCE:
        config["variance_type"] = {"small": "fixed_small", "large": "fixed_large", "learned": "learned_range"}[variance]
    if kind in ("DDPMScheduler", "DDIMScheduler"):
        config["clip_sample"] = bool(process.get("clip", False))
    return config
