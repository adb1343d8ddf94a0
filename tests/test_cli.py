"""The command itself, in processes of its own: exit codes, first lines, what is imported, sweeps."""

import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from omegaconf import DictConfig

from sdtrain import __main__
from sdtrain.errors import ConfigError, RunError
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


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (["--help"], ["python -m sdtrain +experiment=quickstart", "\nexperiment: ", "\nobjective: ", "\nsampler: "]),
        (["experiment=smoke", "--cfg", "job", "--resolve"], ["name: smoke", "_target_: sdtrain.model.unet.UNet"]),
        (["+experiment=smoke", "seed=x"], []),
    ],
)
def test_help_config_and_mistakes_answer_without_torch_and_leave_nothing(
    asked: list[str], expected: list[str], tmp_path: Path
) -> None:
    done = sdtrain(*asked, code=LIGHT, cwd=tmp_path)
    assert "HEAVY []" in done.stdout, done.stderr
    assert all(text in done.stdout for text in expected)
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
        (["+experiment=smoke", "--seed=3"], "the option --seed=3 is not known; write key=value"),
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
    ("raised", "code", "expected"),
    [
        (None, 0, ""),
        (ConfigError("this file is missing"), 2, "error: this file is missing\n"),
        (RunError("no checkpoint", 3), 3, "error: no checkpoint\n"),
        (RunError("not finite", 76), 76, "error: not finite\n"),
        (KeyboardInterrupt(), 75, "stopped\n"),
    ],
)
def test_what_a_run_raises_becomes_the_exit_code(
    raised: BaseException | None,
    code: int,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(cfg: DictConfig) -> object:
        if raised:
            raise raised
        return cfg

    monkeypatch.setitem(sys.modules, "sdtrain.run", types.SimpleNamespace(run=run))
    monkeypatch.setattr(sys, "argv", ["sdtrain", "experiment=smoke"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # what the call sets is taken back after the test
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        __main__.cli()
    assert (left.value.code, capsys.readouterr().err) == (code, expected)
    assert list(tmp_path.iterdir()) == [], "Hydra left something behind"


def test_a_bug_keeps_its_traceback(tmp_path: Path) -> None:
    done = sdtrain("experiment=smoke", code=DOOR.format(body="raise RuntimeError('a bug')"), cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1] == "RuntimeError: a bug"


def test_a_sweep_names_every_directory_by_what_changes() -> None:
    found = jobs(["+experiment=smoke", "seed=1", "objective=epsilon,v", "sampler=ddim,euler"])
    directories = [job[-1].removeprefix("output_dir=").strip("'") for job in found]
    assert [Path(directory).name for directory in directories] == [
        "objective=epsilon,sampler=ddim",
        "objective=epsilon,sampler=euler",
        "objective=v,sampler=ddim",
        "objective=v,sampler=euler",
    ]
    assert all(Path(directory).parent == Path("outputs/smoke") for directory in directories)
    assert all("seed=1" in job for job in found)


def test_a_sweep_keeps_to_the_directory_it_is_given() -> None:
    found = jobs(["+experiment=smoke", "output_dir=/tmp/a b", "model.block_out_channels=[32,64],[64,64]"])
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
    code = CHILD.format(code=DOOR.format(body="raise RunError('lost', {1: 76, 2: 3}[cfg.seed])"))
    done = sdtrain("-m", "experiment=smoke", "seed=1,2", code=code, cwd=tmp_path)
    ran = [line for line in done.stdout.splitlines() if line.startswith("ran")]
    assert ran == [f"ran {seed} outputs/smoke/seed={seed}" for seed in (1, 2)]
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
