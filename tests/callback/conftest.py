"""A real Lightning fit of ten parameters, for callbacks to ride on."""

import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, IterableDataset

from sdtrain.contracts import Context, Preview
from sdtrain.tracker.none import NullTracker


class Endless(IterableDataset):
    def __init__(self, wait_seconds):
        self.wait_seconds = wait_seconds

    def __iter__(self):
        while True:
            time.sleep(self.wait_seconds)
            yield torch.ones(4, 9)


class Recorder(NullTracker):
    def __init__(self):
        self.rows, self.images = [], []

    def log(self, row):
        self.rows.append(dict(row))

    def image(self, name, path, step, captions=(), pictures=None):
        self.images.append((name, path, step, list(captions)))
        self.pictures = pictures


class TinyStage(LightningModule):
    """What the callbacks ask of a stage, and a record of what they asked."""

    def __init__(
        self, context, accumulate=1, evaluate_seconds=0.0, compute_seconds=0.0, preview=True, figures=True, compared=()
    ):
        super().__init__()
        self.layer = torch.nn.Linear(9, 1)
        self.context = context
        self.images_seen = 0
        self.accumulate = accumulate
        self.evaluate_seconds = evaluate_seconds
        self.compute_seconds = compute_seconds
        self.has_preview, self.has_figures = preview, figures
        self.compared = dict(compared)
        self.losses = []
        self.is_averaged = False
        self.ema = None
        self.flops_per_image = 0.0
        self.asked = []

    def training_step(self, batch, batch_idx):
        time.sleep(self.compute_seconds)
        loss = self.layer(batch).square().mean()
        self.losses.append(loss.detach())
        self.images_seen += len(batch)
        return loss

    def configure_optimizers(self):
        groups = [
            {"params": [self.layer.weight], "lr": 1e-4, "name": "weight"},
            {"params": [self.layer.bias], "lr": 1e-5, "name": "bias"},
        ]
        optimizer = torch.optim.SGD(groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step + 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint):
        checkpoint["images_seen"] = self.images_seen

    def on_load_checkpoint(self, checkpoint):
        self.images_seen = checkpoint["images_seen"]

    def take_metrics(self):
        self.asked.append(("metrics", self.trainer.global_step))
        loss = torch.stack(self.losses).mean().item()
        num_losses = len(self.losses)
        self.losses = []
        return {"loss": loss, "num_losses": num_losses}

    @contextmanager
    def averaged_weights(self):
        self.is_averaged = True
        yield
        self.is_averaged = False

    def evaluate(self):
        assert self.is_averaged
        self.asked.append(("evaluate", self.trainer.global_step))
        time.sleep(self.evaluate_seconds)
        return {"val/psnr": 20.0 + self.trainer.global_step} if self.has_figures else {}

    def count_parameters(self):
        return {"weight": 9, "bias": 1}, 1_250_000

    def evaluate_raw(self):
        assert not self.is_averaged
        return {"val_raw/psnr": 10.0 + self.trainer.global_step}

    def compare(self):
        assert self.is_averaged
        return self.compared

    def preview(self):
        assert self.is_averaged
        self.asked.append(("preview", self.trainer.global_step))
        if not self.has_preview:
            return None
        images = np.full((3, 32, 32, 3), self.trainer.global_step, dtype=np.uint8)
        return Preview(images, ["a small red star above a big blue ring", "original", "x" * 900], columns=2)


@pytest.fixture
def tiny_fit(tmp_path):
    """`tiny_fit(callbacks, max_steps=...)` fits and returns the stage; its tracker holds what was written."""

    def fit(callbacks, max_steps=6, wait_seconds=0.0, resume=None, accumulate=1, **options):
        context = Context("tiny", tmp_path, tmp_path / "tiny", Recorder(), 0, 4, max_steps, 1, 2)
        stage = TinyStage(context, accumulate=accumulate, **options)
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=max_steps,
            max_epochs=-1,
            accumulate_grad_batches=accumulate,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=callbacks,
        )
        trainer.fit(stage, DataLoader(Endless(wait_seconds), batch_size=None), ckpt_path=resume, weights_only=True)
        return stage

    return fit
