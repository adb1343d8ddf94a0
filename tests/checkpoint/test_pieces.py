"""What one number of ranks saved in pieces, any other reads, to the bit."""

import pytest
import torch
from safetensors.torch import save_file

from sdtrain.checkpoint.pieces import Pieces, by_name, by_number, file_name
from sdtrain.errors import RunError


def save(directory, whole, cuts):
    """`whole` in pieces between `cuts`, each by a rank of its own."""
    for rank, (start, stop) in enumerate(zip(cuts, cuts[1:])):
        save_file({f"conv.weight/exp_avg/{start}": whole.flatten()[start:stop].clone()}, directory / file_name(rank))


@pytest.mark.parametrize("cuts", [[0, 24], [0, 5, 24], [0, 12, 24], [0, 1, 2, 23, 24]])
@pytest.mark.parametrize("wanted", [[0, 24], [0, 7, 24], [0, 5, 5, 12, 24]])
def test_any_cut_is_read_by_any_other(tmp_path, cuts, wanted):
    whole = torch.randn(2, 3, 4)
    save(tmp_path, whole, cuts)
    pieces = Pieces(tmp_path)
    assert pieces.keys("conv.weight") == ["exp_avg"]
    assert pieces.keys("conv.bias") == []
    assert torch.equal(pieces.read("conv.weight", "exp_avg").flatten(), whole.flatten())
    parts = [pieces.read("conv.weight", "exp_avg", a, b) for a, b in zip(wanted, wanted[1:]) if a < b]
    assert torch.equal(torch.cat(parts), whole.flatten())


def test_what_was_saved_whole_keeps_its_shape_and_can_be_cut(tmp_path):
    whole = torch.randn(2, 3, 4)
    save_file({"w/exp_avg/0": whole}, tmp_path / file_name(0))
    assert torch.equal(Pieces(tmp_path).read("w", "exp_avg"), whole)
    assert torch.equal(Pieces(tmp_path).read("w", "exp_avg", 5, 20), whole.flatten()[5:20])


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_missing_piece_is_told(tmp_path, missing):
    save(tmp_path, torch.randn(24), [0, 8, 16, 24])
    (tmp_path / file_name(missing)).unlink()
    with pytest.raises(RunError, match="exp_avg of conv.weight") as raised:
        Pieces(tmp_path).read("conv.weight", "exp_avg", 0, 24)
    assert raised.value.exit_code == 3


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_an_optimizer_by_name_and_back(tmp_path, num_ranks):
    def make():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.Linear(4, 4)).to(memory_format=torch.channels_last)
        groups = [{"params": [*net[1].parameters()], "lr": 0.1, "name": "b"}, {"params": [*net[0].parameters()]}]
        named = [(f"{i}.{n}", p) for i in (1, 0) for n, p in net[i].named_parameters()]
        return net, torch.optim.AdamW(groups, lr=0.01, fused=True), named

    def step(net, optimizer):
        torch.manual_seed(1)
        for p in net.parameters():
            p.grad = torch.randn_like(p) if p.requires_grad else None
        optimizer.step()

    net, optimizer, named = make()
    net[1].bias.requires_grad_(False)  # has no state
    step(net, optimizer)
    saved = by_name(optimizer.state_dict(), [name for name, _ in named])
    for rank in range(num_ranks):
        part = {}
        for full, tensor in saved["tensors"].items():
            flat, (start, stop) = tensor.flatten(), (tensor.numel() * r // num_ranks for r in (rank, rank + 1))
            if start < stop:
                part[f"{full.removesuffix('/0')}/{start}"] = tensor if num_ranks == 1 else flat[start:stop].clone()
        save_file({key: tensor.contiguous() for key, tensor in part.items()}, tmp_path / file_name(rank))
    other_net, other, other_named = make()
    other_net[1].bias.requires_grad_(False)
    other_net.load_state_dict(net.state_dict())
    other.load_state_dict(by_number(saved | {"tensors": Pieces(tmp_path)}, other.state_dict(), other_named))
    assert other.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    assert other.state_dict()["state"].keys() == {0, 2, 3}
    step(net, optimizer)
    step(other_net, other)
    for p, q in zip(net.parameters(), other_net.parameters()):
        assert torch.equal(p, q)
