"""The KL autoencoder (Kingma and Welling 2014; Rombach et al. 2022): pixels <-> latents.

Parameter names and configuration keys are those of diffusers' `AutoencoderKL`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdtrain.contracts import Posterior
from sdtrain.layer.attention import Attention
from sdtrain.layer.norm import GroupNorm
from sdtrain.layer.resnet import Downsample, ResnetBlock, Upsample


class _Mid(nn.Module):
    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups=groups) for _ in range(2)])
        if attention:
            heads = Attention(channels, num_heads=1, head_dim=channels, bias=True, norm_groups=groups)
            self.attentions = nn.ModuleList([heads])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        if hasattr(self, "attentions"):
            x = self.attentions[0].spatial(x)
        return self.resnets[1](x)


class _Level(nn.Module):
    def __init__(self, resnets: list[nn.Module]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        for name in ("downsamplers", "upsamplers"):
            if hasattr(self, name):
                x = getattr(self, name)[0](x)
        return x


class Encoder(nn.Module):
    """(B, in_channels, H, W) -> (B, out_channels, H / f, W / f), f = 2^(levels - 1)."""

    def __init__(
        self, in_channels: int, out_channels: int, widths: Sequence[int], layers: int, groups: int, attention: bool
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.down_blocks, previous = nn.ModuleList(), widths[0]
        for i, width in enumerate(widths):
            inputs = [previous] + [width] * (layers - 1)
            level = _Level([ResnetBlock(n, width, groups=groups) for n in inputs])
            if i < len(widths) - 1:
                level.downsamplers = nn.ModuleList([Downsample(width, asymmetric=True)])
            self.down_blocks.append(level)
            previous = width
        self.mid_block = _Mid(previous, groups, attention)
        self.conv_norm_out = GroupNorm(groups, previous, 1e-6)
        self.conv_out = nn.Conv2d(previous, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """(B, in_channels, h, w) -> (B, out_channels, h f, w f)."""

    def __init__(
        self, in_channels: int, out_channels: int, widths: Sequence[int], layers: int, groups: int, attention: bool
    ) -> None:
        super().__init__()
        previous = widths[-1]
        self.conv_in = nn.Conv2d(in_channels, previous, 3, padding=1)
        self.mid_block = _Mid(previous, groups, attention)
        self.up_blocks = nn.ModuleList()
        for i, width in reversed(list(enumerate(widths))):
            inputs = [previous] + [width] * layers
            level = _Level([ResnetBlock(n, width, groups=groups) for n in inputs])
            if i > 0:
                level.upsamplers = nn.ModuleList([Upsample(width)])
            self.up_blocks.append(level)
            previous = width
        self.conv_norm_out = GroupNorm(groups, previous, 1e-6)
        self.conv_out = nn.Conv2d(previous, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Encodes pictures in [-1, 1] to a diagonal Gaussian over latents, and decodes latents.

    Whitening is per channel, (z - shift) * scale, with statistics that are measured at the end of stage 1 and are
    values, not buffers: they live in the stage manifest.

    Args:
        block_out_channels: widths from full resolution down; the down-factor is 2^(their number - 1).
        mid_block_add_attention: one attention over all positions at the lowest resolution, in encoder and decoder.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: Sequence[int] = (64,),
        layers_per_block: int = 1,
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        mid_block_add_attention: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
    ) -> None:
        super().__init__()
        widths = list(block_out_channels)
        shared = (widths, layers_per_block, norm_num_groups, mid_block_add_attention)
        self.encoder = Encoder(in_channels, 2 * latent_channels, *shared)
        self.decoder = Decoder(latent_channels, out_channels, *shared)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else None
        moments = self.encoder.conv_out if self.quant_conv is None else self.quant_conv
        # A posterior that starts as wide as the prior drowns the latents, and the first hundreds of steps only narrow
        # it.
        nn.init.constant_(moments.bias[latent_channels:], -6.0)
        self.latent_channels, self.down_factor = latent_channels, 2 ** (len(widths) - 1)
        self.shift, self.scale = [0.0] * latent_channels, [1.0] * latent_channels
        self.to(memory_format=torch.channels_last)

    @property
    def last_layer(self) -> nn.Conv2d:
        """The convolution whose gradients balance the adversarial loss (Esser et al. 2021, equation 7)."""
        return self.decoder.conv_out

    def encode(self, image: Tensor) -> Posterior:
        """(B, 3, H, W) in [-1, 1] -> mean and std, (B, C, H / f, W / f), unwhitened, float32."""
        moments = self.encoder(image.contiguous(memory_format=torch.channels_last))
        moments = moments if self.quant_conv is None else self.quant_conv(moments)
        mean, logvar = moments.float().chunk(2, dim=1)
        return Posterior(mean, torch.exp(0.5 * logvar.clamp(-30.0, 20.0)))

    def decode(self, latent: Tensor) -> Tensor:
        """(B, C, h, w) unwhitened -> (B, 3, h f, w f), about [-1, 1] but not clipped."""
        latent = latent.contiguous(memory_format=torch.channels_last)
        latent = latent if self.post_quant_conv is None else self.post_quant_conv(latent)
        return self.decoder(latent)

    def whiten(self, latent: Tensor) -> Tensor:
        """Unit variance and zero mean per channel: what the denoiser is trained on."""
        return (latent - self._per_channel(self.shift, latent)) * self._per_channel(self.scale, latent)

    def unwhiten(self, latent: Tensor) -> Tensor:
        """The inverse of `whiten`."""
        return latent / self._per_channel(self.scale, latent) + self._per_channel(self.shift, latent)

    @staticmethod
    def _per_channel(values: list[float], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device)[None, :, None, None]
