"""Shards without an index: real tar files, a local http server that misbehaves, two ranks, real Lightning fits."""

import http.server
import io
import itertools
import json
import tarfile
import threading
import time
from collections import Counter

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from sdtrain.build import build
from sdtrain.config import load_config
from sdtrain.data.caption import CaptionRule
from sdtrain.data.lane import Lanes, LaneStream
from sdtrain.data.quarantine import Quarantine
from sdtrain.data.retry import Retry
from sdtrain.data.sequential import SequentialDataModule
from sdtrain.data.steady import LocalFile
from sdtrain.errors import ConfigError

QUICK = Retry(3, 0.01, 0.02)


def reader(**options):
    """Lanes as a config makes them, and as impatient as a test is."""
    return lambda *args, **more: Lanes(*args, **{"retry": QUICK, **options, **more})


def module(shards, batch_size=8, num_accumulate=1, seed=3, **options):
    options = {"image_size": 16, "reader": reader(max_bad_fraction=1.0), **options}
    data = SequentialDataModule(shards, **options)
    data.connect(seed, batch_size, num_accumulate)
    return data


def lanes(addresses, **options):
    return Lanes([str(address) for address in addresses], 16, **{"retry": QUICK, "max_bad_fraction": 1.0, **options})


def stream(made, num, **options):
    return list(itertools.islice(LaneStream(made, 4, **options), num))


def numbers(samples):
    """Which samples they are: the fixture writes their number in the caption, the attributes and the pixels."""
    found = []
    for sample in samples:
        number = sample.attributes["number"]
        assert sample.caption == f"picture {number}"
        assert (sample.picture.image.pixels == number % 251).all()
        found.append(number)
    return found


