"""What slurm/submit.py renders, refuses, writes and sends; sbatch is a script that notes what it is given."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sdtrain.config import load_config
from sdtrain.continuation import check_continuation, check_submitted
from sdtrain.errors import ConfigError

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TYPED = ["+experiment=smoke", "cluster=slurm", "num_nodes=4", "devices=2", "cluster.python=python"]


@pytest.fixture
def submit(capsys):
    """submit(arguments) -> (exit code, standard output, standard error), in this process."""
    spec = importlib.util.spec_from_file_location("submit", ROOT / "slurm" / "submit.py")
    module = sys.modules["submit"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield lambda *arguments: (module.main([str(argument) for argument in arguments]), *capsys.readouterr())
    del sys.modules["submit"]


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """An sbatch that takes everything; `sbatch()` are the arguments of the calls so far, `sbatch("1 2")` the queue."""
    folder = tmp_path / "bin"
    folder.mkdir()
    said = folder / "said"
    number = f'grep -c parsable "{said}"'
    (folder / "sbatch").write_text(f'#!/bin/bash\necho "$@" >>"{said}"\necho "$((40 + $({number})));cluster"\n')
    (folder / "squeue").write_text(f'#!/bin/bash\ncat "{folder}/queue" 2>/dev/null\n')
    for name in ("sbatch", "squeue"):
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def calls(queue=None):
        if queue is not None:
            (folder / "queue").write_text(queue)
        return [line.replace(str(tmp_path), "/runs") for line in said.read_text().splitlines()]

    return calls


GOLDEN = {
    "chain": ["output_dir={}/run", "cluster.autoencoder.num_nodes=1", "cluster.autoencoder.time_minutes=60"],
    "array": ["output_dir={}/run", "stages=[autoencoder]", "accelerator=cpu", "--array", "seed=0,1"],
    "container": [
        *("output_dir={}/run", "stages=[autoencoder]", "cluster.container=[apptainer,exec,--nv,train.sif]"),
        *("cluster.partition=gpu", "cluster.account=me", "cluster.qos=high", "cluster.constraint='a100&ib'"),
        *(
            "cluster.exclude='n[1-2]'",
            "cluster.gpu_type=a100",
            "cluster.memory='0'",
            "cluster.lines=['--mail-type=END']",
        ),
        *("cluster.setup=['module load cuda','export NCCL_DEBUG=WARN']", "cluster.srun=['--container-image=x']"),
        *("cluster.master_address='$(hostname -i)'", "cluster.max_step_seconds=10", "cluster.max_save_seconds=20"),
    ],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_script_is_as_it_was_read(submit, tmp_path, name):
    """Whoever changes slurm/job.sh reads these files again; SDTRAIN_WRITE_GOLDEN=1 writes them."""
    code, script, error = submit(*TYPED, *(word.format(tmp_path) for word in GOLDEN[name]), "--dry-run")
    assert (code, error) == (0, "")
    assert list(tmp_path.iterdir()) == []
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    script = script.replace(str(tmp_path), "/runs").replace(f"--chdir={Path.cwd()}\n", "--chdir=/here\n")
    script = re.sub(r"[0-9a-f]{64}", "HASH", script)
    file = HERE / "golden" / f"{name}.sh"
    if os.environ.get("SDTRAIN_WRITE_GOLDEN"):
        file.write_text(script)
    assert script == file.read_text()


def test_the_command_in_a_script_is_one_that_sdtrain_takes(submit, tmp_path):
    _, script, _ = submit(*TYPED, f"output_dir='{tmp_path}/a=b'", "autoencoder.objective.kl_weight=1e-7", "--dry-run")
    arguments = re.search(r"^run=.*?^\)", script, re.MULTILINE | re.DOTALL)[0]
    said = subprocess.check_output(["bash", "-c", f'{arguments}\nprintf "%s\\n" "${{arguments[@]}}"'], text=True)
    cfg = load_config(said.splitlines())
    assert (cfg.output_dir, list(cfg.stages), cfg.num_nodes, cfg.devices) == (f"{tmp_path}/a=b", ["autoencoder"], 4, 2)
    assert cfg.autoencoder.objective.kl_weight == 1e-7


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["+experiment=smoke", "num_nodes=2"], "no cluster is named; write cluster=slurm"),
        ([*TYPED, "cluster=slrum"], "did you mean 'slurm'?"),
        ([*TYPED, "cluster.partion=x"], "did you mean 'cluster.partition'?"),
        ([*TYPED, "devices=auto"], "devices=auto: a job asks for a number"),
        ([*TYPED, "num_nodes=3"], r"batch_size=16 is the global batch: it must be a multiple of 6 \(devices"),
        ([*TYPED, "cluster.autoencoder.num_nodes=3"], "autoencoder.trainer.batch_size=16 .* multiple of 6"),
        ([*TYPED, "cluster.time_minutes=4"], "cluster.time_minutes=4: the signal to stop comes 240 s ahead"),
        ([*TYPED, "cluster.diffusion.time_minutes=2"], "cluster.time_minutes=2: the signal to stop"),
        ([*TYPED, "cluster.max_save_seconds=90000"], "the signal to stop comes 90120 s ahead"),
        ([*TYPED, "output_dir='outputs/a b'"], "a job's directory is made of letters"),
        ([*TYPED, "--array", "sede=1,2"], "did you mean 'seed'?"),
        ([*TYPED, "seed=1,2"], "the value has commas"),
        (TYPED, "there is no sbatch on this machine; --dry-run prints"),
    ],
)
def test_a_mistake_is_told_before_anything_is_sent(submit, monkeypatch, typed, said):
    monkeypatch.setenv("PATH", "")
    code, printed, error = submit(*typed)
    assert (code, printed) == (2, "")
    assert re.search(said, error.splitlines()[0])
    assert not Path("outputs", "smoke", "slurm").exists()


def test_stages_have_node_counts_of_their_own(submit, tmp_path):
    """Six devices do not divide stage 1's batch, and need not where only stage 2 runs on them."""
    own = ["num_nodes=3", "diffusion.trainer.batch_size=30", "cluster.autoencoder.num_nodes=1"]
    code, script, error = submit(*TYPED, *own, f"output_dir={tmp_path}/run", "--dry-run")
    assert (code, error) == (0, "")
    assert re.findall(r"--nodes=(\d)", script) == ["1", "3"]
    assert re.findall(r"num_nodes=(\d)\n", script.replace("cluster.autoencoder.num_nodes=1", "")) == ["1", "3"]


