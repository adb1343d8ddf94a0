"""What a session does with its directory."""

import errno
import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sdtrain import continuation, session
from sdtrain.config import load_config
from sdtrain.continuation import code_version
from sdtrain.errors import ConfigError
from sdtrain.run import next_command
from sdtrain.session import Session


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


def test_a_run_that_begins_anew_finds_nothing_of_the_one_before(small, tmp_path, capsys):
    """The guard: killed before a checkpoint of its own it went on from the old one; what was done stayed done."""
    for path in ("autoencoder/manifest.json", "recognition/vgg.safetensors", "diffusion/checkpoints/step_00000004/a"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
    (tmp_path / "summary.json").write_text('{"name": "a", "autoencoder": {"steps": 4}, "diffusion": {"steps": 4}}')
    cfg = load_config([*small, f"output_dir='{tmp_path}'", "resume=never", "stages=[diffusion]"])
    for _ in range(2):
        Session(cfg)
    assert (tmp_path / "autoencoder" / "manifest.json").exists()
    assert not (tmp_path / "diffusion").exists()
    assert (tmp_path / "old" / "diffusion" / "checkpoints" / "step_00000004").is_dir()
    assert json.loads((tmp_path / "summary.json").read_text()) == {"name": "a", "autoencoder": {"steps": 4}}
    assert capsys.readouterr().out.count("diffusion: begins anew; what was here is in") == 1
    cfg.stages = ["autoencoder"]
    Session(cfg)
    assert {path.name for path in (tmp_path / "old").iterdir()} == {"autoencoder", "recognition", "diffusion"}


def test_two_runs_do_not_train_in_one_directory(small, tmp_path, monkeypatch):
    """The guard: each would prune the other's checkpoints, and remove what it is writing."""
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys; from pathlib import Path; from sdtrain.checkpoint.claim import claim; "
         "file = claim(Path(sys.argv[1])); print(1, flush=True); sys.stdin.read()", tmp_path],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        holder.stdout.readline()
        (tmp_path / "exit_rank1.json").touch()  # the other run's
        monkeypatch.setattr("sdtrain.checkpoint.claim._SAME_HOST_SECONDS", 0.0)
        cfg = load_config([*small, f"output_dir='{tmp_path}'"])
        with pytest.raises(ConfigError, match=f"is being trained by process {holder.pid}"):
            Session(cfg)
        assert (tmp_path / "exit_rank1.json").exists()
    finally:
        holder.communicate()
    with Session(cfg).recorded():
        pass
    claimed = Session(cfg)
    with claimed.recorded():
        pass
    assert claimed._claim.closed


def test_what_began_while_it_waited_for_the_directory_is_not_gone_on_from(small, tmp_path, monkeypatch):
    """The guard: of two runs that start at once the second one found no config, and wrote over the first one's."""
    cfg, other = (load_config([*small, f"output_dir='{tmp_path}'", f"seed={seed}"]) for seed in (0, 1))

    def wait(directory):
        (directory / "autoencoder").mkdir()
        continuation.write_config(directory, other)

    monkeypatch.setattr(session, "claim", wait)
    with pytest.raises(ConfigError, match="holds a run of another config: seed 1 -> 0"):
        Session(cfg)


@pytest.mark.parametrize("is_done", [True, False])
def test_another_config_is_told_how_to_keep_a_stage_1_that_is_done(small, tmp_path, is_done):
    """The guard: who mended stage 2 was told to begin anew, days after stage 1."""
    before, cfg = (load_config([*small, f"output_dir='{tmp_path}'", f"seed={seed}"]) for seed in (0, 1))
    continuation.write_config(tmp_path, before)
    (tmp_path / "autoencoder").mkdir()
    if is_done:
        (tmp_path / "autoencoder" / "manifest.json").touch()
    with pytest.raises(ConfigError) as caught:
        continuation.check_continuation(tmp_path, cfg)
    assert (f"stages=[diffusion] first_stage.weights={tmp_path / 'autoencoder'}" in str(caught.value)) == is_done


@pytest.mark.parametrize("name", ["lock", "config.yaml.tmp", "metrics.jsonl"])
def test_a_directory_that_takes_no_file_is_told(small, tmp_path, monkeypatch, name):
    """The guard: a disk that is full when a run begins was a traceback, here and in the claim."""
    opened = Path.open

    def full(path, *args, **kwargs):
        if path == tmp_path / name:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    cfg = load_config([*small, f"output_dir='{tmp_path}'"])
    with pytest.raises(
        ConfigError, match=rf"^cannot write {tmp_path}/{name}: No space left on device \(\d+ bytes free"
    ):
        Session(cfg)


def test_the_command_that_is_printed_last_can_be_typed(small, tmp_path):
    cfg = load_config([*small, f"output_dir='{tmp_path}/a b'"])
    for stages, told in ((["diffusion"], f"{tmp_path}/a b"), (["autoencoder"], f"output_dir={tmp_path}/a b")):
        cfg.stages = stages
        assert told in shlex.split(next_command(SimpleNamespace(cfg=cfg, directory=tmp_path / "a b")))


def test_weights_of_another_objective_are_told_of(small, tmp_path, capsys):
    other = tmp_path / "other"
    (other / "diffusion").mkdir(parents=True)
    (other / "config.yaml").write_text("objective: {prediction: sigma, path: {_target_: sdtrain.diffusion.path.EDM}}")
    Session(load_config([*small, f"output_dir='{tmp_path}/run'", f"model.weights='{other}'"]))
    told = f"warning: model.weights: {other} was trained with another objective: prediction is s"
    assert told in capsys.readouterr().out
    assert '"warning": "model.weights' in (tmp_path / "run" / "metrics.jsonl").read_text()
