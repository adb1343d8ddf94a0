"""Event files read back with TensorBoard's own reader, and one line where it is not installed."""

import importlib.util
import json

import pytest
from PIL import Image

from sdtrain.errors import ConfigError
from sdtrain.tracker.tensorboard import TensorboardTracker

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is an extra: pip install sdtrain[tensorboard]"
)


def test_without_the_package_one_line_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package tensorboard.*pip install sdtrain\[tensorboard\]"):
        TensorboardTracker()


@needs_tensorboard
def test_curves_histograms_pictures_and_texts_are_read_back(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("FAKE_TOKEN", "hunter2hunter2")
    Image.new("RGB", (64, 32), "red").save(tmp_path / "grid.png")
    tracker = TensorboardTracker()
    place = {"stage": "diffusion", "images": 8}
    tracker.start(tmp_path, "quick", "diffusion", {"seed": 1, "url": "x?hunter2hunter2"})
    tracker.log({"event": "start", **place, "step": 0, "config_hash": "c0"})
    tracker.log({**place, "step": 1, "loss": 0.5, "histogram/latent": {"low": -1, "high": 1, "counts": [1, 3]}})
    tracker.log({**place, "step": 2, "loss": 0.25})
    tracker.image("diffusion/samples", tmp_path / "grid.png", 2, ["a star", "a ring"])
    tracker.log({"event": "alert", **place, "step": 2, "text": "it rose"})

    again = TensorboardTracker()  # after a crash: from the checkpoint of step 1 on
    again.start(tmp_path, "quick", "diffusion", {"seed": 1})
    again.log({"event": "start", **place, "step": 1, "config_hash": "c0"})
    again.log({**place, "step": 2, "loss": 0.125})
    again.finish({"psnr": 21.0})

    found = EventAccumulator(str(tmp_path / "tensorboard" / "diffusion"), size_guidance={"tensors": 0})
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 0.5), (2, 0.125)]
    (event,) = found.Histograms("histogram/latent")
    assert (event.histogram_value.bucket_limit, event.histogram_value.bucket) == ([0.0, 1.0], [1.0, 3.0])
    assert (event.histogram_value.num, event.histogram_value.sum) == (4.0, 1.0)
    texts = {tag: found.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in found.Tags()["tensors"]}
    assert json.loads(texts["summary/text_summary"]) == {"psnr": 21.0}
    assert "c0" in texts["start/text_summary"]
    files = [path.read_bytes() for path in (tmp_path / "tensorboard").rglob("events*")]
    assert len(files) == 2
    assert not any(b"hunter2" in content for content in files)
    assert any(b"it rose" in content and b"1. a ring" in content for content in files)
    tracker.finish({})
