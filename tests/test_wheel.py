"""The wheel: it carries the configs, and its command answers from another directory, without the checkout."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("sdtrain-*.whl"))


def test_the_wheel_carries_what_a_run_reads(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"sdtrain/configs/{path.relative_to(ROOT / 'configs')}" for path in ROOT.glob("configs/**/*.yaml")}
    assert configs <= names
    assert {"sdtrain/py.typed", "sdtrain/__main__.py"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "tools/", "configs/")) for name in names)


def test_the_installed_command_works_from_another_directory(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--no-deps", "--quiet", wheel], check=True, cwd=tmp_path)
    # The libraries are those of this environment; the checkout itself is not on the path.
    libraries = next(path for path in sys.path if path.endswith("site-packages"))
    packages = next(home.glob("lib/python*/site-packages"))
    (packages / "libraries.pth").write_text(libraries)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    where = "import sdtrain.config as c; print(c.config_directory())"
    found = subprocess.run([python, "-c", where], cwd="/", env=environment, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()) == packages / "sdtrain" / "configs"
    for command in ([python, "-m", "sdtrain"], [home / "bin" / "sdtrain"]):
        done = subprocess.run(
            [*command, "experiment=smoke", "--cfg", "job"], cwd="/", env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "name: smoke" in done.stdout
