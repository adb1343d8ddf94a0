"""Training on stored latents: what is in a batch, that it is what encoding on the fly gives, and what is refused."""

import io
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from sdtrain.data.bucket import Buckets
from sdtrain.data.caption import CaptionRule
from sdtrain.data.datamodule import ShardDataModule
from sdtrain.data.index import build_index
from sdtrain.data.latent_file import (
    ABOUT,
    JOB,
    PREPROCESSING,
    PartWriter,
    find_damage,
    finish,
    part_paths,
    read_about,
    start,
)
from sdtrain.data.latents import LatentDataModule
from sdtrain.data.sealed import write_sealed
from sdtrain.data.text_file import encoder_folder, finish_text, text_job, write_text_part
from sdtrain.data.view import to_float
from sdtrain.errors import ConfigError
from sdtrain.stage.latents import check_latents, identity

SIZE = 16


class FirstStage(torch.nn.Module):
    """Not the same for a mirrored picture: it looks to the right."""

    latent_channels, down_factor = 4, 4

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = torch.nn.Conv2d(3, 8, 4, stride=4)

    def encode(self, image):
        mean, std = self.conv(image).chunk(2, dim=1)
        return mean, std.abs()


def noise_png(seed, size=(20, 17)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


@pytest.fixture
def shards(make_sample, make_shards):
    def make(num=40, per_shard=9, size=lambda number: (20, 17), **changed):
        samples = [make_sample(number, png=noise_png(number, size(number))) for number in range(num)]
        samples[7] |= changed
        return make_shards(samples, per_shard)

    return make


@pytest.fixture
def precompute(tmp_path):
    def make(shards, first_stage=None, name="cache", has_flips=False, buckets=None, parts=None):
        first_stage = first_stage or FirstStage()
        out, index = tmp_path / name, build_index(shards)
        job = {"first_stage": identity(first_stage), "preprocessing": PREPROCESSING, "image_size": SIZE}
        job |= {"has_flips": has_flips, "buckets": buckets}

        @torch.no_grad()
        def encode(pixels):
            return torch.stack(first_stage.encode(to_float(pixels)), dim=1).half().numpy()

        start(out, job)
        table = None if buckets is None else Buckets(**buckets).table(SIZE)
        writer = PartWriter(out, index, SIZE, table, encode, lambda height, width: 4, has_flips)
        for part in range(len(index.shards)) if parts is None else parts:
            writer.write(part)
        if parts is None:
            finish(out, index, job)
        return out

    return make


def module(out, seed=3, batch=8, **more):
    data = LatentDataModule(str(out), image_size=SIZE, **more)
    data.connect(seed, batch)
    data.setup()
    return data


def taken(data, num):
    batches = iter(data.train_dataloader())
    return [next(batches) for _ in range(num)]


def pictures(shards, flip=False, **more):
    import functools

    from sdtrain.data.reader import Reader

    reader = functools.partial(Reader, flip=flip)
    data = ShardDataModule([str(shard) for shard in shards], image_size=SIZE, reader=reader, **more)
    data.connect(3, 8)
    data.setup()
    return data


@pytest.mark.parametrize("flip", [False, True])
def test_batches_are_those_of_encoding_on_the_fly(shards, precompute, flip):
    made, first_stage = shards(), FirstStage()
    stored = module(precompute(made, first_stage, has_flips=flip), flip=flip)
    fresh = pictures(made, flip)
    assert stored.fingerprint == fresh.fingerprint
    assert stored.splits == fresh.splits
    assert stored.captions("val") == fresh.captions("val")
    for ours, theirs in zip(taken(stored, 12), taken(fresh, 12)):
        with torch.no_grad():
            expected = torch.stack(first_stage.encode(theirs["image"]), dim=1)
        assert ours["latent"].dtype == torch.float16
        assert (ours["latent"].float() - expected).abs().max() < 2e-3
        for name in ("caption", "attributes", "key", "cursor", "last_micro_of_step"):
            assert ours[name] == theirs[name], name
        for name in ("sample_id", "epoch", "original_size", "crop_top_left", "target_size"):
            assert torch.equal(ours[name], theirs[name]), name


def test_flips_are_not_latent_flips(shards, precompute):
    data = module(precompute(shards(), has_flips=True), flip=True)
    kept = data._reader("train")
    ids = np.arange(len(kept.index))
    both = [kept.batch(ids, ids * 0 + epoch)["latent"] for epoch in range(6)]
    views = {tuple(np.asarray(one[0]).ravel()) for one in both}
    assert len(views) == 2  # a picture and its mirror
    first, second = (next(b[0] for b in both if tuple(np.asarray(b[0]).ravel()) == view) for view in views)
    assert not torch.equal(first.flip(-1), second)
    with pytest.raises(ConfigError, match="--flips"):
        module(precompute(shards(), name="none"), flip=True)


def test_workers_resume_and_end_as_the_plan_says(shards, precompute):
    out = precompute(shards())
    whole = [batch["sample_id"].tolist() for batch in taken(module(out), 9)]
    first = module(out)
    first.advance(taken(first, 4)[-1]["cursor"])
    again = module(out, num_workers=2, start_method="fork")
    again.load_state_dict(first.state_dict())
    again._readers["train"] = pickle.loads(pickle.dumps(again._readers["train"]))  # as spawned workers get it
    assert [batch["sample_id"].tolist() for batch in taken(again, 5)] == whole[4:]


def test_other_shapes_stand_in_batches_of_their_own(shards, precompute):
    made = shards(size=lambda number: [(40, 20), (20, 20), (20, 40), (90, 20)][number % 4])
    buckets = {"step": 4, "max_ratio": 2.0, "max_upscale": 1.0}
    data = module(precompute(made, buckets=buckets), batch=2, val=0.3)
    assert data.accounting()["left_out/no_bucket"] == 10
    assert (np.diff(np.load(data.folder / "table.npy")["sample"]) > 0).all()  # as in the shards, whatever the shape
    shapes = {tuple(batch["latent"].shape[3:]) for batch in taken(data, 12)}
    assert len(shapes) >= 2
    val = data.load("val", range(data.splits["val"]))
    assert val["latent"].shape[3:] == (4, 4)
    assert check_latents(FirstStage(), data, seed=0) == 16


def test_another_first_stage_is_refused_by_name(shards, precompute):
    data = module(precompute(shards()))
    assert check_latents(FirstStage(), data, seed=0) == 16
    with pytest.raises(ConfigError, match="another first stage: weight_hash is"):
        check_latents(FirstStage(seed=1), data, seed=0)
    with pytest.raises(ConfigError, match="image_size is 16 there, 32 here"):
        LatentDataModule(str(data.folder), image_size=32).setup()
    about = read_about(data.folder)
    write_sealed(data.folder / ABOUT, about | {"preprocessing": 0})
    with pytest.raises(ConfigError, match="preprocessing is 0 there"):
        module(data.folder)


def test_changed_latents_are_found(shards, precompute):
    out = precompute(shards())
    assert find_damage(out, read_about(out)) == []
    for part in range(5):
        path = part_paths(out, part)[0]
        changed = bytearray(path.read_bytes())
        changed[1] ^= 0x40
        path.write_bytes(changed)
    assert len(find_damage(out, read_about(out))) == 5
    about, first_stage = read_about(out), FirstStage()
    with torch.no_grad():
        first_stage.conv.bias += 1
    write_sealed(out / ABOUT, about | {"first_stage": identity(first_stage)})
    with pytest.raises(ConfigError, match="encodes to another latent now"):
        check_latents(first_stage, module(out), seed=0)
    part_paths(out, 0)[0].write_bytes(b"short")
    with pytest.raises(ConfigError, match="cut off"):
        taken(module(out), 8)


def test_what_cannot_be_read_is_left_out_and_told(shards, precompute):
    data = module(precompute(shards(png=b"<html>")))
    assert sum(data.splits.values()) == 39
    assert sum(count for name, count in data.accounting().items() if name.startswith("left_out/")) == 1
    assert "picture 7" not in data.captions("train") + data.captions("val")


def test_latents_outlive_their_shards(shards, precompute):
    made = shards()
    out = precompute(made)
    for shard in made:
        shard.unlink()
    data = module(out)
    assert check_latents(FirstStage(), data, seed=0) == 0
    assert "image" not in data.load("val", [0], as_images=True)
    assert taken(data, 2)[0]["latent"].shape == (8, 2, 4, 4, 4)


def test_a_stopped_job_goes_on_and_makes_the_same(shards, precompute, tmp_path):
    made = shards()
    whole = precompute(made, name="whole")
    out = precompute(made, name="stopped", parts=[3, 0])
    with pytest.raises(ConfigError, match="not finished"):
        module(out)
    part_paths(out, 1)[0].write_bytes(b"half of it")  # renamed, but its .json is missing
    (out / "parts" / ".000002.bin").write_bytes(b"a draft")
    precompute(made, name="stopped")
    for path in [*sorted(whole.glob("*")), *sorted((whole / "parts").glob("*.*"))]:
        if path.is_file():
            assert path.read_bytes() == (out / path.relative_to(whole)).read_bytes(), path
    with pytest.raises(ConfigError, match="other latents: weight_hash"):
        precompute(made, FirstStage(seed=1), name="stopped")


def test_captions_that_are_asked_for_and_not_stored_are_refused(shards, precompute):
    out = precompute(shards())
    module(out).accompany(["caption"])
    other = module(out, caption=CaptionRule({"json.typo": 1}), text=False)
    other.accompany([])
    with pytest.raises(ConfigError, match=r"^data.caption.fields: none of \d+ samples .* json.typo; there is .*txt"):
        other.accompany(["caption"])


def test_samples_without_a_stand_in_cannot_be_dropped(tmp_path):
    with pytest.raises(ConfigError, match="caption.empty"):
        LatentDataModule(str(tmp_path), caption=CaptionRule(empty="drop"))


@pytest.fixture
def embed():
    """embed(a cache) -> its folder of the embeddings of an encoder that counts letters."""

    def make(out):
        about = read_about(out)
        job = text_job(about, {"weight_hash": "x", "width": 2, "pooled_width": 3, "max_tokens": 12})
        here = encoder_folder(out, job["encoder"])
        start(here, job)

        def encode(captions):
            tokens = [np.array([[ord(letter), 1] for letter in text], np.float16) for text in captions]
            return [(states, np.full(3, len(states), np.float16)) for states in tokens]

        for part in range(len(about["parts"])):
            write_text_part(out, here, about, part, encode)
        finish_text(here, about, job)
        return here

    return make


def flip_bit(path, byte):
    data = bytearray(path.read_bytes())
    data[byte] ^= 0x10
    path.write_bytes(data)


def places_of(out, here):
    """Files and bytes of everything that is stored of one row, by what it is."""
    table, texts = np.load(out / "table.npy"), np.load(here / "table.npy")
    number = 5
    row, text = table[number], texts[number]
    path, size = part_paths(out, row["part"])[0], 4 * 4 * int(row["size"].prod())
    first = int(row["offset"])
    caption = first + 2 * size
    found = {"latent": (path, first + 9), "mirrored": (path, first + size), "caption": (path, caption + 1)}
    found["json"] = (path, caption + int(row["caption_bytes"]) + 3)
    states = part_paths(here, text["part"])[0]
    found["states"] = (states, int(text["offset"]) + 1)
    found["pooled"] = (states, int(text["offset"]) + 4 * int(text["num_tokens"]) + 5)
    for name, folder, kind in (("row", out, table.dtype), ("text", here, texts.dtype)):
        head = (folder / "table.npy").stat().st_size - len(table) * kind.itemsize
        for field, (_, offset) in kind.fields.items():
            found[f"{name}.{field}"] = (folder / "table.npy", head + number * kind.itemsize + offset)
    return number, found


def test_a_flipped_bit_of_anything_that_is_stored_is_replaced_and_counted(shards, precompute, embed, tmp_path):
    out = precompute(shards(), has_flips=True)
    here = embed(out)
    number, found = places_of(out, here)
    assert len(found) == 6 + 9 + 4
    whole = module(out, flip=True)._reader("train")
    if number not in whole.index.columns["latent_row"]:
        pytest.fail("the row that is damaged is held out")
    place = int(np.flatnonzero(whole.index.columns["latent_row"] == number)[0])
    epochs = {}
    for epoch in range(20):
        epochs.setdefault(whole._drawn(np.array([place]), np.array([epoch]))[0][0], epoch)
    for name, (path, byte) in found.items():
        kept = path.read_bytes()
        flip_bit(path, byte)
        data = module(out, flip=True)
        data.connect(3, 8, directory=tmp_path / f"run_{name}")
        reader, is_mirrored = data._reader("train"), name == "mirrored"
        ids = np.array([place, place + 2])
        batch = reader.batch(ids, np.full(2, epochs[is_mirrored]))
        expected = whole.batch(ids + [1, 0], np.full(2, epochs[is_mirrored]))
        assert batch["sample_id"].tolist() == ids.tolist()
        for key in ("caption", "key", "attributes"):
            assert batch[key] == expected[key], (name, key)
        for key in (key for key in batch if key.startswith("text_")):
            assert torch.equal(batch[key], expected[key]), (name, key)
        views = list(whole._stored(np.array([place + 1] * 2), [False, True]))
        assert bytes(batch["latent"][0].numpy().tobytes()) == bytes(views[is_mirrored][0]), name
        told = data.accounting()
        assert (told["replaced"], told["replaced/crc_mismatch"]) == (1, 1), name
        data.captions("train")  # is no batch
        assert data.accounting()["replaced"] == 1, name
        assert "crc_mismatch" in reader._accounting.quarantine.path.read_text()
        path.write_bytes(kept)
    clean = module(out, flip=True)
    clean._reader("train").batch(np.arange(8), np.zeros(8, np.int64))
    assert clean.accounting()["replaced"] == 0


def test_a_flipped_bit_of_the_index_is_refused_by_name(shards, precompute):
    out = precompute(shards())
    for path in sorted(out.glob("index.*.npy")):
        kept = path.read_bytes()
        flip_bit(path, len(kept) - 1)
        with pytest.raises(ConfigError, match=f"{path.name} is not what was written"):
            module(out)
        path.write_bytes(kept)
    module(out)


def test_a_flipped_bit_of_what_a_cache_says_of_itself_is_refused_by_name(shards, precompute, embed):
    made = shards()
    out = precompute(made)
    here = embed(out)
    for path in (out / ABOUT, here / "text.json"):
        kept = path.read_bytes()
        for byte in range(3, len(kept), 41):
            flip_bit(path, byte)
            with pytest.raises(ConfigError, match=f"{path.name} is|version"):
                module(out)
            path.write_bytes(kept)
    (out / ABOUT).unlink()
    for path, kind in ((out / JOB, JOB), (part_paths(out, 1)[2], "000001.json")):
        kept = path.read_bytes()
        flip_bit(path, kept.index(b'": ') + 3)
        with pytest.raises(ConfigError, match=f"{kind} is|version"):
            precompute(made)
        path.write_bytes(kept)
    precompute(made)
    module(out)


def test_without_a_whole_sample_it_ends(shards, precompute):
    out = precompute(shards())
    for part in range(5):
        path = part_paths(out, part)[0]
        path.write_bytes(bytes(255 - byte for byte in path.read_bytes()))
    with pytest.raises(ConfigError, match=r"crc_mismatch|no whole sample"):
        taken(module(out), 8)


def test_a_cache_without_checksums_is_refused_by_its_version(shards, precompute):
    out, made = precompute(shards()), shards()
    for name in (ABOUT, JOB):
        about = json.loads((out / name).read_text())
        del about["v"]
        (out / name).write_text(json.dumps(about))
    with pytest.raises(ConfigError, match="version 1, this reads 3, .* remove it and make it again"):
        module(out)
    with pytest.raises(ConfigError, match="version 1, this reads 3"):
        precompute(made)
