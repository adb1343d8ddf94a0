"""What a session takes from Lightning's trainer."""

import pytest
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from sdtrain.callback import ending
from sdtrain.config import load_config
from sdtrain.errors import ConfigError
from sdtrain.trainer import check_code, make_trainer


def test_lightning_neither_handles_signals_nor_asks_the_ranks_at_every_batch(small, tmp_path, monkeypatch):
    """The guard: its handler hangs in a collective, and its question waits for the device."""
    cfg = load_config([*small, f"output_dir='{tmp_path}'"])
    monkeypatch.setattr(_SignalConnector, "register_signal_handlers", lambda self: pytest.fail("a handler"))
    monkeypatch.setattr(_TrainingEpochLoop, "_broadcast_sigterm_tensor", lambda self: pytest.fail("a broadcast"))
    trainer = make_trainer(cfg, cfg.diffusion, tmp_path)
    trainer._signal_connector.register_signal_handlers()
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor()
    assert ending.launchers[-1] is trainer.strategy.launcher


def test_a_precision_that_lightning_replaces_is_refused(small, tmp_path, monkeypatch):
    """The guard: 16-mixed on a CPU that `auto` found would train in bf16."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    cfg = load_config([*small, f"output_dir='{tmp_path}'", "accelerator=auto", "precision=16-mixed"])
    with pytest.raises(ConfigError, match="precision=16-mixed became bf16-mixed on this machine"):
        make_trainer(cfg, cfg.diffusion, tmp_path)


def test_ranks_that_run_different_code_do_not_start(monkeypatch):
    """The guard: a file that was edited between the start of two ranks was told 4 steps later, as diverged weights."""
    told = ["a", "b", "a", "c"]
    monkeypatch.setattr("torch.distributed.all_gather_object", lambda into, own: into.__setitem__(slice(None), told))
    with pytest.raises(ConfigError, match="^rank 1, 3 runs other code than rank 0"):
        check_code(4)
    told[:] = "aaaa"
    check_code(4)
    check_code(1)
