"""The averages in a real fit: once an optimizer step, saved and restored with the run, kept for later."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from sdtrain.callback.ema import EMA
from sdtrain.checkpoint.commit import verify
from sdtrain.contracts import Context
from sdtrain.errors import ConfigError
from sdtrain.stage.base import Stage
from sdtrain.tracker.none import NullTracker


class Averaged(LightningModule):
    """A stage of two layers, one of which is averaged; it records that layer after every optimizer step."""

    averaged_weights = Stage.averaged_weights

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.other = torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)
        self.ema, self.history, self.is_left_out = None, [], False

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


class Late(SingleDeviceStrategy):
    """It restores after `on_fit_start`."""

    restore_checkpoint_after_setup = True


def fit(max_steps, accumulate=1, resume=None, directory=Path("nowhere"), strategy="auto", **options):
    stage = Averaged()
    stage.context = Context("layers", directory, directory, NullTracker(), 0, 2, max_steps)
    first = stage.layer.weight.detach().clone()
    trainer = Trainer(
        accelerator="cpu",
        strategy=strategy,
        max_steps=max_steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[EMA(**(options or {"decay": 0.7}))],
    )
    trainer.fit(stage, DataLoader(torch.rand(200, 3), batch_size=2), ckpt_path=resume, weights_only=True)
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


def test_a_step_that_was_left_out_is_not_averaged(monkeypatch):
    def step(self, batch, batch_idx, original=Averaged.training_step):
        self.is_left_out = batch_idx == 2
        return original(self, batch, batch_idx)

    monkeypatch.setattr(Averaged, "training_step", step)
    stage, _ = fit(6)
    assert stage.ema.num_updates == 5


def test_it_averages_what_the_stage_names(tmp_path):
    assert fit(1)[0].ema.names == ["layer.weight", "layer.bias"]


@pytest.fixture(params=["auto", "late"])
def strategy(request):
    return Late(torch.device("cpu")) if request.param == "late" else "auto"


@pytest.mark.parametrize("options", [{"decay": 0.7}, {"lengths": [0.1, 0.05]}])
def test_a_resumed_fit_goes_on_averaging(tmp_path, strategy, options):
    stage, _ = fit(4, **options)
    stage.trainer.save_checkpoint(tmp_path / "state.ckpt")
    saved = torch.load(tmp_path / "state.ckpt", weights_only=True)
    again, _ = fit(6, resume=tmp_path / "state.ckpt", strategy=strategy, **options)
    assert again.ema.num_updates == 6
    assert len(again.history) == 2
    for name, profile, shadow in zip(("ema", "ema_0.050"), again.ema.profiles, again.ema.shadows):
        assert set(saved[name]) - {"length"} == {"layer.weight", "layer.bias", "num_updates"}
        expected = saved[name]["layer.weight"]
        for update, weight in enumerate(again.history, start=5):
            expected = torch.lerp(expected, weight, 1 - profile.kept(update))
        torch.testing.assert_close(shadow[0], expected)


def test_a_fit_that_was_done_has_its_average(tmp_path):
    """Killed between the last checkpoint and the summary, it trains no more, and its figures are of the average."""
    stage, _ = fit(4)
    stage.trainer.save_checkpoint(tmp_path / "state.ckpt")
    again, _ = fit(4, resume=tmp_path / "state.ckpt")
    assert again.ema.num_updates == 4
    assert all(torch.equal(a, b) for a, b in zip(again.ema.shadows[0], stage.ema.shadows[0]))


def test_a_run_that_had_no_average_starts_one_where_it_is(tmp_path, strategy):
    stage, _ = fit(4)
    stage.trainer.callbacks.clear()
    stage.trainer.save_checkpoint(tmp_path / "state.ckpt")
    again, first = fit(5, resume=tmp_path / "state.ckpt", strategy=strategy)
    expected = torch.lerp(stage.history[-1], again.history[-1], 0.9)  # the first update keeps a tenth
    torch.testing.assert_close(again.ema.shadows[0][0], expected)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_snapshots_are_kept_for_good(tmp_path, accumulate):
    stage, _ = fit(6, accumulate, directory=tmp_path, lengths=[0.05, 0.1], snapshot_every_steps=2)
    places = sorted((tmp_path / "ema").iterdir())
    assert [place.name for place in places] == ["step_00000002", "step_00000004", "step_00000006"]
    for place, step in zip(places, (2, 4, 6)):
        verify(place)
        for name, length in (("ema", 0.05), ("ema_0.100", 0.1)):
            averages = load_file(place / f"{name}.safetensors")
            assert (int(averages["num_updates"]), float(averages["length"])) == (step, length)
    assert torch.equal(averages["layer.weight"], stage.ema.shadows[1][0])


def test_snapshots_after_the_step_that_a_fit_goes_on_from_are_of_a_line_given_up(tmp_path):
    """The guard: after resume=never or a rollback, tools/ema.py would mix two trainings, and take the newest step of
    the one that is gone.
    """
    options = {"directory": tmp_path, "lengths": [0.05, 0.1], "snapshot_every_steps": 2}
    fit(4, **options)[0].trainer.save_checkpoint(tmp_path / "state.ckpt")
    fit(8, **options)
    for resume, names in ((tmp_path / "state.ckpt", ["step_00000002", "step_00000004"]), (None, [])):
        (tmp_path / "ema" / "step_00000008.tmp").mkdir()  # of a save that was killed
        fit(5, resume=resume, **options | {"snapshot_every_steps": 100})
        assert sorted(path.name for path in (tmp_path / "ema").iterdir()) == names


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "decay=None and lengths=\\[\\]: give one"),
        ({"decay": 0.9, "lengths": [0.1]}, "give one, and the other as null"),
        ({"lengths": [0.4]}, "at most 0.289; 0.4 is not"),
        ({"lengths": [0.1, 0.1001]}, "must differ in the third decimal"),
        ({"decay": 0.9, "snapshot_every_steps": 5}, "snapshot_every_steps=5 must be 1 or more, and needs lengths"),
        ({"lengths": [0.1], "snapshot_every_steps": 0}, "snapshot_every_steps=0 must be 1 or more"),
        ({"decay": 1.0}, "decay=1.0 must be from 0 on and below 1"),
        ({"decay": -0.1}, "decay=-0.1 must be"),
    ],
)
def test_what_cannot_be_is_refused(options, told):
    with pytest.raises(ConfigError, match=told):
        EMA(**options)