class Stage(L.LightningModule):
    """As a stage does it."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def training_step(self, batch, _):
        self.seen.append((len(batch["caption"]), batch["key"]))
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


class Server(http.server.ThreadingHTTPServer):
    """Files by name under a behaviour: /plain/x.tar, /cut/x.tar, ..."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.asked, self.released = folder, Counter(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        _, behaviour, name = self.path.split("/", 2)
        self.server.asked[behaviour] += 1
        is_first = self.server.asked[behaviour] == 1
        data = (self.server.folder / name).read_bytes()
        if behaviour == "busy" and self.server.asked[behaviour] <= 2:
            self.send_error(503)
        elif behaviour == "gone":
            self.send_error(404)
        elif behaviour in ("metadata", "local"):
            self.send_response(302)
            self.send_header(
                "Location", {"metadata": "http://169.254.169.254/x.tar", "local": "file:///etc/passwd"}[behaviour]
            )
            self.end_headers()
        else:
            self.give(data, behaviour, is_first)

    def give(self, data, behaviour, is_first):
        start = 0
        if behaviour == "ranges" and "Range" in self.headers:
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", f'"{self.server.asked[behaviour]}"' if behaviour == "changing" else '"v1"')
        self.send_header("Content-Length", str(len(data) - start + (1000 if behaviour == "longer" else 0)))
        self.end_headers()
        breaks = behaviour in ("cut", "ranges", "stall", "changing")
        self.wfile.write(data[start : start + len(data) // 2 if breaks and is_first else None])
        if behaviour == "stall" and is_first:
            self.wfile.flush()
            self.server.released.wait(20)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    made = Server(tmp_path / "shards")
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield made
    made.released.set()
    made.shutdown()
    made.server_close()
    thread.join()


def test_every_sample_once_in_an_epoch(make_shards):
    shards = make_shards(40, per_shard=10)
    for num_lanes in (1, 2, 3, 4):
        seen = []
        for lane in range(num_lanes):
            made = lanes(shards, shuffle_samples=5)
            endless = made.endless(lane, num_lanes)
            seen += [s for s in itertools.islice(endless, 60) if s.epoch == 0]
        assert sorted(numbers(seen)) == list(range(40))


@pytest.mark.parametrize("shuffle_samples", [1, 8])
def test_the_order_is_another_one_each_epoch_and_by_the_seed(make_shards, shuffle_samples):
    made = lanes(make_shards(40, per_shard=4), shuffle_samples=shuffle_samples)
    orders = []
    for made.seed in (0, 1):
        samples = list(itertools.islice(made.endless(0, 1), 100))
        orders += [tuple(numbers(s for s in samples if s.epoch == epoch)) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert tuple(range(40)) not in orders
    again = list(itertools.islice(made.endless(0, 1), 100))
    assert tuple(numbers(s for s in again if s.epoch == 1)) == orders[3]


def test_places_count_the_samples_of_a_step(make_shards):
    shards, places = make_shards(48, per_shard=4), []
    for rank in range(2):
        for worker in range(2):
            of_rank = LaneStream(lanes(shards), 3, num_accumulate=2, step=5, rank=rank, world=2)
            micro = itertools.islice(of_rank.micro_batches(worker, 2), 2)
            places += [place for batch in micro for place in batch["place"].tolist()]
    assert sorted(places) == list(range(5 * 12, 7 * 12))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_two_ranks_have_the_same_number_of_batches_and_no_sample_twice(make_shards, num_workers):
    shards = make_shards(64, per_shard=8)
    seen, shapes = [], []
    for rank in range(2):
        data = module(str(shards[0].parent), val=[str(shards[0])], num_workers=num_workers)
        data.trainer = type("Trainer", (), {"global_rank": rank, "world_size": 2, "lightning_module": None})()
        batches = list(itertools.islice(iter(data.train_dataloader()), 8))
        shapes.append(
            [(batch["image"].shape, batch["cursor"]["step"], batch["last_micro_of_step"]) for batch in batches]
        )
        seen += [key for batch in batches for key, epoch in zip(batch["key"], batch["epoch"].tolist()) if epoch == 0]
        assert all(len(batch["caption"]) == 4 for batch in batches)
    assert shapes[0] == shapes[1] == [((4, 3, 16, 16), step, True) for step in range(1, 9)]
    assert len(set(seen)) == len(seen)


def test_a_batch_is_as_others_make_it(make_shards):
    (batch,) = stream(lanes(make_shards(8), shuffle_samples=1), 1)
    assert batch["image"].dtype == torch.float32
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    number = batch["attributes"][2]["number"]
    assert batch["image"][2].unique().tolist() == pytest.approx([number / 127.5 - 1], abs=1e-6)
    assert batch["caption"][2] == f"picture {number}"
    assert batch["key"][2] == f"x-000000/{number:06d}"
    assert batch["sample_id"].dtype == batch["epoch"].dtype == torch.int64
    assert len(set(batch["sample_id"].tolist())) == 4
    assert batch["original_size"].tolist() == batch["target_size"].tolist() == [[16, 16]] * 4
    assert batch["crop_top_left"].tolist() == [[0, 0]] * 4


def test_a_sample_has_its_number_wherever_it_is_read(make_shards):
    shards = make_shards(40, per_shard=10)
    named = []
    for num_lanes in (1, 3):
        samples = [s for lane in range(num_lanes) for s in itertools.islice(lanes(shards).endless(lane, num_lanes), 40)]
        named.append({sample.attributes["number"]: sample.sample_id for sample in samples})
    assert all(named[0][number] == named[1][number] for number in named[0].keys() & named[1].keys())


def test_shards_of_one_name_in_two_folders_share_no_number(make_shards, tmp_path):
    shard = make_shards(5)[0]
    (other := tmp_path / "other" / shard.name).parent.mkdir()
    other.write_bytes(shard.read_bytes())
    assert len({sample.sample_id for sample in lanes([shard, other]).once()}) == 10


def test_accumulation_counts_steps(make_shards):
    batches = stream(lanes(make_shards(8)), 6, num_accumulate=3, step=10)
    assert [batch["cursor"]["step"] for batch in batches] == [11, 11, 11, 12, 12, 12]
    assert [batch["last_micro_of_step"] for batch in batches] == [False, False, True] * 2


def test_bad_samples_are_left_out_and_the_batch_stays_full(make_shards, make_sample):
    bad = {
        3: {"png": b"<html>"},
        4: {"txt": b"x" * 1_000_000},
        9: {"txt": b"\xff\xfe\xfd\xfc"},
        11: {"json": b"[" * 100_000},
        12: {"png": None},
        14: {"txt": b" "},
    }
    shards = make_shards([make_sample(number, **bad.get(number, {})) for number in range(20)], per_shard=7)
    made = lanes(shards, caption=CaptionRule(empty="drop"), shuffle_samples=4)
    batches = stream(made, 9)
    assert [len(batch["caption"]) for batch in batches] == [4] * 9
    told = {a["number"] for batch in batches for a in batch["attributes"]}
    assert told == set(range(20)) - bad.keys()
    report = made.report()
    assert (report["read"], report["decoded"]) == (36, 36)
    wanted = {"not_an_image", "caption_too_large", "caption_not_utf8", "bad_json", "empty_caption"}
    assert {name for name in report if name.startswith("replaced/")} == {f"replaced/{name}" for name in wanted}
    assert report["replaced"] == sum(report[f"replaced/{name}"] for name in wanted)
    assert report["lost/no_image"] >= 2


def test_workers_count_side_by_side(make_shards):
    made = lanes(make_shards(4), num_workers=2)
    for worker in (0, 1, 1):
        made.enter_worker(worker)
        made.losses.count("no_image")
    assert made.losses._counts.sum(dim=1).tolist() == [0, 1, 2]
    assert made.report()["lost/no_image"] == 3


def test_too_many_bad_samples_end_the_run(make_shards, make_sample):
    shards = make_shards([make_sample(number, png=b"<html>") for number in range(200)])
    with pytest.raises(ConfigError, match="not_an_image"):
        stream(lanes(shards, max_bad_fraction=0.1), 1)


def headers_of(shard):
    with tarfile.open(shard) as tar:
        return [member.offset for member in tar]


def test_a_cut_at_any_block_never_makes_a_wrong_pair(make_shards, caplog):
    """Two shards with the same keys, as downloads have them: webdataset joins one's picture to the other's caption."""
    first = make_shards(4, name="a")[0]
    whole, other = first.read_bytes(), first.with_name("b.tar")
    other.write_bytes(whole)
    end = headers_of(first)[-1] + 1024 + 1024  # the last member is short; then two blocks of zeros, and more
    for size in range(0, end, 512):
        first.write_bytes(whole[:size])
        caplog.clear()
        made = lanes([first, other])
        found = Counter(numbers(made.once()))  # each picture with its own caption and attributes
        assert found[3] == 1
        assert max(found.values()) <= 2
        report = made.report()
        assert report["lost/cut_off"] == 1
        assert "cut_off" in caplog.text
        assert report.get("lost/incomplete", 0) == (size >= 512)
    first.write_bytes(whole[:end])
    made = lanes([first, other])
    assert Counter(numbers(made.once())) == {0: 2, 1: 2, 2: 2, 3: 2}
    assert made.report() == {"read": 0, "replaced": 0}


def test_a_flipped_bit_in_any_header_is_told(make_shards):
    first = make_shards(3, name="a")[0]
    whole, headers = first.read_bytes(), headers_of(first)
    for offset, place in itertools.product(headers, (0, 60, 130, 150, 156, 257)):
        data = bytearray(whole)
        data[offset + place] ^= 1
        first.write_bytes(data)
        made = lanes([first])
        num_whole = max(0, headers.index(offset) - 1) // 3  # the sample before may have had more members
        assert numbers(made.once()) == list(range(num_whole))
        assert made.report()["lost/bad_header"] == 1


def tar_of(path, members):
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data, *more in members:
            info = tarfile.TarInfo(name)
            info.size, info.type = len(data), more[0] if more else tarfile.REGTYPE
            tar.addfile(info, io.BytesIO(data))
    return path


def test_what_other_readers_run_is_never_opened(tmp_path, make_sample):
    good = make_sample(0)
    bomb = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    members = [("0.png", good["png"]), ("0.txt", b"picture 0"), ("0.json", good["json"])]
    members += [(f"0.{suffix}", bomb) for suffix in ("pyd", "pkl", "pickle", "pth", "txt.gz")]
    members += [("../../up.png", good["png"]), ("0x.__bad__", b""), ("1.__key__", b"9")]
    made = lanes([tar_of(tmp_path / "x.tar", members)])
    assert numbers(made.once()) == [0]
    lost = {"lost/bad_key": 1, "lost/forbidden_suffix": 5, "lost/ignored_member": 2}
    assert made.report() == {"read": 0, "replaced": 0} | lost
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.GNUTYPE_SPARSE, tarfile.CHRTYPE])
def test_members_that_are_no_plain_files_end_the_shard(tmp_path, make_sample, kind):
    good = make_sample(0)
    members = [("0.png", good["png"]), ("0.txt", b"picture 0"), ("0.json", good["json"]), ("1.png", b"", kind)]
    made = lanes([tar_of(tmp_path / "x.tar", members)])
    assert list(made.once()) == []
    assert made.report() == {"read": 0, "replaced": 0, "lost/refused_member": 1, "lost/incomplete": 1}


def test_members_of_no_sample_are_counted(tmp_path, make_sample):
    """A key ends at the first dot of a name: `img.v1.png` is no picture."""
    good = make_sample(0)
    members = [("0.png", good["png"]), ("0.txt", b"picture 0"), ("0.json", good["json"])]
    members += [("img.v1.png", good["png"]), ("img.v1.txt", b"one")]
    shards = [tar_of(tmp_path / "x.tar", members), tar_of(tmp_path / "empty.tar", [])]
    made = lanes(shards)
    assert numbers(made.once()) == [0]
    lost = {"lost/ignored_member": 2, "lost/empty_shard": 1}
    assert made.report() == {"read": 0, "replaced": 0} | lost


def test_interleaved_members_are_told(tmp_path, make_sample):
    samples = [make_sample(number) for number in range(3)]
    members = [(f"{n}.{kind}", sample[kind]) for kind in ("png", "txt") for n, sample in enumerate(samples)]
    made = lanes([tar_of(tmp_path / "x.tar", members)])
    assert {sample.caption for sample in made.once()} == {""}
    assert made.report()["lost/interleaved"] == 1
    assert made.report()["lost/no_caption"] == 2


@pytest.mark.parametrize("data", [b"", b"x" * 5000, b"\x1f\x8b" + bytes(2000), None])
def test_no_shard_at_all_ends_the_run(tmp_path, data, caplog):
    path = tmp_path / "x.tar"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ConfigError, match="1 shards in a row have no sample"):
        stream(lanes([path]), 1)
    assert str(path) in caplog.text


