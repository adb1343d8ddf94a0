"""A tiny real fit whose data and noise are functions of position: the subject of the fault tests, here or in a child.

As a script it reads one JSON object of `fit`'s keywords from the command line, prints the result's hash, and leaves
with the exit code that a RunError carries.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, IterableDataset

from sdtrain.callback import ending
from sdtrain.callback.checkpoint import Checkpoint
from sdtrain.callback.divergence import Divergence
from sdtrain.callback.guard import Guard
from sdtrain.callback.stop import Stop
from sdtrain.callback.straggler import Straggler
from sdtrain.callback.watchdog import Watchdog
from sdtrain.checkpoint.commit import find_resume, read_manifest
from sdtrain.contracts import Context
from sdtrain.errors import ConfigError, RunError
from sdtrain.strategy.commit_io import CommitIO

warnings.filterwarnings("ignore")


class Rows:
    """A tracker that keeps its rows."""

    def __init__(self):
        self.rows = []

    def log(self, row):
        self.rows.append(dict(row))


class Stream(IterableDataset):
    def __init__(self, start):
        self.start = start

    def __iter__(self):
        for index in range(self.start, 10**6):
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(7 * index + 1))
            yield {"x": x, "sample_id": torch.arange(4 * index, 4 * index + 4)}


class Toy(LightningModule):
    def __init__(self, context, nan_at_sample=-1, nan_rank=None, inf_gradient_at_step=-1, slow_rank=None):
        super().__init__()
        self.context = context
        self.images_seen, self.is_last_micro, self.is_left_out = 0, True, False
        self.nan_at_sample, self.nan_rank = nan_at_sample, nan_rank
        self.inf_gradient_at_step, self.slow_rank = inf_gradient_at_step, slow_rank
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(8, 8)

    def training_step(self, batch, batch_idx):
        self.images_seen += len(batch["x"])
        if self.global_rank == self.slow_rank:
            time.sleep(0.05)
        generator = torch.Generator().manual_seed(1000 * self.global_step + int(batch["sample_id"][0]))
        loss = (self.layer(batch["x"]) - torch.randn(batch["x"].shape, generator=generator)).pow(2).mean()
        if self.nan_at_sample not in batch["sample_id"]:
            return loss
        if self.nan_rank is None:
            return loss * float("nan")
        # on one rank alone, and in its loss alone: the gradients, which all ranks share, stay finite
        return loss + float("nan") if self.global_rank == self.nan_rank else loss

    def on_after_backward(self):
        if self.global_step + 1 == self.inf_gradient_at_step:
            self.layer.bias.grad[3] = float("inf")

    def configure_gradient_clipping(self, optimizer, **_):
        """As a stage does: the norms, and no clipping."""
        for p in self.parameters():
            p.grad = None if self.is_left_out else p.grad
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        self.gradient_norms = {"layer": torch.nn.utils.get_total_norm(gradients)}

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 0.01)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint):
        checkpoint["images_seen"] = self.images_seen
        checkpoint["ema"] = {"layer.weight": self.layer.weight.detach() / 2}

    def on_load_checkpoint(self, checkpoint):
        self.images_seen = checkpoint["images_seen"]
        assert set(checkpoint["ema"]) == {"layer.weight"}


class Fault(Callback):
    """Sends this process a signal at a micro-batch, or kills it inside the save of a step.

    Or, at a micro-batch, `does` something else: "raise", "sleep", "unsync" (its gradients are not summed), "drift".
    """

    def __init__(self, signal_number=0, at_batch=-1, rank=0, save_step=-1, function="", call=0, does=""):
        self.signal_number, self.at_batch, self.rank, self.does = signal_number, at_batch, rank, does
        self.save_step, self.function, self.call = save_step, function, call
        self.num_batches = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.num_batches += 1
        if self.does == "unsync" and trainer.global_rank == self.rank:
            trainer.model.require_backward_grad_sync = self.num_batches != self.at_batch
        if self.num_batches != self.at_batch or trainer.global_rank != self.rank:
            return
        if self.signal_number:
            os.kill(os.getpid(), self.signal_number)
        elif self.does == "raise":
            raise ConfigError("this rank's disk is gone")
        elif self.does == "sleep":
            time.sleep(1000)
        elif self.does == "drift":
            pl_module.layer.bias.data[5] += 1e-6

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        if trainer.global_step == self.save_step:
            self._arm({"fsync": os, "rename": os, "rmtree": shutil, "save": torch}[self.function])

    def _arm(self, module):
        original, num_calls = getattr(module, self.function), 0

        def deadly(*args, **kwargs):
            nonlocal num_calls
            num_calls += 1
            if num_calls == self.call:
                if self.function == "save":  # dies with the file half written
                    args[1].write_bytes(b"PK half a file")
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(module, self.function, deadly)


def fit(
    directory, max_steps=8, every_steps=2, keep_last=2, accumulate=1, resume="auto", fault=None, module=None,
    time_limit_seconds=None, on_nonfinite="stop", hang_seconds=None, compare_every=1000, tracker=None, max_epochs=-1,
    saving=None, **trainer_options,
):  # fmt: skip
    """Fits the toy in `directory`, continuing what lies there; returns its trainer."""
    directory = Path(directory)
    stage = directory / "toy"
    stage.mkdir(parents=True, exist_ok=True)
    context = Context(
        "toy", directory, stage, tracker or Rows(), 0, 4 * accumulate, max_steps, config_hash="c", data_fingerprint="d"
    )
    callbacks = [Straggler(min(compare_every, 10)), Guard(on_nonfinite), Divergence(compare_every)]
    callbacks += [*(saving or [Checkpoint(every_steps, keep_last)]), Stop(time_limit_seconds)]
    if fault:
        callbacks.insert(0, Fault(**fault) if isinstance(fault, dict) else fault)
    if hang_seconds is not None:
        callbacks.insert(0, Watchdog(hang_seconds, 4 * hang_seconds))
    trainer = Trainer(
        max_steps=max_steps, max_epochs=max_epochs, accumulate_grad_batches=accumulate, accelerator="cpu",
        callbacks=callbacks, plugins=[CommitIO()], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **trainer_options,
    )  # fmt: skip
    ending.launchers.append(trainer.strategy.launcher)
    path = find_resume(stage / "checkpoints", resume)
    start = read_manifest(path)["step"] * accumulate if path else 0
    toy = Toy(context, **(module or {}))
    trainer.fit(toy, DataLoader(Stream(start), batch_size=None), ckpt_path=path)
    return trainer


def fit_in_child(**options):
    """`fit` in a forked process, since some faults end theirs; its exit code, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            torch.set_num_threads(1)  # a thread pool does not survive a fork
            fit(**options)
            code = 0
        except (ConfigError, RunError) as error:
            code = error.exit_code
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def state_hash(trainer):
    """sha256 over the weights, the optimizer's state and the images seen."""
    tensors = [*trainer.lightning_module.parameters()]
    for state in trainer.optimizers[0].state.values():
        tensors += [state["exp_avg"], state["exp_avg_sq"], state["step"]]
    joined = b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)
    rate, images = trainer.optimizers[0].param_groups[0]["lr"], trainer.lightning_module.images_seen
    return hashlib.sha256(joined + repr((rate, images)).encode()).hexdigest()


def main(options):
    """As `sdtrain.run.run` ends, so does this."""
    directory, rank = Path(options["directory"]), ending.global_rank()
    if rank == 0:
        ending.forget(directory)
    with ending.recorded(directory, rank, lambda: None):
        sys.stdout.write(f"hash {state_hash(fit(**options))}\n")  # one write: ranks share the pipe


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except (ConfigError, RunError) as error:
        print(error, flush=True)
        sys.exit(error.exit_code)
