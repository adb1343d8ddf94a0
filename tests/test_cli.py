"""The command itself, in processes of its own: exit codes, first lines, what is imported, sweeps."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdtrain import __main__
from sdtrain.sweep import jobs

ROOT = Path(__file__).resolve().parents[1]
SECONDS_FOR_A_MISTAKE = 3


def sdtrain(*arguments: str, cwd: Path = ROOT, code: str = "") -> subprocess.CompletedProcess[str]:
    """`python -m sdtrain`, or the same with `code` run before it and after it in one process."""
    command = ["-c", code, *arguments] if code else ["-m", "sdtrain", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, capture_output=True, text=True, env=environment, timeout=60
    )


LIGHT = """
import sys
from sdtrain.__main__ import cli
try:
    cli()
finally:
    print("HEAVY", [name for name in ("torch", "lightning", "wandb", "numpy", "transformers") if name in sys.modules])
"""


@pytest.mark.parametrize("asked", [["--help"], ["experiment=smoke", "--cfg", "job"], ["+experiment=smoke", "seed=x"]])
def test_help_config_and_mistakes_import_nothing_heavy(asked: list[str]) -> None:
    done = sdtrain(*asked, code=LIGHT)
    assert "HEAVY []" in done.stdout, done.stderr


def test_help_names_the_groups_and_a_command() -> None:
    text = sdtrain("--help").stdout
    assert "python -m sdtrain +experiment=quickstart" in text
    for group in ("data", "experiment", "model", "objective", "sampler"):
        assert f"\n{group}: " in text


def test_the_config_is_shown_without_running(tmp_path: Path) -> None:
    done = sdtrain("experiment=smoke", "--cfg", "job", "--resolve", cwd=tmp_path)
    assert done.returncode == 0
    assert "_target_: sdtrain.model.unet.UNet" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_completion_answers() -> None:
    os.environ.update(COMP_LINE="sdtrain objective=", COMP_POINT="18")
    try:
        assert "objective=epsilon" in sdtrain("-sc", "query=bash").stdout
    finally:
        del os.environ["COMP_LINE"], os.environ["COMP_POINT"]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["experiment=smoke", "diffusion.trainer.max_step=3"], "did you mean 'diffusion.trainer.max_steps'?"),
        (["+experiment=smoke", "model=unett"], "did you mean 'unet'?"),
        (["+experiment=smoke", "--seed=3"], "the option --seed=3 is not known; write key=value"),
        (["+experiment=smoke", "--config-path", "x"], "--config-dir"),
        (["-m", "+experiment=smoke", "seed=1,b"], "seed must be a whole number, not 'b'"),
    ],
)
def test_a_mistake_ends_with_2_and_one_line_and_leaves_nothing(typed: list[str], expected: str, tmp_path: Path) -> None:
    began = time.monotonic()
    done = sdtrain(*typed, cwd=tmp_path)
    seconds = time.monotonic() - began
    first = done.stderr.splitlines()[0]
    assert (done.returncode, done.stdout) == (2, "")
    assert first.startswith("error: ")
    assert expected in first
    assert "Traceback" not in done.stderr
    assert seconds < SECONDS_FOR_A_MISTAKE
    assert list(tmp_path.iterdir()) == []


# `sdtrain.run` is replaced, so that only the door is tested: what a run raises becomes its exit code.
DOOR = """
import sys, types
from sdtrain.errors import ConfigError, RunError
def run(cfg):
    print("ran", cfg.seed, cfg.output_dir, flush=True)
    {body}
sys.modules["sdtrain.run"] = types.SimpleNamespace(run=run)
from sdtrain.__main__ import cli
cli()
"""


@pytest.mark.parametrize(
    ("body", "code", "expected"),
    [
        ("return object()", 0, ""),
        ("raise ConfigError('this file is missing')", 2, "error: this file is missing"),
        ("raise RunError('no checkpoint', 3)", 3, "error: no checkpoint"),
        ("raise RunError('not finite', 76)", 76, "error: not finite"),
        ("raise KeyboardInterrupt", 75, "stopped"),
        ("raise RuntimeError('a bug')", 1, "RuntimeError: a bug"),
    ],
)
def test_what_a_run_raises_becomes_the_exit_code(body: str, code: int, expected: str, tmp_path: Path) -> None:
    done = sdtrain("experiment=smoke", code=DOOR.format(body=body), cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert "ran" in done.stdout
    assert expected in (done.stderr if code == 1 else done.stderr.partition("\n")[0])
    assert ("Traceback" in done.stderr) == (code == 1)
    assert list(tmp_path.iterdir()) == [], "Hydra left something behind"


def test_a_sweep_names_every_directory_by_what_changes() -> None:
    found = jobs(["+experiment=smoke", "seed=1,2", "objective=epsilon,v", "diffusion.trainer.max_steps=7"])
    directories = [job[-1].removeprefix("output_dir=").strip("'") for job in found]
    assert [Path(directory).name for directory in directories] == [
        "seed=1,objective=epsilon",
        "seed=1,objective=v",
        "seed=2,objective=epsilon",
        "seed=2,objective=v",
    ]
    assert all(Path(directory).parent == Path("outputs/smoke") for directory in directories)
    assert all("diffusion.trainer.max_steps=7" in job for job in found)


def test_a_sweep_keeps_to_the_directory_it_is_given() -> None:
    found = jobs(["+experiment=smoke", "output_dir=/tmp/a b", "model.block_out_channels='[32,64]','[64,64]'"])
    assert [Path(job[-1].removeprefix("output_dir=").strip("'")).parent for job in found] == [Path("/tmp/a b")] * 2
    assert len({job[-1] for job in found}) == 2
    assert jobs(["+experiment=smoke", "output_dir=/tmp/a,/tmp/b"])[1][-1] == "output_dir=/tmp/b"


CHILD = """
import subprocess, sys
code = {code!r}
real = subprocess.Popen
subprocess.Popen = lambda command, **options: real([command[0], "-c", code, *command[3:]], **options)
from sdtrain.__main__ import cli
cli()
"""


def test_a_sweep_runs_every_job_and_the_first_code_survives(tmp_path: Path) -> None:
    body = "raise RunError('lost', {1: 76, 2: 3}[cfg.seed]) if cfg.seed in (1, 2) else None"
    body = f"\n    if cfg.seed < 3: {body.partition(' if ')[0]}"
    code = CHILD.format(code=DOOR.format(body=body))
    done = sdtrain("-m", "experiment=smoke", "seed=3,1,2", code=code, cwd=tmp_path)
    ran = [line for line in done.stdout.splitlines() if line.startswith("ran")]
    assert ran == [f"ran {seed} outputs/smoke/seed={seed}" for seed in (3, 1, 2)]
    assert done.returncode == 76


def test_a_stopped_sweep_starts_no_further_job(tmp_path: Path) -> None:
    body = "import time, signal\n    try: time.sleep(30)\n    except KeyboardInterrupt: raise RunError('stopped', 75)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CHILD.format(code=DOOR.format(body=body)), "-m", "experiment=smoke", "seed=1,2"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=environment)
    while not process.stdout.readline().startswith("ran"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 75
    assert "ran" not in process.stdout.read()


def test_both_spellings_of_an_experiment_reach_hydra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(__main__, "main", lambda: None)
    monkeypatch.setattr(sys, "argv", ["sdtrain"])
    for spelled in ("experiment=smoke", "+experiment=smoke"):
        assert __main__.start([spelled, "debug=fast"]) == 0
        assert sys.argv[1:] == ["+experiment=smoke", "+debug=fast"]
