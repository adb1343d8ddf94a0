"""The pages in a real browser: Chromium draws them at two widths and in print, and its script has run.

What it must look like was judged by eye from the same screenshots; here are the ways in which it can break unseen.
"""

import json
import os
import re
import shutil
import signal
import subprocess

import numpy as np
import pytest
from PIL import Image

from sdtrain.tracker.compare import write_comparison
from sdtrain.tracker.jsonl import JsonlTracker
from sdtrain.tracker.report import write_report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs a browser: apt-get install chromium"),
]
# What a person would do, done as soon as the page stands; the page's policy allows scripts in it.
PROBE = """<script>
const move = (slider, value) => { slider.value = value; slider.dispatchEvent(new Event("input")); };
const line = () => document.querySelector(".smoothing").closest("section").querySelector("path.line").getAttribute("d");
const before = line();
move(document.querySelector(".smoothing input"), 0);
const raw = line();
move(document.querySelector(".smoothing input"), 10);
const again = line();
move(document.querySelector(".gallery input"), 0);
const root = document.documentElement;
const told = {
  moved: raw !== before, same: again, before: before, overflow: root.scrollWidth - root.clientWidth,
  shown: [...document.querySelectorAll(".gallery img:not([hidden])")].map((image) => image.dataset.step),
  cut: [...document.querySelectorAll("table")].filter((it) => it.scrollWidth > it.parentElement.clientWidth).length,
};
document.body.dataset.told = JSON.stringify(told);
</script></body>"""


def chromium(folder, *arguments):
    """Chromium's standard output. It and its children are ended, also when it hangs."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder / 'profile'}", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        return process.communicate(timeout=90)[0].decode()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def told(page, width):
    """What the probe saw in the page at this width."""
    probed = page.with_name(f"probed_{page.name}")
    probed.write_text(page.read_text().replace("</body>", PROBE))
    found = chromium(page.parent, f"--window-size={width},900", "--dump-dom", probed.as_uri())
    return json.loads(re.search(r'data-told="([^"]*)"', found).group(1).replace("&quot;", '"'))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, last in (("one", 300), ("two", 200)):
        run = folder / name
        samples = run / "diffusion" / "samples"
        samples.mkdir(parents=True)
        (run / "config.yaml").write_text(f"name: {name}\nlr: {last}\n")
        match = {key: {"one": {"all": 0.5, "shape": 0.6}} for key in ("ceiling", "reconstruction", "floor")}
        summary = {"caption_match": match | {"one": {"all": 0.5, "shape": 0.6}}, "weight_hash": "0123456789abcdef" * 4}
        (run / "summary.json").write_text(json.dumps({"diffusion": summary}))
        tracker = JsonlTracker(run / "metrics.jsonl")
        for step in range(10, last + 1, 10):
            loss = 9.0 / step + 0.01 * (step % 20)
            row = {"stage": "diffusion", "step": step, "loss": loss, "step_seconds": 0.5, "images_per_second": 400.0}
            tracker.log(row)
        for step in (0, last):
            Image.new("RGB", (300, 200), (200, 0, 0)).save(samples / f"step_{step:08d}.png")
    return [folder / "one", folder / "two"]


@pytest.mark.parametrize("width", [1200, 500])  # a headless window is not narrower
def test_the_report_stands_and_its_sliders_work(runs, width):
    found = told(write_report(runs[0]), width)
    assert found["moved"]
    assert found["shown"] == ["0"]
    assert found["overflow"] == 0  # nothing but what is meant to scroll sideways
    assert found["cut"] == 0


def test_the_script_smooths_as_python_did(runs):
    found = told(write_report(runs[0]), 1200)
    ours, theirs = (np.array(re.findall(r"[\d.]+", found[key]), float) for key in ("before", "same"))
    np.testing.assert_allclose(theirs, ours, atol=0.15)


def test_a_run_without_a_grid_at_the_step_shows_its_last_before(runs):
    page = write_comparison(runs, runs[0].parent / "compare.html")
    assert told(page, 1200)["shown"] == ["0", "0"]
    page.write_text(page.read_text().replace('"[0, 200, 300]"', '"[250, 200, 300]"'))  # the slider's first is 250
    assert told(page, 1200)["shown"] == ["0", "200"]


def test_screenshot_and_print_are_not_blank(runs):
    page, folder = write_report(runs[0]), runs[0]
    chromium(folder, f"--screenshot={folder / 'page.png'}", "--window-size=1200,2000", page.as_uri())
    pixels = np.asarray(Image.open(folder / "page.png").convert("RGB")).astype(int)
    assert pixels.shape == (2000, 1200, 3)
    red = (abs(pixels - (200, 0, 0)).sum(2) < 24).sum()
    assert red > 20_000  # the grid
    chromium(folder, "--no-pdf-header-footer", f"--print-to-pdf={folder / 'page.pdf'}", page.as_uri())
    assert (folder / "page.pdf").read_bytes().count(b"/Type /Page\n") in range(1, 6)
