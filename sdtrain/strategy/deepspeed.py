"""DeepSpeed's ZeRO (Rajbhandari et al. 2020) under Lightning, on CUDA and, with gloo, on a CPU."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn
from typing_extensions import override

from sdtrain.errors import ConfigError
from sdtrain.strategy import zero
from sdtrain.strategy.commit_io import Saving
from sdtrain.strategy.loss_scale import LossScale

_AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class Autocast(DeepSpeedPrecision):
    """Mixed precision as on one device: float32 weights under autocast. DeepSpeed's own casts weights and batches."""

    def __init__(self, precision: Any, device_type: str) -> None:  # noqa: ANN401 Lightning's literal
        super().__init__(precision)
        self.device_type = device_type
        self.scaler = LossScale() if precision == "16-mixed" else None
        self.sharded: nn.Module | None = None  # under stage 3

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    @override
    def convert_input(self, data: Any) -> Any:
        return data

    @override
    def backward(self, tensor: Tensor, model: LightningModule, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        engine = model.trainer.model
        if self.scaler is not None:
            engine.optimizer.override_loss_scale(self.scaler.scale)
        # Lightning has divided the loss by the number of micro-batches; DeepSpeed would do it again.
        engine.backward(tensor, *args, scale_wrt_gas=False, **kwargs)

    @override
    @contextmanager
    def train_step_context(self) -> Iterator[None]:
        yield  # the engine does in its forward what is done below

    @override
    @contextmanager
    def forward_context(self) -> Iterator[None]:
        dtype = _AUTOCAST[self.precision]
        modules = [] if self.sharded is None else list(self.sharded.modules())
        with nullcontext() if dtype is None else torch.autocast(self.device_type, dtype):
            for module in modules:  # one that looks at another's weights gets them whole
                module._parameters._in_forward = True
            yield
            for module in modules:
                module._parameters._in_forward = False


class DeepSpeed(DeepSpeedStrategy):
    """Optimizer states, gradients and weights in as many pieces as there are devices, by the stage of ZeRO.

    A precision is what it is elsewhere: `bf16-mixed` and `16-mixed` are float32 weights under autocast.

    Args:
        zero_stage: 1 shards the optimizer's states, 2 the gradients too, 3 the weights too.
        offload: the optimizer's states and its work on the host.
        accelerator: the run's.

    Raises:
        ConfigError: where DeepSpeed is not installed.
    """

    has_whole_gradients = False  # `callback.gradient` asks: they are in pieces, a parameter's on several ranks

    def __init__(self, zero_stage: Literal[1, 2, 3], offload: bool = False, accelerator: str = "auto") -> None:
        if find_spec("deepspeed") is None:
            raise ConfigError(
                "strategy=deepspeed_*: the package deepspeed is not installed (it is for Linux alone):"
                " pip install 'sdtrain[deepspeed]', or write strategy=ddp"
            )
        if accelerator == "cpu" or not torch.cuda.is_available():
            os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is first imported
        self.zero_stage, self.offload = zero_stage, offload
        self._factors: dict[str, Tensor] = {}
        self._idle: Sequence[str] = ()
        super().__init__(stage=zero_stage, offload_optimizer=offload, logging_level=logging.ERROR)

    @property
    def precision_plugin(self) -> Precision:
        """The trainer's, with batches left alone."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if isinstance(plugin, DeepSpeedPrecision):
            if plugin.precision not in _AUTOCAST:
                raise ConfigError(
                    f"precision={plugin.precision}: DeepSpeed's weights learn in float32; write precision=bf16-mixed"
                )
            plugin = Autocast(plugin.precision, "cpu" if isinstance(self.accelerator, CPUAccelerator) else "cuda")
        self._precision_plugin = plugin

    @property
    @override
    def root_device(self) -> torch.device:
        # DeepSpeed wants an index, also of a CPU.
        return torch.device("cpu", 0) if isinstance(self.accelerator, CPUAccelerator) else super().root_device

    @override
    def setup_environment(self) -> None:
        if not isinstance(self.accelerator, CPUAccelerator | CUDAAccelerator):
            raise ConfigError("strategy=deepspeed_* runs on CUDA and on a CPU; write accelerator=cpu, or strategy=auto")
        if self.precision_plugin.precision == "16-mixed" and self.root_device.type == "cpu":
            raise ConfigError("precision=16-mixed does not exist on a CPU; write precision=bf16-mixed or 32-true")
        DDPStrategy.setup_environment(self)  # past Lightning's check that there is CUDA

    @override
    def setup_distributed(self) -> None:
        warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*deprecated", category=FutureWarning)
        if isinstance(self.accelerator, CUDAAccelerator):
            super().setup_distributed()
            return
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        return False  # as elsewhere: the module, the data and the callbacks are restored before training is set up

    @override
    def _format_config(self) -> None:
        trainer = self.lightning_module.trainer
        num_portions = trainer.world_size * trainer.accumulate_grad_batches
        # DeepSpeed would guess it from a loader that has no batch size.
        self.config["train_micro_batch_size_per_gpu"] = self.lightning_module.context.global_batch_size // num_portions
        self.config["fp16"] = self.config["bf16"] = {"enabled": False}
        if self.zero_stage < 3 and not self.offload:
            self.config["zero_optimization"]["compute_grad_norm"] = False  # ours is of each part
        super()._format_config()

    @override
    def _init_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        optimizer, config = super()._init_optimizers()
        if self.offload:
            optimizer = _on_host(optimizer)
            config.scheduler.optimizer = optimizer
        optimizer.register_step_pre_hook(self._scale_gradients)
        return optimizer, config

    @override
    def init_deepspeed(self) -> None:
        from deepspeed import DeepSpeedEngine

        before = self.lightning_module.__dict__.get("_engine")
        if before is not None:  # this module's last fit; its hooks would go on reducing gradients
            before.destroy()
        for tensor in (*self.lightning_module.parameters(), *self.lightning_module.buffers()):
            tensor.data = tensor.data.to(self.root_device)
            torch.distributed.broadcast(tensor.data, 0)
        # Its own broadcasts look at tensors as bytes, which they cannot at scalars and at channels-last ones.
        for p in self.lightning_module.parameters() if self.zero_stage == 3 else ():
            p.data = p.data.flatten().view(p.shape)
        with patch.object(DeepSpeedEngine, "_broadcast_model"):
            super().init_deepspeed()
        self.lightning_module.__dict__["_engine"] = self.model
        if self.zero_stage == 3:
            self.precision_plugin.sharded = self.lightning_module
        # Its forward switches off an autocast that it was not told of. Told so only now, it leaves gradients alone.
        dtype = _AUTOCAST[self.precision_plugin.precision]
        self.model._config.torch_autocast_enabled = dtype is not None
        self.model._config.torch_autocast_dtype = dtype

    @cached_property
    def shards(self) -> dict[str, zero.Shard]:
        """This rank's piece of each learned parameter, by name; the same names in the same order on every rank."""
        return zero.shards(self.model.optimizer, self.lightning_module.named_parameters())

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights that learn, whole, on the first rank's host. All ranks together."""
        names = {id(p): name for name, p in self.lightning_module.named_parameters()}
        state = {}
        for key, value in self.lightning_module.state_dict(keep_vars=True).items():
            shard = self.shards.get(names.get(id(value), ""))
            whole = zero.whole(value) if shard is None else zero.gather(shard, self.root_device)
            if self.is_global_zero:
                state[key] = whole.detach().cpu()
        return state

    @override
    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        scaler = self.precision_plugin.scaler
        return zero.optimizer_state(optimizer, self.shards) | {"scaler": scaler and scaler.state_dict()}

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str, storage_options: Any = None) -> None:
        # A CheckpointIO is never asked by Lightning's; and every rank has a file to write, together with the others.
        saving = Saving(**storage_options or {})._replace(in_background=False)
        self.checkpoint_io.save(checkpoint, Path(filepath), saving, self.global_rank, self._exchange)

    def _exchange(self, own: Any) -> list[Any]:  # noqa: ANN401 anything that can be pickled
        told: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(told, own)
        return told

    @override
    def load_checkpoint(self, checkpoint_path: str, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if any(hasattr(p, "ds_id") for p in self.lightning_module.parameters()):
            return  # a module's second fit under stage 3: its pieces are filled below
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        (saved,) = checkpoint["optimizer_states"]
        with torch.no_grad():  # the weights have come with the module, but for a second fit under stage 3
            for name, shard in self.shards.items():
                shard.tensor.copy_(zero.cut(shard, checkpoint["state_dict"][name]))
            zero.load_optimizer_state(self.model.optimizer, self.shards, saved)
            zero.refresh(self.model.optimizer)
        if self.precision_plugin.scaler is not None and saved.get("scaler"):
            self.precision_plugin.scaler.load_state_dict(saved["scaler"])

    def norms(self) -> dict[str, Tensor]:
        """The norm of each part's gradients over all ranks, after a step's last backward. All ranks together."""
        squares: dict[str, Tensor] = {}
        for name, gradients in zero.gradient_groups(self.model.optimizer):
            own = [norm.to(self.root_device) for norm in torch._foreach_norm(gradients, 2, torch.float32)]
            square = torch.stack(own).square().sum() if own else torch.zeros((), device=self.root_device)
            squares[name] = squares.get(name, 0.0) + square
        total = self.reduce(torch.stack(list(squares.values())), reduce_op="sum")
        return dict(zip(squares, total.sqrt() / self.model.optimizer.loss_scale))

    def clip(self, max_norm: float | None, idle: Sequence[str]) -> dict[str, Tensor]:
        """As `norms`, of the parts that are not idle. The step that follows clips each part by its own.

        Args:
            max_norm: null for no clipping.
            idle: parts that the step leaves as they are, without counting it.
        """
        by_part = self.norms()
        norms = torch.stack([*by_part.values()])
        factors = torch.ones_like(norms) if max_norm is None else (max_norm / (norms + 1e-6)).clamp(max=1.0)
        scaler = self.precision_plugin.scaler
        if scaler is not None and not by_part.keys() <= set(idle):  # a step that is left out says nothing of the scale
            scaler.update(is_finite := bool(norms.isfinite().all()))
            idle = idle if is_finite else list(by_part)
        self._factors, self._idle = dict(zip(by_part, factors)), idle
        return {name: norm for name, norm in by_part.items() if name not in idle}

    def _scale_gradients(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """ZeRO steps one group after the other, its gradients in float32 then, and unscaled."""
        if any(group["name"] in self._idle for group in optimizer.param_groups if group["params"]):
            optimizer.param_groups = []  # of this one call: ZeRO puts them back
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad.mul_(self._factors[group["name"]].to(p.device))


def _on_host(optimizer: torch.optim.AdamW) -> torch.optim.Optimizer:
    """DeepSpeed's AdamW for the host, over the same parameter groups."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    made = DeepSpeedCPUAdam(optimizer.param_groups, adamw_mode=True)
    made.param_groups = optimizer.param_groups
    return made
