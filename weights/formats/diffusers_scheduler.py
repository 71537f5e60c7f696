"""The scheduler of a diffusers pipeline: its config to `config.process` and `config.sample` of ours.

A scheduler there is two things: the process that the network was trained on, and the sampler that the pipeline uses
unless told otherwise, with its choice of times.
"""

from collections.abc import Mapping
from typing import Any

from cli.errors import UserError

# Class -> (our sampler, steps that its pipelines take unless told otherwise; 0 for all of the chain).
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
# Keys of which ours computes these values only.
_FIXED: dict[str, Any] = {
    **{"trained_betas": None, "thresholding": False, "clip_sample_range": 1.0, "use_karras_sigmas": False},
    **{"use_exponential_sigmas": False, "use_beta_sigmas": False, "use_flow_sigmas": False, "use_lu_lambdas": False},
    **{"algorithm_type": "dpmsolver++", "solver_order": 2, "predict_x0": True},
    **{"interpolation_type": "linear", "lower_order_final": True, "euler_at_final": False},
    **{"use_dynamic_shifting": False, "shift_terminal": None},
}
# Of how the pipeline samples alone: the last step, first times, limits. Our samplers have their own.
_OF_SAMPLING = {
    *("timestep_spacing", "steps_offset", "set_alpha_to_one", "skip_prk_steps", "sigma_min", "sigma_max"),
    *("dynamic_thresholding_ratio", "sample_max_value", "lambda_min_clipped", "disable_corrector", "solver_p", "rho"),
    *("timestep_type", "final_sigmas_type", "rescale_sigmas", "flow_shift", "time_shift_type"),
}
_READ = {
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", "variance_type"),
    *("clip_sample", "rescale_betas_zero_snr"),
}


def read_scheduler(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (`config.process`, what differs from the defaults in `config.sample`).

    Args:
      config: scheduler_config.json.

    Raises:
      UserError: if the class or a key is one that ours has nothing for; names all of them.
    """
    kind = config.get("_class_name")
    if kind not in SAMPLERS:
        raise UserError(f"the scheduler is a {kind}; those that are converted are {', '.join(SAMPLERS)}")
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    fixed = {**_FIXED, "solver_type": "bh2" if kind == "UniPCMultistepScheduler" else "midpoint"}
    known = _READ | fixed.keys() | _OF_SAMPLING
    problems = [f"{key} is {value!r}, which is unknown" for key, value in given.items() if key not in known]
    problems += [
        f"{key} is {given[key]!r}, ours {value!r}" for key, value in fixed.items() if given.get(key, value) != value
    ]

    def choose(key: str, default: str, choices: Mapping[str, str]) -> str:
        value = given.get(key, default) or default
        if value not in choices:
            problems.append(f"{key} is {value!r}, ours are {', '.join(choices)}")
        return choices.get(value, "")

    steps = given.get("num_train_timesteps", 1000)
    schedule = {
        "name": "discrete",
        "kind": choose("beta_schedule", "linear", _BETAS),
        "steps": steps,
        "start": given.get("beta_start", 1e-4),
        "end": given.get("beta_end", 0.02),
    }
    if given.get("rescale_betas_zero_snr"):
        schedule["zero_terminal_snr"] = True
    process = {
        "schedule": schedule,
        "prediction": choose("prediction_type", "epsilon", _PREDICTIONS),
        "variance": choose("variance_type", "fixed_small", _VARIANCES),
        "clip": bool(given.get("clip_sample", kind in ("DDPMScheduler", "DDIMScheduler"))),
    }
    if problems:
        raise UserError(f"the scheduler {kind} cannot be converted: {'; '.join(problems)}")
    sampler, usual = SAMPLERS[kind]
    return process, {"sampler": sampler, "steps": usual or steps}
