"""FID and its like while a model trains: its definition, who draws what, and in real runs the tool's number."""

import importlib.util
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from sdtrain.errors import ConfigError
from sdtrain.metric.distance import fid
from sdtrain.metric.distribution import SEED_STRIDE, Distribution, network_of, shares
from sdtrain.metric.moments import FeatureMoments
from sdtrain.metric.random_features import RandomFeatures
from sdtrain.tracker.jsonl import read_rows

ROOT = Path(__file__).parents[2]


def test_shares_are_all_places_once_and_as_many_for_every_rank():
    for num, size, world in [(11, 4, 2), (1, 4, 3), (64, 8, 4), (9, 3, 1)]:
        found = [list(shares(num, size, rank, world)) for rank in range(world)]
        assert len({len(own) for own in found}) == 1
        together = sorted(share for own in found for share in own)
        assert [place for _, places in together for place in places] == list(range(num))
        assert [number for number, _ in together] == list(range(len(together)))
        assert all(places for _, places in together[: -(-num // size)])


class Data:
    """Held-out pictures of random colours, and which were asked for."""

    def __init__(self, num=7):
        self.splits, self.asked = {"val": num}, []
        self.images = torch.rand(num, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1

    def load(self, split, places, as_images):
        assert split == "val"
        assert as_images
        self.asked.append(list(places))
        return {"image": self.images[list(places)], "caption": [f"number {i}" for i in places]}


def drawn(batch, seed):
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in batch["caption"]])


def test_a_stage_s_figure_is_of_the_drawn_beside_the_held_out():
    from sdtrain.stage.autoencoder import to_uint8
    from sdtrain.stage.comparison import compare

    extractor, data = RandomFeatures(num_features=8), Data()
    distribution = Distribution(extractor, ["fd", "precision_recall"], num_images=10, batch=4, seed=5)
    found = compare(distribution, data, drawn, "cpu", 0, 1)

    def moments(pictures):
        seen = FeatureMoments(8)
        seen.update(extractor(torch.from_numpy(pictures).permute(0, 3, 1, 2)), torch.arange(len(pictures)))
        return seen.reduce()

    fake = np.concatenate([drawn({"caption": "x" * n}, 5 + c * SEED_STRIDE) for c, n in enumerate((4, 4, 2))])
    assert found.keys() == {"fd", "precision", "recall"}
    assert found["fd"] == pytest.approx(fid(moments(to_uint8(data.images)), moments(fake)), rel=1e-4)
    assert data.asked == [[0, 1, 2, 3], [4, 5, 6], [0, 1, 2, 3], [4, 5, 6, 0], [1, 2, 0, 0]]
    data.asked.clear()
    assert compare(distribution, data, drawn, "cpu", 0, 1) == found
    assert data.asked == [[0, 1, 2, 3], [4, 5, 6, 0], [1, 2, 0, 0]]  # the real ones are known


def test_a_rank_without_a_share_draws_with_the_others_and_does_not_count(monkeypatch):
    from sdtrain.stage import comparison

    """Guard: the batch that is filled up: ranks that draw fewer run their network less often, and ZeRO-3 waits."""
    data, seeds = Data(), []
    distribution = Distribution(RandomFeatures(num_features=8), ["fd"], num_images=5, batch=4)
    distribution.real = "known"
    distribution.figures = lambda moments: {"fd": moments}
    monkeypatch.setattr(comparison.Distribution, "see", lambda *_: Counted())
    for rank, num in ((0, 4), (1, 1), (2, 0)):
        found = comparison.compare(distribution, data, lambda b, s: seeds.append(s) or drawn(b, s), "cpu", rank, 3)
        assert found == {"fd": num}
    assert seeds == [0, SEED_STRIDE, 2 * SEED_STRIDE]
    assert [len(places) for places in data.asked] == [4, 4, 4]


class Counted:
    num = 0

    def add(self, pictures, places):
        self.num += len(places)

    def reduce(self):
        return self.num


def test_mistakes_are_told_before_anything_is_drawn(tmp_path):
    network = RandomFeatures()
    for values, expected in [
        ({"metric": ["fid"]}, "metric.distribution.metric: fid is of Inception's features"),
        ({"metric": ["beauty"]}, "there is no metric 'beauty'"),
        ({"metric": ["fd"], "num_images": 1}, "num_images=1: give at least 2"),
        ({"metric": ["fd"], "reference": str(tmp_path / "absent")}, "metric.distribution.reference: "),
    ]:
        with pytest.raises(ConfigError, match=expected):
            Distribution(network, **values)


def test_stored_moments_stand_for_the_held_out_pictures(tmp_path):
    network, seen = RandomFeatures(num_features=8), FeatureMoments(8)
    seen.update(torch.randn(9, 8), torch.arange(9))
    seen.reduce().save(tmp_path / "real.safetensors", network_of(network))
    distribution = Distribution(network, ["fd"], reference=str(tmp_path / "real.safetensors"))
    assert distribution.real.num_images == 9


def test_one_word_turns_the_fid_on_and_an_absent_file_is_named():
    from sdtrain.build import build
    from sdtrain.config import load_config

    assert "distribution" not in load_config(["+experiment=smoke"]).diffusion.metric
    chosen = load_config(["+experiment=smoke", "metric@diffusion.metric=diffusion_fid"]).diffusion.metric
    assert chosen.keys() == {"caption_match", "memorisation", "distribution"}
    with pytest.raises(ConfigError, match=r"no file weights/pt_inception.*github.com/mseitzer"):
        build(chosen.distribution)


FEW = """
metric@diffusion.metric=diffusion_fd diffusion.metric.caption_match=null diffusion.metric.memorisation=null
diffusion.metric.distribution.num_images=22 +diffusion.metric.distribution.batch=4
diffusion.callback.evaluate={_target_:sdtrain.callback.evaluate.Evaluate,every_steps:2}
autoencoder.trainer.max_steps=1
""".split()


def told(run):
    """The figure of each step, as the rows have it; the last one is the summary's."""
    found = {row["step"]: row["val/fd"] for row in read_rows(run / "metrics.jsonl") if "val/fd" in row}
    assert list(found) == [2, 4]
    summary = json.loads((run / "summary.json").read_text())["diffusion"]
    assert summary["fd"] == found[4] != found[2]
    assert summary["looking"]["seconds"]["validation"] > 0
    return found[4]


def by_the_tool(run, capsys, tmp_path):
    """The same samples, by tools/evaluate.py in one process."""
    import yaml

    spec = importlib.util.spec_from_file_location("evaluate", ROOT / "tools" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    protocol = yaml.safe_load((ROOT / "configs" / "evaluation" / "quick.yaml").read_text())
    (tmp_path / "quick.yaml").write_text(yaml.safe_dump({**protocol, "batch": 4}))
    options = ["--protocol", tmp_path / "quick.yaml", "--num-images", 22, "--metric", "fd"]
    capsys.readouterr()
    assert module.main([str(argument) for argument in [run, *options]]) == 0
    (result,) = json.loads(Path(capsys.readouterr().out.splitlines()[-1]).read_text())["results"]
    return result["random_features/fd"]


@pytest.mark.slow
def test_a_run_tells_the_tool_s_number(train, capsys, tmp_path):
    run = train(tmp_path / "run", *FEW)
    assert by_the_tool(run, capsys, tmp_path) == pytest.approx(told(run), rel=1e-5)


@pytest.mark.slow
def test_two_ranks_tell_the_tool_s_number(command, capsys, tmp_path):
    arguments, options = command(tmp_path / "run", *FEW, "devices=2", "strategy=ddp")
    done = subprocess.run(arguments, **options, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert by_the_tool(tmp_path / "run", capsys, tmp_path) == pytest.approx(told(tmp_path / "run"), rel=1e-5)
