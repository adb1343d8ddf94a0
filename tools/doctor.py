"""Looks over a machine, and what an experiment wants of it: each line is a pass, a note, or what to do.

    python tools/doctor.py                                     the machine
    python tools/doctor.py +experiment=kl_f8 data.shards=DIR   the same, and this run's shards, weights and devices

It takes what python -m sdtrain takes. It leaves with 0, or with 1 where a line says what to do.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from packaging.requirements import Requirement
from wants import Line, config, shards, weights

from sdtrain.config import _compose, plus
from sdtrain.errors import ConfigError
from sdtrain.target import parts

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = ("deepspeed", "remote", "parquet", "tensorboard")  # extras of pyproject.toml: absent is no mistake
KNOWN_BAD = {  # package: (versions, why)
    "lightning": ("==2.6.2,==2.6.3", "these two were malware; remove it and change every password of this account"),
    "pytorch-lightning": ("==2.6.2,==2.6.3", "these two were malware; remove it, change every password"),
    "pillow": ("<13", "a picture can overflow its JPEG decoder"),
}
LEAST_FREE_BYTES = 20 * 2**30
LEAST_SHARED_BYTES = 2**30
LEAST_FILES = 1024
COLLECTIVE_SECONDS = 120
COLLECTIVE = """
import sys, datetime, torch, torch.distributed as dist
dist.init_process_group("gloo", f"file://{sys.argv[2]}", rank=int(sys.argv[1]), world_size=2,
                        timeout=datetime.timedelta(seconds=60))
value = torch.ones(1) + int(sys.argv[1])
dist.all_reduce(value)
assert value.item() == 3, value
dist.destroy_process_group()
"""


def main(argv: list[str] | None = None) -> int:
    """Print the lines; 1 where one of them is not in order, 2 where the arguments are wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="as for python -m sdtrain")
    parser.add_argument("--json", action="store_true", help="one list of objects, for programs")
    args = parser.parse_intermixed_args(argv)
    overrides = [plus(override) for override in args.overrides]
    try:
        values = OmegaConf.to_container(_compose(overrides), resolve=True)
    except (ConfigError, OmegaConfBaseException) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    lines = []
    for line in look(values, overrides):
        lines.append(line)
        if not args.json:
            print(f"{line.status:4}  {line.name:18} {line.said}{f'; {line.advice}' if line.advice else ''}", flush=True)
    num_failed = sum(line.status == "fail" for line in lines)
    if args.json:
        print(json.dumps([asdict(line) for line in lines], indent=1))
    else:
        print(f"{num_failed} of {len(lines)} want something done" if num_failed else f"all {len(lines)} in order")
    return 1 if num_failed else 0


def look(values: dict[str, Any], overrides: Sequence[str]) -> Iterator[Line]:
    """All lines, in turn; a look that breaks is a line too."""
    uses_deepspeed = any(".deepspeed." in node["_target_"] for path, node in parts(values) if "strategy" in path)
    uses_tensorboard = any(".tensorboard." in node["_target_"] for path, node in parts(values) if path == "tracker")
    needed = {name for name, is_used in (("deepspeed", uses_deepspeed), ("tensorboard", uses_tensorboard)) if is_used}
    looks: list[tuple[str, Callable[[], Iterator[Line]]]] = [
        ("python", python),
        ("packages", lambda: packages(needed)),
        ("gpu", lambda: gpu(values if overrides else None)),
        ("compiler", lambda: compiler(uses_deepspeed, values)),
        ("cpu kernels", cpu_kernels),
        ("disk", lambda: disk(Path(values["output_dir"]).expanduser())),
        ("shared memory", shared_memory),
        ("open files", open_files),
        ("wandb", wandb),
        ("slurm", slurm),
        ("collective", collective),
    ]
    if overrides:
        looks += [("config", lambda: config(values, overrides)), ("shards", lambda: shards(values["data"]))]
        looks += [("weights", lambda: weights(values))]
    for name, one in looks:
        try:
            yield from one()
        except Exception as error:
            said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            yield Line(name, "fail", said, "" if isinstance(error, ConfigError) else "this look broke; mend it first")


