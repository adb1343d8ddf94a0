"""A real Slurm on this machine: munged, slurmctld and a slurmd for each of two nodes, on the loopback, as this user.

Skipped where Slurm is not installed; with SDTRAIN_REQUIRE_SLURM=1, as in CI, that fails.
"""

import contextlib
import ctypes
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from string import Template

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "DEADLINE"}
PR_SET_PDEATHSIG = 1


def end_with_parent():
    """In the child: a daemon is killed when pytest goes, however it goes."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Slurm:
    """A controller with two nodes of four made-up cores, in a folder of its own."""

    def __init__(self, folder):
        self.folder, self.daemons = folder, []
        outer = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        self.environment = {
            **outer,
            "PATH": f"{outer['PATH']}:/usr/sbin:/sbin",
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }

    def start(self):
        for name in ("state", "spool", "munge"):
            (self.folder / name).mkdir()
        for name in ("gpu0", "gpu1"):  # a GPU is a file that exists
            (self.folder / name).touch()
        gpus = f"NodeName=node[1-2] Name=gpu File={self.folder}/gpu[0-1]"
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\n{gpus}\n")
        ports = free_ports(3)
        values = {
            "folder": self.folder,
            "host": socket.gethostname().split(".")[0],
            "user": subprocess.check_output(["id", "-un"], text=True).strip(),
            "controller_port": ports[0],
            "port1": ports[1],
            "port2": ports[2],
            "srun_ports": f"{ports[0] + 50}-{ports[0] + 180}",
            "first_job": random.randint(1000, 8000),
        }
        (self.folder / "slurm.conf").write_text(Template((HERE / "slurm.conf").read_text()).substitute(values))
        self._start_munge()
        self._spawn("slurmctld", "-D")
        for number in (1, 2):
            self._spawn("slurmd", "-D", "-N", f"node{number}")
        states = ("sinfo", "-h", "-N", "-p", "debug", "-o", "%T")
        self._until(lambda: self.run(*states, check=False).split() == ["idle"] * 2)

    def _start_munge(self):
        munge = self.folder / "munge"
        key = munge / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        munge.chmod(0o755)
        files = [f"--key-file={key}", f"--socket={munge}/socket", f"--pid-file={munge}/pid"]
        files += [f"--log-file={munge}/log", f"--seed-file={munge}/seed"]
        self._spawn("munged", "--foreground", "--origin=127.0.0.1", "--num-threads=2", *files)
        self._until((munge / "socket").exists)

    def _spawn(self, *command):
        with open(self.folder / f"{command[0]}{len(self.daemons)}.out", "wb") as log:
            self.daemons.append(
                subprocess.Popen(
                    command,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=end_with_parent,
                )
            )

    def _until(self, is_true, seconds=30):
        end = time.monotonic() + seconds
        while not is_true():
            if time.monotonic() > end or any(daemon.poll() is not None for daemon in self.daemons):
                logs = "\n".join(path.read_text()[-2000:] for path in self.folder.glob("*.out"))
                raise RuntimeError(f"the controller did not come up:\n{logs}")
            time.sleep(0.05)

    def stop(self):
        """Jobs first, then the daemons in the order nodes, controller, munge; last what a job may have left."""
        with contextlib.suppress(subprocess.SubprocessError):
            self.run("scancel", "--user", str(os.getuid()), check=False)
            end = time.monotonic() + 10
            while self.run("squeue", "-h", "-t", "R,CG", check=False) and time.monotonic() < end:
                time.sleep(0.1)
        for daemon in [*self.daemons[2:], *self.daemons[:2][::-1]]:
            daemon.terminate()
            try:
                daemon.wait(5)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for pid in self.stepds():
            for child in [*descendants(pid), pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)

    def stepds(self):
        """Those of this controller: slurmd leaves its slurmstepd, and so the job, alive."""
        mine = f"SLURM_CONF={self.environment['SLURM_CONF']}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                is_stepd = (folder / "comm").read_text() == "slurmstepd\n"
                if is_stepd and mine in (folder / "environ").read_bytes().split(b"\0"):
                    yield int(folder.name)

    def run(self, *command, check=True):
        done = subprocess.run(
            [str(word) for word in command], env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, *arguments, check=True):
        """slurm/submit.py; (exit code, what it printed, the ids by stage)."""
        command = [sys.executable, "slurm/submit.py", *map(str, arguments)]
        done = subprocess.run(command, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        ids = dict(re.findall(r"^(\w+): job (\d+)", done.stdout, re.MULTILINE))
        return done.returncode, done.stdout + done.stderr, ids

    def job(self, job):
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", "-o", job)))

    def wait(self, job, states=FINAL, seconds=90):
        """The job's record once it is in one of the states."""
        end = time.monotonic() + seconds
        while (record := self.job(job))["JobState"] not in states:
            assert time.monotonic() < end, f"job {job} is still {record['JobState']} ({record['Reason']})"
            time.sleep(0.1)
        return record


def free_ports(count):
    """Neighbours, below the ephemeral range, so that nobody takes them in between."""
    while True:
        base = random.randrange(20000, 31000, 200)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(base, base + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return [*range(base, base + count)]


def descendants(pid):
    with contextlib.suppress(OSError):
        for file in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in file.read_text().split():
                yield from descendants(int(child))
                yield int(child)


@pytest.fixture(scope="session")
def slurm():
    """The controller, up while this session's tests run."""
    missing = [name for name in NEEDED if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]
    if missing or sys.platform != "linux":
        give_up = pytest.fail if os.environ.get("SDTRAIN_REQUIRE_SLURM") == "1" else pytest.skip
        give_up(f"no {' '.join(missing)} here: apt-get install -y --no-install-recommends slurm-wlm munge")
    with tempfile.TemporaryDirectory(prefix="slurm.", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o755)
        controller = Slurm(Path(folder))
        try:
            controller.start()
            yield controller
        finally:
            controller.stop()
