"""The average in a real fit: once an optimizer step, saved and restored with the run."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from sdtrain.callback.ema import EMA
from sdtrain.stage.base import Stage


class Averaged(LightningModule):
    """A stage of two layers, one of which is averaged; it records that layer after every optimizer step."""

    averaged_weights = Stage.averaged_weights

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.other = torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)
        self.ema, self.history = None, []

    def averaged_parameters(self):
        return ((name, p) for name, p in self.named_parameters() if name.startswith("layer."))

    def training_step(self, batch, batch_idx):
        return (self.layer(batch) + self.other(batch) - 5).square().mean()

    def on_train_start(self):
        self.last = self.layer.weight.detach().clone()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if not torch.equal(self.last, self.layer.weight):
            self.last = self.layer.weight.detach().clone()
            self.history.append(self.last)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(max_steps, accumulate=1, decay=0.7, resume=None):
    stage = Averaged()
    first = stage.layer.weight.detach().clone()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[EMA(decay)],
    )
    trainer.fit(stage, DataLoader(torch.rand(60, 3), batch_size=2), ckpt_path=resume, weights_only=True)
    return stage, first


@pytest.mark.parametrize("accumulate", [1, 3])
def test_one_update_an_optimizer_step_whatever_the_accumulation(accumulate):
    stage, expected = fit(6, accumulate)
    assert stage.ema.num_updates == len(stage.history) == 6
    for n, weight in enumerate(stage.history):
        now = min(0.7, (1 + n) / (10 + n))
        expected = now * expected + (1 - now) * weight
    with stage.averaged_weights():
        torch.testing.assert_close(stage.layer.weight.detach(), expected)
    assert torch.equal(stage.layer.weight, stage.history[-1])


def test_it_averages_what_the_stage_names(tmp_path):
    assert fit(1)[0].ema.names == ["layer.weight", "layer.bias"]


def test_a_resumed_fit_goes_on_averaging(tmp_path):
    stage, _ = fit(4)
    stage.trainer.save_checkpoint(tmp_path / "state.ckpt")
    saved = torch.load(tmp_path / "state.ckpt", weights_only=True)["ema"]
    assert set(saved) == {"layer.weight", "layer.bias", "num_updates"}
    again, _ = fit(6, resume=tmp_path / "state.ckpt")
    assert again.ema.num_updates == 6
    expected = saved["layer.weight"]
    for n, weight in enumerate(again.history, start=4):
        now = min(0.7, (1 + n) / (10 + n))
        expected = now * expected + (1 - now) * weight
    assert len(again.history) == 2
    torch.testing.assert_close(again.ema.shadow[0], expected)
