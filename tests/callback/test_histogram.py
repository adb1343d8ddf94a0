"""Histograms against numpy's, and in a real run against what its last step was trained on."""

import numpy as np
import pytest
import torch

from sdtrain.callback.histogram import LATENTS, TIMESTEPS, counts
from sdtrain.tracker.jsonl import read_rows


def test_counts_are_numpy_s_and_outliers_are_in_the_outer_bins():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 3
    found = counts(values.view(10, 100), *LATENTS)
    wanted, _ = np.histogram(values.clamp(-4, 3.999).numpy(), bins=32, range=(-4, 4))
    assert found.tolist() == wanted.tolist()
    assert int(found.sum()) == 1000
    assert counts(torch.tensor([0.0, 1.0, 0.05]), *TIMESTEPS).nonzero().flatten().tolist() == [0, 1, 19]
    assert counts(torch.zeros(2), 0, 1, 2).dtype == torch.int64


@pytest.mark.slow
def test_a_run_tells_what_its_last_step_was_trained_on(train, tmp_path, monkeypatch):
    from sdtrain.objective.denoising import Denoising

    seen, loss = [], Denoising.loss

    def watched(self, denoiser, x0, cond, draw):
        out = loss(self, denoiser, x0, cond, draw)
        if torch.is_grad_enabled():
            seen.append((out["t"], x0))
        return out

    monkeypatch.setattr(Denoising, "loss", watched)
    train(tmp_path / "run", "diffusion.trainer.max_steps=3", "autoencoder.trainer.max_steps=1")
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "histogram/latent" in row]
    assert [(row["stage"], row["step"], row["images"]) for row in rows] == [("diffusion", 3, 24)]
    t, x0 = seen[-1]
    for name, values, (low, high, num) in (("timestep", t, TIMESTEPS), ("latent", x0, LATENTS)):
        assert rows[0][f"histogram/{name}"] == {
            "low": low,
            "high": high,
            "counts": counts(values, low, high, num).tolist(),
        }