def python() -> Iterator[Line]:
    """Its version."""
    found = ".".join(map(str, sys.version_info[:3]))
    is_new = sys.version_info >= (3, 11)
    yield Line("python", "pass" if is_new else "fail", f"{found}, {sys.executable}", "" if is_new else "3.11 is wanted")


def packages(needed: Collection[str]) -> Iterator[Line]:
    """What pyproject.toml asks for, with the extras that a run needs, and what is known to be bad of any version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [(text, False) for text in project["dependencies"]]
    wanted += [(text, True) for extra in OPTIONAL for text in project["optional-dependencies"][extra]]
    for text, is_optional in wanted:
        requirement = Requirement(text.partition(";")[0])
        is_optional = is_optional and requirement.name not in needed
        yield package(requirement, is_optional)
    if installed("pytorch-lightning"):
        yield package(Requirement("pytorch-lightning"), True)
    if installed("torch-fidelity") and find_spec("torchvision") is None:
        yield Line(
            "torch-fidelity", "fail", "without torchvision it breaks torchmetrics", "pip uninstall torch-fidelity"
        )


def package(requirement: Requirement, is_optional: bool) -> Line:
    """One, as it is installed."""
    name, found = requirement.name, installed(requirement.name)
    install = f'{sys.executable} -m pip install -c constraints.txt "{requirement}"'
    if not found:
        return Line(name, *(("note", "not installed; it is optional") if is_optional else ("fail", "missing", install)))
    bad, why = KNOWN_BAD.get(name, ("", ""))
    if bad and any(Requirement(f"x{one}").specifier.contains(found) for one in bad.split(",")):
        return Line(name, "fail", f"{found}: {why}", install)
    if not requirement.specifier.contains(found, prereleases=True):
        return Line(name, "fail", f"{found}, wanted {requirement.specifier}", install)
    return Line(name, "pass", found)


def installed(name: str) -> str:
    """The version, or nothing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def gpu(values: dict[str, Any] | None) -> Iterator[Line]:
    """The driver, torch's CUDA and NCCL, and whether there are as many devices as the run asks for."""
    import torch

    asked = str(values["accelerator"]) if values else "auto"
    driver = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
    if not torch.cuda.is_available():
        is_wanted, text = asked in ("gpu", "cuda"), f"none; torch {torch.__version__} runs on the CPU"
        status, advice = "note", ""
        if driver and asked != "cpu":
            status, text = "fail", f"driver {driver}, but torch {torch.__version__} does not see it"
            advice = "install torch's CUDA build that this driver supports: https://pytorch.org/get-started"
        elif is_wanted:
            status, advice = "fail", "look on the machine that trains, or write accelerator=auto"
        yield Line("gpu", status, text, advice)
        return
    num_found = torch.cuda.device_count()
    names = {torch.cuda.get_device_name(i) for i in range(num_found)}
    num_wanted = values["devices"] if values and isinstance(values["devices"], int) else 1
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "absent"
    text = f"{num_found} x {', '.join(sorted(names))}, driver {driver}, CUDA {torch.version.cuda}, NCCL {nccl}"
    is_enough = asked == "cpu" or num_found >= num_wanted
    yield Line("gpu", "pass" if is_enough else "fail", text, "" if is_enough else f"devices={num_wanted} is too many")


def compiler(uses_deepspeed: bool, values: dict[str, Any]) -> Iterator[Line]:
    """DeepSpeed builds its operators at first use; torch.compile builds kernels on a CPU."""
    found = shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")
    is_wanted = uses_deepspeed or any(values[stage]["compile"] for stage in ("autoencoder", "diffusion"))
    status = "pass" if found else "fail" if is_wanted else "note"
    advice = "" if found else "install g++, or set CXX; strategy=deepspeed_* and compile=true need it"
    yield Line("c++ compiler", status, found or "none", advice)
    if installed("deepspeed"):
        ninja = shutil.which("ninja") or find_spec("ninja")
        status = "pass" if ninja else "fail" if uses_deepspeed else "note"
        advice = "pip install ninja; DeepSpeed builds its operators with it" if not ninja else ""
        yield Line("ninja", status, "found" if ninja else "none", advice)
        nvcc = shutil.which("nvcc")
        yield Line("nvcc", "pass" if nvcc else "note", nvcc or "none; DeepSpeed's CUDA operators cannot be built here")


