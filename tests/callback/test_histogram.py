"""Histograms against numpy's, and in a real run against what it trained on and learned, W&B's copy included."""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sdtrain.callback.histogram import BINS, Histogram, counts
from sdtrain.tracker.jsonl import read_rows


def test_counts_are_numpy_s_and_outliers_are_in_the_outer_bins():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 3
    found = counts(values.view(10, 100), *BINS["latent"])
    wanted, _ = np.histogram(values.clamp(-4, 3.999).numpy(), bins=32, range=(-4, 4))
    assert found.tolist() == wanted.tolist()
    assert int(found.sum()) == 1000
    assert counts(torch.tensor([0.0, 1.0, 0.05]), *BINS["timestep"]).nonzero().flatten().tolist() == [0, 1, 19]
    assert counts(torch.zeros(2), 0, 1, 2).dtype == torch.int64


class Shown:
    """A stage with one thing to show, and what it logged."""

    images_seen = 8

    def __init__(self, values):
        self.rows, self.values = [], values
        self.context = SimpleNamespace(stage="autoencoder", tracker=SimpleNamespace(log=self.rows.append))
        self.precision = nullcontext

    def histograms(self, batch):
        assert batch == "the last one"
        return {} if self.values is None else {"posterior_mean": self.values}


def shown(values, world_size=1, reduce=None, is_first=True):
    strategy = SimpleNamespace(reduce=reduce, root_device=torch.device("cpu"))
    trainer = SimpleNamespace(
        strategy=strategy, callbacks=[], world_size=world_size, is_global_zero=is_first, global_step=1, max_steps=1
    )
    stage = Shown(values)
    Histogram().on_train_batch_end(trainer, stage, None, "the last one", 0)
    return [row["histogram/posterior_mean"] for row in stage.rows]


def test_what_has_no_bounds_is_counted_as_far_as_a_power_of_two():
    (found,) = shown(torch.tensor([[0.5, -0.1], [3.1, -2.0]]))
    assert (found["low"], found["high"], len(found["counts"])) == (-4.0, 4.0, 64)
    assert np.flatnonzero(found["counts"]).tolist() == [16, 31, 36, 56]
    assert shown(torch.zeros(3))[0]["high"] == 2.0**-20
    assert shown(None) == []
    assert shown(torch.tensor([torch.nan, torch.inf, 1.0]))[0]["high"] == 1.0  # the guard ends the run, not this


def test_ranks_agree_on_the_bounds_and_one_writes_the_sum():
    asked = []

    def reduce(values, reduce_op):
        asked.append(reduce_op)
        return torch.tensor(30.0) if reduce_op == "max" else values * 2

    (found,) = shown(torch.ones(3), 2, reduce)
    assert (found["high"], sum(found["counts"]), asked) == (32.0, 6, ["max", "sum"])
    assert shown(torch.ones(3)[:0], 2, reduce, is_first=False) == []  # it has nothing, and takes part
    assert asked == ["max", "sum"] * 2


def test_codes_have_a_mean_alone_and_one_rank_shows_it():
    from sdtrain.contracts import Posterior
    from sdtrain.stage.autoencoder import AutoencoderStage

    def stage(std, rank):
        first_stage = torch.nn.Module()
        first_stage.encode = lambda image: Posterior(image + 1, std * torch.ones_like(image))
        found = AutoencoderStage(None, first_stage, torch.nn.Module(), None, None, {})
        data = SimpleNamespace(
            image_size=64, splits={"val": 5}, load=lambda split, places: {"image": torch.zeros(len(places), 3, 2, 2)}
        )
        found.trainer = SimpleNamespace(datamodule=data, is_global_zero=rank == 0)
        return {name: values.shape[0] for name, values in found.histograms(None).items()}

    assert stage(0.5, 0) == {"posterior_mean": 5, "posterior_log_variance": 5}
    assert stage(0.5, 1) == {"posterior_mean": 0, "posterior_log_variance": 0}
    assert stage(0.0, 0) == {"posterior_mean": 5}


@pytest.mark.slow
def test_a_run_tells_what_its_last_step_was_trained_on_and_an_offline_wandb_run_has_it(train, tmp_path, monkeypatch):
    from sdtrain.first_stage.autoencoder_kl import AutoencoderKL
    from sdtrain.objective.denoising import Denoising

    seen, loss = [], Denoising.loss

    def watched(self, denoiser, x0, cond, draw):
        out = loss(self, denoiser, x0, cond, draw)
        if torch.is_grad_enabled():
            seen.append((out["t"], x0))
        return out

    monkeypatch.setattr(Denoising, "loss", watched)
    posteriors, encode = [], AutoencoderKL.encode
    monkeypatch.setattr(AutoencoderKL, "encode", lambda *args: posteriors.append(encode(*args)) or posteriors[-1])
    steps = ("diffusion.trainer.max_steps=3", "autoencoder.trainer.max_steps=1")
    train(tmp_path / "run", *steps, "tracker=wandb")
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "histogram/latent" in row]
    assert [(row["stage"], row["step"], row["images"]) for row in rows] == [("diffusion", 3, 24)]
    t, x0 = seen[-1]
    for name, values in (("timestep", t), ("latent", x0)):
        low, high, num = BINS[name]
        assert rows[0][f"histogram/{name}"] == {
            "low": low,
            "high": high,
            "counts": counts(values, low, high, num).tolist(),
        }
    (learned,) = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "histogram/posterior_mean" in row]
    assert (learned["stage"], learned["step"]) == ("autoencoder", 1)
    mean, std = next(found for found in posteriors if len(found.mean) == 16 and not found.mean.requires_grad)
    spread = learned["histogram/posterior_log_variance"]
    assert spread["counts"] == counts(2 * std.log(), *BINS["posterior_log_variance"]).tolist()
    found = learned["histogram/posterior_mean"]
    assert found["counts"] == counts(mean, found["low"], found["high"], 64).tolist()
    assert found["high"] >= float(mean.abs().max()) > found["high"] / 2
    segments = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    mirrored = {key: value for segment in segments for key, value in read(segment)}
    written = {key: value for row in (rows[0], learned) for key, value in row.items() if key.startswith("histogram/")}
    assert len(written) == 4
    for key, told in written.items():
        edges = np.linspace(told["low"], told["high"], len(told["counts"]) + 1)
        assert mirrored[f"{key}.values"] == told["counts"]
        assert mirrored[f"{key}.bins"] == pytest.approx(edges.tolist())


def read(segment):
    """(key, value) of the histograms in an offline run, by W&B's own reader."""
    wandb = Path(sys.executable).with_name("wandb")
    output = subprocess.run([wandb, "leet", "inspect", "--json", segment], capture_output=True, text=True, check=True)
    records = [json.loads(line) for line in output.stdout.splitlines()]
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    return [(key, value) for row in rows for key, value in row.items() if key.startswith("histogram/")]
