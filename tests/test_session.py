"""What a session takes from Lightning's trainer."""

import pytest
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from sdtrain.callback import ending
from sdtrain.config import load_config
from sdtrain.session import Session


def test_lightning_neither_handles_signals_nor_asks_the_ranks_at_every_batch(small, tmp_path, monkeypatch):
    """The guard: its handler hangs in a collective, and its question waits for the device."""
    cfg = load_config([*small, f"output_dir='{tmp_path}'"])
    monkeypatch.setattr(_SignalConnector, "register_signal_handlers", lambda self: pytest.fail("a handler"))
    monkeypatch.setattr(_TrainingEpochLoop, "_broadcast_sigterm_tensor", lambda self: pytest.fail("a broadcast"))
    trainer = Session(cfg).trainer(cfg.diffusion)
    trainer._signal_connector.register_signal_handlers()
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor()
    assert ending.launchers[-1] is trainer.strategy.launcher
