"""What the stages share."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from sdtrain.contracts import Context
from sdtrain.errors import ConfigError
from sdtrain.layer.frozen import Frozen
from sdtrain.optim.adamw import AdamW
from sdtrain.optim.muon import Muon
from sdtrain.stage.base import Stage, images_at_once


@pytest.mark.parametrize(("image_size", "expected"), [(64, 128), (256, 64), (512, 16), (1024, 4), (4096, 1)])
def test_large_pictures_are_taken_few_at_once(image_size, expected):
    assert images_at_once(128, image_size) == expected


class TwoParts(Stage):
    def __init__(self, clip_norm):
        super().__init__(Context("toy", None, None, None, 0, 4, 10), AdamW(), clip_norm)
        self.large, self.small = nn.Linear(3, 3), nn.Linear(3, 3)

    def parts(self):
        return {"large": list(self.large.parameters()), "small": list(self.small.parameters())}

    def give_gradients(self):
        for p in self.parameters():
            p.grad = torch.full_like(p, 10.0 if any(p is q for q in self.large.parameters()) else 0.01)


@pytest.fixture
def two_parts():
    def make(clip_norm):
        stage = TwoParts(clip_norm)
        stage.trainer = SimpleNamespace(strategy=SimpleNamespace())
        stage.configure_optimizers()
        stage.give_gradients()
        return stage

    return make


def norm(module):
    return float(torch.cat([p.grad.flatten() for p in module.parameters()]).norm())


def test_each_part_is_clipped_by_its_own_norm(two_parts):
    stage = two_parts(1.0)
    stage.configure_gradient_clipping(None)
    assert norm(stage.large) == pytest.approx(1.0, rel=1e-4)
    assert norm(stage.small) == pytest.approx(0.01 * 12**0.5)
    assert float(stage._sums["grad_norm/large"]) == pytest.approx(10 * 12**0.5)


def test_an_optimizer_that_clips_within_its_step_is_told_the_norms(two_parts):
    stage = two_parts(1.0)
    optimizer = stage.configure_optimizers()["optimizer"]
    stage.configure_gradient_clipping(optimizer)
    assert norm(stage.large) == pytest.approx(10 * 12**0.5)
    assert float(stage._sums["grad_norm/large"]) == pytest.approx(10 * 12**0.5)
    optimizer.step()
    assert norm(stage.large) == pytest.approx(1.0, rel=1e-4)
    assert norm(stage.small) == pytest.approx(0.01 * 12**0.5)


def test_fp16s_gradients_are_unscaled_before_they_are_clipped(two_parts):
    stage = two_parts(1.0)
    optimizer = stage.configure_optimizers()["optimizer"]
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    plugin._after_closure = lambda _, optimizer: stage.configure_gradient_clipping(optimizer)

    def closure():
        for p in stage.parameters():
            p.grad = None
        loss = sum((10 if name.startswith("large") else 0.01) * p.sum() for name, p in stage.named_parameters())
        plugin.scaler.scale(loss).backward()
        return loss

    plugin.optimizer_step(optimizer, stage, closure)
    assert float(stage._sums["grad_norm/large"]) == pytest.approx(10 * 12**0.5)
    assert norm(stage.large) == pytest.approx(1.0, rel=1e-4)
    assert norm(stage.small) == pytest.approx(0.01 * 12**0.5)


def test_nothing_is_clipped_before_the_last_micro_batch_or_without_a_norm(two_parts):
    stage = two_parts(1.0)
    stage.is_last_micro = False
    stage.configure_gradient_clipping(None)
    assert norm(stage.large) == pytest.approx(10 * 12**0.5)
    stage = two_parts(None)
    stage.configure_gradient_clipping(None)
    assert norm(stage.large) == pytest.approx(10 * 12**0.5)


def test_a_part_that_is_idle_gives_the_optimizer_nothing(two_parts):
    stage = two_parts(1.0)
    stage.idle_parts = ("small",)
    stage.configure_gradient_clipping(None)
    assert all(p.grad is None for p in stage.small.parameters())
    assert set(stage._sums) == {"grad_norm/large"}


def test_a_step_that_is_left_out_gives_the_optimizer_nothing_and_its_schedule_does_not_count_it(two_parts):
    stage = two_parts(1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD(stage.parameters(), 1.0), lambda step: 1.0 - step / 4)
    for is_left_out, last_epoch in ((True, 0), (False, 1)):
        stage.is_left_out = is_left_out
        stage.give_gradients()
        stage.configure_gradient_clipping(None)
        assert all((p.grad is None) == is_left_out for p in stage.parameters())
        stage.lr_scheduler_step(schedule, None)
        assert schedule.last_epoch == last_epoch
    assert stage._counts == {"grad_norm/large": 1, "grad_norm/small": 1}


def test_a_strategy_that_keeps_the_gradients_clips_them(two_parts):
    stage = two_parts(1.0)
    stage.idle_parts = ("small",)
    asked = []
    stage.trainer.strategy.clip = lambda *told: asked.append(told) or {"large": torch.tensor(5.0)}
    stage.configure_gradient_clipping(None)
    assert asked == [(1.0, ("small",))]
    assert float(stage._sums["grad_norm/large"]) == 5.0


def test_what_is_noted_is_what_it_was_then(two_parts):
    stage = two_parts(1.0)
    value = torch.tensor(1.0)
    stage.note(value=value)
    value.fill_(2.0)
    assert float(stage._sums["value"]) == 1.0


def test_a_row_that_is_not_written_yet_goes_on_after_a_resume(two_parts):
    """The guard: the steps between a row and a checkpoint were in no row of a run that was stopped there."""

    def step(stage, value):
        stage.trainer.world_size = 1
        stage.note(loss=torch.tensor(value))
        stage.note_at("loss_at", torch.tensor([value]), torch.tensor([0.5]))

    whole, first, second = two_parts(1.0), two_parts(1.0), two_parts(1.0)
    for value in (1.0, 2.0, 6.0):
        step(whole, value)
    for value in (1.0, 2.0):
        step(first, value)
    checkpoint = {}
    first.on_save_checkpoint(checkpoint)
    second.on_load_checkpoint(checkpoint)
    step(second, 6.0)
    assert second.take_metrics() == whole.take_metrics() == {"loss": 3.0, "loss_at/0.50-0.62": 3.0}

    first.trainer.world_size, first.trainer.strategy.reduce = 2, lambda sums, reduce_op: sums / 2
    first.on_save_checkpoint(checkpoint)  # with a rank whose losses are 0, and whose times are elsewhere
    second.on_load_checkpoint(checkpoint)
    assert second.take_metrics() == {"loss": 0.75, "loss_at/0.50-0.62": 3.0}
    second.on_load_checkpoint({})
    assert second.take_metrics() == {}


def test_another_optimizer_than_the_checkpoints_is_refused(two_parts):
    """The guard: Muon over AdamW's states ended as a bug of ours, a KeyError in its first step."""
    first, second = two_parts(1.0), two_parts(1.0)
    first.trainer.world_size = 1
    checkpoint = {}
    first.on_save_checkpoint(checkpoint)
    second.on_load_checkpoint(checkpoint)
    second.optim = Muon()
    with pytest.raises(ConfigError, match="of toy is Muon, .* states of AdamW, .* write optim=adamw for it again"):
        second.on_load_checkpoint(checkpoint)


