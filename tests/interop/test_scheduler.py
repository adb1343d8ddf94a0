"""The scheduler that an export names steps as our sampler does."""

import re
from types import SimpleNamespace

import pytest
import torch

from sdtrain.diffusion.guidance import ClassifierFree
from sdtrain.diffusion.path import EDM, RectifiedFlow, VariancePreserving
from sdtrain.diffusion.timestep import Uniform
from sdtrain.diffusion.weighting import Unit
from sdtrain.errors import ConfigError
from sdtrain.interop.scheduler import differs, low_resolution_config, scheduler_config
from sdtrain.objective.denoising import Denoising
from sdtrain.sampler.ddim import DDIM
from sdtrain.sampler.dpmpp import DPMpp
from sdtrain.sampler.euler import Euler


def objective(path, prediction, **more):
    return Denoising(path, prediction, Uniform(), Unit(), **more)


def network(x, time, cond):
    """Nothing trained, but it depends on all that it is told."""
    return torch.tanh(0.7 * x.roll(1, dims=1)) * torch.cos(time / 300).reshape(-1, 1, 1, 1) + 0.1 * x


def theirs(config, noise, num_steps):
    """As StableDiffusionPipeline goes through its scheduler."""
    import diffusers

    values = {key: value for key, value in config.items() if not key.startswith("_")}
    kind = getattr(diffusers, config["_class_name"])
    scheduler = kind.from_config(values)
    unknown = values.keys() - dict(scheduler.config).keys()
    assert not unknown, unknown
    scheduler.set_timesteps(num_steps)
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(scaled, t.float().expand(len(x)), {}), t, x).prev_sample
    return x, scheduler


def at_its_times(made, noise, scheduler):
    """Our own steps, straight in x0 and noise, at the scheduler's times; DPM-Solver tells the network whole ones."""
    x, sigmas = noise, scheduler.sigmas.double()
    for time, t, s in zip(scheduler.timesteps, sigmas[:-1], sigmas[1:]):
        x0 = made.to_x0(network(x, time.float().expand(len(x)), {}), x, t.float().expand(len(x)))
        at, to = made.path(t), made.path(s)
        x = to.alpha * x0 + to.sigma * (x - at.alpha * x0) / at.sigma
    return x.float()


NOISE = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
VP, ZERO = VariancePreserving(), VariancePreserving(zero_terminal_snr=True)


@pytest.mark.parametrize(
    ("path", "prediction", "spacing"),
    [
        (VP, "epsilon", "leading"),
        (VP, "epsilon", "trailing"),
        (VP, "v", "trailing"),
        (VP, "x0", "leading"),
        (ZERO, "v", "trailing"),
        (VariancePreserving("cosine"), "v", "trailing"),
        (VariancePreserving("linear", beta_start=1e-4, beta_end=0.02), "epsilon", "trailing"),
    ],
)
def test_ddim(path, prediction, spacing):
    made, sampler = objective(path, prediction), DDIM(num_steps=10, spacing=spacing)
    config = scheduler_config(made, sampler, False)
    x, _ = theirs(config, NOISE, 10)
    ours = sampler(lambda x, t: made.x0_of(network)(x, t, {}), NOISE, path)
    torch.testing.assert_close(x, ours, atol=1e-4 * float(ours.abs().max()), rtol=0)


@pytest.mark.parametrize("is_mmdit", [False, True])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_rectified_flow(is_mmdit, shift):
    made = objective(RectifiedFlow(), "velocity")
    config = scheduler_config(made, Euler(shift=shift), is_mmdit)
    assert config["_class_name"] == ("FlowMatchEulerDiscreteScheduler" if is_mmdit else "DPMSolverMultistepScheduler")
    x, scheduler = theirs(config, NOISE, 8)
    ours = at_its_times(made, NOISE, scheduler)
    torch.testing.assert_close(x, ours, atol=1e-4 * float(ours.abs().max()), rtol=0)
    if is_mmdit:  # and `linspace` is its spacing
        sampler = Euler(num_steps=8, shift=shift, spacing="linspace")
        ours = sampler(lambda x, t: made.x0_of(network)(x, t, {}), NOISE, RectifiedFlow())
        torch.testing.assert_close(x, ours, atol=1e-4 * float(ours.abs().max()), rtol=0)


