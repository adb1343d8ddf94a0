"""Norms by block against torch's own, in a real run against those of whole parts, and none where there are pieces."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from sdtrain.callback.gradient import Gradient, block_norms, block_of
from sdtrain.errors import ConfigError
from sdtrain.tracker.jsonl import read_rows


def test_blocks_are_the_parts_of_the_network_that_stand_at_its_top():
    assert block_of("model.conv_in.weight") == "model/conv_in"
    assert block_of("model.down_blocks.0.resnets.1.conv1.weight") == "model/down_blocks.0"
    assert block_of("model.transformer_blocks.11.attn.to_q.bias") == "model/transformer_blocks.11"
    assert block_of("first_stage.encoder.down_blocks.0.resnets.0.conv1.weight") == "first_stage/encoder"
    assert block_of("objective.logvar") == "objective/logvar"


def test_norms_are_those_of_each_block():
    torch.manual_seed(0)
    names = ["model.in.weight", "model.blocks.0.a", "model.blocks.0.b", "model.blocks.1.a", "model.frozen.a"]
    named = {name: torch.nn.Parameter(torch.zeros(3, 5)) for name in names}
    for parameter in list(named.values())[:-1]:
        parameter.grad = torch.randn(3, 5)
    found = block_norms(named.items())
    assert list(found) == ["model/in", "model/blocks.0", "model/blocks.1"]
    both = torch.cat([named[name].grad.flatten() for name in names[1:3]])
    assert float(found["model/blocks.0"]) == pytest.approx(float(both.norm()))
    assert block_norms([]) == {}


def test_in_a_run_the_blocks_make_up_the_norm_that_is_clipped(finished):
    rows = [row for row in read_rows(finished / "metrics.jsonl") if "loss" in row]
    for stage, parts in (("diffusion", ("model", "conditioner")), ("autoencoder", ("first_stage", "objective"))):
        told = [row for row in rows if row["stage"] == stage]
        assert len(told) == 4
        for row in told:
            blocks = [v**2 for k, v in row.items() if k.startswith("grad_norm/") and k.count("/") == 2]
            wholes = [v**2 for k, v in row.items() if k.startswith("grad_norm/") and k.count("/") == 1]
            assert len(blocks) > 3
            assert sum(blocks) == pytest.approx(sum(wholes), rel=1e-4)
        assert {k.split("/")[1] for row in told for k in row if k.startswith("grad_norm/") and k.count("/") == 2} == {
            *parts
        }


def test_only_at_its_interval_and_the_last_step_and_not_where_gradients_are_in_pieces(capsys, monkeypatch):
    from sdtrain.strategy.deepspeed import DeepSpeed

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    layer = torch.nn.Linear(2, 1)
    layer(torch.ones(2)).sum().backward()
    pieces = DeepSpeed(zero_stage=2, accelerator="cpu")
    for strategy, wanted in ((DDPStrategy(), [3, 6, 7]), (pieces, [])):
        noted = []
        trainer = SimpleNamespace(strategy=strategy, max_steps=7, is_global_zero=True, global_step=0)
        stage = SimpleNamespace(
            context=SimpleNamespace(stage="diffusion"),
            named_parameters=lambda: [("model.conv.weight", layer.weight)],
            note=lambda noted=noted, trainer=trainer, **values: noted.append((trainer.global_step + 1, *values)),
        )
        callback = Gradient(every_steps=3)
        callback.on_train_start(trainer, stage)
        for step in range(7):
            trainer.global_step = step
            callback.on_before_optimizer_step(trainer, stage, None)
        assert noted == [(step, "grad_norm/model/conv") for step in wanted]
    said = capsys.readouterr().out
    assert said == "diffusion: no gradient norms by block, this strategy keeps gradients in pieces\n"


def test_an_interval_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="gradient.every_steps=0 must be 1 or more"):
        Gradient(every_steps=0)