def test_one_broken_shard_among_many_does_not(make_shards):
    shards = make_shards(40, per_shard=4)
    shards[3].write_bytes(b"")
    shards[5].unlink()
    made = lanes(shards)
    stream(made, 30)
    assert made.report()["lost/unreadable"] >= 2
    assert made.report()["lost/cut_off"] >= 2


def test_what_is_lost_is_written_down_once(tmp_path, make_shards, make_sample):
    shards = make_shards([make_sample(n, **({"png": None} if n == 5 else {})) for n in range(40)], per_shard=4)
    shards[3].write_bytes(shards[3].read_bytes()[:3000])
    made = lanes(shards)
    made.accounting.quarantine = Quarantine(tmp_path)
    for _ in range(2):
        list(made.once())
    rows = [json.loads(line) for line in (tmp_path / "rank0-main.jsonl").read_text().splitlines()]
    found = {(row["reason"], row["shard"].rpartition("/")[2], row["key"], row["exception"]) for row in rows}
    broken = ("cut_off", shards[3].name, "", "Defect")
    assert found == {("no_image", shards[1].name, "000005", "BadSample"), broken} | {
        ("incomplete", shards[3].name, row["key"], "BadSample") for row in rows if row["reason"] == "incomplete"
    }
    assert len(rows) == 3
    assert made.report()["lost/cut_off"] == made.report()["lost/no_image"] == 2


