"""Stage 2: the denoiser, in the latent space of a frozen first stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sdtrain.contracts import Batch, Conditioning, Context, Preview
from sdtrain.layer.frozen import Frozen
from sdtrain.metric.memorisation import NUM_TRAINING, PART
from sdtrain.ops.random import Draw
from sdtrain.stage.autoencoder import to_uint8
from sdtrain.stage.base import Stage, images_at_once
from sdtrain.stage.comparison import compare, real_pictures
from sdtrain.stage.generation import Generation, for_conditioner

_BATCH = 128
_NUM_VALIDATED = 256
_VALIDATION_SEED = 0  # not the run's: runs of other seeds are compared by the same noise
# sigma / (alpha + sigma), which is t on straight paths; every path reaches them (Stable Diffusion's ends at 0.936).
LEVELS = tuple(0.05 + 0.125 * i for i in range(8))


class DiffusionStage(Stage):
    """Trains a denoiser and, where it learns, its conditioner.

    Args:
        model: the denoiser.
        conditioner: what it is told.
        objective: what is minimised; the sampler reads `to_x0` from the same object.
        sampler: draws previews and the pictures that metrics read.
        first_stage: frozen, already whitened by its manifest.
        decoded: an optional loss on the decoded prediction of x0.
        metric: parts by name: caption_match, memorisation, distribution.
    """

    def __init__(
        self,
        context: Context,
        model: nn.Module,
        conditioner: nn.Module,
        objective: Any,  # noqa: ANN401 a part
        sampler: Any,  # noqa: ANN401
        first_stage: nn.Module,
        optim: Any,  # noqa: ANN401
        clip_norm: float | None,
        metric: Mapping[str, Any],
        decoded: nn.Module | None = None,
    ) -> None:
        super().__init__(context, optim, clip_norm)
        self.model, self.conditioner = model, conditioner
        self.objective, self.sampler, self.metric = objective, sampler, metric
        self.frozen = Frozen(first_stage)
        self.decoded = None if decoded is None else Frozen(decoded)
        self._compared: dict[str, float] = {}  # the last figures of drawn pictures

    @property
    def first_stage(self) -> nn.Module:
        """The frozen autoencoder."""
        return self.frozen.module

    def parts(self) -> Mapping[str, Sequence[nn.Parameter]]:
        """The denoiser and the conditioner, each with its own learning rate."""
        named = {"model": self.model.parameters(), "conditioner": self.conditioner.parameters()}
        return {name: [p for p in parameters if p.requires_grad] for name, parameters in named.items()}

    def shares(self) -> dict[str, tuple[int, int]]:
        """The captions that each text encoder had to cut; where there are several, by its name."""
        readers = {path: part for path, part in self.conditioner.named_modules() if hasattr(part, "cut_captions")}
        names = {path: f"/{path.rpartition('.')[2]}" if len(readers) > 1 else "" for path in readers}
        return {f"cut_caption_share{names[path]}": part.cut_captions() for path, part in readers.items()}

    def latents(self, batch: Batch, draw: Draw) -> Tensor:
        """(B, C, h, w) whitened: a draw from the cached or freshly encoded posterior."""
        if "latent" in batch:
            mean, std = batch["latent"].float().unbind(dim=1)
        else:
            with torch.no_grad():
                mean, std = self.first_stage.encode(batch["image"])
        return self.first_stage.whiten(mean + std * draw.normal("posterior", mean.shape[1:]))

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:  # noqa: ARG002 Lightning's signature
        """One micro-batch."""
        self.consumed(batch)
        draw = self.draw(batch)
        x0 = self.latents(batch, draw)
        told = self.conditioner(for_conditioner(batch, self.first_stage, tuple(x0.shape[2:])), draw)
        out = self.objective.loss(self.model, x0, told, draw)
        loss = out["loss"].mean()
        if self.decoded is not None:
            predicted = self.objective.to_x0(out["output"], out["x_t"], out["t"])
            decoded = self.decoded(self.first_stage, predicted, x0, self.objective.path(out["t"]))
            self.note(decoded=decoded)
            loss = loss + decoded
        self.note(loss=loss)
        self.note_at("loss_at", out["loss"], out["t"])
        return {"loss": loss}

    def histograms(self, batch: Batch) -> dict[str, Tensor]:
        """The times that were drawn for a batch, and its whitened latents."""
        draw = self.draw(batch)
        return {"timestep": self.objective.timestep(draw, self.objective.path), "latent": self.latents(batch, draw)}

    def evaluate(self) -> dict[str, float]:
        """On held-out samples with fixed times and noise: the loss, which rises where the model begins to overfit, and
        the error of x0.

        The error is of whitened latents, a mean over elements, at eight noise levels that are ratios of noise to data
        and so the same on every path: figures of any objective on the same first stage and data compare. Sample i is
        noised to level i mod 8, as MLPerf's FLUX benchmark does; the mean over the levels is `x0_error`.
        """
        return self._validate("val", with_loss=True)

    def evaluate_raw(self) -> dict[str, float]:
        """The same errors of x0 by another name, for the weights that are trained where an average is evaluated."""
        return self._validate("val_raw", with_loss=False)

    def compare(self) -> dict[str, float]:
        """Figures of drawn pictures beside held-out ones, where they are asked for: `val/fid`."""
        distribution = self.metric.get("distribution")
        if distribution is not None:
            place = self.trainer.global_rank, self.trainer.world_size
            device = self.device if self.device.type == "cuda" else "cpu"  # others have no float64
            found = compare(distribution, self.trainer.datamodule, self.generate, device, *place)
            self._compared = {f"val/{name}": value for name, value in found.items()}
        return self._compared

    @torch.no_grad()
    def _validate(self, prefix: str, with_loss: bool) -> dict[str, float]:
        ratios = torch.tensor([level / (1 - level) for level in LEVELS], device=self.device)
        tally = torch.zeros(2, len(LEVELS) + 1, device=self.device)  # sums and counts, by level; the loss stands last
        with self.precision():
            for place, counts, x0, told, draw in self._held_out():
                level, noise = place % len(LEVELS), draw.normal("validation", x0.shape[1:])
                error = self.objective.x0_error(self.model, x0, noise, told, ratios[level])
                tally.index_add_(1, level, torch.stack((error * counts, counts)))
                if with_loss:
                    loss = self.objective.loss(self.model, x0, told, draw)["loss"]
                    tally[:, -1] += torch.stack((loss * counts, counts)).sum(dim=1)
        if self.trainer.world_size > 1:
            tally = self.trainer.strategy.reduce(tally, reduce_op="sum")
        sums, counts = tally.tolist()
        errors = {f"t{level:g}": s / n for level, s, n in zip(LEVELS, sums, counts) if n}
        found = {f"{prefix}/loss": sums[-1] / counts[-1]} if with_loss else {}
        found[f"{prefix}/x0_error"] = sum(errors.values()) / len(errors)
        return found | {f"{prefix}/x0_error_at/{name}": error for name, error in errors.items()}

    def _held_out(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Conditioning, Draw]]:
        """This rank's share of the held-out samples: their places in the split, whether each counts (1 or 0), latents,
        conditions and random numbers.

        All ranks get as many batches of the same sizes, since sharded weights are gathered by all together; the last
        sample, once more, fills what is missing and does not count.
        """
        data, rank, world = self.trainer.datamodule, self.trainer.global_rank, self.trainer.world_size
        num = min(_NUM_VALIDATED, data.splits["val"])
        own = torch.arange(rank, world * -(-num // world), world)
        for places in own.split(images_at_once(_BATCH, data.image_size)):
            batch = data.load("val", places.clamp(max=num - 1))
            moved = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            draw = Draw(_VALIDATION_SEED, moved["sample_id"], moved["epoch"])
            x0 = self.latents(moved, draw)
            told = self.conditioner(for_conditioner(moved, self.first_stage, tuple(x0.shape[2:])))
            yield places.to(self.device), (places < num).float().to(self.device), x0, told, draw

    def generation(self) -> Generation:
        """The parts that draw pictures, as they stand now."""
        side = self.trainer.datamodule.image_size // self.first_stage.down_factor
        parts = (self.model, self.conditioner, self.objective, self.first_stage, self.sampler)
        return Generation(*parts, latent_size=(side, side))

    def generate(self, batch: Batch, seed: int) -> np.ndarray:
        """uint8 (N, H, W, 3)."""
        size = images_at_once(_BATCH, self.trainer.datamodule.image_size)
        with self.precision():
            return self.generation()(batch, seed, size=size)

    def preview(self) -> Preview:
        """The same held-out captions and the same noise each time."""
        data = self.trainer.datamodule
        batch = data.load("val", range(min(16, data.splits["val"])), as_images=True)
        return Preview(self.generate(batch, self.context.seed), batch["caption"], 8)

    def finish(self) -> dict[str, Any]:
        """The summary of the stage: losses, and what the pictures show where the data says what they should."""
        measured = self.evaluate() | (self._compared or self.compare())
        figures: dict[str, Any] = {name.removeprefix("val/"): value for name, value in measured.items()}
        groups = self._groups()
        if groups:
            figures["caption_match"] = self.metric["caption_match"].report(groups)
        if self.metric.get("memorisation") is not None:
            figures["memorisation"] = self._memorisation(groups)
        return figures

    def _groups(self) -> dict[str, dict[str, Any]]:
        """Real pictures, reconstructions and samples of each group of captions that the reader asks for."""
        reader, data = self.metric.get("caption_match"), self.trainer.datamodule
        if reader is None or "held_out" not in data.splits:
            return {}  # only the embedded data sets say what their pictures show
        groups = {}
        for name, split, num_things in reader.groups:
            told = data.attributes(split)
            ids = [i for i, found in enumerate(told) if len(found["things"]) == num_things][: reader.num_captions]
            if not ids:
                continue
            batch = data.load(split, ids, as_images=True)
            image = batch["image"].to(self.device)
            with torch.no_grad(), self.precision():
                made = [
                    self.first_stage.decode(self.first_stage.encode(part).mean)
                    for part in image.split(images_at_once(_BATCH, image.shape[-1]))
                ]
            groups[name] = {
                "real": to_uint8(image),
                "attributes": [told[i] for i in ids],
                "reconstructions": to_uint8(torch.cat(made)),
                "samples": self.generate(batch, self.context.seed),
            }
        return groups

    def _memorisation(self, groups: dict[str, dict[str, Any]]) -> dict[str, float]:
        data = self.trainer.datamodule
        num_held_out = min(512, data.splits["val"])
        batch = data.load("val", range(num_held_out), as_images=True)
        held_out = to_uint8(batch["image"])
        if groups:
            samples = np.concatenate([group["samples"] for group in groups.values()])
        else:
            samples = self.generate(batch, self.context.seed)
        num, rank, world = min(data.splits["train"], NUM_TRAINING), self.trainer.global_rank, self.trainer.world_size
        parts = (range(i, min(i + PART, num)) for i in range(rank * PART, num, world * PART))
        return self.metric["memorisation"](samples, held_out, (real_pictures(data, "train", part) for part in parts))
