"""Several runs in one page, through the command line."""

import html
import importlib.util
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from sdtrain.tracker.jsonl import JsonlTracker

TOOL = Path(__file__).parents[2] / "tools" / "compare.py"


@pytest.fixture
def tool(capsys):
    """tool(arguments) -> (exit code, standard output, standard error), in this process."""
    spec = importlib.util.spec_from_file_location("compare", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    capsys.readouterr()
    return lambda *arguments: (module.main([str(argument) for argument in arguments]), *capsys.readouterr())


@pytest.fixture
def runs(tmp_path):
    """Two runs, the second without images a second and with grids at other steps."""
    paths = []
    for name, lr, steps in (("slow", 0.001, (0, 100, 200)), ("<fast>", 0.01, (0, 150))):
        run = tmp_path / name
        folder = run / "diffusion" / "samples"
        folder.mkdir(parents=True)
        (run / "config.yaml").write_text(f"name: same\noutput_dir: {run}\nseed: 0\noptim:\n  lr: {lr}\n")
        summary = {"world_size": 1, "diffusion": {"loss": lr * 7, "steps": 40, "strategy": name}}
        (run / "summary.json").write_text(json.dumps(summary))
        tracker = JsonlTracker(run / "metrics.jsonl")
        for step in range(1, 41):
            row = {"stage": "diffusion", "step": step, "loss": lr * (step % 2)}
            tracker.log(row | ({"images_per_second": 9.0} if name == "slow" else {}))
        for step in (20, 40):
            tracker.log({"stage": "diffusion", "step": step, "val/loss": lr, "val/x0_error/t1": 2 * lr})
        for step in steps:
            Image.new("RGB", (8, 8)).save(folder / f"step_{step:08d}.png")
        paths.append(run)
    return paths


def charts(page):
    """Title -> the series of a chart."""
    found = re.findall(r'data-series="([^"]*)".*?<b>(.*?)</b>', page, re.DOTALL)
    return {title: json.loads(html.unescape(series)) for series, title in found}


def rows(page, title):
    """The cells of a section's table."""
    content = re.search(rf"<h2>{title}</h2>(.*?)</section>", page, re.DOTALL).group(1)
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall("<tr>(.*?)</tr>", content)]


def test_curves_figures_and_configs_stand_side_by_side(tool, runs, tmp_path):
    out = tmp_path / "new" / "compare.html"
    code, printed, _ = tool(*runs, "--out", out)
    assert (code, printed.strip()) == (0, str(out))
    page = out.read_text()
    found = charts(page)
    assert list(found) == ["Loss, training", "Loss, held out", "val/x0 error/t1", "images per second"]
    assert [line["name"] for line in found["Loss, training"]] == ["slow", "<fast>"]
    assert found["Loss, held out"][1]["points"] == [[20, 0.01], [40, 0.01]]
    assert page.count('class="faint') == 3  # the raw values behind the smoothed ones
    assert rows(page, "Figures")[1:] == [["diffusion.loss", "0.007", "0.07"]]
    assert rows(page, "Where the configs differ") == [["", "slow", "&lt;fast&gt;"], ["optim.lr", "0.001", "0.01"]]
    assert "<fast>" not in page


def test_a_run_has_one_colour_in_all_charts(tool, runs, tmp_path):
    (runs[0] / "metrics.jsonl").write_text("")
    tool(*runs, "--out", tmp_path / "c.html")
    assert {line["colour"] for series in charts((tmp_path / "c.html").read_text()).values() for line in series} == {1}


def test_grids_are_under_one_slider(tool, runs, tmp_path):
    tool(*runs, "--out", tmp_path / "c.html")
    page = (tmp_path / "c.html").read_text()
    assert 'data-steps="[0, 100, 150, 200]"' in page
    assert page.count("which step") == 1
    shown = re.findall(r'alt="([^"]*)" data-step="\d+">', page)
    assert shown == ["slow diffusion samples at step 200", "&lt;fast&gt; diffusion samples at step 150"]
    assert page.count("<img") == 5


def test_what_cannot_be_compared_is_said_in_one_line(tool, runs, tmp_path):
    for arguments, wanted in (
        ([runs[0]], "2 to 8 runs"),
        ([runs[0], tmp_path], "is not a run"),
        ([runs[0], runs[1], runs[0] / ".." / "slow"], "given twice"),
        ([*runs, "--out", runs[0] / "config.yaml" / "c.html"], "cannot write"),
    ):
        code, _, error = tool(*arguments)
        assert code == 2, error
        assert wanted in error
        assert error.count("\n") == 1


def test_runs_of_one_name_are_told_apart_by_their_folder(tool, runs, tmp_path):
    (tmp_path / "other").mkdir()
    twin = runs[0].rename(tmp_path / "other" / "<fast>")
    tool(runs[1], twin, "--out", tmp_path / "c.html")
    assert rows((tmp_path / "c.html").read_text(), "Figures")[0][2] == "other/&lt;fast&gt;"


def test_evaluations_of_one_protocol_are_compared(tool, runs, tmp_path):
    for number, run in enumerate(runs):
        row = {"event": "evaluation", "stage": "evaluation", "guidance": 3.0, "num_pictures": 50, "step": 40}
        JsonlTracker(run / "metrics.jsonl").log(
            {**row, "eval": f"quick_step_00000040_{number}", "inception/fid": 7.0 + number}
        )
    assert tool(*runs, "--out", tmp_path / "page.html")[0] == 0
    assert ["quick, guidance 3.0, 50 pictures: inception/fid", "7", "8"] in rows(
        (tmp_path / "page.html").read_text(), "Figures"
    )
