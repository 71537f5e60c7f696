"""The scheduler of a diffusers pipeline: its config to `config.process` and `config.sample` of ours.

A scheduler there is two things: the process that the network was trained on, and the sampler that the pipeline uses
unless told otherwise, with its choice of times.
"""

from collections.abc import Mapping
from typing import Any

from cli.errors import UserError
from weights.files.fields import IDLE, Field, fixed, flag, read_fields, real, whole, word

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
    **{"use_dynamic_shifting": False, "shift_terminal": None, "timestep_values": None},
}
# Of how the pipeline samples alone: the last step, first times, limits. Our samplers have their own.
_OF_SAMPLING = {
    *("timestep_spacing", "steps_offset", "set_alpha_to_one", "skip_prk_steps", "sigma_min", "sigma_max"),
    *("dynamic_thresholding_ratio", "sample_max_value", "lambda_min_clipped", "disable_corrector", "solver_p", "rho"),
    *("timestep_type", "final_sigmas_type", "rescale_sigmas", "flow_shift", "time_shift_type"),
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
        **{key: fixed(value) for key, value in {**_FIXED, "solver_type": solver_type}.items()},
        **dict.fromkeys(_OF_SAMPLING, IDLE),
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
    sampler, usual = SAMPLERS[kind]
    return process, {"sampler": sampler, "steps": usual or given["num_train_timesteps"]}
