"""Parameters -> groups -> AdamW and Muon; every parameter in exactly one group."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanochat.adamw import AdamW, AdamWSettings
from nanochat.common import UserError
from nanochat.muon import Muon, MuonSettings
from nanochat.runtime import World, has_fast_bf16

_REFERENCE_DIM = 768  # the width at which the AdamW learning rates were tuned
_GATE_LR = 0.2  # of smear and backout, whatever the batch
_STEP = "step"  # 0-d entry of the state: equal on every rank, all else is sharded


@dataclass(frozen=True)
class OptimizerConfig:
    """Learning rates and decay of every group."""

    embedding_lr: float = 0.2
    """AdamW learning rate of the token embedding, at width 768 (scaled by width^-0.5)."""
    unembedding_lr: float = 0.004
    """AdamW learning rate of the output head, at width 768 (scaled by width^-0.5)."""
    matrix_lr: float = 0.02
    """Muon learning rate of every matrix in the blocks."""
    scalar_lr: float = 0.5
    """AdamW learning rate of the weights of the embedding in each layer; others derive from it."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the embedding and the head, if not refined."""
    matrix_weight_decay: float = 0.0
    """Decoupled weight decay of the matrices."""
    adam_beta1: float = 0.8
    """AdamW: share of the running mean that is kept at each step."""
    adam_beta2: float = 0.95
    """AdamW: share of the running mean square that is kept at each step, if not refined."""
    is_refined: bool = False
    """Muon's refinements, and AdamW with moments and decay of each group's own."""


class Optimizer:
    """AdamW and Muon behind one step; gradients are summed over ranks inside."""

    def __init__(
        self,
        named_parameters: Sequence[tuple[str, nn.Parameter]],
        adamw: Sequence[AdamW],
        muon: Sequence[Muon],
        *,
        world: World,
    ) -> None:
        self._named_parameters = list(named_parameters)
        self._adamw = list(adamw)
        self._muon = list(muon)
        self._world = world
        self._step = 0

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
        """Update all parameters from their `.grad`, this rank's sum over targets; uses it up.

        grad_scale: 1 / number of targets over all ranks. decay_multiplier: of the decay of
        matrices. grad_clip: bound on the norm of the scaled gradient over all parameters and
        ranks, 0 for none. skip_overflow: update nothing when that norm is not finite, which
        costs a look at it. Returns the norm before clipping, 0-d on the device: reading it is the
        caller's choice.
        """
        for name, parameter in self._named_parameters:
            if parameter.grad is None:
                raise ValueError(f"parameter {name} has no gradient; was backward called?")
        parts: list[AdamW | Muon] = [*self._adamw, *self._muon]
        for part in parts:
            part.reduce()
        squares = torch.stack([part.squared_norm() for part in parts]).sum()
        norm = self._world.all_reduce_(squares).sqrt() * grad_scale
        if skip_overflow and not norm.isfinite():  # on all ranks, for all have the same norm
            for part in parts:
                part.drop()
            return norm
        scale = torch.full_like(norm, grad_scale)
        if grad_clip > 0:
            scale = scale * (grad_clip / norm).clamp(max=1.0)
        self._step += 1
        for muon in self._muon:
            muon.update(
                scale=scale,
                lr_multiplier=lr_multiplier,
                momentum=muon_momentum,
                decay_multiplier=decay_multiplier,
            )
        for adamw in self._adamw:
            adamw.update(scale=scale, lr_multiplier=lr_multiplier, step=self._step)
        for part in parts:
            part.finish()
        return norm

    def zero_grad(self) -> None:
        """Drop the gradients; the next backward allocates them instead of adding to zeros."""
        for _, parameter in self._named_parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """State of this rank, "<parameter>.<state>" -> rows, not copied; "step" is on every rank.

        Over ranks, equal names are consecutive rows of one tensor: concatenated in rank order
        they are the whole, which `load_state_dict` takes at any world size.
        """
        state = {name: tensor for name, (tensor, _) in self._own_state().items()}
        return {_STEP: torch.tensor(self._step), **state}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore from this rank's `state_dict` or from the whole tensors of all ranks."""
        own = self._own_state()
        missing = sorted(({_STEP} | own.keys()) - state.keys())
        if missing:
            raise UserError(
                f"the optimizer state lacks {missing[0]!r} and {len(missing) - 1} more: it belongs "
                "to another model or number of processes"
            )
        for name, (target, start) in own.items():
            source = state[name]
            if len(source) != len(target):
                source = source[start : start + len(target)]
            if source.shape != target.shape:
                raise UserError(
                    f"optimizer state {name!r} has shape {tuple(state[name].shape)}, which does "
                    f"not hold the {tuple(target.shape)} at row {start}: another model's state"
                )
            target.copy_(source)
        self._step = int(state[_STEP])

    def _own_state(self) -> dict[str, tuple[Tensor, int]]:
        parts: list[AdamW | Muon] = [*self._adamw, *self._muon]
        return {name: rows for part in parts for name, rows in part.state().items()}


