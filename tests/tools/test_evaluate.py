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
def module():
    """The tool, which is no package's."""
    spec = importlib.util.spec_from_file_location("evaluate", TOOL)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def tool(module, capsys):
    """tool(arguments) -> (exit code, standard output, standard error), in this process."""
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


def test_samples_are_looked_for_among_the_training_pictures(tool, run, monkeypatch):
    import numpy as np

    from sdtrain.interop.pipeline import Pipeline
    from sdtrain.metric.memorisation import memorisation
    from sdtrain.stage.comparison import real_pictures

    common = (run, "--metric", "memorisation", "--num-images", 12, "--num-steps", 2)
    code, printed, error = tool(*common)
    assert code == 0, error
    told, (result,) = read(printed)["protocol"], read(printed)["results"]
    assert result["memorisation/sample"] > 1
    about = told["memorisation"]
    assert (about["num_samples"], about["num_held_out"], about["num_training"]) == (12, 16, 64)
    complete = json.loads(max((run / "diffusion" / "checkpoints").glob("*/COMPLETE.json")).read_text())
    assert about["training"] == complete["data_fingerprint"]
    assert "random_features" not in told["networks"]

    taken = []  # a model that draws its training pictures
    monkeypatch.setattr(Pipeline, "draw", lambda *_: taken[:12])
    from sdtrain.interop.evaluation import _open_data
    from sdtrain.interop.subject import Subject

    data = _open_data(Subject.load(run, {"source": "samples", "weights": "ema"}, "cpu"), "val")
    taken = real_pictures(data, "train", range(20, 32))
    (copied,) = read(tool(*common)[1])["results"]
    assert (copied["memorisation/sample"], copied["memorisation/ratio"], copied["memorisation/closer"]) == (0, 0, 1)
    held_out, training = (real_pictures(data, split, range(num)) for split, num in (("val", 16), ("train", 64)))
    wanted = memorisation(np.array(taken), held_out, [training[:40], training[40:]])
    assert {name: copied[f"memorisation/{name}"] for name in wanted} == wanted

    from sdtrain.interop import look, ranks

    monkeypatch.setattr(look, "_NUM_COMPARED", 5)  # of many samples, so many are kept
    few = look.Copies(data, {"split": "val", "batch": 4, "num_images": 12, "num_training": 64}, ranks.Ranks())
    few.add(taken[:4], range(4), [])
    few.add(taken[4:], range(4, 12), [])
    assert list(few.samples) == list(range(5))


def test_pictures_that_were_deleted_are_rendered_again(run, tmp_path):
    from sdtrain.config import load_config
    from sdtrain.interop.evaluation import _open_data
    from sdtrain.interop.subject import Subject

    cfg = load_config(["+experiment=smoke", "data.num_train=8", "data.num_val=4", f"data.root={tmp_path / 'new'}"])
    subject = Subject(cfg, torch.nn.Module(), None, {})
    assert _open_data(subject, "val").splits["val"] == 4


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


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("drawbench.csv", 'Prompts,Category\nA red star.,Colors\n"A ring, left of a star",Positional\n'),
        ("parti.tsv", "Prompt\tCategory\tNote\nA red star.\tAbstract\t-\nA ring, left of a star\tArts\t-\n"),
        ("own.txt", "A red star.\n\n  A ring, left of a star\n"),
    ],
)
def test_prompts_as_they_are_published(module, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert module.read_prompts(tmp_path / name) == [{"prompt": "A red star."}, {"prompt": "A ring, left of a star"}]


PROMPTS = [
    {"tag": "single_object", "prompt": "a photo of a bus", "include": [{"class": "bus", "count": 1}]},
    {"tag": "colors", "prompt": "a photo of a red bus", "include": [{"class": "bus", "count": 1, "color": "red"}]},
    {"tag": "single_object", "prompt": "a photo of a dog", "include": [{"class": "dog", "count": 1}]},
]


@pytest.fixture
def geneval(judges, tmp_path):
    """The arguments of GenEval's recipe with small networks, and its prompts in a file."""
    values = yaml.safe_load((ROOT / "configs" / "evaluation" / "geneval.yaml").read_text())
    values["extractors"]["clip"]["weights"] = str(judges / "clip")
    values["detector"] |= {"weights": str(judges / "detector"), "side": 64}
    (tmp_path / "geneval.yaml").write_text(yaml.safe_dump({**values, "batch": 4}))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in PROMPTS))
    return "--protocol", tmp_path / "geneval.yaml", "--prompts", tmp_path / "prompts.jsonl", "--num-images", 7