def test_too_many_broken_shards_end_the_run(tmp_path, make_shards):
    shards = make_shards(200, per_shard=2)
    for shard in shards[:21]:
        shard.write_bytes(shard.read_bytes()[:2000])
    made = lanes(shards, max_bad_fraction=0.05)
    made.accounting.quarantine = Quarantine(tmp_path)
    with pytest.raises(ConfigError, match=r"shards broke off: cut_off \d+; .*each is in .*rank0-main.jsonl"):
        stream(made, 1000)
    for shard in shards[5:21]:
        shard.write_bytes(shards[30].read_bytes())
    made = lanes(shards, max_bad_fraction=0.05)
    stream(made, 200)  # the same five in every epoch are one in twenty
    assert made.report()["lost/cut_off"] > 9


def test_a_disk_that_fails_for_a_moment(make_shards, monkeypatch):
    shards, fails = make_shards(20, per_shard=10), iter([True, False, True, True, False])
    real = LocalFile._open

    def flaky(self):
        if next(fails, False):
            raise OSError(5, "Input/output error")
        return real(self)

    monkeypatch.setattr(LocalFile, "_open", flaky)
    made = lanes(shards)
    assert sorted(numbers(made.once())) == list(range(20))
    assert made.report() == {"read": 0, "retries": 3, "replaced": 0}


