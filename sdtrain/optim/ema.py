"""Moving averages of weights, each rank of what it owns, updated once an optimizer step by foreach operations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sdtrain.errors import ConfigError
from sdtrain.optim.averaging import Exponential, Power

CHUNK_BYTES = 1 << 28  # so much of 16-bit weights is held in 32 bits at once


class EMA:
    """Averages of named parameters in float32, one for each profile; the first is the one that `swapped` shows.

    Under DeepSpeed a rank averages what it owns and no more: its part of the 32-bit weights that ZeRO keeps.

    Args:
        named: what is averaged.
        profiles: how much each step counts.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], profiles: Sequence[Exponential | Power]) -> None:
        pairs = list(named)
        self.names, self.parameters = [name for name, _ in pairs], [p for _, p in pairs]
        self.profiles, self.num_updates = list(profiles), 0
        self._owned = [owned(p) for p in self.parameters]
        self._sources = [own.values for own in self._owned]
        self.shadows = [[v.detach().to(torch.float32, copy=True) for v in self._sources] for _ in self.profiles]
        self._chunks = _chunks(self._sources)

    @torch.no_grad()
    def update(self) -> None:
        """shadow <- kept shadow + (1 - kept) weights. Nothing in it waits for the device."""
        self.num_updates += 1
        if self._chunks is None:
            self._blend(slice(None), self._sources)
        else:
            for part in self._chunks:
                self._blend(part, [source.float() for source in self._sources[part]])

    def _blend(self, part: slice, values: list[Tensor]) -> None:
        for profile, shadow in zip(self.profiles, self.shadows):
            torch._foreach_lerp_(shadow[part], values, 1.0 - profile.kept(self.num_updates))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The module holds the first average inside the block, and its own bits again after it. All ranks together."""
        places = [own.place for own in self._owned]
        before = [place.data for place in places]
        release(self.parameters)
        try:
            for place, own, shadow in zip(places, self._owned, self.shadows[0]):
                place.data = own.shown(shadow)
            gather_persistent(self.parameters)
            yield
        finally:
            release(self.parameters)
            for place, data in zip(places, before):
                place.data = data
            gather_persistent(self.parameters)

    def state_dict(self, is_kept: bool = True) -> dict[str, dict[str, Tensor]]:
        """Of each profile, by the stem of its file: the averages by parameter name, whole, and what `load` checks.

        All ranks together; those that do not keep what is gathered give an empty one. What every rank owns is not
        copied.
        """
        state: dict[str, dict[str, Tensor]] = {}
        for number, (profile, shadow) in enumerate(zip(self.profiles, self.shadows)):
            values = {"num_updates": torch.tensor(self.num_updates)}
            if profile.length is not None:
                values["length"] = torch.tensor(profile.length, dtype=torch.float64)
            for name, own, mine in zip(self.names, self._owned, shadow):
                whole = own.whole(mine)
                if is_kept:
                    values[name] = whole if own.start is None else whole.cpu()
            if is_kept:
                state[self.stem(number)] = values
        return state

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Each rank takes what it owns. Strict: every profile and parameter, nothing else.

        Raises:
            ConfigError: for averages of other lengths than these.
            KeyError: for a missing or unexpected name.
        """
        there = {stem: float(values.get("length", 0)) for stem, values in state.items()}
        here = {self.stem(number): profile.length or 0 for number, profile in enumerate(self.profiles)}
        if there != here:
            raise ConfigError(
                f"callback.ema: the checkpoint holds {_told(there)}, this run asks for {_told(here)}; they are counted "
                "from the start of training, so restore what it was, or start a new output_dir"
            )
        for number, shadow in enumerate(self.shadows):
            values = dict(state[self.stem(number)])
            self.num_updates = int(values.pop("num_updates"))
            values.pop("length", None)
            if values.keys() != set(self.names):
                raise KeyError(f"EMA does not fit: {sorted(values.keys() ^ set(self.names))[:4]}")
            for name, own, mine in zip(self.names, self._owned, shadow):
                own.take(values[name], mine)

    def stem(self, number: int) -> str:
        """The name of a profile's file: "ema" of the first, "ema_0.100" of another of length 0.1."""
        return "ema" if number == 0 else f"ema_{self.profiles[number].length:.3f}"


