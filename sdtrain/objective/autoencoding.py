"""Stage 1's objective: reconstruct, keep the latents simple, look right, and fool a discriminator, in one backward.

loss = (pixel + perceptual) / e^logvar + logvar + penalty on the latents + w * generator(D with detached parameters)
       + discriminator(D, real, fake.detach())

so the generator and the discriminator are two parameter groups of one optimizer, and each moves by its own loss alone.
(Rombach et al. 2022, equation 25; hinge loss with the non-saturating generator term; adaptive w of Esser et al. 2021,
equation 7.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdtrain.contracts import FirstStage
from sdtrain.errors import ConfigError
from sdtrain.layer.frozen import Frozen
from sdtrain.ops.random import Draw


class _ScaleGradient(torch.autograd.Function):
    """The identity whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:  # noqa: ANN401 torch's signature
        ctx.save_for_backward(factor)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        return gradient * ctx.saved_tensors[0], None


class Autoencoding(nn.Module):
    """The losses of a KL autoencoder with an adversary.

    The adaptive weight is the ratio of the two losses' gradients at the decoder's last layer. Both gradients are
    caught where the
    branches meet at the reconstruction, during the one backward, so it costs two thin convolutions and no second
    backward. They are
    summed over micro-batches and ranks, once an optimizer step, and the weight serves the next step.

    Args:
        pixel: "l1" or "mse", the mean over elements.
        kl_weight: on the KL divergence, summed over latents and divided by the number of pixel values.
        perceptual: a distance between two batches of pictures, or null; frozen.
        discriminator: pictures -> patch logits, or null for no adversary.
        adversarial_weight: times the adaptive weight.
        adversarial_start: the optimizer step at which the adversary enters.
        logvar: initial log-variance of the reconstruction, learned with the generator; null for none.

    Raises:
        ConfigError: for an unknown pixel loss.
    """

    def __init__(
        self,
        pixel: Literal["l1", "mse"] = "l1",
        kl_weight: float = 1e-6,
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 1.0,
        discriminator: nn.Module | None = None,
        adversarial_weight: float = 0.5,
        adversarial_start: int = 50_000,
        logvar: float | None = 0.0,
    ) -> None:
        super().__init__()
        if pixel not in ("l1", "mse"):
            raise ConfigError(f"autoencoder.objective.pixel is l1 or mse, not {pixel!r}")
        self.pixel, self.kl_weight, self.perceptual_weight = pixel, kl_weight, perceptual_weight
        self.perceptual = None if perceptual is None else Frozen(perceptual)
        self.discriminator = discriminator
        self.adversarial_weight, self.adversarial_start = adversarial_weight, adversarial_start
        self.logvar = None if logvar is None else nn.Parameter(torch.tensor(float(logvar)))
        self.register_buffer("adaptive_weight", torch.zeros(()))
        self._sums: dict[str, Tensor] = {}

    def generator_parameters(self) -> list[nn.Parameter]:
        """What moves with the autoencoder beside the autoencoder itself."""
        return [] if self.logvar is None else [self.logvar]

    def discriminator_parameters(self) -> list[nn.Parameter]:
        """What moves by the discriminator's loss."""
        return [] if self.discriminator is None else list(self.discriminator.parameters())

    def loss(self, first_stage: FirstStage, image: Tensor, draw: Draw, step: int) -> dict[str, Tensor]:
        """image (B, 3, H, W) in [-1, 1], step counted in optimizer steps -> {"loss": (), and its terms, detached}."""
        with _input_of(first_stage.last_layer) as features:
            fake, penalty, penalties = self.autoencode(first_stage, image, draw)
        fake = fake.float()
        catch = torch.is_grad_enabled() and step >= self.adversarial_start and self.discriminator is not None
        branch = self._caught(fake, "reconstruction", features) if catch else fake
        difference = branch - image
        pixel = difference.abs().mean() if self.pixel == "l1" else difference.square().mean()
        perceptual = self.perceptual(branch, image).mean() if self.perceptual is not None else torch.zeros_like(pixel)
        total = pixel + self.perceptual_weight * perceptual
        terms = {"pixel": pixel, "perceptual": perceptual} | penalties
        if self.logvar is not None:
            total, terms["logvar"] = total * torch.exp(-self.logvar) + self.logvar, self.logvar
        total = total + penalty
        if self.discriminator is not None:
            adversarial, added = self._adversarial(image, fake, features if catch else None)
            total, terms = total + added, terms | adversarial
        return {"loss": total} | {name: value.detach() for name, value in terms.items()}

    def autoencode(
        self, first_stage: FirstStage, image: Tensor, draw: Draw
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """image -> its reconstruction, the weighted penalty on its latents, and the terms of that.

        Raises:
            ConfigError: for a first stage with a codebook, which has no posterior.
        """
        if hasattr(first_stage, "quantize"):
            raise ConfigError("this first stage has a codebook: write objective@autoencoder.objective=autoencoding_vq")
        posterior = first_stage.encode(image)
        latent = posterior.mean + posterior.std * draw.normal("posterior", posterior.mean.shape[1:])
        variance = posterior.std.square()
        kl = 0.5 * (posterior.mean.square() + variance - 1.0 - variance.log()).sum() / image.numel()
        return first_stage.decode(latent), self.kl_weight * kl, {"kl": kl}

    def _adversarial(
        self, image: Tensor, fake: Tensor, features: list[Tensor] | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The generator's and the discriminator's terms; before the start a zero that still touches every parameter
        of D.
        """
        if features is None:
            zero = sum((p.sum() for p in self.discriminator.parameters()), torch.zeros((), device=image.device)) * 0.0
            return {"generator": zero, "discriminator": zero}, zero
        frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        branch = _ScaleGradient.apply(fake, self.adversarial_weight * self.adaptive_weight)
        branch = self._caught(branch, "adversarial", features)
        generator = -torch.func.functional_call(self.discriminator, frozen, branch).float().mean()
        real, made = self.discriminator(torch.cat((image, fake.detach()))).float().chunk(2)
        discriminator = 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + made).mean())
        terms = {"generator": generator, "discriminator": discriminator, "adaptive_weight": self.adaptive_weight}
        return terms, generator + discriminator

    def _caught(self, x: Tensor, name: str, features: list[Tensor]) -> Tensor:
        """x itself, whose gradient in the coming backward is added up as that of the decoder's last layer."""
        x = x.view_as(x)
        x.register_hook(lambda gradient: self._add(name, gradient.detach(), features[0].detach()))
        return x

    def _add(self, name: str, gradient: Tensor, features: Tensor) -> None:
        with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
            channels = (gradient.shape[1], features.shape[1], 3, 3)
            weight = torch.nn.grad.conv2d_weight(features.float(), channels, gradient.float(), padding=1)
        self._sums[name] = self._sums[name] + weight if name in self._sums else weight

    @torch.no_grad()
    def update_adaptive_weight(self, all_reduce: Callable[[Tensor], Tensor]) -> bool:
        """Once an optimizer step, after its last backward: the next step's weight, the same number on every rank.

        Returns whether the adversary took part. Before its start the discriminator's gradients are zeros that only a
        reduction over ranks wants: an optimizer would count them as steps and have spent its bias correction when the
        first gradients come. With Adam's betas of 0.9 and 0.999 these are a hundred steps of 3 to 6.6 times the
        learning rate where gradients are steady (measured here at the first: 3.16, and 1 where it is left out).
        """
        took_part = len(self._sums) == 2
        if took_part:
            rec, adv = (all_reduce(self._sums[name]).norm() for name in ("reconstruction", "adversarial"))
            weight = (rec / (adv + 1e-4 * rec + 1e-12)).clamp(0.0, 1e4)
            # A step that is not finite may be skipped, and must not leave its mark here.
            self.adaptive_weight.copy_(torch.where(weight.isfinite() & adv.isfinite(), weight, self.adaptive_weight))
        self._sums.clear()
        return took_part


class VQAutoencoding(Autoencoding):
    """The same losses of an autoencoder with a codebook, whose loss stands in place of the KL divergence.

    Args:
        codebook_weight, commitment_weight: on |sg[z] - e|^2 and |z - sg[e]|^2. Equation 3 of van den Oord et al. 2017
            has 1 and 0.25; these defaults are what taming-transformers and latent diffusion's models were trained with.
        pixel, perceptual, perceptual_weight, discriminator, adversarial_weight, adversarial_start: as Autoencoding's.
    """

    def __init__(
        self,
        pixel: Literal["l1", "mse"] = "l1",
        codebook_weight: float = 0.25,
        commitment_weight: float = 1.0,
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 1.0,
        discriminator: nn.Module | None = None,
        adversarial_weight: float = 0.5,
        adversarial_start: int = 50_000,
    ) -> None:
        adversary = (discriminator, adversarial_weight, adversarial_start)
        super().__init__(pixel, 0.0, perceptual, perceptual_weight, *adversary, logvar=None)
        self.codebook_weight, self.commitment_weight = codebook_weight, commitment_weight

    def autoencode(
        self,
        first_stage: FirstStage,
        image: Tensor,
        draw: Draw,  # noqa: ARG002 the codes are not drawn
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """image -> its reconstruction, the weighted penalty on its latents, and the terms of that.

        Raises:
            ConfigError: for a first stage without a codebook.
        """
        if not hasattr(first_stage, "quantize"):
            raise ConfigError("this first stage has no codebook: write objective@autoencoder.objective=autoencoding")
        found = first_stage.quantize(first_stage.encode(image).mean)
        penalty = self.codebook_weight * found.codebook + self.commitment_weight * found.commitment
        terms = {name: getattr(found, name) for name in ("codebook", "commitment", "perplexity", "num_dead")}
        return first_stage.decode_codes(found.latent), penalty, terms


class _input_of:  # noqa: N801 reads as a verb where it is used
    """Collects what a layer is given while the block runs."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __enter__(self) -> list[Tensor]:
        seen: list[Tensor] = []
        self.handle = self.layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        return seen

    def __exit__(self, *_: object) -> None:
        self.handle.remove()
