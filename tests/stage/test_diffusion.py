"""Validation of stage 2: the same figures on any number of ranks, of every sample once."""

import threading
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from torch import distributed, nn

from sdtrain.conditioner.none import Nothing
from sdtrain.contracts import Context
from sdtrain.diffusion.path import RectifiedFlow
from sdtrain.diffusion.timestep import Uniform
from sdtrain.diffusion.weighting import Unit
from sdtrain.first_stage.identity import Identity
from sdtrain.objective.denoising import Denoising
from sdtrain.ops.random import Draw
from sdtrain.optim.adamw import AdamW
from sdtrain.stage.diffusion import LEVELS, DiffusionStage

IMAGES = torch.rand(45, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1


class Data:
    """Held-out pictures, and which of them were asked for."""

    image_size = 1024  # so that few are taken at once

    def __init__(self, num):
        self.splits, self.asked = {"val": num}, []

    def load(self, split, places):
        self.asked.append(places.tolist())
        return {"image": IMAGES[places], "caption": [""] * len(places), "sample_id": places, "epoch": 0 * places}


class Half(nn.Module):
    """A network that halves its input, but for what the time adds."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, time, cond):
        return self.scale * x + time.view(-1, 1, 1, 1) / 2000


class Reader(nn.Module):
    """What reads captions."""

    def cut_captions(self):
        return 1, 4


def test_captions_that_are_cut_are_told_by_the_name_of_their_reader():
    several = nn.Module()
    several.parts = nn.ModuleDict({"clip": nn.ModuleDict({"clip_l": Reader()}), "t5": Reader(), "size": nn.Identity()})
    for conditioner, names in (
        (several, ("/clip_l", "/t5")),
        (nn.ModuleDict({"text": Reader()}), ("",)),
        (Nothing(), ()),
    ):
        told = DiffusionStage.shares(SimpleNamespace(conditioner=conditioner))
        assert told == {f"cut_caption_share{name}": (1, 4) for name in names}


def make(num, seed=0, rank=0, world=1, reduce=None):
    objective = Denoising(RectifiedFlow(), "velocity", Uniform(), Unit())
    context = Context("diffusion", None, None, None, seed, 8, 10)
    parts = {"model": Half(), "conditioner": Nothing(), "first_stage": Identity(3), "sampler": None}
    stage = DiffusionStage(context, **parts, objective=objective, optim=AdamW(), clip_norm=None, metric={})
    stage.precision = torch.no_grad  # a context that changes nothing here
    stage.trainer = SimpleNamespace(
        datamodule=Data(num), global_rank=rank, world_size=world, strategy=SimpleNamespace(reduce=reduce)
    )
    return stage


def test_the_figures_are_their_definition():
    stage = make(20)
    found, ids = stage.evaluate(), torch.arange(20)
    draw, x0 = Draw(0, ids, 0 * ids), IMAGES[:20]
    noise, t = draw.normal("validation", (3, 4, 4)), torch.tensor([LEVELS[i % 8] for i in range(20)]).view(-1, 1, 1, 1)
    x_t = (1 - t) * x0 + t * noise
    error = (x_t - t * (0.5 * x_t + t / 2) - x0).square().mean((1, 2, 3))  # velocity = noise - x0
    of_level = {f"val/x0_error_at/t{level:g}": float(error[i::8].mean()) for i, level in enumerate(LEVELS)}
    assert {name: value for name, value in found.items() if "_at/" in name} == pytest.approx(of_level, rel=1e-5)
    assert found["val/x0_error"] == pytest.approx(sum(of_level.values()) / 8, rel=1e-6)
    with torch.no_grad():
        loss = stage.objective.loss(stage.model, x0, {}, draw)["loss"].mean()
    assert found["val/loss"] == pytest.approx(float(loss), rel=1e-6)
    raw = {name.replace("val/", "val_raw/"): value for name, value in found.items() if "x0" in name}
    assert stage.evaluate_raw() == pytest.approx(raw)


def test_levels_that_no_sample_has_are_left_out():
    found = make(3).evaluate()
    assert [name for name in found if "_at/" in name] == [f"val/x0_error_at/t{t}" for t in ("0.05", "0.175", "0.3")]


def test_another_seed_is_validated_on_the_same_noise():
    assert make(9, seed=1).evaluate() == make(9, seed=2).evaluate()


def on_ranks(world, num, folder):
    """What each of so many ranks of gloo finds, each in a thread with its own store and group."""
    found, data, errors = {}, {}, []

    def rank(number):
        try:
            store = distributed.FileStore(str(folder / f"meet{world}"), world)
            group = distributed.ProcessGroupGloo(store, number, world, timedelta(seconds=30))

            def reduce(values, reduce_op):
                assert reduce_op == "sum"
                group.allreduce([values]).wait()
                return values

            stage = make(num, rank=number, world=world, reduce=reduce)
            found[number], data[number] = stage.evaluate(), stage.trainer.datamodule.asked
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    return found, data


@pytest.mark.parametrize(("world", "num"), [(2, 45), (4, 45), (4, 3)])
def test_ranks_share_the_samples_and_find_what_one_finds(world, num, tmp_path):
    found, asked = on_ranks(world, num, tmp_path)
    alone = make(num).evaluate()
    for one in found.values():
        assert one == pytest.approx(alone, rel=1e-6)
    # Sharded weights are gathered by all ranks together, so all have as many batches of the same sizes.
    assert len({tuple(map(len, calls)) for calls in asked.values()}) == 1
    places = [place for calls in asked.values() for call in calls for place in call]
    assert len(places) == world * -(-num // world)
    assert set(places) == set(range(num))


def test_a_group_that_has_no_caption_is_left_out():
    """The guard: with data.num_val=1 no caption names two things, and the end of the run was an IndexError."""
    stage = make(45)
    reader = SimpleNamespace(groups=[("two", "val", 2)], num_captions=8)
    stage.metric = {"caption_match": reader}
    data = stage.trainer.datamodule
    data.splits["held_out"], data.attributes = 1, lambda split: [{"things": [{}]}]
    assert stage._groups() == {}
    assert data.asked == []
