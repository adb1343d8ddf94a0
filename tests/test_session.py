"""What a session takes from Lightning's trainer."""

import json
import subprocess

import pytest
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from sdtrain import continuation, session
from sdtrain.callback import ending
from sdtrain.config import load_config
from sdtrain.continuation import code_version
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


def test_what_code_runs_is_written_down_and_a_change_of_it_told(small, tmp_path, monkeypatch, capsys):
    """The guard: a run that goes on by edited code says so."""

    def events():
        rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in row.items() if key not in ("time", "seconds")} for row in rows]

    cfg, code = load_config([*small, f"output_dir='{tmp_path}'"]), code_version()
    for _ in range(2):
        Session(cfg)
    assert events() == [{"event": "code", **code}]
    assert "warning" not in capsys.readouterr().out
    monkeypatch.setattr(session, "code_version", lambda: code | {"source": "abc"})
    Session(cfg)
    told = f"the code differs from that of the run before: source {code['source']}"
    assert [row["warning"].startswith(told) for row in events()[2:]] == [True]
    assert f"warning: {told}" in capsys.readouterr().out


def test_the_source_is_what_the_package_holds(tmp_path, monkeypatch):
    package = tmp_path / "sdtrain"
    package.mkdir()
    monkeypatch.setattr(continuation, "__file__", str(package / "continuation.py"))
    found = set()
    for name, text in (("a.py", "1"), ("a.py", "2"), ("b.c", "2"), ("notes.txt", "3")):
        (package / name).write_text(text)
        found.add(code_version.__wrapped__()["source"])
    assert len(found) == 3
    assert "commit" not in code_version.__wrapped__()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    commit = code_version.__wrapped__()["commit"]
    (package / "a.py").write_text("3")
    assert code_version.__wrapped__()["commit"] == f"{commit}-dirty"