@pytest.mark.parametrize("behaviour", ["plain", "busy", "cut", "ranges"])
def test_http_gives_what_the_files_give(make_shards, server, behaviour):
    shards = make_shards(20, per_shard=5)
    local = lanes(shards, shuffle_samples=4)
    there = lanes([f"{server.url}/{behaviour}/{shard.name}" for shard in shards], shuffle_samples=4)
    for here, far in zip(stream(local, 12), stream(there, 12)):
        assert torch.equal(here.pop("image"), far.pop("image"))
        assert (here.pop("sample_id") != far.pop("sample_id")).all()  # the address is another
        assert here.keys() == far.keys()
        assert all(torch.equal(here[k], far[k]) if torch.is_tensor(here[k]) else here[k] == far[k] for k in here)
    assert not any(name.startswith("lost/") for name in there.report())
    assert server.asked[behaviour] >= 12 * 4 // 5 + (behaviour != "plain")


def test_a_server_that_stalls_is_left(make_shards, server, monkeypatch):
    (shard,) = make_shards(5)
    monkeypatch.setattr("sdtrain.data.steady.open_once.__wrapped__.__defaults__", (0.3,))
    start = time.monotonic()
    assert sorted(numbers(lanes([f"{server.url}/stall/{shard.name}"]).once())) == list(range(5))
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("behaviour", ["longer", "gone", "changing"])
def test_a_server_that_lies_is_told(make_shards, server, behaviour, caplog):
    (shard,) = make_shards(30)
    made = lanes([f"{server.url}/{behaviour}/{shard.name}?token=secret"])
    server.folder.joinpath(f"{shard.name}?token=secret").write_bytes(shard.read_bytes())
    found = numbers(made.once())
    assert found == list(range(len(found)))
    assert len(found) < 30 or behaviour == "longer"
    assert made.report()["lost/unreadable"] == 1
    assert server.url in caplog.text
    assert "secret" not in caplog.text


def test_a_server_may_not_send_us_elsewhere(make_shards, server):
    (shard,) = make_shards(5)
    with pytest.raises(ConfigError, match="metadata service"):
        list(lanes([f"{server.url}/metadata/{shard.name}"]).once())
    made = lanes([f"{server.url}/local/{shard.name}"])
    assert list(made.once()) == []
    assert made.report()["lost/unreadable"] == 1
    assert server.asked["local"] == 1  # it would be the same next time


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("pipe:touch ran", "would run a command.*allow_pipe"),
        (" PIPE:touch ran", "would run a command"),
        ("http://169.254.169.254/latest/x.tar", "metadata service"),
        ("ftp://host/x.tar", "only"),
        ("/nowhere/*.tar", "no shard matches"),
    ],
)
def test_addresses_that_are_refused(tmp_path, monkeypatch, address, message):
    monkeypatch.chdir(tmp_path)
    for options in ({"shards": address}, {"shards": [address]}):
        with pytest.raises(ConfigError, match=message):
            module(**options).splits  # noqa: B018
    assert not (tmp_path / "ran").exists()