def test_geneval_by_tag_and_what_judged(tool, run, geneval, monkeypatch):
    """Random networks find nothing, so what they find is said for them."""
    from sdtrain.metric.detector import Detection, Detector
    from sdtrain.metric.geneval import GenEval

    code, printed, error = tool(run, *geneval)
    assert code == 0, error
    told, (result,) = read(printed)["protocol"], read(printed)["results"]
    assert {"geneval/single_object", "geneval/colors", "geneval/overall", "clip/clip_score"} <= result.keys()
    assert told["networks"]["detector"]["network"] == "mask2former"
    assert told["networks"]["colours"]["sha256"] == told["networks"]["clip"]["sha256"]
    assert told["prompts"]["num_prompts"] == 3

    import numpy as np

    bus = Detection("bus", 0.9, (8, 8, 40, 40), np.ones((64, 64), bool))
    monkeypatch.setattr(Detector, "forward", lambda *_: [bus])
    monkeypatch.setattr(GenEval, "colour", lambda *_: "red")
    (found,) = read(tool(run, *geneval, "--metric", "geneval")[1])["results"]
    assert found["geneval/colors"] == 1.0
    assert found["geneval/single_object"] == 3 / 5  # places 0, 3, 6 of 0, 2, 3, 5, 6
    assert found["geneval/overall"] == pytest.approx(0.8)
    assert not any(name.startswith("clip/") for name in found)


def test_geneval_says_what_it_lacks(tool, run, geneval, tmp_path):
    plain, lame, wild = tmp_path / "plain.txt", tmp_path / "lame.jsonl", tmp_path / "wild.jsonl"
    plain.write_text("a photo of a bus\n")
    lame.write_text('{"tag": "colors"}\n')
    wild.write_text(json.dumps({**PROMPTS[0], "include": [{"class": "unicorn", "count": 1}]}))
    (tmp_path / "broken.jsonl").write_text("{")
    protocol, official = geneval[:2], ("--protocol", "geneval", "--metric", "geneval")
    for arguments, expected in [
        ((*protocol, "--metric", "geneval"), "geneval wants --prompts FILE.jsonl, a JSON object a line"),
        ((*protocol, "--prompts", plain), "prompt 1 cannot be judged"),
        ((*protocol, "--prompts", lame), "line 1 has no `prompt`"),
        ((*protocol, "--prompts", wild), "prompt 1: the detector knows no 'unicorn'"),
        ((*protocol, "--prompts", tmp_path / "broken.jsonl"), "broken.jsonl cannot be read"),
        ((*official, *geneval[2:]), "config.json; it wants a folder of"),
    ]:
        code, printed, error = tool(run, *arguments)
        assert (code, printed) == (2, ""), arguments
        assert expected in error, error
    code, printed, error = tool(run, *protocol, "--prompts", plain, "--metric", "clip_score", "--num-images", 2)
    assert code == 0, error  # which needs no detector


