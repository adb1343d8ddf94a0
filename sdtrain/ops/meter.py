"""What a computation on a CUDA device would take, found by running it on meta tensors: no numbers, only shapes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention
# CUDA's autocast (ATen/autocast_mode.h), as far as anything here calls it.
_LOWER = set("linear conv2d matmul __matmul__ mm bmm addmm baddbmm einsum scaled_dot_product_attention".split())
_FLOAT32 = set("group_norm layer_norm rms_norm softmax log_softmax exp log pow rsqrt norm mse_loss l1_loss".split())
_FLOAT32 |= {"interpolate"}


class Meter(TorchDispatchMode):
    """Counts what runs inside of it: `flops`, two a multiply-accumulate of products, convolutions and attention, and
    `peak_bytes`, the most memory that was held at once by what was made inside.

    Attention is counted as the fused kernel that CUDA has, whose scores are never held; that its backward makes them
    again is not counted as work.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.live_bytes = self.peak_bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 torch's signature
        types: Any,  # noqa: ANN401, ARG002
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        for tensor in tree_leaves((args, kwargs)):
            self._hold(tensor, is_new=False)
        out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            self._hold(tensor, is_new=True)
        self.flops += _flops(func._overloadpacket, args, kwargs, out)
        return out

    def _hold(self, value: Any, is_new: bool) -> None:  # noqa: ANN401 a leaf of any type
        """Counts a storage as long as it lives. One that was there before is known and counts nothing."""
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        if id(storage) not in self._known:
            num_bytes = storage.nbytes() if is_new else 0
            self._known.add(id(storage))
            self.live_bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            weakref.finalize(storage, self._release, id(storage), num_bytes)

    def _release(self, name: int, num_bytes: int) -> None:
        self._known.discard(name)
        self.live_bytes -= num_bytes


def _flops(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:  # noqa: ANN401
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_backward:
        return 2 * sdpa_flop_count(*(tensor.shape for tensor in args[1:4]))
    return flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0


class _Cuda(TorchFunctionMode):
    """Makes meta tensors go the ways of CUDA's: mixed precision, and fused attention."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = dtype
        self.copies: dict[int, Tensor] = {}  # of weights, kept to the end of the forward
        self.is_forward = True

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401 torch's signature
        types: Any,  # noqa: ANN401, ARG002
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        dtype = self.dtype if name in _LOWER else torch.float32 if name in _FLOAT32 else None
        if self.dtype is not None and dtype is not None:
            args, kwargs = tree_map(lambda x: self._cast(x, dtype), (args, kwargs))
        if name == "scaled_dot_product_attention":
            return _FLASH(*args[:3])[0]  # a mask changes neither work nor memory worth counting
        return func(*args, **kwargs)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:  # noqa: ANN401 an argument of any type
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        is_kept = self.is_forward and value.is_leaf and value.requires_grad and torch.is_grad_enabled()
        if not is_kept:
            return value.to(dtype)
        if id(value) not in self.copies:
            self.copies[id(value)] = value.to(dtype)
        return self.copies[id(value)]

    @contextmanager
    def autocast(self, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True) -> Iterator[None]:  # noqa: ARG002
        """Stands in for `torch.autocast`, which does not know the meta device."""
        before, self.dtype = self.dtype, (dtype or self.dtype) if enabled else None
        yield
        self.dtype = before


def measure(function: Callable[[Meter], Tensor | None], dtype: torch.dtype | None = None) -> Meter:
    """Runs a function of meta tensors as CUDA would, under autocast to `dtype`, and the backward of the loss that it
    gives, if any; gives the meter that both ran under.

    The function may read the meter as it goes.
    """
    meter, cuda = Meter(), _Cuda(dtype)
    with patch.object(torch, "autocast", cuda.autocast), torch.device("meta"), cuda, meter:
        loss = function(meter)
        cuda.copies.clear()
        cuda.is_forward = False
        if loss is not None:
            # Not `loss.backward()`, inside of which checkpointed blocks would be done again without `cuda`.
            engine = torch.autograd.Variable._execution_engine
            engine.run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, accumulate_grad=True)
    return meter
