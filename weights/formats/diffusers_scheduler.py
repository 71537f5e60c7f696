"""The scheduler of a diffusers pipeline: its config to `config.process` and `config.sample` of ours, and back.

A scheduler there is two things: the process that the network was trained on, and the sampler that the pipeline uses
unless told otherwise, with its choice of times. The traps of that format: what a class assumes of a key that is left
out differs from class to class, so that one sampler's file is another's with other numbers; and files carry keys of
the classes that they were made of, which the library leaves out, and so must who wants to compute the same.
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
# What the classes read: all of them the first, and each its own.
_SHARED = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"),
    *("timestep_spacing", "steps_offset"),
)
_ZERO = "rescale_betas_zero_snr"
_CLIPPED = ("clip_sample", "clip_sample_range")
_THRESHOLDED = ("thresholding", "dynamic_thresholding_ratio", "sample_max_value")
_SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
_MULTISTEP = (
    *(_ZERO, *_SIGMAS, *_THRESHOLDED, "solver_order", "solver_type", "lower_order_final", "use_flow_sigmas"),
    *("flow_shift", "final_sigmas_type", "use_dynamic_shifting", "time_shift_type"),
)
_OWN: dict[str, tuple[str, ...]] = {
    "DDPMScheduler": (_ZERO, *_CLIPPED, *_THRESHOLDED, "variance_type"),
    "DDIMScheduler": (_ZERO, *_CLIPPED, *_THRESHOLDED, "set_alpha_to_one"),
    "PNDMScheduler": ("set_alpha_to_one", "skip_prk_steps"),
    "EulerDiscreteScheduler": (
        *(_ZERO, *_SIGMAS, "interpolation_type", "sigma_min", "sigma_max", "timestep_type", "final_sigmas_type"),
    ),
    "EulerAncestralDiscreteScheduler": (_ZERO,),
    "HeunDiscreteScheduler": (*_SIGMAS, *_CLIPPED),
    "DPMSolverMultistepScheduler": (
        *(*_MULTISTEP, "algorithm_type", "euler_at_final", "use_lu_lambdas", "lambda_min_clipped", "variance_type"),
    ),
    "UniPCMultistepScheduler": (
        *(*_MULTISTEP, "predict_x0", "disable_corrector", "solver_p", "sigma_min", "sigma_max", "shift_terminal"),
    ),
}
# Of classes that are not converted, and of former versions of these.
_ELSEWHERE = ("rho", "rescale_sigmas", "noise_sampler_seed", "tensor_format", "timestep_values")
_KNOWN = {*_SHARED, *_ELSEWHERE, *(key for keys in _OWN.values() for key in keys)}
_NO_DATA = ("PNDMScheduler", "EulerAncestralDiscreteScheduler")  # classes that read no network that predicts data

_BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
_PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
_VARIANCES = {
    **{"fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large", "fixed_large_log": "large"},
    "learned_range": "learned",
}
_WITH_VARIANCE = "DDPMScheduler"  # the one class whose steps have a variance that is named
_SPACINGS = ("leading", "linspace", "trailing")
# Keys of which ours computes these values only.
_FIXED: dict[str, Any] = {
    **{"trained_betas": None, "thresholding": False, "clip_sample_range": 1.0, "use_karras_sigmas": False},
    **{"use_exponential_sigmas": False, "use_beta_sigmas": False, "use_flow_sigmas": False, "use_lu_lambdas": False},
    **{"solver_order": 2, "predict_x0": True},
    **{"interpolation_type": "linear", "lower_order_final": True, "euler_at_final": False},
    **{"use_dynamic_shifting": False, "shift_terminal": None, "solver_p": None},
    **{"lambda_min_clipped": -math.inf, "timestep_type": "discrete", "final_sigmas_type": "zero"},
    **{"sigma_min": None, "sigma_max": None},
}
# What the keys above make idle.
_IDLE = ("dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type")


def _table(kind: str) -> dict[str, Field]:
    """What the config of a class may hold, with the library's defaults."""
    first, last = (0.00085, 0.012) if kind == "HeunDiscreteScheduler" else (1e-4, 0.02)
    # A type of other classes' solvers stands for the class's own: files that are made of theirs have it.
    solvers = ("midpoint", "logrho", "bh1", "bh2")
    if kind == "UniPCMultistepScheduler":
        solvers = ("bh2", "midpoint", "heun", "logrho")
    fields = {
        "num_train_timesteps": whole(1000, high=10**6),
        "beta_start": real(first, low=0, high=1, above=True),
        "beta_end": real(last, low=0, high=1, above=True),
        "beta_schedule": word("linear", tuple(_BETAS)),
        "prediction_type": word("epsilon", tuple(_PREDICTIONS)),
        "variance_type": word(choices=tuple(_VARIANCES)).or_null(),
        "clip_sample": flag(kind in ("DDPMScheduler", "DDIMScheduler")),
        _ZERO: flag(False),
        "timestep_spacing": word("leading", _SPACINGS),
        "steps_offset": whole(0, low=0, high=10**6),
        "set_alpha_to_one": flag(kind != "PNDMScheduler"),
        "skip_prk_steps": flag(False),
        "algorithm_type": fixed("dpmsolver++", "deis"),
        "solver_type": fixed(*solvers),
        "disable_corrector": Field("an empty list", lambda value: value == [], []),
        **{key: fixed(value) for key, value in _FIXED.items()},
        **dict.fromkeys(_IDLE, IDLE),
    }
    return {key: fields[key] for key in (*_SHARED, *_OWN[kind])}