def test_parameters_are_counted_by_part_and_frozen_ones_with_what_holds_them(two_parts):
    stage = two_parts(1.0)
    stage.held = Frozen(nn.Sequential(nn.Linear(2, 2), Frozen(nn.Linear(1, 1))))
    assert stage.count_parameters() == ({"large": 12, "small": 12}, 8)
    stage.small.bias.ds_numel, stage.small.bias.data = 3, torch.empty(0)  # as ZeRO-3 leaves it
    assert stage.count_parameters() == ({"large": 12, "small": 12}, 8)


def test_means_by_place_are_of_all_samples_of_all_ranks(two_parts):
    """What a mean over ranks gives of sums and of counts, not of means: ranks have other times."""
    places = [torch.tensor([0.0, 0.1249, 0.125, 0.3]), torch.tensor([0.01, 0.3, 0.999, 1.0])]
    values = [torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([6.0, 8.0, 10.0, 20.0])]
    sent = []

    def row(at, value, reduce):
        stage = two_parts(1.0)
        stage.note(loss=value.mean())
        stage.note_at("loss_at", value[:3].requires_grad_(), at[:3])
        stage.note_at("loss_at", value[3:], at[3:])
        stage.trainer.world_size, stage.trainer.strategy.reduce = 2, reduce
        assert not stage._binned["loss_at"].requires_grad
        found = stage.take_metrics()
        assert stage.take_metrics() == {}
        stage.note(loss=value.mean())
        stage.trainer.world_size = 1
        assert stage.take_metrics().keys() == {"loss"}
        return found

    for at, value in zip(places, values):
        row(at, value, lambda means, reduce_op: sent.append(means) or means)
    found = row(at, value, lambda means, reduce_op: torch.stack(sent).mean(dim=0))
    expected = {"0.00-0.12": 3.0, "0.12-0.25": 3.0, "0.25-0.38": 6.0, "0.88-1.00": 15.0}
    assert found == pytest.approx({"loss": 6.75} | {f"loss_at/{name}": mean for name, mean in expected.items()})
