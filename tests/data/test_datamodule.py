"""The data module: splits, the cursor through a real Lightning fit, refusals."""

import functools
import io
import json
import tracemalloc

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from sdtrain.config import load_config
from sdtrain.data import source
from sdtrain.data.bucket import Buckets
from sdtrain.data.datamodule import ShardDataModule
from sdtrain.data.reader import Reader
from sdtrain.errors import ConfigError


def module(folder=None, batch_size=8, num_accumulate=1, seed=3, image_size=16, **options):
    data = ShardDataModule(folder and str(folder), image_size=image_size, **options)
    data.connect(seed, batch_size, num_accumulate)
    return data


class Stage(L.LightningModule):
    """As a stage does it: remembers what it was given, and advances at the end of an optimizer step."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def training_step(self, batch, _):
        self.seen.append((batch["sample_id"].tolist(), batch["epoch"].tolist()))
        if batch["last_micro_of_step"]:
            self.trainer.datamodule.advance(batch["cursor"])
        return (self.weight - batch["image"].mean()).square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(data, max_steps, checkpoint=None, num_accumulate=1):
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=max_steps,
        accumulate_grad_batches=num_accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    stage = Stage()
    trainer.fit(stage, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return stage, trainer


@pytest.mark.parametrize(("num_workers", "num_accumulate"), [(0, 1), (0, 2), (2, 2)])
def test_half_and_resume_is_the_whole(tmp_path, make_shards, num_workers, num_accumulate):
    folder = make_shards(21)[0].parent
    whole, _ = fit(module(folder, num_accumulate=num_accumulate), 10, None, num_accumulate)
    first = module(folder, num_accumulate=num_accumulate, num_workers=num_workers)
    half, trainer = fit(first, 5, None, num_accumulate)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    assert first.state_dict()["step"] == 5
    second = module(folder, num_accumulate=num_accumulate, num_workers=2 - num_workers)
    rest, _ = fit(second, 10, tmp_path / "half.ckpt", num_accumulate)
    assert half.seen + rest.seen == whole.seen
    assert torch.equal(rest.weight, whole.weight)


def global_batches(data, num_steps, num_accumulate, world=1, cursor=None):
    """The sample ids and epochs that all ranks of a run together are given, and the last cursor."""
    found = []
    for rank in range(world):
        data._place = lambda rank=rank: (rank, world)
        data.connect(3, 8, num_accumulate)
        if cursor:
            data.load_state_dict(cursor)
        batches = iter(data.train_dataloader())
        found.append([[next(batches) for _ in range(num_accumulate)] for _ in range(num_steps)])
    data.advance(found[0][-1][-1]["cursor"])
    ids = [
        [(i, e) for b in sum(step, []) for i, e in zip(b["sample_id"].tolist(), b["epoch"].tolist())]
        for step in zip(*found)
    ]
    return ids, data.state_dict()


def png_of(width, height):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def wide(make_shards, make_sample):
    sides = [(32, 32), (40, 24), (24, 40), (96, 24), (36, 36)]
    return make_shards([make_sample(n, png=png_of(*sides[n % 5])) for n in range(60)], per_shard=13, name="wide")[
        0
    ].parent


def test_buckets_from_the_index_and_resumed_on_another_world(wide, capsys):
    def new(num_accumulate):
        return module(
            wide, image_size=32, buckets=Buckets(step=8, max_upscale=1.4), val=0.1, num_accumulate=num_accumulate
        )

    data = new(4)
    assert sum(data.splits.values()) == 60 - data.accounting()["rejected/ratio"]
    assert "10 of 54 pictures have no bucket and are left out: 10 by data.buckets.max_ratio" in capsys.readouterr().out
    whole, _ = global_batches(data, 9, 4)
    first, state = global_batches(new(4), 4, 4)
    assert state["buckets.cell"] == 2
    second, state = global_batches(new(2), 3, 2, world=2, cursor=json.loads(json.dumps(state)))
    third, _ = global_batches(new(1), 2, 1, world=8, cursor=json.loads(json.dumps(state)))
    assert first + second + third == whole
    shapes = {tuple(batch["image"].shape[2:]) for _, batch in zip(range(24), new(4).train_dataloader())}
    assert len(shapes) == 3
    counts = data.accounting()
    assert counts["rejected/ratio"] > 0
    assert sum(count for name, count in counts.items() if name.startswith("bucket/")) == data.num_train
    assert counts["epoch"] > 0


def test_buckets_that_cannot_be_split_so(wide):
    data = module(wide, image_size=32, buckets=Buckets(step=8, max_upscale=1.4, cell=4))
    with pytest.raises(ConfigError, match=r"with 1 ranks num_accumulate may be one of \[2, 4, 8\]"):
        data.train_dataloader()
    with pytest.raises(ConfigError, match=r"bucket: \d+ by data.buckets.max_ratio, \d+ by data.buckets.max_upscale"):
        module(wide, image_size=256, buckets=Buckets(step=64)).setup()


@pytest.mark.parametrize("change", [{"buckets": Buckets(step=8)}, {"reader": functools.partial(Reader, flip=True)}])
def test_latents_of_one_square_are_no_substitute_for_others(make_shards, change):
    data = module(make_shards(21)[0].parent, **change)
    if "buckets" in change:
        data.buckets.max_upscale = None
    with pytest.raises(ConfigError, match="cache_latents=false"):
        data.attach_latents("train", torch.zeros(data.num_train, 2, 4, 2, 2))


def test_training_alone_is_cropped_at_random(wide):
    data = module(wide, image_size=24, reader=functools.partial(Reader, crop="random", flip=True))
    crops = [(data._reader(split).crop, data._reader(split).flip) for split in ("train", "val")]
    assert crops == [("random", True), ("center", False)]
    assert data._reader("train").seed == 3


@pytest.fixture
def two_sources(make_shards, make_sample):
    """Sources of 24 and 8 samples; the first one's metadata say how good a sample is."""
    first = make_shards([make_sample(n) for n in range(24)], per_shard=10, name="first")
    second = make_shards([make_sample(n) for n in range(100, 108)], name="second")

    def sources(first_weight="0.7", second_weight="0.3", **options):
        return {
            "first": {"shards": [str(path) for path in first], "weight": first_weight, **options},
            "second": {"shards": str(second[0]), "weight": second_weight},
        }

    return sources


