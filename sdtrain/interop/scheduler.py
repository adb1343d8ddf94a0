"""A run's noise path, prediction and spacing as the scheduler_config.json of a diffusers pipeline. Every value is
written out: diffusers' defaults are not those of Stable Diffusion.
"""

from __future__ import annotations

from typing import Any

from sdtrain.diffusion.path import EDM, RectifiedFlow, VariancePreserving
from sdtrain.errors import ConfigError
from sdtrain.interop.folder import VERSION
from sdtrain.sampler.ddim import DDIM
from sdtrain.sampler.euler import Euler

_SCHEDULES = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}
_PREDICTIONS = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}


def scheduler_config(objective: Any, sampler: Any, is_mmdit: bool) -> dict[str, Any]:  # noqa: ANN401 parts
    """The scheduler that asks and steps as our samplers do: the last step ends at x0 itself.

    Raises:
        ConfigError: for an objective that no scheduler of the pipeline knows.
    """
    path, prediction, is_variance_learned = objective.path, objective.prediction, objective.learned_variance
    if is_mmdit and not isinstance(path, RectifiedFlow):
        raise ConfigError(
            "StableDiffusion3Pipeline samples rectified flows alone, by a velocity; this run's path is "
            f"{type(path).__name__}"
        )
    if isinstance(path, RectifiedFlow):
        values = _flow(path, prediction, sampler, is_mmdit, is_variance_learned)
    elif isinstance(path, VariancePreserving) and prediction in _PREDICTIONS:
        values = _variance_preserving(path, prediction, sampler, is_variance_learned)
    elif isinstance(path, EDM) and prediction == "v" and path.time_scale == 0.25 and not is_variance_learned:
        values = {"_class_name": "EDMEulerScheduler", "sigma_min": path.sigma_min, "sigma_max": path.sigma_max}
        values |= {"sigma_data": 1.0, "rho": path.rho, "sigma_schedule": "karras", "num_train_timesteps": 1000}
        values |= {"prediction_type": "v_prediction", "final_sigmas_type": "zero"}
    else:
        raise ConfigError(f"no scheduler of diffusers knows a prediction of {prediction} on the path {path}")
    return values | {"_diffusers_version": VERSION}


def differs(config: dict[str, Any], sampler: Any) -> str | None:  # noqa: ANN401
    """How a pipeline with this scheduler draws otherwise than the run itself, in a line; None where it does not."""
    kind, spacing, guidance = config["_class_name"], sampler.spacing, sampler.guidance
    spacings = {
        "DDIMScheduler": config.get("timestep_spacing"),
        "FlowMatchEulerDiscreteScheduler": "linspace",
        "EDMEulerScheduler": "karras",
    }
    is_shifted = sampler.shift != 1 and kind != "FlowMatchEulerDiscreteScheduler"
    is_straight = isinstance(sampler, DDIM) and not sampler.eta or isinstance(sampler, Euler) and not sampler.heun
    if not is_straight or is_shifted or spacing != spacings.get(kind) or spacing == "linspace" and kind[0] == "D":
        name = f"{type(sampler).__name__} with spacing={spacing} and shift={sampler.shift}"
        return f"its {kind} asks at other times or steps otherwise than this run's sampler, {name}"
    if guidance.rescale or list(guidance.interval) != [0.0, 1.0]:
        return "it guides without this run's sampler.guidance.rescale and interval"
    return None


def low_resolution_config(path: VariancePreserving) -> dict[str, Any]:
    """The scheduler that puts noise on the small picture before it is made large."""
    values = _schedule(path) | {"prediction_type": "epsilon", "clip_sample": False}
    return values | {"_class_name": "DDPMScheduler", "_diffusers_version": VERSION}


def _schedule(path: VariancePreserving) -> dict[str, Any]:
    return {
        "num_train_timesteps": path.num_steps,
        "beta_schedule": _SCHEDULES[path.schedule],
        "beta_start": path.beta_start,
        "beta_end": path.beta_end,
        "trained_betas": None,
        "rescale_betas_zero_snr": path.zero_terminal_snr,
    }


def _variance_preserving(
    path: VariancePreserving,
    prediction: str,
    sampler: Any,
    is_variance_learned: bool,  # noqa: ANN401
) -> dict[str, Any]:
    spacing = getattr(sampler, "spacing", "trailing")
    # Uniform and Karras start at the last step as trailing does, which diffusers has on the schedule's own steps.
    spacing = spacing if spacing in ("leading", "linspace", "trailing") else "trailing"
    values = _schedule(path) | {
        "prediction_type": _PREDICTIONS[prediction],
        "timestep_spacing": "trailing" if path.zero_terminal_snr else spacing,
        "steps_offset": 1,  # a pipeline overwrites anything else
        "clip_sample": False,  # so, too
        "clip_sample_range": 1.0,
        "thresholding": False,
        "dynamic_thresholding_ratio": 0.995,
        "sample_max_value": 1.0,
    }
    if is_variance_learned:
        return values | {"_class_name": "DDPMScheduler", "variance_type": "learned_range"}
    return values | {"_class_name": "DDIMScheduler", "set_alpha_to_one": True}


def _flow(
    path: RectifiedFlow,
    prediction: str,
    sampler: Any,  # noqa: ANN401
    is_mmdit: bool,
    is_variance_learned: bool,
) -> dict[str, Any]:
    if prediction != "velocity" or is_variance_learned or path.time_scale != int(path.time_scale):
        raise ConfigError(
            "diffusers samples a rectified flow by its velocity alone, with a whole time_scale; this run predicts "
            f"{prediction}{' and a variance' * is_variance_learned} with time_scale {path.time_scale}"
        )
    steps, shift = int(path.time_scale), getattr(sampler, "shift", 1.0)
    if is_mmdit:
        values = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": steps, "shift": shift}
        return values | {"use_dynamic_shifting": False}
    # The U-Net's pipelines ask a scheduler for init_noise_sigma, which the flow-matching ones lack. Of first order this
    # one takes the straight steps of our Euler.
    return {
        "_class_name": "DPMSolverMultistepScheduler",
        "num_train_timesteps": steps,
        "beta_schedule": "scaled_linear",  # read, and then not used
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "trained_betas": None,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": shift,
        "algorithm_type": "dpmsolver++",
        "solver_order": 1,
        "solver_type": "midpoint",
        "lower_order_final": True,
        "final_sigmas_type": "zero",
        "thresholding": False,
        "timestep_spacing": "linspace",
        "steps_offset": 1,
    }
