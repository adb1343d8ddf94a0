"""A module inside another that is used and moved with it, but neither trained, nor averaged, nor saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn


class Frozen(nn.Module):
    """Holds a module out of its owner's parameters and state. The held one keeps its own precision.

    Args:
        module: put into evaluation mode, its gradients switched off.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__["module"] = module.requires_grad_(False).eval()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Frozen:
        self.module._apply(lambda held: held.to(fn(held).device), recurse)
        return super()._apply(fn, recurse)

    def forward(self, *args: Any) -> Any:  # noqa: ANN401 whatever the held one takes
        return self.module(*args)


def everything(module: nn.Module) -> Iterator[nn.Module]:
    """All modules inside of one, the frozen ones too."""
    for inner in module.modules():
        yield inner
        if isinstance(inner, Frozen):
            yield from everything(inner.module)