def own_val(make_shards):
    return str(make_shards(2, name="val")[0])


def test_sources_are_mixed_by_weight_and_their_weights_can_change(two_sources, make_shards, capsys):
    val = own_val(make_shards)
    before = module(sources=two_sources(), val=val)
    assert before.splits == {"train": 32, "val": 2}
    ids, state = global_batches(before, 40, 1)
    share = sum(sample < 24 for step in ids for sample, _ in step) / 320
    assert abs(share - 0.7) < 0.02
    assert before.accounting()["epoch/first"] == pytest.approx(320 * 0.7 / 24, abs=0.5)
    after = module(sources=two_sources("0.25", "0.75"), val=val)
    rest, last = global_batches(after, 40, 1, cursor=json.loads(json.dumps(state)))
    assert "data: other weights (first 1/4, second 3/4) from block 10 on" in capsys.readouterr().out
    assert abs(sum(sample < 24 for step in rest[8:] for sample, _ in step) / 256 - 0.25) < 0.03
    taken = [ref for step in ids + rest for ref in step]
    assert len(set(taken)) == len(taken)
    global_batches(after, 1, 1, cursor=last)
    assert "other weights" not in capsys.readouterr().out
    other = two_sources()
    other["third"] = other.pop("second")
    with pytest.raises(ConfigError, match="^data.fingerprint"):
        module(sources=other, val=val).load_state_dict(state)


def test_source_with_a_filter(two_sources, make_shards, capsys):
    data = module(sources=two_sources(filter=["width >= 16", "caption_length > 9"]), val=own_val(make_shards))
    assert data.splits["train"] == 14 + 8  # "picture 9" has nine characters
    assert data.accounting()["filtered/caption_length > 9"] == 10
    assert "data.sources.first.filter: 'caption_length > 9' takes out 10" in capsys.readouterr().out
    unfiltered = module(sources=two_sources(), val=own_val(make_shards))
    assert data.fingerprint != unfiltered.fingerprint


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weight": "much"}, "first.weight: 'much' is no number"),
        ({"weight": "1/0"}, "first.weight: '1/0' is no number"),
        ({"weight": "-1"}, "first.weight: -1 is less than 0"),
        ({"shards": None}, "first: shards are missing"),
        ({"wieght": "1"}, r"first: unknown \['wieght'\]"),
        ({"shards": "nowhere.tar"}, "first.shards: no shard matches"),
        ({"filter": "beauty > 3"}, r"first.filter: write a list, \['beauty > 3'\]"),
        ({"filter": ["beauty > 3"]}, "first.filter: .*beauty"),
    ],
)
def test_faults_of_sources(two_sources, change, said):
    sources = two_sources()
    sources["first"].update(change)
    with pytest.raises(ConfigError, match=f"^data.sources.{said}"):
        module(sources=sources).setup()