class Owned(NamedTuple):
    """What a rank owns of a parameter, at full precision where its engine keeps that beside 16 bits.

    Args:
        values: the parameter itself, or a flat part of it.
        start: of that part in the flattened parameter; None where every rank owns all of it.
        shape: the parameter's own.
        place: where its weights are: the parameter or, under ZeRO-3, this rank's part of it.
    """

    values: Tensor
    start: int | None
    shape: torch.Size
    place: Tensor

    def whole(self, part: Tensor) -> Tensor:
        """The parameter's size out of all ranks' parts, which do not overlap."""
        if self.start is None:
            return part
        num = self.shape.numel()
        flat = torch.zeros(max(num, self.start + part.numel()), dtype=part.dtype, device=self.place.device)
        flat[self.start : self.start + part.numel()] = part
        flat = flat[:num]  # without what pads the last part
        torch.distributed.all_reduce(flat)
        return flat.view(self.shape)

    def shown(self, part: Tensor) -> Tensor:
        """An average as what stands in `place`."""
        is_in_parts = self.place.shape != self.shape
        return (part if is_in_parts else self.whole(part)).to(self.place.device, self.place.dtype)

    def take(self, whole: Tensor, part: Tensor) -> None:
        """Fills a part from the whole."""
        if self.start is None:
            part.copy_(whole)
        else:
            mine = whole.flatten()[self.start : self.start + part.numel()]
            part[: mine.numel()].copy_(mine)


def owned(p: nn.Parameter) -> Owned:
    """What this rank owns of a parameter, under any strategy."""
    if hasattr(p, "ds_tensor"):  # ZeRO-3
        group, first, num = p._z3_optimizer.grad_position[p._z3_optimizer.get_param_id(p)]
        flat = p._z3_optimizer.fp32_partitioned_groups_flat[group].detach()
        return Owned(flat[first : first + num], torch.distributed.get_rank() * num, p.ds_shape, p.ds_tensor)
    if hasattr(p, "_hp_mapping"):  # ZeRO-1 and 2
        part = p._hp_mapping
        if part is None:
            return Owned(torch.empty(0, device=p.device), 0, p.shape, p)
        return Owned(part.hp_fragment.detach(), part.lp_fragment_address.start, p.shape, p)
    return Owned(p, None, p.shape, p)


def release(parameters: Sequence[nn.Parameter]) -> None:
    """ZeRO-3 frees what it has gathered: it would hide what stands in the parts."""
    if hasattr(parameters[0], "ds_tensor"):
        parameters[0]._z3_optimizer.empty_partition_cache()


def gather_persistent(parameters: Sequence[nn.Parameter]) -> None:
    """ZeRO-3 holds small parameters whole, and modules look at them where it does not see it; `release` freed them."""
    if hasattr(parameters[0], "ds_tensor"):
        kept = parameters[0]._z3_optimizer.persistent_parameters
        if kept:
            kept[0].all_gather(kept)


def _chunks(sources: Sequence[Tensor]) -> list[slice] | None:
    """Runs of at most CHUNK_BYTES in 32 bits; None where nothing has fewer bits."""
    if all(source.dtype == torch.float32 for source in sources):
        return None
    cuts, size = [0], 0
    for number, source in enumerate(sources):
        size += 4 * source.numel()
        if size > CHUNK_BYTES and number > cuts[-1]:
            cuts.append(number)
            size = 4 * source.numel()
    return [slice(first, last) for first, last in zip(cuts, [*cuts[1:], len(sources)])]


def _told(lengths: Mapping[str, float]) -> str:
    return f"lengths {[*lengths.values()]}" if any(lengths.values()) else "an exponential average"
