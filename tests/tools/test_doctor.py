"""tools/doctor.py: what it says of a machine and of an experiment's wants, each in order and out of order."""

import importlib.util
import json
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from sdtrain.data.shard_writer import write_shards
from sdtrain.layer import kernels

TOOL = Path(__file__).parents[2] / "tools" / "doctor.py"
SMOKE = ("+experiment=smoke", "accelerator=cpu")


@pytest.fixture
def doctor(monkeypatch):
    """The tool as a module, without its two processes."""
    monkeypatch.syspath_prepend(TOOL.parent)
    spec = importlib.util.spec_from_file_location("doctor", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "collective", lambda: iter(()))
    return module


@pytest.fixture
def lines(doctor, capsys, tmp_path):
    """lines(arguments) -> (exit code, {name: line})."""

    def call(*arguments):
        capsys.readouterr()
        code = doctor.main([*arguments, f"output_dir={tmp_path}/run", "--json"])
        return code, {line["name"]: line for line in json.loads(capsys.readouterr().out)}

    return call


def test_a_machine_in_order(lines):
    code, found = lines(*SMOKE)
    failed = {name: line for name, line in found.items() if line["status"] == "fail"}
    assert (code, failed) == (0, {})
    assert found["torch"]["said"] == torch.__version__
    assert found["weights"]["said"] == "none are wanted: all is trained from nothing"
    assert {"output_dir room", "TMPDIR room", "filesystems", "commit", "open files", "wandb", "slurm"} <= set(found)
    assert all(line["advice"] for line in failed.values())


@pytest.mark.parametrize(
    ("name", "there", "status", "word"),
    [
        ("lightning", "2.6.2", "fail", "malware"),
        ("pillow", "12.1.0", "fail", "overflow"),
        ("webdataset", "", "fail", "pip install"),
        ("deepspeed", "", "note", "optional"),
        ("torch", "2.9.0", "fail", "wanted"),
    ],
)
def test_a_package_out_of_order(doctor, monkeypatch, name, there, status, word):
    real = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda asked: there if asked == name else real(asked))
    (found,) = [line for line in doctor.packages(()) if line.name == name]
    assert found.status == status
    assert word in f"{found.said} {found.advice}"


@pytest.mark.parametrize(
    ("name", "word"), [("deepspeed", "strategy=deepspeed_zero1"), ("tensorboard", "tracker=tensorboard")]
)
def test_an_extra_is_wanted_where_the_run_uses_it(doctor, lines, monkeypatch, name, word):
    real = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda asked: "" if asked == name else real(asked))
    assert lines(*SMOKE)[1][name]["status"] == "note"
    code, found = lines(*SMOKE, word)
    assert (code, found[name]["status"]) == (1, "fail")
    assert f'install -c constraints.txt "{name}' in found[name]["advice"]


def test_torch_fidelity_without_torchvision(doctor, monkeypatch):
    real = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda asked: "0.4.0" if asked == "torch-fidelity" else real(asked))
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert [line.status for line in doctor.packages(()) if line.name == "torch-fidelity"] == ["fail"]


def test_small_limits(doctor, monkeypatch):
    usage = namedtuple("usage", "total used free")(64 * 2**20, 0, 64 * 2**20)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: usage)
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda which: (256, 256))
    assert [(line.status, line.advice) for line in doctor.open_files()] == [("fail", "ulimit -n 65536")]
    assert [line.status for line in doctor.shared_memory()] == ["fail"]


def test_a_directory_that_cannot_be_renamed_in(doctor, monkeypatch, tmp_path):
    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(doctor.Path, "rename", refuse)
    found = {line.name: line for line in doctor.disk(tmp_path / "run")}
    assert found["commit"].status == "fail"
    assert "Read-only file system" in found["commit"].said
    assert list(tmp_path.iterdir()) == []


def test_no_gpu_where_one_is_asked_for(doctor, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "said", lambda *command: "")
    statuses = {
        asked: next(doctor.gpu({"accelerator": asked, "devices": 1})).status for asked in ("auto", "cpu", "gpu")
    }
    assert statuses == {"auto": "note", "cpu": "note", "gpu": "fail"}
    monkeypatch.setattr(doctor, "said", lambda *command: "550.1")
    assert next(doctor.gpu(None)).status == "fail"


