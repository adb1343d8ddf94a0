"""The evaluation of a finished run, through the command line."""

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "evaluate.py"


@pytest.fixture
def tool(capsys):
    """tool(arguments) -> (exit code, standard output, standard error), in this process."""
    spec = importlib.util.spec_from_file_location("evaluate", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    capsys.readouterr()
    return lambda *arguments: (module.main([str(argument) for argument in arguments]), *capsys.readouterr())


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory):
    """A copy of the finished run, as an evaluation writes into it."""
    return shutil.copytree(finished, tmp_path_factory.mktemp("evaluated") / "run")


@pytest.fixture
def protocol(tmp_path):
    """protocol(**changes) -> a file of the quick one with changes."""

    def write(**changes):
        file = tmp_path / "mine.yaml"
        values = yaml.safe_load((ROOT / "configs" / "evaluation" / "quick.yaml").read_text())
        file.write_text(yaml.safe_dump({**values, **changes}))
        return file

    return write


def read(printed):
    return json.loads(Path(printed.splitlines()[-1]).read_text())


def test_figures_and_all_that_they_depend_on(tool, run):
    code, printed, error = tool(run, "--num-images", 11, "--guidance", 1, 3, "--num-steps", 2, "--sampler", "ddim")
    assert code == 0, error
    path = Path(printed.splitlines()[-1])
    assert path.parent == run / "eval"
    told, results = read(printed)["protocol"], read(printed)["results"]
    assert [result["guidance"] for result in results] == [1, 3]
    for result in results:
        assert result["num_pictures"] == 11
        assert result["num_values"] == 11 * 3 * 64 * 64
        assert 0 <= result["num_clamped_values"] <= result["num_values"]
        assert result["random_features/fd"] > 0
        assert {"random_features/kid", "random_features/precision", "random_features/recall"} <= result.keys()
    assert results[0]["random_features/fd"] != results[1]["random_features/fd"]
    assert (told["num_images"], told["seed"], told["num_steps"], told["sampler"]) == (11, 0, 2, "ddim")
    assert (told["weights"], told["step"], told["protocol"]) == ("ema", 4, "quick")
    network = told["networks"]["random_features"]
    assert (len(network["sha256"]), network["resize"]) == (64, "bicubic_antialiased")
    reference = told["reference"]["random_features"]
    assert (len(reference["pictures_sha256"]), reference["num_images"]) == (64, 16)
    assert "codec" in told
    assert "model.safetensors" in told["files"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    mine = [row for row in rows if row.get("eval") == path.stem]
    assert [row["guidance"] for row in mine] == [1, 3]
    assert {row["stage"] for row in mine} == {"evaluation"}


def test_the_same_again_and_another_seed(tool, run):
    def figure(*options):
        code, printed, error = tool(run, "--num-images", 6, "--metric", "fd", *options)
        assert code == 0, error
        (result,) = read(printed)["results"]
        assert not any("kid" in name for name in result)
        return result["random_features/fd"]

    own = figure()
    assert figure() == own
    assert figure("--seed", 1) != own
    assert figure("--weights", "raw") != own


def test_what_is_clamped_is_counted(run):
    from sdtrain.errors import RunError
    from sdtrain.interop.evaluation import Counting

    class Loud:
        down_factor = 4

        def decode(self, latent):
            return latent

    counting = Counting(Loud())
    image = torch.zeros(3, 3, 4, 4)
    image[0, 0, 0, :2], image[1, 2, 1, 1] = 1.5, -7
    counting.decode(image)
    counting.decode(torch.ones(1, 3, 4, 4))
    assert counting.down_factor == 4
    assert (counting.num_pictures, counting.num_clamped_pictures) == (4, 2)
    assert (counting.num_values, counting.num_clamped_values) == (4 * 48, 3)
    with pytest.raises(RunError, match="not finite"):
        counting.decode(image / 0)


def test_a_stored_reference_gives_the_same_figure(tool, run, tmp_path):
    common = (run, "--num-images", 6, "--metric", "fd")
    _, first, error = tool(*common, "--write-reference", tmp_path / "stored")
    code, second, error = tool(*common, "--reference", tmp_path / "stored")
    assert code == 0, error
    assert read(first)["results"] == read(second)["results"]
    file = tmp_path / "stored" / "random_features.safetensors"
    found = read(second)["protocol"]["reference"]["random_features"]
    assert found == {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "num_images": 16}


def test_reconstructions(tool, run, protocol):
    file = protocol(source="reconstructions", metric={"random_features": ["fd"], "pixels": ["reconstruction"]})
    code, printed, error = tool(run, "--protocol", file)
    assert code == 0, error
    (result,) = read(printed)["results"]
    assert result["num_pictures"] == 16
    assert result["pixels/psnr"] > 3
    assert 0 <= result["pixels/out_of_range"] <= 1
    assert result["random_features/fd"] > 0


def test_a_protocol_without_a_scale_has_the_runs_own(tool, run):
    scale = yaml.safe_load((run / "config.yaml").read_text())["sampler"]["guidance"]["scale"]
    common = (run, "--num-images", 4, "--metric", "fd")
    own, said = (read(tool(*common, *given)[1])["results"] for given in ((), ("--guidance", scale)))
    assert own == said
    assert own[0]["guidance"] == scale


def test_prompts_come_round(tool, run, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a red star\n\na blue ring\n")
    code, printed, error = tool(run, "--prompts", file, "--num-images", 5, "--metric", "fd")
    assert code == 0, error
    assert read(printed)["protocol"]["prompts"]["num_prompts"] == 2
    assert read(printed)["results"][0]["num_pictures"] == 5


def test_mistakes_end_with_2_and_one_line(tool, run, protocol, tmp_path):
    for arguments, expected in [
        ((tmp_path,), "is no run: there is no"),
        ((run, "--protocol", "coco"), "nor one of coco30k, drawbench"),
        ((run, "--protocol", "imagenet50k"), "it wants pt_inception-2015-12-05-6726825d.pth (https://"),
        ((run, "--protocol", "partiprompts"), "config.json; it wants a folder of"),
        ((run, "--metric", "fid"), "measures no fid"),
        ((run, "--num-images", 1), "give at least 2"),
        ((run, "--split", "none"), "has no 'none'; it has"),
        ((run, "--prompts", tmp_path / "absent"), "cannot be read"),
        ((run, "--reference", tmp_path), "holds no stored moments"),
    ]:
        code, printed, error = tool(*arguments)
        assert (code, printed) == (2, ""), arguments
        assert expected in error, error
        assert error.count("\n") == 1, error
    for changes, expected in [
        ({"metric": {"random_features": ["fid"]}}, "fid is of Inception's features; of random_features's, ask for fd"),
        ({"metric": {"random_features": ["cmmd"]}}, "cmmd is of CLIP's features"),
        ({"metric": {"random_features": ["inception_score"]}}, "has no classes"),
        ({"metric": {"random_features": ["beauty"]}}, "there is no metric 'beauty'"),
        ({"metric": {"pixels": ["lpips"]}}, "only of source: reconstructions"),
        ({"metric": {"other": ["fd"]}}, "no such extractor"),
        ({"planted": 1}, "must have exactly the keys"),
        ({"source": "dreams"}, "neither samples nor reconstructions"),
        ({"source": "reconstructions", "metric": {"pixels": ["ms_ssim"]}}, "161 pixels a side"),
    ]:
        code, printed, error = tool(run, "--protocol", protocol(**changes))
        assert (code, printed) == (2, ""), changes
        assert expected in error, error
        assert error.count("\n") == 1, error


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tool, run, protocol):
    file = protocol(batch=4, num_images=11, num_kept=12, guidance=[3.0])
    _, alone, error = tool(run, "--protocol", file)
    command = [sys.executable, str(TOOL), str(run), "--protocol", str(file), "--devices", "2"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    one, two = read(alone)["results"][0], read(done.stdout)["results"][0]
    assert two == pytest.approx(one, rel=1e-5, nan_ok=True)