def test_a_pipe_that_is_allowed(make_shards, tmp_path):
    shards = make_shards(20, per_shard=10)
    folder = shards[0].parent
    data = module(f"pipe:cat {folder}/x-00000{{0..1}}.tar", allow_pipe=True)
    assert data.splits == {"train": 10, "val": 10}
    assert len(set(data.captions("train") + data.captions("val"))) == 20
    made = lanes([f"pipe:sh -c 'cat {shards[0]}; exit 3'", f"pipe:{tmp_path}/no_such_program"])
    assert len(list(made.once())) == 9  # nobody knows whether the last one is whole
    assert made.report()["lost/unreadable"] == 2
    assert list(lanes([f"pipe:echo $(touch {tmp_path}/ran)"]).once()) == []
    assert not (tmp_path / "ran").exists()


def test_it_says_that_a_resume_is_statistical(make_shards, capsys):
    data = module(make_shards(20, per_shard=5)[0].parent)
    data.setup()
    data.setup()
    said = [line for line in capsys.readouterr().out.splitlines() if "statistically only" in line]
    assert len(said) == 1
    rows = []
    stage = type("Stage", (), {})()
    stage.context = type("Context", (), {"stage": "diffusion"})()
    stage.context.tracker = type("Tracker", (), {"log": rows.append})()
    data.trainer = type("Trainer", (), {"global_rank": 0, "world_size": 1, "lightning_module": stage})()
    data.train_dataloader()
    (row,) = rows
    assert row["resume"] == "statistical"
    assert data.accounting()["resumes_exactly"] == 0


def test_validation_is_some_of_the_shards(make_shards, capsys):
    shards = make_shards(60, per_shard=6)
    data = module(shards[0].parent, val=0.3, num_held_samples=1000)
    assert data.splits == {"train": 42, "val": 18}
    assert not set(data.captions("train")) & set(data.captions("val"))
    assert module([str(s) for s in reversed(shards)], val=0.3).captions("val") == data.captions("val")
    assert module(shards[0].parent, val=0.3, seed=99).captions("val") == data.captions("val")
    assert module(shards[0], val=[str(shards[1])]).captions("val") == [f"picture {n}" for n in range(6, 12)]
    assert module(shards[0]).splits == {"train": 6, "val": 6}
    assert "one shard only" in capsys.readouterr().out


def test_what_is_kept_can_be_loaded(make_shards):
    data = module(make_shards(40, per_shard=10)[0].parent, num_held_samples=7)
    assert data.splits == {"train": 7, "val": 7}
    batch = data.load("train", torch.tensor([5, 0, 5]), as_images=True)
    captions, attributes = data.captions("train"), data.attributes("train")
    assert batch["caption"] == [captions[5], captions[0], captions[5]]
    assert batch["attributes"] == [attributes[5], attributes[0], attributes[5]]
    assert batch["image"].shape == (3, 3, 16, 16)
    assert torch.equal(batch["image"], data.load("train", [5, 0, 5])["image"])
    with pytest.raises(ConfigError, match="no split 'held_out'"):
        data.captions("held_out")
    with pytest.raises(ConfigError, match="cache_latents=false"):
        data.attach_latents("train", torch.zeros(7, 2, 4, 2, 2))


