"""How a first stage's latents are whitened for the denoiser: by values of config or manifest, never by buffers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from sdtrain.errors import ConfigError

_SCALE = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
# How large the training pictures were, and what half-precision inference does: nothing about the network.
_SAYS_NOTHING = ("sample_size", "force_upcast")


class Whitened(nn.Module):
    """A first stage whose denoiser sees (z - shift) * scale, per channel.

    Ours are whitened by statistics that are measured at the end of stage 1 and arrive with the manifest. An imported
    one keeps the scale that its denoiser was trained on.

    Args:
        shifts_channels, scales_channels: whether each channel may have its own, which an export must be able to fold.
    """

    diffusers_class: ClassVar[str]
    meaningless: ClassVar[Mapping[str, Any]] = {"act_fn": "silu"}  # keys of diffusers, with all that is built here

    def __init__(self, latent_channels: int, shifts_channels: bool, scales_channels: bool) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        self.shifts_channels, self.scales_channels = shifts_channels, scales_channels
        self.shift, self.scale = [0.0] * latent_channels, [1.0] * latent_channels

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> Self:
        """The network that the content of a diffusers config.json describes, with the scale it states.

        Raises:
            ConfigError: for a key that diffusers' class does not have, or that asks for what is not built here.
        """
        kind = config.get("_class_name", cls.diffusers_class)
        if kind != cls.diffusers_class:
            raise ConfigError(f"first_stage: the config is of a {kind}, not of a {cls.diffusers_class}")
        levels = len(config.get("block_out_channels", (64,)))
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
        meaningless = {**cls.meaningless, **blocks}
        arguments = inspect.signature(cls).parameters.keys() - {"gradient_checkpointing"}
        known = {*arguments, *meaningless, *_SCALE, *_SAYS_NOTHING}
        for key, value in config.items():
            value = list(value) if isinstance(value, tuple) else value
            if not key.startswith("_") and key not in known:
                near = "".join(f"; did you mean {name!r}?" for name in get_close_matches(key, known, 1))
                raise ConfigError(f"first_stage: unknown key {key!r}{near}")
            if value != meaningless.get(key, value):
                raise ConfigError(f"first_stage: {key} is {value!r} there; only {meaningless[key]!r} is built here")
        network = cls(**{key: value for key, value in config.items() if key in arguments})
        network.shift, network.scale = scale_of(config, network.latent_channels)
        return network

    def whitening(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Measured mean and std of the channels (C,) -> those to whiten by, pooled where no export could say them."""
        shift = mean if self.shifts_channels else mean.mean().expand_as(mean)
        pooled = (std.square() + (mean - shift).square()).mean().sqrt()
        return shift, std if self.scales_channels else pooled.expand_as(std)

    def whiten(self, latent: Tensor) -> Tensor:
        """Unit variance and zero mean: what the denoiser is trained on."""
        return (latent - _per_channel(self.shift, latent)) * _per_channel(self.scale, latent)

    def unwhiten(self, latent: Tensor) -> Tensor:
        """The inverse of `whiten`."""
        return latent / _per_channel(self.scale, latent) + _per_channel(self.shift, latent)


def scale_of(config: Mapping[str, Any], num_channels: int) -> tuple[list[float], list[float]]:
    """Shift and scale per channel that a diffusers config.json states: (z - shift or mean) * scaling_factor / std."""
    factor = config.get("scaling_factor", 0.18215)  # diffusers' default, that of Stable Diffusion 1
    shift = config.get("latents_mean") or [config.get("shift_factor") or 0.0] * num_channels
    return [float(x) for x in shift], [factor / x for x in config.get("latents_std") or [1.0] * num_channels]


def _per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    # Not blocking, or every step would wait for the device here.
    return torch.tensor(values, dtype=like.dtype)[None, :, None, None].to(like.device, non_blocking=True)


def fold_output(first_stage: nn.Module, name: str, shift: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """In float64, the convolution `name` followed by (y - shift) * scale, each (C,)."""
    conv = first_stage.get_submodule(name)
    weight, bias = conv.weight.detach().double().cpu(), conv.bias.detach().double().cpu()
    return {f"{name}.weight": weight * scale[:, None, None, None], f"{name}.bias": (bias - shift) * scale}


def fold_input(first_stage: nn.Module, name: str, shift: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """In float64, the 1x1 convolution `name` of x / scale + shift, each (C,)."""
    conv = first_stage.get_submodule(name)
    weight, bias = conv.weight.detach().double().cpu(), conv.bias.detach().double().cpu()
    shifted = bias + weight[:, :, 0, 0] @ shift
    return {f"{name}.weight": weight / scale[None, :, None, None], f"{name}.bias": shifted}