def test_all_are_checked_before_the_first_is_sent_and_the_second_waits(submit, sbatch, tmp_path):
    code, printed, _ = submit(*TYPED, f"output_dir={tmp_path}/run")
    assert code == 0
    assert sbatch() == [
        "--test-only /runs/run/slurm/autoencoder.sh",
        "--test-only /runs/run/slurm/diffusion.sh",
        "--parsable /runs/run/slurm/autoencoder.sh",
        "--parsable --dependency=afterok:41 --kill-on-invalid-dep=yes /runs/run/slurm/diffusion.sh",
    ]
    assert printed.startswith("autoencoder: job 41\ndiffusion: job 42 after 41\n")
    sent = [json.loads(line) for line in (tmp_path / "run" / "slurm" / "jobs.jsonl").read_text().splitlines()]
    assert [(each["job"], each["stage"]) for each in sent] == [("41", "autoencoder"), ("42", "diffusion")]


def test_a_task_of_an_array_waits_for_its_own_first_stage(submit, sbatch, tmp_path):
    submit(*TYPED, f"output_dir={tmp_path}/run", "--array", "seed=0,1")
    assert sbatch()[-1] == "--parsable --dependency=aftercorr:41 --kill-on-invalid-dep=yes /runs/run/slurm/diffusion.sh"
    sent = (tmp_path / "run" / "seed=1" / "slurm" / "jobs.jsonl").read_text().splitlines()
    assert [json.loads(line)["job"] for line in sent] == ["41_1", "42_1"]
    assert (tmp_path / "run" / "seed=1" / "config.yaml").exists()


def test_only_tested_is_not_sent(submit, sbatch, tmp_path):
    assert submit(*TYPED, f"output_dir={tmp_path}/run", "--test-only")[0] == 0
    assert [call.split()[0] for call in sbatch()] == ["--test-only"] * 2


def test_a_job_whose_config_has_changed_since_ends(submit, sbatch, tmp_path):
    run = tmp_path / "run"
    typed = [*TYPED, f"output_dir={run}"]
    submit(*typed)
    check_continuation(run, load_config(typed))
    changed = [*typed, "diffusion.trainer.batch_size=64"]
    with pytest.raises(ConfigError, match="batch_size 32 -> 64"):
        check_continuation(run, load_config(changed))
    assert submit(*changed)[0] == 0  # nothing has begun, so that a mistake can be mended
    (run / "autoencoder").mkdir()
    code, _, error = submit(*typed)
    assert (code, "batch_size 64 -> 32" in error) == (2, True)


