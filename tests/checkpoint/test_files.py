"""What is written comes back bit for bit, and without pickle."""

import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sdtrain.checkpoint import files


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_same(left, right):
    assert left.dtype == right.dtype
    assert left.shape == right.shape
    assert torch.equal(bits(left), bits(right))


def make_checkpoint():
    torch.manual_seed(0)
    base = torch.randn(6, 4)
    state_dict = {
        "float": torch.randn(3, 5),
        "nan": torch.tensor([float("nan"), float("-inf"), -0.0]),
        "double": torch.randn(2, dtype=torch.float64),
        "bf16": torch.randn(3).bfloat16(),
        "half": torch.randn(3).half(),
        "long": torch.tensor(2**60 + 1),
        "bool": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "base": base,
        "tied": base,
        "rows": base[2:4],
        "transposed": base.T,
    }
    moments = {"float/step/0": torch.tensor(3.0), "float/exp_avg/0": torch.randn(3, 5)}
    optimizer = {"tensors": moments, "values": {"float/seen/0": 7}, "groups": [{"lr": 0.1}]}
    rest = {
        "global_step": 3,
        "optimizer_states": [optimizer],
        "lr_schedulers": [{"base_lrs": [0.1], "lr_lambdas": [None]}],
    }
    return {**rest, "state_dict": state_dict, "ema": {"base": base / 2, "tied": base}}


def test_round_trip_is_bit_exact(tmp_path):
    checkpoint = make_checkpoint()
    written = files.write(checkpoint, tmp_path)
    assert sorted(written) == sorted(tmp_path.iterdir())
    names = ["ema.safetensors", "model.safetensors", "optimizer_00000.safetensors", "training.pt"]
    assert sorted(path.name for path in written) == names
    back = files.read(tmp_path)
    assert set(back) == set(checkpoint)
    for part in ("state_dict", "ema"):
        assert set(back[part]) == set(checkpoint[part])
        for name, tensor in checkpoint[part].items():
            assert_same(back[part][name], tensor)
    (saved,), (optimizer,) = checkpoint["optimizer_states"], back["optimizer_states"]
    assert sorted(optimizer["tensors"].keys("float")) == ["exp_avg", "step"]
    for key in ("exp_avg", "step"):
        assert_same(optimizer["tensors"].read("float", key), saved["tensors"][f"float/{key}/0"])
    assert (optimizer["values"], optimizer["groups"]) == (saved["values"], saved["groups"])
    assert back["lr_schedulers"] == checkpoint["lr_schedulers"]
    assert back["global_step"] == 3


def test_tied_weights_stay_tied_and_any_reader_finds_them(tmp_path):
    def make():
        model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "out": nn.Linear(4, 5, bias=False)})
        model["out"].weight = model["embed"].weight
        return model

    model, other = make(), make()
    files.write({"state_dict": model.state_dict()}, tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == {"embed.weight", "out.weight"}
    other.load_state_dict(files.read(tmp_path)["state_dict"])
    assert other["out"].weight is other["embed"].weight
    assert_same(other["embed"].weight, model["embed"].weight)


def test_other_ranks_write_what_their_optimizer_holds(tmp_path):
    written = files.write(make_checkpoint(), tmp_path, rank=3)
    assert [path.name for path in written] == ["optimizer_00003.safetensors"] == [p.name for p in tmp_path.iterdir()]


def test_no_ema_no_file(tmp_path):
    files.write({"state_dict": {"x": torch.zeros(1)}}, tmp_path)
    assert not (tmp_path / "ema.safetensors").exists()
    assert "ema" not in files.read(tmp_path)


class Opaque:
    """A value that only pickle could bring back."""


def test_state_that_would_need_pickle_fails_the_save(tmp_path):
    with pytest.raises(pickle.UnpicklingError, match="Opaque"):
        files.write({"state_dict": {}, "callbacks": {"x": Opaque()}}, tmp_path)


def test_counted_bytes_are_about_those_on_the_disk(tmp_path):
    checkpoint = make_checkpoint()
    checkpoint["state_dict"]["large"] = torch.randn(100_000)
    files.write(checkpoint, tmp_path)
    num_bytes = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert num_bytes <= files.count_bytes(checkpoint) <= 1.1 * num_bytes
