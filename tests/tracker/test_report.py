"""report.html from real files: complete, valid, self-contained, and never a crash."""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from PIL import Image

from sdtrain.tracker.gallery import MAX_PICTURES
from sdtrain.tracker.jsonl import JsonlTracker
from sdtrain.tracker.report import write_report
from sdtrain.tracker.run_files import RunFiles

VOID = {"meta", "input", "img", "br", "line", "circle"}


class Page(HTMLParser):
    """Refuses unbalanced tags; keeps tags and text."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.open)

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data + "\n"

    def all(self, tag, **wanted):
        return [found for name, found in self.tags if name == tag and wanted.items() <= found.items()]


def scores(level):
    return {"all": level, "shape": level + 0.01, "colour": level + 0.02}


@pytest.fixture
def run(tmp_path):
    tmp_path = tmp_path / "outputs" / "run"  # alone in its folder
    tmp_path.mkdir(parents=True)
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    for stage in ("autoencoder", "diffusion"):
        for step in range(10, 301, 10):
            row = {"stage": stage, "step": step, "images": step * 8, "loss": 50.0 / step, "images_per_second": 400.0}
            tracker.log({**row, "lr/unet": 1e-3, "lr/text": 1e-4, "grad_norm": 1.0, "kl": 3.0, "data/replaced": 2})
        tracker.log({"stage": stage, "step": 150, "val/psnr": 25.0, "val/loss": 0.5})
        tracker.log({"stage": stage, "step": 300, "val/psnr": 28.0, "val/loss": 0.4})
        tracker.log({"stage": stage, "step": 200, "event": "stop", "reason": "SIGTERM <now>"})
        folder = tmp_path / stage / "samples"
        folder.mkdir(parents=True)
        for step in (0, 100, 300):
            Image.new("RGB", (300, 200), (step % 256, 0, 0)).save(folder / f"step_{step:08d}.png")
            tracker.image(f"{stage}/samples", folder / f"step_{step:08d}.png", step)
    limits = {
        name: {"one": scores(level)} for name, level in (("ceiling", 0.98), ("floor", 0.1), ("reconstruction", 0.96))
    }
    summary = {
        "world_size": 2,
        "strategy": "ddp",
        "seconds": {"total": 3725.0, "autoencoder": 125.0},
        "autoencoder": {"psnr": 28.35, "ssim": 0.9312, "looking": {"seconds": {"samples": 1.5}, "share": 0.0123}},
        "diffusion": {"caption_match": {"one": scores(0.91), **limits}, "memorisation": {"ratio": 0.97}},
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "config.yaml").write_text("name: my run\ndata: <script>alert(1)</script> https://example.org\n")
    (tmp_path / "autoencoder" / "manifest.json").write_text(json.dumps({"mean": [0.5, -0.25], "dead_channels": []}))
    return tmp_path


def test_everything_a_run_holds_is_in_it(run):
    page = Page(write_report(run))
    assert "my run" in page.text
    for figure in ("28.35", "0.931", "91.0 %", "98.0 %", "96.0 %", "10.0 %", "0.97", "1 h 02 min", "world size 2"):
        assert figure in page.text
    for heading in ("Autoencoder", "Diffusion", "Events", "Stage manifest", "One object", "Config"):
        assert heading in page.text
    assert "Two objects" not in page.text  # nothing was measured on them
    labels = [svg["aria-label"] for svg in page.all("svg")]
    for label in ("Loss", "PSNR (dB, held out)", "Images per second", "Learning rate", "Gradient norm", "kl"):
        assert labels.count(f"{label} over steps") == 2
    assert page.text.count("SIGTERM <now>") == 2
    assert "0.5, -0.25" in page.text
    assert "dead_channels\nnone" in page.text
    assert page.text.index("autoencoder\n2 min 05 s") < page.text.index("total\n1 h 02 min")
    assert "together\n1.5 s\n1.2 %" in page.text
    assert not run.joinpath("report.html.tmp").exists()


def test_it_needs_nothing_from_outside(run):
    page = Page(write_report(run))
    links = [
        value for _, found in page.tags for name, value in found.items() if name in ("src", "href", "action", "data")
    ]
    assert len(links) == 6
    assert all(link.startswith("data:image/webp;base64,") for link in links)
    assert not page.all("link")
    assert len(page.all("script")) == 1  # the config's own stays text
    (policy,) = (found["content"] for found in page.all("meta") if found.get("http-equiv"))
    assert "default-src 'none'" in policy
    assert "url(" not in (run / "report.html").read_text()
    assert page.all("meta", name="viewport")


def test_the_slider_stands_at_the_last_grid(run):
    page = Page(write_report(run))
    pictures = page.all("img")
    assert [(found["data-step"], "hidden" in found) for found in pictures[:3]] == [
        ("0", True),
        ("100", True),
        ("300", False),
    ]
    slider = page.all("input")[0]
    assert (slider["min"], slider["max"], slider["value"]) == ("0", "2", "2")
    data = base64.b64decode(pictures[2]["src"].partition(",")[2])
    red = Image.open(io.BytesIO(data)).convert("RGB").getpixel((5, 5))
    assert abs(red[0] - 44) < 8


def test_many_grids_are_thinned_and_large_ones_reduced(tmp_path):
    folder = tmp_path / "diffusion" / "samples"
    folder.mkdir(parents=True)
    for step in range(0, 2000, 20):
        Image.new("RGB", (8, 8)).save(folder / f"step_{step:08d}.png")
    Image.new("RGB", (4000, 100)).save(folder / "step_00002000.png")
    pictures = Page(write_report(tmp_path)).all("img")
    assert len(pictures) == MAX_PICTURES
    assert (pictures[0]["data-step"], pictures[-1]["data-step"]) == ("0", "2000")
    data = base64.b64decode(pictures[-1]["src"].partition(",")[2])
    assert Image.open(io.BytesIO(data)).size == (1400, 35)


def test_rows_that_a_resume_superseded_are_in_no_curve(tmp_path):
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    for steps, loss in (((10, 20, 30), 7.0), ((20, 25), 3.0)):
        for step in steps:
            tracker.log({"stage": "diffusion", "step": step, "loss": loss})
    (chart,) = Page(write_report(tmp_path)).all("figure")
    assert json.loads(chart["data-series"])[0]["points"] == [[10, 7.0], [20, 3.0], [25, 3.0]]


def test_an_empty_directory_gives_an_empty_report(tmp_path):
    page = Page(write_report(tmp_path))
    assert tmp_path.name in page.text
    assert not page.all("section")


def test_broken_files_are_left_out(run):
    (run / "summary.json").write_text('{"autoencoder": {"psnr": NaN, "ssim": "high"}, "seconds": 3, "diffusion": []}')
    (run / "autoencoder" / "manifest.json").write_text('{"cut')
    png = run / "autoencoder" / "samples" / "step_00000300.png"
    png.write_bytes(png.read_bytes()[:150])
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"stage": "diffusion", "step": null, "loss": 1}\n{"loss": NaN, "step": 400}\n\xff\xfe\n[1]\n{"ste')
    page = Page(write_report(run))
    assert "Reconstruction PSNR" not in page.text
    assert [found["data-step"] for found in page.all("img")] == ["0", "100", "0", "100", "300"]


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_script_parses(run):
    script = re.search(r"<script>(.*)</script>", write_report(run).read_text(), re.DOTALL).group(1)
    (run / "script.js").write_text(script)
    subprocess.run(["node", "--check", str(run / "script.js")], check=True)


def test_many_blocks_stand_in_as_many_charts_as_they_want(tmp_path):
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        bins = {f"loss_at/{i}": 1.0 for i in (2, 1)}
        norms = {f"grad_norm/unet/{i}": float(i) for i in range(10)}
        tracker.log({"stage": "diffusion", "step": step, "loss": 1.0, **norms, **bins, "val_raw/x0_error": 1.0})
        tracker.log({"stage": "diffusion", "step": step, "val/x0_error": 1.0, "val_raw/x0_error": 1.0})
    page = Page(write_report(tmp_path))
    drawn = [json.loads(figure["data-series"]) for figure in page.all("figure")]
    names = [[line["name"] for line in lines] for lines in drawn]
    assert [[str(i) for i in range(8)], ["8", "9"]] == [found for found in names if "0" in found or "9" in found]
    assert ["1", "2"] in names  # in order, whichever came first
    labels = [svg["aria-label"] for svg in page.all("svg")]
    assert "raw weights: x0 error (held out) over steps" in labels


def test_evaluations_stand_by_what_was_asked_for(run):
    tracker = JsonlTracker(run / "metrics.jsonl")
    row = {"event": "evaluation", "stage": "evaluation", "step": 300, "guidance": 3.0, "sampler": None, "seed": 0}
    row |= {"num_steps": 7, "weights": "ema", "num_pictures": 50}
    for fd, step in ((1.0, 200), (2.125, 300)):
        tracker.log({**row, "eval": f"quick_step_{step:08d}_0123abcd", "step": step, "random/fd": fd})
    tracker.log({**row, "eval": "coco_step_00000300_0", "guidance": None, "seed": 1, "random/fd": 8.5})
    found = RunFiles.read(run).evaluations
    assert list(found) == ["quick, guidance 3.0, num steps 7, 50 pictures", "coco, num steps 7, seed 1, 50 pictures"]
    page = Page(write_report(run))
    assert "2.12" in page.text
    assert "8.5" in page.text
    assert "quick, guidance 3.0, num steps 7, 50 pictures" in page.text
    assert page.text.count("quick") == 1  # not among the events