def test_edm():
    made, sampler = objective(EDM(), "v"), Euler(num_steps=10, spacing="karras")
    x, _ = theirs(scheduler_config(made, sampler, False), NOISE, 10)
    ours = sampler(lambda x, t: made.x0_of(network)(x, t, {}), NOISE, EDM())
    torch.testing.assert_close(x, ours, atol=1e-3 * float(ours.abs().max()), rtol=0)


FLOW = objective(RectifiedFlow(), "velocity")


@pytest.mark.parametrize(
    ("made", "is_mmdit", "sampler", "expected"),
    [
        (objective(VP, "v"), False, DDIM(spacing="trailing"), None),
        (objective(VP, "v"), False, Euler(spacing="leading"), None),
        (objective(VP, "v"), False, DDIM(), "DDIMScheduler .* DDIM with spacing=uniform and shift=1.0"),
        (objective(VP, "v"), False, DDIM(spacing="linspace"), "spacing=linspace"),  # which diffusers rounds
        (objective(VP, "v"), False, DDIM(spacing="trailing", eta=1.0), "DDIM"),
        (objective(VP, "v"), False, Euler(spacing="trailing", heun=True), "Euler"),
        (objective(VP, "v"), False, Euler(spacing="trailing", shift=2.0), "shift=2.0"),
        (objective(VP, "v"), False, DPMpp(spacing="trailing"), "DPMpp"),
        (objective(ZERO, "v"), False, DDIM(spacing="leading"), "spacing=leading"),
        (objective(EDM(), "v"), False, Euler(spacing="karras"), None),
        (FLOW, True, Euler(spacing="linspace", shift=3.0), None),
        (FLOW, True, Euler(), "FlowMatchEulerDiscreteScheduler .* spacing=uniform"),
        (FLOW, False, Euler(spacing="linspace"), "DPMSolverMultistepScheduler"),  # which cuts its times
        (FLOW, True, Euler(spacing="linspace", guidance=ClassifierFree(3.0, rescale=0.7)), "guidance.rescale"),
        (FLOW, True, Euler(spacing="linspace", guidance=ClassifierFree(3.0, interval=(0, 0.5))), "interval"),
    ],
)
def test_a_sampler_that_no_scheduler_steps_as_is_told(made, is_mmdit, sampler, expected):
    found = differs(scheduler_config(made, sampler, is_mmdit), sampler)
    assert (found is None) == (expected is None)
    assert expected is None or re.search(expected, found)


def test_a_learned_variance_is_said():
    made = objective(VP, "epsilon", learned_variance=True)
    config = scheduler_config(made, DDIM(), False)
    assert (config["_class_name"], config["variance_type"]) == ("DDPMScheduler", "learned_range")


def test_values_that_pipelines_overwrite_are_theirs():
    for prediction in ("epsilon", "v"):
        config = scheduler_config(objective(VP, prediction), DDIM(), False)
        assert (config["steps_offset"], config["clip_sample"]) == (1, False)
        assert (config["beta_start"], config["beta_end"], config["beta_schedule"]) == (0.00085, 0.012, "scaled_linear")
    assert scheduler_config(objective(ZERO, "v"), DDIM(spacing="leading"), False)["timestep_spacing"] == "trailing"
    low = low_resolution_config(VariancePreserving(beta_start=1e-4, beta_end=0.02))
    assert (low["_class_name"], low["beta_end"]) == ("DDPMScheduler", 0.02)


@pytest.mark.parametrize(
    ("path", "prediction", "is_mmdit", "expected"),
    [
        (VP, "velocity", False, "no scheduler of diffusers knows a prediction of velocity"),
        (EDM(), "epsilon", False, "no scheduler of diffusers knows a prediction of epsilon"),
        (RectifiedFlow(), "v", False, "by its velocity alone"),
        (RectifiedFlow(time_scale=0.5), "velocity", True, "with a whole time_scale"),
        (VP, "v", True, "samples rectified flows alone"),
    ],
)
def test_what_no_scheduler_knows_is_refused(path, prediction, is_mmdit, expected):
    with pytest.raises(ConfigError, match=expected):
        scheduler_config(SimpleNamespace(path=path, prediction=prediction, learned_variance=False), Euler(), is_mmdit)