def cpu_kernels() -> Iterator[Line]:
    """What runs faster on a CPU where gcc builds it, and as torch does it where not."""
    from sdtrain.layer.kernels import library

    found = library()
    advice = "install gcc, and make ~/.cache writable; a CPU trains faster with them" if found is None else ""
    yield Line("cpu kernels", "note" if found is None else "pass", found._name if found else "not built", advice)


def disk(directory: Path) -> Iterator[Line]:
    """Free room at output_dir and TMPDIR, and whether what is written there can be committed."""
    home = next(place for place in (directory, *directory.resolve().parents) if place.exists())
    for name, place in (("output_dir", home), ("TMPDIR", Path(tempfile.gettempdir()))):
        free_bytes = shutil.disk_usage(place).free
        is_little = free_bytes < LEAST_FREE_BYTES
        advice = f"a full disk ends a run at a save; free some, or set another {name}" if is_little else ""
        yield Line(f"{name} room", "note" if is_little else "pass", f"{free_bytes / 2**30:.1f} GiB at {place}", advice)
    is_same = home.stat().st_dev == Path(tempfile.gettempdir()).stat().st_dev
    yield Line("filesystems", "pass", f"output_dir and TMPDIR are on {'one' if is_same else 'two'}")
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=home) as folder:
            part = Path(folder, "part")
            with part.open("wb") as file:
                file.write(b"x" * 2**20)
                file.flush()
                os.fsync(file.fileno())
            part.rename(Path(folder, "whole"))
            descriptor = os.open(folder, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        yield Line("commit", "pass", f"write, fsync and rename work in {home}")
    except OSError as error:
        yield Line(
            "commit", "fail", f"{home}: {error.strerror}", "checkpoints cannot be kept there; set another output_dir"
        )


def shared_memory() -> Iterator[Line]:
    """/dev/shm, through which data workers hand over batches and NCCL's ranks talk."""
    place = Path("/dev/shm")
    if place.is_dir():
        size = shutil.disk_usage(place).total
        is_little = size < LEAST_SHARED_BYTES
        advice = "data workers and NCCL want more: docker run --shm-size=8g" if is_little else ""
        yield Line("shared memory", "fail" if is_little else "pass", f"{size / 2**30:.1f} GiB in {place}", advice)


def open_files() -> Iterator[Line]:
    """The limit on open files: a reader keeps up to 128 shards open."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    is_little = limit != resource.RLIM_INFINITY and limit < LEAST_FILES
    yield Line("open files", "fail" if is_little else "pass", f"{limit}", "ulimit -n 65536" if is_little else "")


def wandb() -> Iterator[Line]:
    """How a run would start it. Offline is no mistake: nothing waits for W&B."""
    from sdtrain.tracker.wandb import resolved_mode

    mode = resolved_mode("auto")
    advice = "" if mode == "online" else "`wandb login` or WANDB_API_KEY puts runs online; `wandb sync` does it later"
    yield Line("wandb", "pass" if mode == "online" else "note", mode, advice)


def slurm() -> Iterator[Line]:
    """Whether jobs can be sent from here."""
    found = said("sinfo", "--version")
    yield Line("slurm", "pass" if found else "note", found or "no Slurm here; slurm/submit.py --dry-run needs none")


def collective() -> Iterator[Line]:
    """Two processes add up a number with gloo."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", COLLECTIVE]
        ranks = [
            subprocess.Popen([*command, str(rank), f"{folder}/store"], stderr=subprocess.PIPE, text=True)
            for rank in range(2)
        ]
        try:
            told = [rank.communicate(timeout=COLLECTIVE_SECONDS)[1] for rank in ranks]
        except subprocess.TimeoutExpired:
            told = [f"no answer in {COLLECTIVE_SECONDS} s"]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    if any(rank.returncode for rank in ranks):
        last = next((text.strip().splitlines()[-1] for text in told if text.strip()), "a process died")
        advice = "GLOO_SOCKET_IFNAME names the interface to talk by; look at the firewall"
        yield Line("collective", "fail", last, advice)
    else:
        yield Line("collective", "pass", "two processes add up with gloo")


def said(*command: str) -> str:
    """What a program prints, or nothing where it is not there or does not work."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (subprocess.SubprocessError, OSError):
        return ""


if __name__ == "__main__":
    sys.exit(main())