def test_shards_or_sources(two_sources):
    for given in ({"sources": two_sources(), "folder": "x"}, {}):
        with pytest.raises(ConfigError, match="set one of data.shards and data.sources"):
            module(**given)
    with pytest.raises(ConfigError, match="no source has a weight above 0"):
        module(sources=two_sources("0", "0"))


@pytest.mark.parametrize(
    "typed", [["data=bucket", "data.shards=tests"], ["data=sources", "data.sources={a: {shards: tests}}"]]
)
def test_configurations_pass_the_preflight(typed, tmp_path):
    load_config([*typed, f"output_dir={tmp_path}", "data.start_method=spawn", "data.reader.crop=random"])


def test_two_fits_of_one_module_each_start_at_step_0(make_shards):
    data = module(make_shards(21)[0].parent)
    first, _ = fit(data, 3)
    data.connect(3, 4)
    second, _ = fit(data, 6)
    assert [len(ids) for ids, _ in second.seen] == [4] * 6
    assert sum((ids for ids, _ in second.seen), []) == sum((ids for ids, _ in first.seen), [])


def test_fewer_pictures_than_a_batch(make_shards):
    stage, _ = fit(module(make_shards(3)[0].parent, batch_size=16), 2)
    assert [len(ids) for ids, _ in stage.seen] == [16, 16]


@pytest.mark.parametrize(
    ("change", "field"),
    [({"seed": 4}, "seed"), ({"batch_size": 4}, "global_batch"), ({"val": 0.5}, "fingerprint")],
)
def test_state_of_another_order_is_refused(make_shards, change, field):
    folder = make_shards(21)[0].parent
    state = module(folder).state_dict()
    with pytest.raises(ConfigError, match=f"^data.{field}"):
        module(folder, **change).load_state_dict(state)


def test_state_restored_after_the_loader_was_built(make_shards):
    data = module(make_shards(21)[0].parent)
    data.train_dataloader()
    with pytest.raises(RuntimeError, match="after the training loader was built"):
        data.load_state_dict(data.state_dict())


def test_keys_are_hashed_together(monkeypatch):
    """Not one by one in Python: a hundred million of them are hashed before the first step."""
    keys = [b"%d" % n * (1 + n % 9) for n in range(3000)]
    found = source.hash_keys(np.array(keys))
    assert len(np.unique(found)) == len(set(keys))
    assert (found == source.hash_keys(np.array(keys, "S50"))).all()  # however wide they are stored
    assert found[:3].tolist() == [source.hash_keys(np.array([key]))[0] for key in keys[:3]]
    assert abs(np.mean(found < 1 << 62) - 0.25) < 0.03
    monkeypatch.setattr(source, "_CHUNK_KEYS", 1000)
    assert (found == source.hash_keys(np.array(keys))).all()
    tracemalloc.start()
    try:
        source.hash_keys(np.zeros(1 << 16, "S16"))
        assert tracemalloc.get_traced_memory()[1] < 40 * (1 << 16)  # a Python object each has more
    finally:
        tracemalloc.stop()


def test_validation_split(make_shards):
    folder = make_shards(100, per_shard=30)[0].parent
    data = module(folder, val=0.2)
    assert data.splits == {"train": 80, "val": 20}
    captions = data.captions("train"), data.captions("val")
    assert len(set(captions[0]) | set(captions[1])) == 100
    again = module(folder, val=0.2)
    assert again.captions("val") == captions[1]
    # other shards of the same samples have the same split
    for path in folder.iterdir():
        path.unlink()
    assert set(module(make_shards(100, per_shard=9, name="y")[0].parent, val=0.2).captions("val")) == set(captions[1])


@pytest.mark.parametrize(("count", "expected"), [(2, (1, 1)), (3, (2, 1)), (10, (9, 1)), (50, (48, 2))])
def test_small_validation_splits(make_shards, count, expected):
    data = module(make_shards(count)[0].parent)
    assert (data.splits["train"], data.splits["val"]) == expected
    assert data.num_train == expected[0]