def digests(run, stage="autoencoder"):
    """What the jobs of a script are told to be."""
    return re.findall(r"cluster\.submitted=(\w{64})", (run / "slurm" / f"{stage}.sh").read_text())


def test_a_job_trains_what_was_sent(submit, sbatch, tmp_path):
    """The guard: a learning rate that a run may change when it goes on is not changed under a job that waits."""
    run = tmp_path / "run"
    typed = [*TYPED, f"output_dir={run}", "diffusion.optim.lr=1e-3"]
    submit(*typed)
    (digest,) = digests(run)
    job = [*typed, "stages=[autoencoder]", f"cluster.submitted={digest}"]
    for allowed in ([], ["diffusion.trainer.max_steps=7", "tracker=none"]):
        check_submitted(run, load_config([*job, *allowed]), digest)
    edited = ["diffusion.optim.lr=2e-3", "autoencoder.precision=32-true", "seed=3", "data.num_train=10"]
    for edits in (edited, edited[:1]):
        with pytest.raises(ConfigError, match="was changed after this job was sent: ") as raised:
            check_submitted(run, load_config([*job, *edits]), digest)
        keys = re.findall(r"(?:: |; )([\w.]+) \S+ -> ", str(raised.value).splitlines()[0])
        assert sorted(keys) == sorted(edit.partition("=")[0] for edit in edits)
    assert len(check_continuation(run, load_config([*typed, edited[0]]))) == 1, "by hand it is a warning, as ever"
    frozen = run / "slurm" / "config.yaml"
    frozen.write_text(frozen.read_text() + "# edited\n")
    with pytest.raises(ConfigError, match=r"slurm/config.yaml is not what this job was sent with; send it again"):
        check_submitted(run, load_config(job), digest)


def test_each_task_of_an_array_has_the_config_of_its_own(submit, sbatch, tmp_path):
    submit(*TYPED, f"output_dir={tmp_path}/run", "--array", "seed=0,1")
    told = digests(tmp_path / "run", "diffusion")
    for seed, other in ((0, 1), (1, 0)):
        run = tmp_path / "run" / f"seed={seed}"
        cfg = load_config([*TYPED, f"seed={seed}", f"output_dir='{run}'"])
        check_submitted(run, cfg, told[seed])
        with pytest.raises(ConfigError, match="is not what this job was sent with"):
            check_submitted(run, cfg, told[other])


def test_what_is_queued_is_not_sent_twice(submit, sbatch, tmp_path):
    typed = [*TYPED, f"output_dir={tmp_path}/run"]
    submit(*typed)
    sbatch("7\n42\n")
    code, _, error = submit(*typed)
    assert (code, "is being trained by job 42; scancel 42 first" in error) == (2, True)
    assert len(sbatch("7\n")) == 4
    assert submit(*typed)[0] == 0


def test_a_cluster_of_ones_own(submit, tmp_path):
    (tmp_path / "own" / "cluster").mkdir(parents=True)
    (tmp_path / "own" / "cluster" / "mine.yaml").write_text("defaults: [slurm]\npartition: big\ntime_minutes: 30\n")
    typed = [*TYPED, "cluster=mine", f"output_dir={tmp_path}/run", "--config-dir", tmp_path / "own", "--dry-run"]
    code, script, _ = submit(*typed)
    assert code == 0
    assert '#SBATCH --partition="big"' in script
    assert f"    --config-dir\n    {tmp_path}/own\n" in script


def test_a_job_that_begins_anew_at_each_requeue_is_not_sent(submit, tmp_path):
    code, _, told = submit(*TYPED, f"output_dir={tmp_path}/run", "resume=never", "--dry-run")
    assert (code, told.startswith("error: resume=never: a job that is requeued would begin anew")) == (2, True)


def test_it_may_be_sent_from_a_directory_with_a_space(submit, tmp_path, monkeypatch):
    (tmp_path / "a b").mkdir()
    monkeypatch.chdir(tmp_path / "a b")
    _, script, _ = submit(*TYPED, f"output_dir={tmp_path}/run", "--dry-run")
    assert f"#SBATCH --chdir='{tmp_path}/a b'\n" in script
