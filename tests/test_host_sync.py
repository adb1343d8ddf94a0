"""Between two rows of the log no code of ours makes the host wait for the accelerator: counted in real training steps.

On a CPU a wait costs nothing and leaves no trace, so what would be one elsewhere is counted as it is called: `.item()`,
`.tolist()`, `.cpu()`, `bool(tensor)` and the like by a function mode, what C++ asks for by a dispatch mode. So is a
copy to the device that blocks, `.to(device)` or `torch.tensor(values, device=device)`: torch waits after it for all
that the device has to do. A call is ours if the first frame outside of torch that is not a plug-in of Lightning's is
ours; the framework's own are printed.
"""

import sys
from collections import Counter
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch import Callback
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

FRAMEWORK = Path(L.__file__).parent
TORCH = (str(Path(torch.__file__).parent), str(Path(sys.modules["contextlib"].__file__).parent), "<")
OURS = (str(Path(__file__).parents[1] / "sdtrain"), __file__)
WAITING = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__", "__format__"}
WAITING |= {"__repr__", "nonzero", "unique", "masked_select", "is_nonzero", "equal", "allclose", "argwhere", "bincount"}
WAITING_IN_C = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "bincount"}

# What reads no tensor of the accelerator's, or one that it has written a step ago.
ALLOWED = {
    "data/",  # batches before they are moved
    "callback/agreement.py",  # ranks agree over gloo, on the host
    "callback/guard.py:bad",  # the note of the step before, copied to the host while this one was computed
}


def culprit():
    """("ours" | "framework", "file:function") of the innermost call that is neither torch's nor a plug-in's."""
    frame = sys._getframe(2)
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if file.startswith(OURS) and name not in ("__torch_function__", "__torch_dispatch__"):
            return "ours", f"{file.removeprefix(OURS[0] + '/').removeprefix(str(Path(OURS[1]).parent) + '/')}:{name}"
        if file.startswith((str(FRAMEWORK / "pytorch" / "loops"), str(FRAMEWORK / "pytorch" / "trainer"))):
            return "framework", f"{Path(file).relative_to(FRAMEWORK)}:{name}"
        frame = frame.f_back
    return "framework", "?"


class Functions(TorchFunctionMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = (resolve_name(function) or getattr(function, "__name__", "")).rsplit(".", 1)[-1]
        if name in WAITING or self.is_blocking_copy(name, args, kwargs or {}):
            self.found[(*culprit(), name)] += 1
        return function(*args, **kwargs or {})

    @staticmethod
    def is_blocking_copy(name, args, kwargs):
        if not sys._getframe(2).f_code.co_filename.startswith(OURS):
            return False  # torch's own, between devices that are one
        if name == "to":
            places = [a for a in (*args[1:], *kwargs.values()) if isinstance(a, torch.device | str)]
            return bool(places) and not kwargs.get("non_blocking")
        return name in ("tensor", "as_tensor") and kwargs.get("device") is not None


class Operators(TorchDispatchMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in WAITING_IN_C or by_mask:
            self.found[(*culprit(), f"aten::{name}")] += 1
        return function(*args, **kwargs or {})


class Watch(Callback):
    """Counts from the start of one step to the start of another."""

    def __init__(self, first, last):
        self.first, self.last, self.modes, self.found = first, last, [], Counter()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.first and not self.modes:
            self.modes = [Functions(self.found), Operators(self.found)]
            for mode in self.modes:
                mode.__enter__()
        elif trainer.global_step == self.last:
            self.close()

    def close(self):
        while self.modes:
            self.modes.pop().__exit__(None, None, None)

    def on_exception(self, *_):
        self.close()


@pytest.fixture
def watched(train, tmp_path, monkeypatch):
    """watched(*overrides) -> what waited in four steps of each stage, by stage."""
    from sdtrain import session

    def run(*overrides, stages=("autoencoder", "diffusion")):
        watches, make = [], session.make_trainer

        def with_watch(*args):
            trainer = make(*args)
            watches.append(Watch(3, 7))
            trainer.callbacks.insert(0, watches[-1])
            return trainer

        monkeypatch.setattr(session, "make_trainer", with_watch)
        steps = [f"{stage}.trainer.max_steps=9" for stage in stages]
        quiet = [f"{stage}.callback.{name}.every_steps=9" for stage in stages for name in ("log", "checkpoint")]
        train(tmp_path / "run", *steps, *quiet, *overrides)
        return dict(zip(("recognition", *stages), [watch.found for watch in watches]))

    return run


def ours(found):
    return {
        f"{place} {name}": count
        for (owner, place, name), count in found.items()
        if owner == "ours" and not any(place.startswith(allowed) for allowed in ALLOWED)
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides", [[], ["autoencoder.trainer.num_accumulate=2", "diffusion.trainer.num_accumulate=2"]]
)
def test_no_step_of_ours_waits_for_the_accelerator(watched, overrides, capsys):
    found = watched(*overrides)
    for stage in ("autoencoder", "diffusion"):
        with capsys.disabled():
            for (owner, place, name), count in sorted(found[stage].items()):
                print(f"\n  {stage}: {owner} {place} {name}: {count / 4:g} a step", end="")
        assert ours(found[stage]) == {}, stage


PLANTED = {
    "item": lambda value: value.item(),
    "__bool__": lambda value: bool(value > 0),
    "__float__": lambda value: float(value),
    "__format__": lambda value: f"{value:.3f}",
    "cpu": lambda value: value.cpu(),
    "tolist": lambda value: value[None].tolist(),
    "to": lambda value: value.to(value.device),
    "tensor": lambda value: torch.tensor([1.0], device=value.device),
    "aten::index": lambda value: value[None][value[None] > 0],
    "aten::nonzero": lambda value: torch.where(value[None] > 0),
}


@pytest.mark.slow
def test_a_wait_that_is_added_is_found(watched, monkeypatch):
    from sdtrain.stage.base import Stage

    note = Stage.note

    def waiting(self, **values):
        for plant in PLANTED.values():
            plant(next(iter(values.values())).detach())
        note(self, **values)

    monkeypatch.setattr(Stage, "note", waiting)
    found = watched("stages=[autoencoder]", stages=("autoencoder",))["autoencoder"]
    assert {f"test_host_sync.py:<lambda> {name}" for name in PLANTED} <= ours(found).keys()