def test_one_picture_is_both(make_shards, capsys):
    data = module(make_shards(1)[0].parent)
    assert data.splits == {"train": 1, "val": 1}
    assert "one sample only" in capsys.readouterr().out
    assert fit(data, 2)[0].seen[0][0] == [0] * 8


def test_own_validation_shards(make_shards, make_sample):
    val = make_shards([make_sample(number) for number in range(100, 104)], name="val")
    train = make_shards(6, name="train")
    data = module(train[0], val=[str(val[0])])
    assert data.splits == {"train": 6, "val": 4}
    assert data.captions("val") == [f"picture {number}" for number in range(100, 104)]


def test_load_is_deterministic(make_shards):
    data = module(make_shards(21)[0].parent)
    batch = data.load("train", range(4, 9))
    again = data.load("train", torch.arange(4, 9))
    assert torch.equal(batch["image"], again["image"])
    assert batch["caption"] == data.captions("train")[4:9]
    assert batch["attributes"] == data.attributes("train")[4:9]
    assert batch["sample_id"].tolist() == [4, 5, 6, 7, 8]


def test_attached_latents_reach_the_stream(make_shards):
    data = module(make_shards(21)[0].parent)
    latents = torch.randn(data.num_train, 2, 4, 2, 2).half()
    data.attach_latents("train", latents, data.shown("train"))
    batch = next(iter(data.train_dataloader()))
    assert torch.equal(batch["latent"], latents[batch["sample_id"]])
    assert "image" not in batch
    assert "image" in data.load("val", [0])
    assert data.load("train", [0], as_images=True)["image"].shape == (1, 3, 16, 16)


@pytest.mark.parametrize("num_cached", [0, 7, 19, 100])
def test_cache_stays_in_its_budget(make_shards, num_cached):
    data = module(make_shards(20)[0].parent, cache_bytes=num_cached * 16 * 16 * 3 + 5)
    held = [reader._cache.nbytes for reader in (data._reader("train"), data._reader("val"))]
    assert sum(held) == min(num_cached, 20) * 16 * 16 * 3
    assert data.load("train", range(19))["caption"] == data.captions("train")


def test_cut_off_shard_is_used_and_said(make_shards, capsys):
    shards = make_shards(40, per_shard=20)
    shards[1].write_bytes(shards[1].read_bytes()[: shards[1].stat().st_size // 2])
    data = module(shards[0].parent)
    assert 20 < sum(data.splits.values()) < 40
    assert data.accounting()["lost/cut_off"] == 1
    assert "x-000001.tar: cut_off" in capsys.readouterr().out


def test_bad_samples_are_accounted_for(make_shards, make_sample):
    folder = make_shards([make_sample(number, **({"png": b"no"} if number == 7 else {})) for number in range(21)])[
        0
    ].parent
    data = module(folder)
    for split, count in data.splits.items():
        data.load(split, range(count))
    counts = data.accounting()
    assert (counts["read"], counts["decoded"], counts["replaced"], counts["replaced/not_an_image"]) == (21, 21, 1, 1)


def test_faults_of_the_configuration(tmp_path, make_shards, make_sample):
    with pytest.raises(ConfigError, match=r"^data.shards: no shard matches '.*nowhere/\*.tar'"):
        module(tmp_path / "nowhere/*.tar").setup()
    with pytest.raises(ConfigError, match=r"^data.val: no shard matches"):
        module(make_shards(3)[0], val=str(tmp_path / "nowhere")).setup()
    with pytest.raises(ConfigError, match="val"):
        module(tmp_path, val=1.5)
    with pytest.raises(ConfigError, match="no sample with an image"):
        module(make_shards([make_sample(0, png=None)], name="z")[0]).setup()
    with pytest.raises(ConfigError, match="no split 'heldout'; there are train, val"):
        module(make_shards(3)[0]).load("heldout", [0])


def test_subclass_with_shards_and_a_split_of_its_own(make_shards):
    class Own(ShardDataModule):
        def __init__(self):
            super().__init__(shards=[], image_size=16)

        def prepare_data(self):
            self._shards = {
                split: make_shards(count, name=split) for split, count in (("train", 5), ("val", 2), ("extra", 3))
            }

    data = Own()
    data.prepare_data()
    assert data.splits == {"train": 5, "val": 2, "extra": 3}
    assert data.load("extra", [2])["caption"] == ["picture 2"]