def test_mistakes_end_with_2_and_one_line(tool, run, protocol, tmp_path):
    table, broken = tmp_path / "table.csv", tmp_path / "broken.jsonl"
    table.write_text("Category,Words\nArts,a star\n")
    broken.write_text('{"prompt": "a star"}\n\n{')
    for arguments, expected in [
        ((tmp_path,), "is no run: there is no"),
        ((run, "--protocol", "coco"), "nor one of coco30k, drawbench"),
        ((run, "--protocol", "imagenet50k"), "it wants pt_inception-2015-12-05-6726825d.pth (https://"),
        ((run, "--protocol", "partiprompts"), "config.json; it wants a folder of"),
        ((run, "--metric", "fid"), "measures no fid"),
        ((run, "--num-images", 1), "give at least 2"),
        ((run, "--split", "none"), "has no 'none'; it has"),
        ((run, "--prompts", tmp_path / "absent"), "cannot be read"),
        ((run, "--prompts", table), "has no column named prompt, but ['Category', 'Words']"),
        ((run, "--prompts", broken), "broken.jsonl cannot be read: line 3 is no JSON"),
        ((run, "--guidance", "nan"), "--guidance: [nan] is not finite"),
        ((run, "--devices", 0), "--devices: 0 processes"),
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
        ({"source": "reconstructions"}, "only memorisation, and only of source: samples"),
        ({"metric": {"training": ["copies"]}}, "only memorisation, and only"),
        ({"split": "train"}, "memorisation wants a held-out split; give --split val"),
        ({"num_training": 0}, "num_training: 0 must be at least 1"),
        ({"source": "reconstructions", "metric": {"pixels": ["ms_ssim"]}}, "161 pixels a side"),
    ]:
        code, printed, error = tool(run, "--protocol", protocol(**changes))
        assert (code, printed) == (2, ""), changes
        assert expected in error, error
        assert error.count("\n") == 1, error


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tool, run, protocol):
    network = {"_target_": "sdtrain.metric.random_features.RandomFeatures"}
    extractors = {name: {**network, "num_features": 8 * n} for n, name in enumerate("abcd", 1)}
    metric = {**{name: ["fd", "kid"] for name in extractors}, "training": ["memorisation"]}
    changes = {"extractors": extractors, "metric": metric, "num_training": 50}
    file = protocol(batch=4, num_images=11, num_kept=12, guidance=[3.0], **changes)
    _, alone, error = tool(run, "--protocol", file)
    command = [sys.executable, str(TOOL), str(run), "--protocol", str(file), "--devices", "2"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    one, two = read(alone)["results"][0], read(done.stdout)["results"][0]
    assert two == pytest.approx(one, rel=1e-5, nan_ok=True)
    assert one["memorisation/sample"] > 0


def test_a_first_stage_alone_is_measured_as_before_stage_2(tool, run, protocol, tmp_path):
    alone = tmp_path / "alone"
    shutil.copytree(run, alone, ignore=shutil.ignore_patterns("diffusion", "eval"))
    file = protocol(source="reconstructions", metric={"random_features": ["fd"], "pixels": ["reconstruction"]})
    whole, half = (read(tool(place, "--protocol", file)[1]) for place in (run, alone))
    assert half == whole
    manifest = json.loads((alone / "autoencoder" / "manifest.json").read_text())
    told = half["protocol"]
    assert (told["weight_hash"], told["step"], told["precision"]) == (manifest["weight_hash"], 4, "32-true")
    (alone / "autoencoder" / "manifest.json").unlink()
    code, _, error = tool(alone, "--protocol", file)
    assert (code, "no stage manifest" in error, error.count("\n")) == (2, True, 1)


def test_figures_go_to_the_mirror_and_into_the_report(tool, run, tmp_path):
    import csv

    own = shutil.copytree(run, tmp_path / "own")
    config = (own / "config.yaml").read_text()
    assert "NullTracker" in config
    (own / "config.yaml").write_text(config.replace("none.NullTracker", "csv.CsvTracker"))
    (own / "report.html").unlink()
    common = ("--num-images", 4, "--num-steps", 2, "--metric", "fd")
    code, printed, error = tool(own, *common, "--guidance", 1, 2.5)
    assert code == 0, error
    results = read(printed)["results"]
    mirrored = list(csv.DictReader((own / "diffusion" / "metrics.csv").open()))
    for row, result, scale in zip(mirrored, results, ("1", "2.5"), strict=True):
        assert float(row[f"eval/quick/guidance_{scale}/random_features/fd"]) == result["random_features/fd"]
        assert row["step"] == "4"
    assert "quick, guidance 2.5, num steps 2, 4 pictures" in (own / "report.html").read_text()
