"""The KL autoencoder (Kingma and Welling 2014; Rombach et al. 2022): pixels <-> latents.

Parameter names and configuration keys are those of diffusers' `AutoencoderKL`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdtrain.contracts import Posterior
from sdtrain.errors import ConfigError
from sdtrain.first_stage.whitening import Whitened, fold_input, fold_output
from sdtrain.layer.attention import Attention
from sdtrain.layer.conv import Conv1x1
from sdtrain.layer.norm import GroupNorm
from sdtrain.layer.resnet import Downsample, ResnetBlock, Upsample

_Block = Callable[[Tensor], Tensor]


class _Mid(nn.Module):
    """Two residual blocks at the lowest resolution, one attention over all positions between them."""

    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups=groups) for _ in range(2)])
        if attention:
            heads = Attention(channels, num_heads=1, head_dim=channels, bias=True, norm_groups=groups)
            self.attentions = nn.ModuleList([heads])

    def blocks(self) -> Iterator[_Block]:
        yield self.resnets[0]
        if hasattr(self, "attentions"):
            yield self.attentions[0].spatial
        yield self.resnets[1]


class _Level(nn.Module):
    """The residual blocks of one resolution, then resampling."""

    def __init__(self, resnets: list[nn.Module]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)

    def blocks(self) -> Iterator[_Block]:
        yield from self.resnets
        for name in ("downsamplers", "upsamplers"):
            if hasattr(self, name):
                yield from getattr(self, name)


class _Half(nn.Module):
    """What encoder and decoder share: their output, and how blocks are run."""

    def __init__(self, in_channels: int, first: int, last: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.conv_in = nn.Conv2d(in_channels, first, 3, padding=1)
        self.conv_norm_out = GroupNorm(groups, last, 1e-6, silu=True)
        self.conv_out = nn.Conv2d(last, out_channels, 3, padding=1)

    def _run(self, x: Tensor, *levels: _Mid | _Level) -> Tensor:
        x = self.conv_in(x)
        for block in (*(block for level in levels for block in level.blocks()), self.conv_norm_out):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)  # nothing here is random
            else:
                x = block(x)
        return self.conv_out(x)


class Encoder(_Half):
    """(B, in_channels, H, W) -> (B, out_channels, H / f, W / f), f = 2^(levels - 1)."""

    def __init__(
        self, in_channels: int, out_channels: int, widths: Sequence[int], layers: int, groups: int, attention: bool
    ) -> None:
        super().__init__(in_channels, widths[0], widths[-1], out_channels, groups)
        self.down_blocks, previous = nn.ModuleList(), widths[0]
        for i, width in enumerate(widths):
            inputs = [previous] + [width] * (layers - 1)
            level = _Level([ResnetBlock(n, width, groups=groups) for n in inputs])
            if i < len(widths) - 1:
                level.downsamplers = nn.ModuleList([Downsample(width, asymmetric=True)])
            self.down_blocks.append(level)
            previous = width
        self.mid_block = _Mid(previous, groups, attention)

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, *self.down_blocks, self.mid_block)


class Decoder(_Half):
    """(B, in_channels, h, w) -> (B, out_channels, h f, w f)."""

    def __init__(
        self, in_channels: int, out_channels: int, widths: Sequence[int], layers: int, groups: int, attention: bool
    ) -> None:
        super().__init__(in_channels, widths[-1], widths[0], out_channels, groups)
        previous = widths[-1]
        self.mid_block = _Mid(previous, groups, attention)
        self.up_blocks = nn.ModuleList()
        for i, width in reversed(list(enumerate(widths))):
            inputs = [previous] + [width] * layers
            level = _Level([ResnetBlock(n, width, groups=groups) for n in inputs])
            if i > 0:
                level.upsamplers = nn.ModuleList([Upsample(width)])
            self.up_blocks.append(level)
            previous = width

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, self.mid_block, *self.up_blocks)


class AutoencoderKL(Whitened):
    """Encodes pictures in [-1, 1] to a diagonal Gaussian over latents, and decodes latents.

    Args:
        block_out_channels: widths from full resolution down; the down-factor is 2^(their number - 1).
        mid_block_add_attention: one attention over all positions at the lowest resolution, in encoder and decoder.
        use_quant_conv, use_post_quant_conv: 1x1 convolutions around the latents; SD3's and Flux's have none.
        gradient_checkpointing: recompute each block in the backward pass instead of keeping its activations.
    """

    diffusers_class = "AutoencoderKL"

    def __init__(  # noqa: PLR0913 the keys of diffusers' configuration
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
        gradient_checkpointing: bool = False,
    ) -> None:
        can_fold = use_quant_conv and use_post_quant_conv
        super().__init__(latent_channels, shifts_channels=can_fold, scales_channels=can_fold)
        widths = list(block_out_channels)
        shared = (widths, layers_per_block, norm_num_groups, mid_block_add_attention)
        self.encoder = Encoder(in_channels, 2 * latent_channels, *shared)
        self.decoder = Decoder(latent_channels, out_channels, *shared)
        self.encoder.gradient_checkpointing = self.decoder.gradient_checkpointing = gradient_checkpointing
        self.quant_conv = Conv1x1(2 * latent_channels, 2 * latent_channels) if use_quant_conv else None
        self.post_quant_conv = Conv1x1(latent_channels, latent_channels) if use_post_quant_conv else None
        moments = self.encoder.conv_out if self.quant_conv is None else self.quant_conv
        # A posterior that starts as wide as the prior drowns the latents, and the first hundreds of steps only narrow
        # it.
        nn.init.constant_(moments.bias[latent_channels:], -6.0)
        self.down_factor = 2 ** (len(widths) - 1)
        self.to(memory_format=torch.channels_last)

    @property
    def last_layer(self) -> nn.Conv2d:
        """The convolution whose gradients balance the adversarial loss (Esser et al. 2021, equation 7)."""
        return self.decoder.conv_out

    def encode(self, image: Tensor) -> Posterior:
        """(B, 3, H, W) in [-1, 1] -> mean and std, (B, C, H / f, W / f), unwhitened, float32."""
        moments = self.encoder(image.contiguous(memory_format=torch.channels_last))
        moments = moments if self.quant_conv is None else self.quant_conv.of_map(moments)
        mean, logvar = moments.float().chunk(2, dim=1)
        return Posterior(mean, torch.exp(0.5 * logvar.clamp(-30.0, 20.0)))

    def decode(self, latent: Tensor) -> Tensor:
        """(B, C, h, w) unwhitened -> (B, 3, h f, w f), about [-1, 1] but not clipped."""
        latent = latent.contiguous(memory_format=torch.channels_last)
        latent = latent if self.post_quant_conv is None else self.post_quant_conv.of_map(latent)
        return self.decoder(latent)

    def folded_state(self) -> dict[str, Tensor]:
        """The state of the same autoencoder whose own latents are the whitened ones: its scale is 1 and its shift 0.

        mean' = (mean - shift) scale and std' = std scale are affine in what the 1x1 quantisation convolution gives
        (log-variance plus 2 log scale), and the inverse is affine in what the post-quantisation convolution takes.

        Raises:
            ConfigError: where it lacks one of the two; its whitening is a scaling_factor and a shift_factor then.
        """
        if self.quant_conv is None or self.post_quant_conv is None:
            raise ConfigError(
                "an autoencoder without quant_conv and post_quant_conv cannot take its whitening into them: "
                "export it with a scaling_factor and a shift_factor"
            )
        shift, scale = torch.tensor(self.shift).double(), torch.tensor(self.scale).double()
        none, one = torch.zeros_like(shift), torch.ones_like(scale)
        folded = fold_output(self, "quant_conv", torch.cat((shift, none)), torch.cat((scale, one)))
        folded["quant_conv.bias"][self.latent_channels :] += 2 * scale.log()
        folded |= fold_input(self, "post_quant_conv", shift, scale)
        state = self.state_dict()
        return state | {name: tensor.to(state[name]) for name, tensor in folded.items()}