def read_scheduler(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (`config.process`, what differs from the defaults in `config.sample`).

    Keys of other classes are left out, as the library does, and said.

    Args:
      config: scheduler_config.json.

    Raises:
      UserError: if the class or a key is one that ours has nothing for; names all of them. Or if the network would be
        asked for noise where there is no data left in it.
    """
    kind = config.get("_class_name")
    if not isinstance(kind, str) or kind not in SAMPLERS:
        raise UserError(f"the scheduler is a {kind}; those that are converted are {', '.join(SAMPLERS)}")
    table = _table(kind)
    strange = [key for key in config if key in _KNOWN and key not in table]
    if strange:
        print(f"the scheduler's file has what no {kind} reads, and which is left out: {', '.join(strange)}")
    given = read_fields(f"the scheduler {kind}", {key: config[key] for key in config if key not in strange}, table)
    schedule = {
        "name": "discrete",
        "kind": _BETAS[given["beta_schedule"]],
        "steps": given["num_train_timesteps"],
        "start": given["beta_start"],
        "end": given["beta_end"],
    }
    if given.get(_ZERO, False):
        schedule["zero_terminal_snr"] = True
        if given["prediction_type"] == "epsilon":
            raise UserError(
                f"the scheduler {kind} cannot be converted: prediction_type is 'epsilon' and {_ZERO} is True, and "
                "noise says nothing of the data where a chain ends in noise alone; set prediction_type to what the "
                f"network predicts, or give --ignore_keys={_ZERO} if it was trained without"
            )
    process = {
        "schedule": schedule,
        "prediction": _PREDICTIONS[given["prediction_type"]],
        "variance": _VARIANCES[given.get("variance_type") or "fixed_small"],
        "clip": given.get("clip_sample", False),
    }
    if not given.get("skip_prk_steps", True):
        print("warning: the scheduler begins with Runge-Kutta steps (skip_prk_steps is false), and plms with none")
    sampler, usual = SAMPLERS[kind]
    return process, {
        "sampler": sampler,
        "steps": usual or given["num_train_timesteps"],
        # One that is not said is each class's own, also where another sampler takes the place of this one.
        "spacing": given["timestep_spacing"] if "timestep_spacing" in config else "",
        "times": "published",
        "offset": given["steps_offset"],
        "end": "clean" if given.get("set_alpha_to_one", True) else "first",
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
    of = {
        " of a chain that ends in noise alone": zero and _ZERO not in _OWN.get(kind, ()),
        " of networks that predict data": prediction == "x0" and kind in _NO_DATA,
    }
    if not kind or any(of.values()):
        why = "".join(each for each, so in of.items() if so and kind)
        kind = "DDIMScheduler"
        print(f"warning: diffusers has no sampler {wanted!r}{why}; the pipeline gets {kind}")
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
    read = _OWN[kind]
    if _ZERO in read:
        config[_ZERO] = zero
    if "set_alpha_to_one" in read:
        config["set_alpha_to_one"] = sample.get("end", "clean") == "clean"
    if "skip_prk_steps" in read:
        config["skip_prk_steps"] = True
    if kind == _WITH_VARIANCE:
        config["variance_type"] = {"small": "fixed_small", "large": "fixed_large", "learned": "learned_range"}[variance]
    clip = bool(process.get("clip", False))
    if "clip_sample" in read:
        config["clip_sample"] = clip
    elif clip:
        print(f"warning: a {kind} cuts no estimates off at -1 and 1, as the run does, and draws other pictures")
    return config