@pytest.mark.parametrize(("num_workers", "num_accumulate"), [(0, 2), (2, 1)])
def test_a_run_is_stopped_and_goes_on_with_shards_it_has_not_begun(tmp_path, make_shards, num_workers, num_accumulate):
    shards = make_shards(120, per_shard=6)
    options = {"val": [str(shards[0])], "num_workers": num_workers, "reader": reader(shuffle_samples=2)}
    first = module(shards[0].parent, num_accumulate=num_accumulate, **options)
    half, trainer = fit(first, 5, None, num_accumulate)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    state = first.state_dict()
    assert state["step"] == 5
    assert state.keys() == {"step", "place"}
    second = module(shards[0].parent, num_accumulate=num_accumulate, **options)
    rest, _ = fit(second, 10, tmp_path / "half.ckpt", num_accumulate)
    assert [num for num, _ in half.seen + rest.seen] == [8 // num_accumulate] * 10 * num_accumulate
    keys = [key for _, keys in half.seen + rest.seen for key in keys]
    assert len(set(keys)) == len(keys) == 80
    assert second.state_dict()["step"] == 10
    assert second.state_dict()["place"] > state["place"]


def test_state_restored_after_the_loader_was_built(make_shards):
    data = module(make_shards(20, per_shard=5)[0].parent)
    data.train_dataloader()
    with pytest.raises(RuntimeError, match="after the training loader was built"):
        data.load_state_dict(data.state_dict())


def test_a_batch_that_does_not_divide(make_shards):
    with pytest.raises(ConfigError, match="8 samples a step do not divide"):
        module(make_shards(20, per_shard=5)[0].parent, num_accumulate=3).train_dataloader()


def test_an_error_in_a_worker_comes_as_it_is(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(b"")
    with pytest.raises(ConfigError, match="^data: 1 shards in a row have no sample"):
        next(iter(module(path, num_workers=1).train_dataloader()))


@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
def test_workers_that_are_not_forked(make_shards, start_method):
    shards = make_shards(40, per_shard=5)
    data = SequentialDataModule(str(shards[0].parent), image_size=16, num_workers=2, start_method=start_method)
    data.connect(0, 8)
    batches = list(itertools.islice(iter(data.train_dataloader()), 6))
    assert [len(batch["caption"]) for batch in batches] == [8] * 6
    assert data.accounting()["read"] >= 48


def test_crop_flip_and_caption_are_drawn_by_sample_and_epoch(make_shards, make_sample):
    """In whatever order the samples come."""
    columns = np.arange(20, dtype=np.uint8)[None, :, None].repeat(16, 0).repeat(3, 2)
    Image.fromarray(columns).save(picture := io.BytesIO(), "PNG")
    members = {"json": json.dumps({"many": ["a", "b", "c", "d"]}).encode(), "png": picture.getvalue()}
    shards, told = make_shards([make_sample(number, **members) for number in range(30)], per_shard=5), []
    for size in (1, 20):
        made = lanes(shards, crop="random", flip=True, caption=CaptionRule({"json.many": 1}), shuffle_samples=size)
        samples = itertools.islice(made.endless(0, 1), 120)
        told.append(
            {(s.sample_id, s.epoch): (s.caption, *s.picture.image.pixels[0, ::15, 0].tolist()) for s in samples}
        )
    both = told[0].keys() & told[1].keys()
    assert len(both) > 60
    assert all(told[0][sample] == told[1][sample] for sample in both)
    assert {caption for caption, *_ in told[0].values()} == set("abcd")
    edges = {(left, left + 15) for left in range(5)}
    assert {(left, right) for _, left, right in told[0].values()} == edges | {(right, left) for left, right in edges}


def test_the_config_builds_it(make_shards):
    folder = make_shards(20, per_shard=5)[0].parent
    rule = "data.reader.caption.fields={txt:0.5,json.text:0.5}"
    cfg = load_config(["data=sequential", f"data.shards={folder}", "data.reader.shuffle_samples=7", rule])
    data = build(cfg.data)
    data.connect(0, 4)
    assert data.splits == {"train": 15, "val": 5}
    assert data._lanes["train"].shuffle_samples == 7
    assert data._lanes["train"].caption == CaptionRule({"txt": 0.5, "json.text": 0.5})
    assert len(data.fingerprint) == 64
