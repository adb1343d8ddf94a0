"""How long training stands still for a checkpoint, written at once or in the background, and how long a resume takes.

    python tools/bench/checkpoint.py [--gigabytes 1.0] [--out DIR]

A fit of one large layer: weights, their average and AdamW's two states are a quarter each. It saves every 2 of 8 steps,
once waiting for each save and once in the background; of both the first save is left out, since it allocates. Then a
fit is begun anew and one from the last checkpoint: the time to the first step of the one more than of the other,
beside that of reading the checkpoint's bytes once. All files are in the page cache.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from step import Batches, Data, Tiny
from timing import machine
from torch import nn

from sdtrain.checkpoint.commit import newest_valid
from sdtrain.config import load_config
from sdtrain.session import Session
from sdtrain.tracker.jsonl import read_rows
from sdtrain.trainer import make_trainer

NUM_STEPS = 8


class FirstStep(L.Callback):
    """When the first step began."""

    def on_train_batch_start(self, *_: Any) -> None:  # noqa: ANN401
        self.began = getattr(self, "began", time.perf_counter())


class Large(Tiny):
    """One layer, of which a step uses a row: saving is what takes long."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, torch.Tensor]:  # noqa: ARG002
        self.consumed(batch)
        return {"loss": self.net.weight[0].square().mean()}


def fit(directory: str, width: int, overrides: tuple[str, ...] = (), resume: Path | None = None) -> float:
    """Trains to the last step; seconds from the start of the fit to the first step."""
    intervals = {"log": 5000, "evaluate": 5000, "samples": 5000, "checkpoint": 2}
    base = ["+experiment=smoke", "tracker=none", "accelerator=cpu", "precision=32-true", f"output_dir={directory}"]
    base += [f"diffusion.callback.{name}.every_steps={steps}" for name, steps in intervals.items()]
    base += [f"diffusion.trainer.max_steps={NUM_STEPS + (resume is not None)}", "diffusion.trainer.batch_size=64"]
    cfg = load_config([*base, *overrides])
    session = Session(cfg)
    stage = Large(session.context("diffusion", cfg.diffusion), nn.Linear(width, width, bias=False))
    trainer, first = make_trainer(cfg, cfg.diffusion, session.directory), FirstStep()
    trainer.callbacks.insert(0, first)
    start = time.perf_counter()
    trainer.fit(stage, datamodule=Data(Batches(NUM_STEPS + 1)), ckpt_path=resume)
    session.tracker.finish({})
    return first.began - start


def saves(directory: str) -> list[dict[str, Any]]:
    """What each save took, without the first and the last: that one is waited for in any case."""
    return [row for row in read_rows(Path(directory) / "metrics.jsonl") if row.get("event") == "checkpoint"][1:-1]


def read_once(checkpoint: Path) -> float:
    """Seconds."""
    buffer, start = bytearray(1 << 24), time.perf_counter()
    for path in checkpoint.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def main() -> None:
    """Prints medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--out", type=Path, help="where to write; default: the system's place for temporary files")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    width = int((arguments.gigabytes * 1e9 / 16) ** 0.5)
    print(f"{machine()}, {' '.join(sys.argv[1:]) or 'defaults'}")
    with tempfile.TemporaryDirectory(dir=arguments.out) as place:
        medians = {}
        for name, is_late in (("waiting", "false"), ("in the background", "true")):
            directory = f"{place}/{is_late}"
            fresh = fit(directory, width, (f"diffusion.callback.checkpoint.in_background={is_late}",))
            rows = saves(directory)
            medians[name] = statistics.median(row["stall_seconds"] for row in rows)
            whole = statistics.median(row["seconds"] for row in rows)
            size = rows[-1]["bytes"] / 1e9
            print(
                f"  {name:18s} training stands still for {medians[name]:6.3f} s; {size:.2f} GB done after {whole:.2f} s"
            )
        print(f"  {medians['in the background'] / medians['waiting']:.1%} of the stall of a save that is waited for")
        checkpoint, _ = newest_valid(Path(directory) / "diffusion" / "checkpoints")
        resumed, once = fit(directory, width, resume=checkpoint), min(read_once(checkpoint) for _ in range(3))
        print(f"  to the first step: anew {fresh:.2f} s, resumed {resumed:.2f} s; reading the bytes once {once:.2f} s")
        print(f"  a resume takes {resumed - fresh - once:.2f} s more than reading once")


if __name__ == "__main__":
    main()