def build_optimizer(
    named_parameters: Sequence[tuple[str, nn.Parameter]],
    config: OptimizerConfig,
    *,
    model_dim: int,
    world: World,
) -> Optimizer:
    """Deal parameters to groups by name: block matrices to Muon, all others to AdamW.

    Parameters are fp32 masters, equal on every rank. Raises ValueError for a parameter that
    no group takes or that comes twice.
    """
    named_parameters = list(named_parameters)
    if len({id(parameter) for _, parameter in named_parameters}) < len(named_parameters):
        raise ValueError("a parameter is listed twice; tied weights are not supported")
    device = named_parameters[0][1].device
    names = [name for name, _ in named_parameters]
    chosen = settings_by_name(names, config, model_dim=model_dim, device=device)
    # By identity: groups that happen to have equal settings stay apart.
    members: dict[int, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in named_parameters:
        if parameter.dtype != torch.float32:
            raise ValueError(f"parameter {name} is {parameter.dtype}; masters are float32")
        members.setdefault(id(chosen[name]), []).append((name, parameter))
    adamw: list[AdamW] = []
    muon: list[Muon] = []
    for group in members.values():
        settings = chosen[group[0][0]]
        if isinstance(settings, AdamWSettings):
            adamw.append(AdamW(group, settings, world=world))
        else:
            muon.append(Muon(group, settings, world=world))
    return Optimizer(named_parameters, adamw, muon, world=world)


def settings_by_name(
    names: Sequence[str], config: OptimizerConfig, *, model_dim: int, device: torch.device
) -> dict[str, AdamWSettings | MuonSettings]:
    """What each parameter is updated with; names of one group share one object.

    Raises ValueError for a name that no group takes.
    """
    groups = _groups(config, model_dim=model_dim, device=device)
    chosen: dict[str, AdamWSettings | MuonSettings] = {}
    for name in names:
        taken = [settings for pattern, settings in groups if re.fullmatch(pattern, name)]
        if len(taken) != 1:
            raise ValueError(f"parameter {name} belongs to {len(taken)} optimizer groups, not 1")
        chosen[name] = taken[0]
    return chosen


def _groups(
    config: OptimizerConfig, *, model_dim: int, device: torch.device
) -> list[tuple[str, AdamWSettings | MuonSettings]]:
    """Pattern of parameter names -> settings. Patterns exclude one another."""
    width_scale = (model_dim / _REFERENCE_DIM) ** -0.5

    def table(learning_rate: float, beta2: float, decay: float) -> AdamWSettings:
        """Of an embedding or the head; beta2 and decay are those of the refined optimizer."""
        refined = config.is_refined
        return AdamWSettings(
            learning_rate=learning_rate,
            beta1=config.adam_beta1,
            beta2=beta2 if refined else config.adam_beta2,
            weight_decay=decay if refined else config.weight_decay,
        )

    def scalars(learning_rate: float, decay: float = 0.0, beta1: float = 0.8) -> AdamWSettings:
        return AdamWSettings(learning_rate, beta1=beta1, beta2=0.95, weight_decay=decay)

    embedding_lr = config.embedding_lr * width_scale
    matrices = MuonSettings(
        learning_rate=config.matrix_lr,
        weight_decay=config.matrix_weight_decay,
        dtype=torch.bfloat16 if has_fast_bf16(device) else torch.float32,
        is_refined=config.is_refined,
    )
    return [
        (r"lm_head\.weight", table(config.unembedding_lr * width_scale, 0.96, 0.01)),
        (r"transformer\.wte\.weight", table(embedding_lr, 0.995, 0.001)),
        (r"value_embeds\.\d+\.weight", table(0.5 * embedding_lr, 0.995, 0.01)),
        (r"resid_lambdas", scalars(0.01 * config.scalar_lr, decay=0.05)),
        (r"x0_lambdas", scalars(config.scalar_lr, beta1=0.96)),
        (r"smear_gate\.weight|smear_lambda|backout_lambda", scalars(_GATE_LR)),
        (r"transformer\.h\.\d+\..*\.weight", matrices),
    ]
