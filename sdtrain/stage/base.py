"""What both stages share: their place in the run, the means they log, their optimizer, and how gradients are
clipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from sdtrain.contracts import Batch, Context
from sdtrain.errors import ConfigError
from sdtrain.layer.frozen import everything
from sdtrain.ops.norm import total_norm
from sdtrain.ops.random import Draw

NUM_BINS = 8


def images_at_once(most: int, image_size: int) -> int:
    """How many pictures are encoded or decoded together where nothing is trained: `most`, fewer of large ones, so that
    together they have at most 4 M pixels.
    """
    return max(1, min(most, 2**22 // image_size**2))


class Stage(L.LightningModule):
    """A LightningModule that owns no layers and no mathematics: it wires parts and logs.

    Args:
        context: where it runs.
        optim: the recipe of its optimizer; `build(parts, max_steps)`.
        clip_norm: each part's gradients are clipped by their own norm, or null.
    """

    def __init__(self, context: Context, optim: Any, clip_norm: float | None) -> None:  # noqa: ANN401 a part
        super().__init__()
        self.context, self.optim, self.clip_norm = context, optim, clip_norm
        self.ema: Any = None  # the EMA callback's, where there is one
        self.flops_per_image = 0.0  # of training on it, where the run counted them
        self.idle_parts: Sequence[str] = ()  # that the coming optimizer step leaves as they are
        self.is_left_out = False  # whether the guard leaves this optimizer step out, as if it had not been due
        self.is_last_micro = True  # whether the optimizer steps after this micro-batch
        self.gradient_norms: dict[str, Tensor] = {}  # of the step before it, by part, on the device
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._binned: dict[str, Tensor] = {}

    def parts(self) -> Mapping[str, Sequence[nn.Parameter]]:
        """What learns, by the name of its part; each is a parameter group."""
        raise TypeError("a stage names its parts")

    def averaged_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What an exponential moving average is kept of."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def count_parameters(self) -> tuple[dict[str, int], int]:
        """Of each part that learns, and of all that is frozen."""
        learned = {name: sum(map(num_values, some)) for name, some in self.parts().items()}
        every = {id(p): p for module in everything(self) for p in module.parameters(recurse=False)}
        return learned, sum(map(num_values, every.values())) - sum(learned.values())

    def shares(self) -> dict[str, tuple[int, int]]:
        """What this process counted of its data beside the loader: a part and the whole, by name."""
        return {}

    @property
    def images_seen(self) -> int:
        """Images over all ranks and micro-batches, up to the last optimizer step."""
        return self.trainer.global_step * self.context.global_batch_size

    def draw(self, batch: Mapping[str, Any]) -> Draw:
        """The random numbers of a batch: a function of seed, epoch and sample, whatever rank or worker it is on."""
        return Draw(self.context.seed, batch["sample_id"], batch["epoch"], batch.get("place"))

    def note(self, **values: Tensor) -> None:
        """Adds to the means of the next row, on the device: nothing waits for it."""
        for name, value in values.items():
            value = value.detach().float()  # copied below: a buffer or a parameter will have changed until the row
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
            self._counts[name] = self._counts.get(name, 0) + 1

    def note_at(self, name: str, values: Tensor, places: Tensor) -> None:
        """Adds values (B,) to the means of the next row by their places (B,) in [0, 1], in NUM_BINS bins, on the
        device.
        """
        values = values.detach().float()
        if name not in self._binned:
            self._binned[name] = torch.zeros(2, NUM_BINS, device=values.device)  # sums and counts
        bins = (places * NUM_BINS).long().clamp(0, NUM_BINS - 1)
        self._binned[name].index_add_(1, bins, torch.stack((values, torch.ones_like(values))))

    def take_metrics(self) -> dict[str, float]:
        """Means since the last call, over ranks too. The one place where the host waits for the device."""
        if not self._sums:
            return {}
        names, binned = list(self._sums), list(self._binned)
        means = torch.stack([self._sums[name] / self._counts[name] for name in names])
        means = torch.cat((means, *(self._binned[name].flatten() for name in binned)))
        if self.trainer.world_size > 1:
            means = self.trainer.strategy.reduce(means, reduce_op="mean")  # sums over counts stay what they are
        self._sums.clear()
        self._counts.clear()
        self._binned.clear()
        found = means.tolist()
        row = dict(zip(names, found))
        for number, name in enumerate(binned):
            first = len(names) + 2 * NUM_BINS * number
            sums, counts = found[first : first + NUM_BINS], found[first + NUM_BINS : first + 2 * NUM_BINS]
            row |= {f"{name}/{_bin(i)}": s / n for i, (s, n) in enumerate(zip(sums, counts)) if n}
        return row

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also what the next row has so far, as means over ranks: after a resume it still is of all its steps."""
        parts = [*self._sums.values(), *self._binned.values()]
        if self.trainer.world_size > 1 and parts:
            flat = self.trainer.strategy.reduce(torch.cat([part.flatten() for part in parts]), reduce_op="mean")
            parts = [new.view(old.shape) for new, old in zip(flat.split([part.numel() for part in parts]), parts)]
        sums = dict(zip([*self._sums, *self._binned], parts))
        checkpoint["row"] = {"counts": dict(self._counts), "sums": sums}
        checkpoint["optim"] = type(self.optim).__name__

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        before, now = checkpoint.get("optim"), type(self.optim).__name__
        if before is not None and before != now:  # checkpoints before it was kept say nothing
            raise ConfigError(
                f"the optimizer of {self.context.stage} is {now}, and its checkpoint has the states of {before}, which"
                f" do not fit: write optim={before.lower()} for it again, or take a new output_dir"
            )
        row = checkpoint.get("row", {"counts": {}, "sums": {}})  # checkpoints before it was kept have none
        self._counts = dict(row["counts"])
        self._sums = {name: part for name, part in row["sums"].items() if name in self._counts}
        self._binned = {name: part for name, part in row["sums"].items() if name not in self._counts}

    def evaluate_raw(self) -> dict[str, float]:
        """What of `evaluate` is also measured without the average."""
        return {}

    def compare(self) -> dict[str, float]:
        """Figures of what it makes beside what is real: they take longer, and are asked for."""
        return {}

    def histograms(self, batch: Batch) -> dict[str, Tensor]:  # noqa: ARG002
        """This rank's share of what is worth a histogram, by name: the same names on every rank. `batch` is the last
        that was trained on.
        """
        return {}

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Inside it, the stage holds the averaged weights, where there are any."""
        return nullcontext() if self.ema is None else self.ema.swapped()

    def precision(self) -> AbstractContextManager[None]:
        """The trainer's autocast, for what runs outside of a training step."""
        return self.trainer.precision_plugin.forward_context() if self._trainer is not None else nullcontext()

    def consumed(self, batch: Mapping[str, Any]) -> None:
        """Moves the data cursor past an optimizer step. Seen by checkpoints only after the step, so it may be said
        within it.
        """
        self.is_last_micro = batch["last_micro_of_step"]
        if self.is_last_micro:
            self.trainer.datamodule.advance(batch["cursor"])

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:  # noqa: ARG002
        """Its tensors. Lightning's own looks into every caption and every attribute of them."""
        return {  # type: ignore[return-value]
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }

    def configure_optimizers(self) -> dict[str, Any]:
        """One optimizer, a schedule that counts optimizer steps up to max_steps."""
        self._learned = {name: list(parameters) for name, parameters in self.parts().items()}  # to walk it once
        optimizer, schedule = self.optim.build(self._learned, self.context.max_steps)
        self._recipe = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """A checkpoint brings back the optimizer's values of the run before; what counts is what is configured now."""
        (optimizer,), (config,) = self.trainer.optimizers, self.trainer.lr_scheduler_configs
        schedule = config.scheduler
        for group, recipe, factor in zip(optimizer.param_groups, self._recipe, schedule.lr_lambdas):
            group.update(recipe)
            group["lr"] = recipe["initial_lr"] * factor(schedule.last_epoch)
        schedule.base_lrs = [recipe["initial_lr"] for recipe in self._recipe]
        for kept in (self._sums, self._binned):  # a checkpoint's are on the host
            kept.update({name: part.to(self.device) for name, part in kept.items()})

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:  # noqa: ANN401, ARG002 Lightning's signature
        """The schedule counts the steps that were made."""
        if not self.is_left_out:
            scheduler.step()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,  # noqa: ARG002 Lightning's signature
        gradient_clip_algorithm: str | None = None,  # noqa: ARG002
    ) -> None:
        """Clips each part by its own norm, and notes the norms. Under DeepSpeed it is called at every micro-batch."""
        if not self.is_last_micro:
            return
        idle = [*self._learned] if self.is_left_out else self.idle_parts
        if hasattr(self.trainer.strategy, "clip"):  # only DeepSpeed knows where its gradients are
            self.gradient_norms = self.trainer.strategy.clip(self.clip_norm, idle)
        else:
            self.gradient_norms = self._clip(optimizer, idle)
        self.note(**{f"grad_norm/{name}": norm for name, norm in self.gradient_norms.items()})

    def _clip(self, optimizer: torch.optim.Optimizer, idle: Sequence[str]) -> dict[str, Tensor]:
        norms = {}
        for name, parameters in self._learned.items():
            if name in idle:
                for p in parameters:  # an optimizer would count a gradient of zero as a step
                    p.grad = None
            gradients = [p.grad for p in parameters if p.grad is not None]
            if gradients:
                norms[name] = total_norm(gradients)
        if not self.clip_norm:
            return norms
        if hasattr(optimizer, "clip"):  # within its step, which takes no pass of its own
            optimizer.clip(norms, self.clip_norm)
            return norms
        for name, norm in norms.items():
            clip_grads_with_norm_(self._learned[name], self.clip_norm, norm, foreach=True)
        return norms


def num_values(p: nn.Parameter) -> int:
    """Of a parameter, all of whose values may not be here: under ZeRO-3 they are in pieces."""
    return getattr(p, "ds_numel", p.numel())


def _bin(number: int) -> str:
    """0.12-0.25 of the second of eight."""
    return f"{number / NUM_BINS:.2f}-{(number + 1) / NUM_BINS:.2f}"
