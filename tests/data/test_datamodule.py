"""The data module: splits, the cursor through a real Lightning fit, refusals."""

import lightning as L
import pytest
import torch

from sdtrain.data.datamodule import ShardDataModule
from sdtrain.errors import ConfigError


def module(folder, batch_size=8, num_accumulate=1, seed=3, **options):
    data = ShardDataModule(str(folder), image_size=16, **options)
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
    [({"seed": 4}, "seed"), ({"batch_size": 4}, "global_batch"), ({"val_fraction": 0.5}, "fingerprint")],
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


def test_validation_split(make_shards):
    folder = make_shards(100, per_shard=30)[0].parent
    data = module(folder, val_fraction=0.2)
    assert data.splits == {"train": 80, "val": 20}
    captions = data.captions("train"), data.captions("val")
    assert len(set(captions[0]) | set(captions[1])) == 100
    again = module(folder, val_fraction=0.2)
    assert again.captions("val") == captions[1]
    # other shards of the same samples have the same split
    for path in folder.iterdir():
        path.unlink()
    assert set(module(make_shards(100, per_shard=9, name="y")[0].parent, val_fraction=0.2).captions("val")) == set(
        captions[1]
    )


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
    data = module(train[0], val_shards=[str(val[0])])
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
    assert data.accounting() == {"read": 21, "replaced": 1, "replaced/not_an_image": 1}


def test_faults_of_the_configuration(tmp_path, make_shards, make_sample):
    with pytest.raises(ConfigError, match=r"^data.shards: no shard matches '.*nowhere/\*.tar'"):
        module(tmp_path / "nowhere/*.tar").setup()
    with pytest.raises(ConfigError, match=r"^data.val_shards: no shard matches"):
        module(make_shards(3)[0], val_shards=str(tmp_path / "nowhere")).setup()
    with pytest.raises(ConfigError, match="val_fraction"):
        module(tmp_path, val_fraction=1.5)
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