def test_no_compiler(doctor, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    off = {stage: {"compile": False} for stage in ("autoencoder", "diffusion")}
    assert next(doctor.compiler(False, off)).status == "note"
    assert next(doctor.compiler(True, off)).status == "fail"
    assert next(doctor.compiler(False, off | {"diffusion": {"compile": True}})).status == "fail"


def test_kernels_that_are_not_built(doctor, monkeypatch):
    assert next(doctor.cpu_kernels()).status == ("note" if kernels.library() is None else "pass")
    monkeypatch.setattr(kernels, "library", lambda: None)
    (line,) = doctor.cpu_kernels()
    assert line.status == "note"
    assert "gcc" in line.advice


def test_a_look_that_breaks_is_a_line(doctor, monkeypatch, lines):
    monkeypatch.setattr(doctor, "slurm", lambda: 1 / 0)
    code, found = lines(*SMOKE)
    assert (code, found["slurm"]["status"]) == (1, "fail")
    assert "ZeroDivisionError" in found["slurm"]["said"]


@pytest.mark.slow  # it imports transformers
def test_what_an_experiment_wants_and_has_not(lines, tmp_path):
    code, found = lines("+experiment=kl_f8")
    assert code == 1
    assert found["data.shards"]["said"] == "has no value"
    key = "autoencoder.objective.perceptual"
    assert "https://download.pytorch.org/models/vgg16-397923af.pth" in found[f"{key}.weights"]["advice"]
    heads = Path(found[f"{key}.heads"]["advice"].split()[1])
    assert heads.is_file()  # the file to copy is there
    _, found = lines("+experiment=sd15_256", f"data.shards={tmp_path}/none", f"first_stage.weights={tmp_path}/none")
    assert found["data.shards"]["status"] == found["first_stage.weights"]["status"] == "fail"
    assert "hf download openai/clip-vit-large-patch14" in found["conditioner.pretrained"]["advice"]
    assert found["config"]["status"] == "pass"
    _, found = lines("+experiment=smoke", "metric@diffusion.metric=diffusion_fid")
    advice = found["diffusion.metric.distribution.extractor.weights"]["advice"]
    assert advice.startswith("curl -L --create-dirs -o weights/pt_inception-2015-12-05-6726825d.pth https://github.com")


def test_what_an_experiment_wants_and_has(lines, tmp_path):
    write_shards([{"__key__": "0", "jpg": b"x", "txt": b"a"}], f"{tmp_path}/%06d.tar", 10)
    weights = tmp_path / "vgg16.pth"
    weights.write_bytes(b"x")
    typed = ("+experiment=kl_f8", f"data.shards={tmp_path}/*.tar", "autoencoder.objective.perceptual.heads=null")
    code, found = lines(*typed, f"autoencoder.objective.perceptual.weights={weights}", "devices=1", "accelerator=cpu")
    assert {name: line for name, line in found.items() if line["status"] == "fail"} == {}
    assert found["data.shards"]["said"].startswith("1 shards; the first has")
    damaged = weights.rename(tmp_path / "vgg16-397923af.pth")
    _, found = lines(*typed, f"autoencoder.objective.perceptual.weights={damaged}")
    assert "damaged" in found["autoencoder.objective.perceptual.weights"]["said"]


def test_a_mistake_in_the_arguments(doctor, capsys):
    assert doctor.main(["+experiment=nonesuch"]) == 2
    assert "nonesuch" in capsys.readouterr().err
    assert doctor.main(["+experiment=smoke", "sed=1"]) == 2


def test_lines_for_people(doctor, capsys, tmp_path):
    assert doctor.main([*SMOKE, f"output_dir={tmp_path}", "devices=0"]) == 1
    said = capsys.readouterr().out
    assert "fail  config" in said
    assert said.endswith("want something done\n")


@pytest.mark.slow  # two processes import torch
def test_two_processes_add_up(monkeypatch):
    monkeypatch.syspath_prepend(TOOL.parent)
    spec = importlib.util.spec_from_file_location("doctor", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert [line.status for line in module.collective()] == ["pass"]
    monkeypatch.setattr(module, "COLLECTIVE", "import sys; sys.exit('no interface')")
    (line,) = module.collective()
    assert (line.status, line.said) == ("fail", "no interface")


def teardown_module():
    sys.modules.pop("wants", None)
