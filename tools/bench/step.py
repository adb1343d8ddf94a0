"""The extra time of a training step over a bare PyTorch loop: ours with everything on, and stock Lightning with the
same.

    python tools/bench/step.py [--rounds 7] [--steps 300] [--tensors 128] [--hooks]

One network of many small layers, one optimizer, one stream of batches. The bare loop clips and steps a schedule and
does nothing else. Ours runs every callback of configs/callback/stage.yaml, the tracker, the cursor and the means.
Stock Lightning runs its own average, checkpoint, learning-rate monitor, timer and progress bar, its CSV logger and
three `self.log`; also without any of them. A step is timed from one request for a batch to the next; the figure is
the median over the steps of a round, then over rounds A B C A B C. With --hooks: which of our hooks takes how long.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch import callbacks as stock
from lightning.pytorch.loggers import CSVLogger
from timing import machine
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from sdtrain.config import load_config
from sdtrain.optim.adamw import AdamW
from sdtrain.session import Session
from sdtrain.stage.base import Stage
from sdtrain.trainer import make_trainer

BATCH, WIDTH, WARM_UP = 64, 16, 50


def network(num_tensors: int) -> nn.Module:
    """Many small layers, as many tensors."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU()) for _ in range(num_tensors // 2)]
    return nn.Sequential(*layers)


class Batches(IterableDataset):
    """The same batch for ever, with its place in the plan, and the time at which each was asked for."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps, self.asked = num_steps, []
        x, ids = torch.randn(BATCH, WIDTH), torch.arange(BATCH)
        told = {"caption": ["a big red star"] * BATCH, "key": ["k"] * BATCH, "attributes": [{"things": [{}]}] * BATCH}
        fixed = {"x": x, "sample_id": ids, "epoch": ids * 0, "last_micro_of_step": True, **told}
        self.made = [{**fixed, "cursor": {"step": step + 1}} for step in range(num_steps + 8)]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.made:
            self.asked.append(time.perf_counter())
            yield batch

    def step_seconds(self) -> float:
        """The median, without the warm-up and the last steps."""
        asked = self.asked[WARM_UP:-10]
        return statistics.median(b - a for a, b in zip(asked, asked[1:]))


class Data(L.LightningDataModule):
    """What a stage asks of its data."""

    fingerprint, image_size, splits, same_on_every_rank = "", 64, {"train": 10**6, "val": 0}, ()

    def __init__(self, batches: Batches) -> None:
        super().__init__()
        self.batches, self.step = batches, 0

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.batches, batch_size=None, collate_fn=lambda batch: batch)

    def advance(self, cursor: dict[str, Any]) -> None:
        self.step = int(cursor["step"])

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def accounting(self) -> dict[str, int]:
        return {}


class Tiny(Stage):
    """A stage of the smallest kind."""

    def __init__(self, context: Any, net: nn.Module) -> None:  # noqa: ANN401
        super().__init__(context, AdamW(lr=1e-4, warmup_steps=10), clip_norm=1.0)
        self.net = net

    def parts(self) -> dict[str, list[nn.Parameter]]:
        return {"net": list(self.net.parameters())}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, torch.Tensor]:  # noqa: ARG002
        self.consumed(batch)
        loss = self.net(batch["x"]).square().mean()
        self.note(loss=loss)
        return {"loss": loss}

    def evaluate(self) -> dict[str, float]:
        return {}

    def preview(self) -> None:
        return None


class StockModule(L.LightningModule):
    """The same as Lightning's documentation writes it."""

    def __init__(self, net: nn.Module, is_logging: bool) -> None:
        super().__init__()
        self.net, self.is_logging = net, is_logging

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:  # noqa: ARG002
        loss = self.net(batch["x"]).square().mean()
        if self.is_logging:
            self.log("loss", loss, prog_bar=True, batch_size=BATCH)
            self.log("images", float(self.global_step * BATCH), batch_size=BATCH)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: ARG002
        if self.is_logging:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
            self.log("grad_norm", norm, batch_size=BATCH)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer, schedule = AdamW(lr=1e-4, warmup_steps=10).build({"net": list(self.net.parameters())}, 10**6)
        for number, group in enumerate(optimizer.param_groups):
            group["name"] = str(number)  # its monitor refuses two of a name
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def bare(num_steps: int, num_tensors: int) -> float:
    """Forward, backward, clip, step, schedule."""
    net, batches = network(num_tensors), Batches(num_steps)
    optimizer, schedule = AdamW(lr=1e-4, warmup_steps=10).build({"net": list(net.parameters())}, 10**6)
    for step, batch in enumerate(DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)):
        if step == num_steps:
            break
        loss = net(batch["x"]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0, foreach=True)
        optimizer.step()
        schedule.step()
    return batches.step_seconds()


