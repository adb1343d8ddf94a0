"""What DeepSpeed cannot do is refused in one line, before anything is trained."""

import pytest
import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision

from sdtrain.config import load_config
from sdtrain.errors import ConfigError
from sdtrain.strategy import deepspeed
from sdtrain.strategy.deepspeed import Autocast, DeepSpeed

ADAMW = ["optim@autoencoder.optim=adamw", "optim@diffusion.optim=adamw"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["strategy=deepspeed_zero1", *ADAMW],
        ["strategy=deepspeed_zero2_offload", *ADAMW],
        ["strategy=deepspeed_zero2", *ADAMW, "+strategy@diffusion.strategy=deepspeed_zero3"],
        ["strategy=deepspeed_zero3", *ADAMW, "stages=[diffusion]", "first_stage.weights=README.md"],
        ["+strategy@diffusion.strategy=deepspeed_zero3", "optim@diffusion.optim=adamw"],  # stage 1 by Muon, alone
    ],
)
def test_what_works_composes(overrides, tmp_path):
    load_config(["+experiment=smoke", f"output_dir={tmp_path}", *overrides])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["strategy=deepspeed_zero3", *ADAMW], "strategy: ZeRO-3 is for stage 2 alone"),
        (["+strategy@autoencoder.strategy=deepspeed_zero3", *ADAMW], "strategy@autoencoder.strategy: ZeRO-3 is for"),
        (["strategy=deepspeed_zero1"], "autoencoder.optim: DeepSpeed cuts weights into pieces, and Muon needs them"),
        (["strategy=deepspeed_zero1", ADAMW[0], "optim@diffusion.optim=adamw8bit"], "and AdamW8bit needs them whole"),
        (["strategy=deepspeed_zero1", *ADAMW, "precision=16-mixed", "accelerator=cpu"], "does not exist on a CPU"),
        (["devices=3"], "must be a multiple of 3 .* devices may be 1, 2, 4, 8, 16$"),
        (["devices=3", "autoencoder.trainer.num_accumulate=4"], "must be a multiple of 12 .* devices may be 1, 2, 4$"),
        (["devices=3", "autoencoder.trainer.num_accumulate=32"], "must be a multiple of 96 [^;]*$"),
    ],
)
def test_what_does_not_is_refused(overrides, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load_config(["+experiment=smoke", f"output_dir={tmp_path}", *overrides])


def test_without_the_package_one_line_says_what_to_do(monkeypatch):
    monkeypatch.setattr(deepspeed, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="deepspeed is not installed .*pip install 'sdtrain.deepspeed.', or write"):
        DeepSpeed(2)


def test_batches_and_modules_keep_their_precision():
    """DeepSpeed's own precision casts all that is a float: targets, noise, and the frozen first stage."""
    plugin = Autocast("bf16-mixed", "cpu")
    batch = {"image": torch.zeros(2), "latent": torch.zeros(2, dtype=torch.float16), "sample_id": torch.zeros(2).long()}
    assert {name: x.dtype for name, x in plugin.convert_input(batch).items()} == {n: x.dtype for n, x in batch.items()}
    linear = plugin.convert_module(torch.nn.Linear(2, 2))
    assert linear.weight.dtype == torch.float32
    with plugin.forward_context():
        assert linear(batch["image"]).dtype == torch.bfloat16
    assert linear(batch["image"]).dtype == torch.float32


def test_a_step_that_is_left_out_says_nothing_of_the_loss_scale(monkeypatch):
    strategy = DeepSpeed(2, accelerator="cpu")
    strategy._precision_plugin = plugin = Autocast("16-mixed", "cuda")
    monkeypatch.setattr(strategy, "norms", lambda: {"a": torch.tensor(float("nan")), "b": torch.tensor(3.0)})
    assert strategy.clip(1.0, ["a", "b"]) == {}
    assert plugin.scaler.scale == 2.0**16
    assert strategy.clip(1.0, ["a"]) == {}
    assert (plugin.scaler.scale, list(strategy._idle)) == (2.0**15, ["a", "b"])


def test_a_precision_without_float32_weights_is_refused():
    strategy = DeepSpeed(2, accelerator="cpu")
    with pytest.raises(ConfigError, match="precision=bf16-true: .* write precision=bf16-mixed"):
        strategy.precision_plugin = DeepSpeedPrecision("bf16-true")
