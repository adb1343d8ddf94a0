"""What is read and written of DeepSpeed's ZeRO optimizers: each rank's pieces of weights, gradients and states."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Shard(NamedTuple):
    """A rank's piece of one parameter: a view of the float32 weights that learn, empty where it has none."""

    tensor: Tensor  # 1-D
    start: int  # in the flattened parameter
    shape: torch.Size  # of the whole parameter
    flat: Tensor  # the rank's piece of the parameter's group, which the optimizer knows
    offset: int  # of `tensor` in `flat`


def shards(zero: Any, named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Shard]:  # noqa: ANN401 DeepSpeed's
    """The piece of each learned parameter, by name."""
    find = _shard_of_weights if hasattr(zero, "fp32_partitioned_groups_flat") else _shard_of_states
    return {name: find(zero, p) for name, p in named if p.requires_grad}


def _shard_of_states(zero: Any, p: nn.Parameter) -> Shard:  # noqa: ANN401
    """Stages 1 and 2: a group is one flat tensor, cut evenly, wherever in a parameter a cut falls."""
    found = p._hp_mapping
    if found is None:
        return Shard(torch.empty(0, device=p.device), 0, p.shape, torch.empty(0), 0)
    flat, place = zero.single_partition_of_fp32_groups[found.param_group_index], found.get_hp_fragment_address()
    piece = flat.detach().narrow(0, place.start, place.numel)
    return Shard(piece, found.lp_fragment_address.start, p.shape, flat, place.start)


def _shard_of_weights(zero: Any, p: nn.Parameter) -> Shard:  # noqa: ANN401
    """Stage 3: each parameter is cut evenly, the last pieces filled up with zeros."""
    group, offset, num_padded = zero.grad_position[zero.get_param_id(p)]
    flat = zero.fp32_partitioned_groups_flat[group]
    start = zero._get_param_partition_rank(p) * num_padded
    num_own = min(max(p.ds_numel - start, 0), num_padded)
    return Shard(flat.detach().narrow(0, offset, num_own), start, p.ds_shape, flat, offset)


def gather(shard: Shard, device: torch.device) -> Tensor:
    """The whole of which every rank has its piece, to the bit: what others own is zero, as bits. All ranks together."""
    whole = torch.zeros(shard.shape.numel(), device=device)
    whole.narrow(0, shard.start, shard.tensor.numel()).copy_(shard.tensor)
    torch.distributed.all_reduce(whole.view(torch.int32))
    return whole.view(shard.shape)


def whole(tensor: Tensor) -> Tensor:
    """A buffer, or a parameter that does not learn: stage 3 has these in pieces, too. All ranks together."""
    if not hasattr(tensor, "ds_id"):
        return tensor
    from deepspeed.zero import GatheredParameters

    with GatheredParameters([tensor]):
        return tensor.detach().clone()


def cut(shard: Shard, whole: Tensor) -> Tensor:
    """This rank's piece of a whole tensor."""
    return whole.flatten().narrow(0, shard.start, shard.tensor.numel())


def optimizer_state(zero: Any, shards: Mapping[str, Shard]) -> dict[str, Any]:  # noqa: ANN401
    """What this rank's optimizer holds, in pieces by parameter name: see `checkpoint.pieces`."""
    tensors: dict[str, Tensor] = {}
    for name, shard in shards.items():
        state = zero.optimizer.state.get(shard.flat, {}) if shard.tensor.numel() else {}
        for key, value in state.items():
            if key != "step":
                tensors[f"{name}/{key}/{shard.start}"] = value.narrow(0, shard.offset, shard.tensor.numel())
            elif shard.start == 0:  # one number for all, told by the rank that has the first element
                tensors[f"{name}/{key}/0"] = torch.as_tensor(float(value))
    groups = [{k: v for k, v in group.items() if k != "params"} for group in zero.optimizer.param_groups]
    return {"tensors": tensors, "values": {}, "groups": groups}


def load_optimizer_state(zero: Any, shards: Mapping[str, Shard], saved: Mapping[str, Any]) -> None:  # noqa: ANN401
    """Takes this rank's pieces out of what one process or the ranks of any ZeRO saved."""
    for name, shard in shards.items():
        state, pieces = zero.optimizer.state[shard.flat], saved["tensors"]
        for key in pieces.keys(name) if shard.tensor.numel() else ():
            if key == "step":
                step = pieces.read(name, key).reshape(()).float()
                is_number = not isinstance(zero.optimizer, torch.optim.AdamW)  # DeepSpeed's own
                state[key] = int(step) if is_number else step.to(shard.flat.device)
                continue
            if key not in state:
                state[key] = torch.zeros_like(shard.flat)
            piece = pieces.read(name, key, shard.start, shard.start + shard.tensor.numel())
            state[key].narrow(0, shard.offset, piece.numel()).copy_(piece.flatten())
        if not state:
            del zero.optimizer.state[shard.flat]
    for group, values in zip(zero.optimizer.param_groups, saved["groups"]):
        group.update(values)


def gradient_groups(zero: Any) -> Iterator[tuple[str, list[Tensor]]]:  # noqa: ANN401
    """This rank's averaged gradients, by the name of their parameter group, once a step's last backward is done."""
    names = [group["name"] for group in zero.optimizer.param_groups]
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        flats, names = zero.fp32_partitioned_groups_flat, [names[i] for i in zero.sub_group_to_group_id.values()]
        on_host = zero.offload_optimizer
    else:
        flats, on_host = zero.single_partition_of_fp32_groups, zero.cpu_offload
    for i, name in enumerate(names):
        yield name, [flats[i].grad] if on_host else list(zero.averaged_gradients[i])


def refresh(zero: Any) -> None:  # noqa: ANN401
    """The weights that compute, from those that learn, after these were written to. All ranks together."""
    if not hasattr(zero, "fp32_partitioned_groups_flat"):
        zero.update_lp_params()
        return
    zero._partition_all_parameters()
    for group in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(group)
    if zero.persistent_parameters:  # small ones, that are whole on every rank
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