def ours(num_steps: int, num_tensors: int, watch: Callable[[L.Trainer, Tiny], None] | None = None) -> float:
    """A session's own trainer, tracker and callbacks."""
    with tempfile.TemporaryDirectory() as directory:
        overrides = [
            "+experiment=smoke",
            "tracker=none",
            "accelerator=cpu",
            "precision=32-true",
            f"output_dir={directory}",
        ]
        intervals = {"log": 50, "evaluate": 5000, "samples": 5000, "checkpoint": 5000}
        overrides += [f"diffusion.callback.{name}.every_steps={steps}" for name, steps in intervals.items()]
        overrides += [f"diffusion.trainer.max_steps={num_steps}", f"diffusion.trainer.batch_size={BATCH}"]
        cfg = load_config(overrides)
        session, batches = Session(cfg), Batches(num_steps)
        stage = Tiny(session.context("diffusion", cfg.diffusion), network(num_tensors))
        trainer = make_trainer(cfg, cfg.diffusion, session.directory)
        if watch is not None:
            watch(trainer, stage)
        trainer.fit(stage, datamodule=Data(batches))
        session.tracker.finish({})
    return batches.step_seconds()


def lightning(num_steps: int, num_tensors: int, is_full: bool = True) -> float:
    """Lightning's trainer as it comes, with or without what ours does."""
    batches = Batches(num_steps)
    with tempfile.TemporaryDirectory() as directory:
        callbacks = [
            stock.EMAWeightAveraging(decay=0.9999),
            stock.ModelCheckpoint(dirpath=directory, every_n_train_steps=5000, save_last=True),
            stock.LearningRateMonitor("step"),
            stock.Timer({"hours": 10}),
        ]
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=num_steps,
            max_epochs=-1,
            gradient_clip_val=1.0,
            callbacks=callbacks if is_full else [],
            logger=CSVLogger(directory) if is_full else False,
            log_every_n_steps=50,
            enable_checkpointing=is_full,
            enable_progress_bar=is_full,
            enable_model_summary=False,
        )
        trainer.fit(StockModule(network(num_tensors), is_full), Data(batches))
    return batches.step_seconds()


def hooks(num_steps: int, num_tensors: int) -> None:
    """Microseconds a step inside each of our hooks; a hook that another calls counts in both."""
    spent: dict[str, float] = defaultdict(float)
    owners: dict[str, Any] = {}

    def timed(name: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - start

        return call

    def watch(trainer: L.Trainer, stage: Tiny) -> None:
        names = ("on_train_batch_start", "on_train_batch_end", "on_before_backward", "on_after_backward")
        names += ("on_before_optimizer_step", "on_before_zero_grad")
        for callback in trainer.callbacks:
            for name in names:
                if getattr(type(callback), name) is not getattr(L.Callback, name):
                    owners[f"{type(callback).__name__}.{name}"] = callback
                    setattr(callback, name, timed(f"{type(callback).__name__}.{name}", getattr(callback, name)))
        for name in ("consumed", "note", "configure_gradient_clipping"):
            setattr(stage, name, timed(f"Stage.{name}", getattr(stage, name)))

    ours(num_steps, num_tensors, watch)
    for name, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"  {name:44s} {seconds / num_steps * 1e6:8.1f} us")


def main() -> None:
    """Prints medians and what each adds to the bare loop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=300, help=f"{WARM_UP} of them and the last are not counted")
    parser.add_argument("--tensors", type=int, default=128)
    parser.add_argument("--hooks", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    os.environ["TQDM_MININTERVAL"] = "0.1"
    size = (arguments.steps, arguments.tensors)
    print(f"{machine()}, {' '.join(sys.argv[1:]) or 'defaults'}")
    if arguments.hooks:
        return hooks(*size)
    contestants = {
        "bare loop": lambda: bare(*size),
        "sdtrain, everything on": lambda: ours(*size),
        "Lightning, nothing on": lambda: lightning(*size, is_full=False),
        "Lightning, the same on": lambda: lightning(*size),
    }
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(arguments.rounds + 1):
        for name, function in contestants.items():
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                seconds = function()
            if turn:
                found[name].append(seconds)
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    for name, seconds in medians.items():
        spread = (max(found[name]) - min(found[name])) / seconds
        extra = (seconds - medians["bare loop"]) * 1e6
        told = f"{extra:6.0f} us more than the bare loop (spread {spread:.0%})"
        print(f"  {name:24s} {seconds * 1e6:8.0f} us a step, {told}")
    return None


if __name__ == "__main__":
    main()
