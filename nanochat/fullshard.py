"""Weights, gradients and optimizer states in shards over all ranks: PyTorch's FSDP2 takes over.

The usual engine keeps whole weights on every rank (`precision`, `adamw`, `muon`). For a model that
does not fit one device like that, `--shard=full` hands storage and collectives to
`torch.distributed.fsdp.fully_shard`, and checkpoints to `torch.distributed.checkpoint`. What is
computed stays the same: AdamW works on the rows a rank has, Muon on gathered matrices, one by one.

Legend: a DTensor is a whole tensor of which this rank holds some rows, its local part.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Replicate
from torch.optim.adamw import adamw

from nanochat.adamw import AdamWSettings
from nanochat.common import UserError
from nanochat.gpt import GPT
from nanochat.muon import MuonSettings, update_direction, variance_shape, with_cautious_decay
from nanochat.optimizers import OptimizerConfig, settings_by_name
from nanochat.runtime import Runtime


class FullShard:
    """What `MasterWeights` and `Optimizer` are to the loop, over a model in shards.

    While hooks run, inside `gathered`, every rank has whole weights in the compute dtype.
    """

    def __init__(self, model: GPT, config: OptimizerConfig, runtime: Runtime) -> None:
        """Cut the fp32 `model`, equal on every rank, into shards in place."""
        world = runtime.world
        if world.size == 1:
            raise UserError("--shard=full is for several processes; start with torchrun")
        self._world = world
        mesh = init_device_mesh(runtime.device.type, (world.size,))
        policy = MixedPrecisionPolicy(
            param_dtype=runtime.compute_dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # rotary tables stay in fp32
        )
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        register_fsdp_forward_method(model, "hidden")
        self._modules = [m for m in model.modules() if isinstance(m, FSDPModule)]
        self._root = self._modules[0]
        self._named = dict(model.named_parameters())
        self._settings = settings_by_name(
            list(self._named), config, model_dim=model.config.n_embd, device=runtime.device
        )
        self._state: dict[str, DTensor] = {}
        for name, parameter in self._named.items():
            is_muon = isinstance(self._settings[name], MuonSettings)
            for key in ("momentum",) if is_muon else ("exp_avg", "exp_avg_sq"):
                self._state[f"{name}.{key}"] = _whole(torch.zeros_like(parameter.data))
            settings = self._settings[name]
            if isinstance(settings, MuonSettings) and settings.is_refined:
                zeros = torch.zeros(variance_shape(parameter.shape), device=runtime.device)
                self._state[f"{name}.variance"] = DTensor.from_local(zeros, mesh, [Replicate()])
        self._step = 0

    # ---- as the loop's weights ----------------------------------------------------------------

    def publish(self) -> None:
        """Nothing to do: every forward pass gathers what it needs."""

    def state_dict(self) -> dict[str, Tensor]:
        """Whole fp32 weights on the host of the main rank, one after the other; {} elsewhere."""
        whole: dict[str, Tensor] = {}
        for name, parameter in self._named.items():
            tensor = _whole(parameter.detach()).full_tensor()
            if self._world.is_main:
                whole[name] = tensor.cpu()
        return whole

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Whole weights on every rank: ranks may then use the model without one another."""
        for module in self._modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in self._modules:
                # The root keeps embedding and head: the loss uses the head behind the forward pass.
                is_root = module is self._root
                module.set_reshard_after_forward(not is_root, recurse=False)
                module.reshard()

    # ---- as the loop's optimizer --------------------------------------------------------------

    @torch.no_grad()
    def step(
        self,
        *,
        grad_scale: float,
        lr_multiplier: float,
        muon_momentum: float,
        decay_multiplier: float = 1.0,
        grad_clip: float = 0.0,
        skip_overflow: bool = False,
    ) -> Tensor:
        """As `optimizers.Optimizer.step`."""
        gradients = {name: _local(p.grad) for name, p in self._named.items()}
        # FSDP leaves means over ranks, the loop counts on sums.
        grad_scale *= self._world.size
        squares = torch.stack(torch._foreach_norm(list(gradients.values()))).square().sum()
        norm = self._world.all_reduce_(squares).sqrt() * grad_scale
        if skip_overflow and not norm.isfinite():
            return norm
        scale = torch.full_like(norm, grad_scale)
        if grad_clip > 0:
            scale = scale * (grad_clip / norm).clamp(max=1.0)
        self._step += 1
        for name, gradient in gradients.items():
            settings = self._settings[name]
            gradient.mul_(scale)
            if isinstance(settings, MuonSettings):
                decay = settings.weight_decay * decay_multiplier
                self._muon(name, gradient, settings, lr_multiplier, muon_momentum, decay)
            else:
                self._adamw(name, gradient, settings, lr_multiplier)
        return norm

    def _adamw(
        self, name: str, gradient: Tensor, settings: AdamWSettings, lr_multiplier: float
    ) -> None:
        adamw(
            [_local(self._named[name].detach())],
            [gradient],
            [_local(self._state[f"{name}.exp_avg"])],
            [_local(self._state[f"{name}.exp_avg_sq"])],
            [],
            [torch.full((), self._step - 1.0, device=gradient.device)],
            fused=True,
            foreach=False,
            amsgrad=False,
            beta1=settings.beta1,
            beta2=settings.beta2,
            lr=settings.learning_rate * lr_multiplier,
            weight_decay=settings.weight_decay,
            eps=settings.epsilon,
            maximize=False,
        )

    def _muon(
        self,
        name: str,
        gradient: Tensor,
        settings: MuonSettings,
        lr_multiplier: float,
        momentum: float,
        decay: float,
    ) -> None:
        state, parameter = self._state[f"{name}.momentum"], self._named[name].detach()
        buffer = _local(state)
        buffer.lerp_(gradient, 1.0 - momentum)
        nesterov = DTensor.from_local(
            gradient.lerp_(buffer, momentum),
            state.device_mesh,
            state.placements,
            shape=state.shape,
            stride=state.stride(),
        ).full_tensor()
        # Every rank orthogonalises every matrix and keeps its rows: time for memory.
        variance = self._state.get(f"{name}.variance")
        direction = update_direction(
            nesterov[None], settings, None if variance is None else _local(variance)[None]
        )[0]
        own = DTensor.from_local(direction, state.device_mesh, [Replicate()], run_check=False)
        rows, columns = parameter.shape
        learning_rate = settings.learning_rate * lr_multiplier
        weights = _local(parameter)
        update = _local(own.redistribute(state.device_mesh, state.placements))
        if settings.is_refined:
            update = with_cautious_decay(update, weights, decay)
        else:
            weights.mul_(1.0 - learning_rate * decay)
        weights.sub_(update, alpha=learning_rate * max(1.0, rows / columns) ** 0.5)

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for parameter in self._named.values():
            parameter.grad = None

    # ---- checkpoints --------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write weights and states, each rank its shards. OSError on all ranks if one has one."""
        try:
            save(self._tensors(), checkpoint_id=folder)
        except CheckpointException as error:  # no Exception: nobody who writes files catches it
            causes = [cause for cause, _ in error.failures.values()]
            problem = next((cause for cause in causes if isinstance(cause, OSError)), None)
            raise problem or OSError(str(error)) from error

    def load(self, folder: Path) -> None:
        """Read what any number of ranks has saved, each rank its shards."""
        tensors = self._tensors()
        load(tensors, checkpoint_id=folder)  # in place
        self._step = int(tensors["step"])

    def _tensors(self) -> dict[str, Any]:
        weights = {f"weight.{name}": p.detach() for name, p in self._named.items()}
        return {**weights, **self._state, "step": torch.tensor(self._step)}


def _local(tensor: Any) -> Tensor:
    """Rows of a DTensor that are here, as a view."""
    return _whole(tensor).to_local()


def _whole(tensor: Any) -> DTensor:
    assert isinstance(tensor, DTensor)  # FSDP2 has turned every parameter into one
    return tensor
