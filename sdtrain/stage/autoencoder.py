"""Stage 1: the autoencoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sdtrain.contracts import Batch, Context, Preview
from sdtrain.ops.random import Draw
from sdtrain.stage.base import Stage, images_at_once

_BATCH = 64


def to_uint8(image: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1], clamped and rounded -> numpy uint8 (B, H, W, 3)."""
    pixels = (image.float().clamp(-1, 1) + 1) * 127.5
    return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


class AutoencoderStage(Stage):
    """Trains a first stage by an objective that may hold an adversary; both learn by one optimizer and one backward.

    Args:
        first_stage: the autoencoder.
        objective: its losses.
        reconstruction: (real, reconstructed) in [0, 1] -> figures; null for none.
        num_evaluated: held-out pictures that figures are measured on.
    """

    def __init__(
        self,
        context: Context,
        first_stage: nn.Module,
        objective: nn.Module,
        optim: Any,  # noqa: ANN401 a part
        clip_norm: float | None,
        metric: Mapping[str, Any],
        num_evaluated: int = 256,
    ) -> None:
        super().__init__(context, optim, clip_norm)
        self.first_stage, self.objective = first_stage, objective
        self.reconstruction, self.num_evaluated = metric.get("reconstruction"), num_evaluated

    def parts(self) -> Mapping[str, Sequence[nn.Parameter]]:
        """Two parameter groups of one optimizer."""
        generator = [*self.first_stage.parameters(), *self.objective.generator_parameters()]
        return {"first_stage": generator, "discriminator": self.objective.discriminator_parameters()}

    def averaged_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The autoencoder, not its adversary."""
        return ((name, p) for name, p in self.named_parameters() if name.startswith("first_stage."))

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:  # noqa: ARG002 Lightning's signature
        """One micro-batch of pictures."""
        self.consumed(batch)
        terms = self.objective.loss(self.first_stage, batch["image"], self.draw(batch), self.trainer.global_step)
        self.note(**terms)
        return {"loss": terms["loss"]}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: ARG002 Lightning's signature
        """All gradients of the step are there: the adversary's weight for the next one."""
        if self.is_last_micro:
            took_part = self.objective.update_adaptive_weight(
                lambda x: self.trainer.strategy.reduce(x, reduce_op="sum")
            )
            self.idle_parts = () if took_part else ("discriminator",)

    @torch.no_grad()
    def reconstruct(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> the decoded posterior mean, float32 in [-1, 1]."""
        with self.precision():
            return self.first_stage.decode(self.first_stage.encode(image).mean).float().clamp(-1, 1)

    def histograms(self, batch: Batch) -> dict[str, Tensor]:  # noqa: ARG002
        """The posterior of the first held-out pictures, by the weights that are trained; all of it by the first rank,
        as every rank encodes the same ones.
        """
        data = self.trainer.datamodule
        num = min(images_at_once(_BATCH, data.image_size), data.splits["val"])
        mean, std = self.first_stage.encode(data.load("val", range(num))["image"].to(self.device))
        found = {"posterior_mean": mean}
        if bool(std.any()):  # codes have none
            found["posterior_log_variance"] = 2 * std.float().log()
        return found if self.trainer.is_global_zero else {name: values[:0] for name, values in found.items()}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Figures on held-out pictures, the same ones each time."""
        data = self.trainer.datamodule
        num = min(self.num_evaluated, data.splits["val"])
        size = images_at_once(_BATCH, data.image_size)
        image = torch.cat([data.load("val", range(i, min(i + size, num)))["image"] for i in range(0, num, size)])
        image = image.to(self.device)
        made, losses = [], []
        for part in image.split(size):
            made.append(self.reconstruct(part))
            with self.precision():
                draw = Draw.of(self.context.seed, part.shape[0], self.device)
                losses.append(self.objective.loss(self.first_stage, part, draw, 0)["loss"] * part.shape[0])
        figures = {"val/loss": float(torch.stack(losses).sum() / num)}
        if self.reconstruction is not None:
            found = self.reconstruction((image + 1) / 2, (torch.cat(made) + 1) / 2)
            figures |= {f"val/{name}": float(value) for name, value in found.items()}
        return figures

    def preview(self) -> Preview:
        """Original and reconstruction of the first held-out pictures, side by side."""
        data = self.trainer.datamodule
        image = data.load("val", range(min(16, data.splits["val"])))["image"].to(self.device)
        pairs = np.concatenate((to_uint8(image), to_uint8(self.reconstruct(image))), axis=2)  # (N, H, 2 W, 3)
        return Preview(pairs, ["original | reconstruction"] * len(pairs), 4)

    def finish(self) -> dict[str, Any]:
        """The summary of the stage: its figures by their plain names."""
        return {name.removeprefix("val/"): value for name, value in self.evaluate().items()}
