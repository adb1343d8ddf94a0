"""Where a process of a run began, with the hashes of all that it depends on, and what it has read since."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from typing_extensions import override

from sdtrain.callback.ending import read_json
from sdtrain.callback.every import EverySteps
from sdtrain.contracts import Context

MOST_CUT = 0.01  # a share of captions that lose their end, beyond which it is told


class Accounts(EverySteps):
    """An event `start` with the run's lineage, then every `every_steps` optimizer steps, and at the last one, a row of
    what no loss says: restarts, the average's decay, and what was read and replaced, over all ranks. They tell each
    other at that step alone.
    """

    def __init__(self, every_steps: int = 1000) -> None:
        super().__init__(every_steps)
        self._num_restarts, self._has_warned = 0, False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        context = pl_module.context
        self._num_restarts = num_starts(context.run_directory / "metrics.jsonl", context.stage)
        context.tracker.log(
            {
                "event": "start",
                **self._place(trainer, pl_module),
                "world_size": trainer.world_size,
                **lineage(context, getattr(trainer.datamodule, "about", None)),
            }
        )

    @override
    def act(self, trainer: Trainer, pl_module: LightningModule) -> None:
        total = counted(trainer.datamodule, trainer.world_size)
        shares = shares_of(pl_module.shares(), trainer.world_size)
        if not trainer.is_global_zero:
            return
        average = pl_module.ema
        decay = {} if average is None else {"ema_decay": average.profiles[0].kept(average.num_updates)}
        counts = {f"data/{name}": count for name, count in total.items()}
        if total.get("read"):
            counts["data/empty_caption_share"] = total.get("empty_captions", 0) / total["read"]
        counts |= {f"data/{name}": share for name, share in shares.items()}
        pl_module.context.tracker.log({**self._place(trainer, pl_module), **decay, **counts})
        if max(shares.values(), default=0.0) > MOST_CUT and not self._has_warned:
            self._has_warned = True
            told = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
            self.warn(trainer, pl_module, f"captions longer than the conditioner's max_tokens lose their end: {told}")

    def _place(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        place = {"stage": pl_module.context.stage, "step": trainer.global_step, "images": pl_module.images_seen}
        return place | {"restarts": self._num_restarts}


def counted(data: LightningDataModule, world_size: int) -> dict[str, float]:
    """What was read and replaced, over all ranks, which call it together."""
    everyones = [data.accounting()] * world_size
    if world_size > 1:
        dist.all_gather_object(everyones, everyones[0])
    return together(everyones, data.same_on_every_rank)


def shares_of(own: Mapping[str, tuple[int, int]], world_size: int) -> dict[str, float]:
    """Parts of wholes over all ranks, which call it together; without those of nothing."""
    everyones = [own] * world_size
    if world_size > 1:
        dist.all_gather_object(everyones, own)
    sums = {name: [sum(one[name][i] for one in everyones) for i in range(2)] for name in own}
    return {name: part / whole for name, (part, whole) in sums.items() if whole}


def together(accounts: Sequence[Mapping[str, float]], same: Collection[str]) -> dict[str, float]:
    """What all ranks counted. Names that begin with a word of `same` are of the whole run already; of shards that are
    bad, which several ranks may have met, it is the most that one rank knows.
    """
    total: dict[str, float] = {}
    for own in accounts:
        for name, count in own.items():
            if name.partition("/")[0] in same:
                total.setdefault(name, count)
            elif name == "bad_shards":
                total[name] = max(total.get(name, 0), count)
            else:
                total[name] = total.get(name, 0) + count
    return total


def lineage(context: Context, latents: dict[str, Any] | None) -> dict[str, str]:
    """What this stage's weights come from, by hash: the config, the data, and in stage 2 the first stage and, where
    `latents` says what is in a cache, that.
    """
    found = {"config_hash": context.config_hash, "data_fingerprint": context.data_fingerprint}
    if (first_stage := read_json(context.directory / "first_stage.json")) is not None:
        found["first_stage"] = first_stage["weight_hash"]
    if latents is not None:
        found["latents"] = hashlib.sha256("".join(part["sha256"] for part in latents["parts"]).encode()).hexdigest()
    return found


def num_starts(metrics: Path, stage: str) -> int:
    """How often this stage was begun before."""
    if not metrics.is_file():
        return 0
    with metrics.open(encoding="utf-8", errors="replace") as lines:
        starts = [json.loads(line) for line in lines if line.startswith('{"event": "start"') and line.endswith("}\n")]
    return sum(row["stage"] == stage for row in starts)
