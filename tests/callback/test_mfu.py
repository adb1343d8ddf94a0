"""The share of the peak in the rows of a real fit, and the peak itself."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback

from sdtrain.callback import mfu
from sdtrain.callback.log import Log
from sdtrain.callback.mfu import MFU, known_peak, measure_matmul_peak


class Counted(Callback):
    """The run knows what an image takes."""

    def setup(self, trainer, pl_module, stage):
        pl_module.flops_per_image = 1e6


def test_rows_and_summary_hold_the_share_of_the_peak(tiny_fit, monkeypatch):
    asked = []
    monkeypatch.setattr(mfu, "measure_matmul_peak", lambda device, dtype: asked.append(dtype) or 1e9)
    share = MFU()
    rows = tiny_fit([Counted(), share, Log(every_steps=2)], max_steps=4, compute_seconds=0.01).context.tracker.rows
    assert asked == [torch.float32]
    for row in rows:
        assert row["mfu"] == pytest.approx(row["images_per_second"] * 1e6 / 1e9, rel=1e-2)
    seconds = sum(2 * row["step_seconds"] for row in rows)
    assert share.summary() == {
        "mfu": pytest.approx(16 * 1e6 / seconds / 1e9, rel=1e-2),
        "flops_per_image": 1e6,
        "peak_flops": 1e9,
        "matmul_peak_flops": 1e9,
    }


def test_work_that_was_not_counted_has_no_share(tiny_fit, monkeypatch):
    monkeypatch.setattr(mfu, "measure_matmul_peak", lambda *_: pytest.fail("nobody asked"))
    share = MFU()
    (row,) = tiny_fit([share, Log(every_steps=2)], max_steps=2).context.tracker.rows
    assert "mfu" not in row
    assert share.summary() == {}


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", None),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("", None),
    ],
)
def test_makers_peaks_go_by_whole_words(name, tflops):
    assert known_peak(name) == (None if tflops is None else tflops * 1e12)


def test_a_measured_peak_is_that_of_the_machine_and_draws_nothing():
    before = torch.get_rng_state()
    assert 1e8 < measure_matmul_peak(torch.device("cpu"), torch.float32) < 1e15
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("precision", "peak"), [("bf16-mixed", 989e12), ("16-true", 989e12), ("32-true", 5e14)])
def test_the_peak_is_of_all_devices_and_by_the_makers_word_in_sixteen_bits(monkeypatch, precision, peak):
    monkeypatch.setattr(mfu, "measure_matmul_peak", lambda device, dtype: 5e14)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    strategy = SimpleNamespace(root_device=torch.device("cuda", 0), broadcast=lambda value: value)
    share = MFU()
    stage = SimpleNamespace(flops_per_image=1e12)
    share.on_train_start(SimpleNamespace(world_size=4, precision=precision, strategy=strategy), stage)
    assert share.of(800, 2.0) == {"mfu": round(400 * 1e12 / (4 * peak), 5)}
    assert (share.summary()["peak_flops"], share.summary()["matmul_peak_flops"]) == (peak, 5e14)
