"""Muon: momentum whose direction is orthogonalised (kellerjordan.github.io/posts/muon, 2024).

All matrices of one shape form one stack, so that a step is a few batched matmuls. Ranks own
whole matrices of a stack.

Legend: K = matrices of a stack, k = those of one rank (K / size, rounded up), M, N = rows and
columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat.runtime import Pending, World

# Quintic a x + b x^3 + c x^5, iterated 5 times: steep at zero instead of convergent, so that
# singular values end anywhere in about 0.7 .. 1.2 (coefficients of the post above).
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5
_NORM_EPSILON = 1e-7  # a zero gradient stays zero


@dataclass(frozen=True)
class MuonSettings:
    """What all matrices are updated with. `coefficients`: one (a, b, c) per iteration."""

    learning_rate: float = 0.02
    weight_decay: float = 0.0
    coefficients: tuple[tuple[float, float, float], ...] = NEWTON_SCHULZ
    dtype: torch.dtype = torch.bfloat16


@dataclass
class _Stack:
    """Matrices of one shape, and those of them that this rank owns."""

    names: list[str]
    parameters: list[Tensor]  # K of (M, N)
    start: int
    stop: int
    matrices_per_rank: int  # k
    momentum: Tensor  # (stop - start, M, N)
    transfer: Pending | None = None  # between the phases of a step
    gradient: Tensor | None = None  # (stop - start, M, N)

    @property
    def own(self) -> list[Tensor]:
        return [parameter.detach() for parameter in self.parameters[self.start : self.stop]]


class Muon:
    """Muon over stacks of matrices. Phases of a step as in `adamw.AdamW`."""

    def __init__(
        self,
        named_parameters: Sequence[tuple[str, Tensor]],
        settings: MuonSettings,
        *,
        world: World,
    ) -> None:
        self.settings = settings
        self._world = world
        by_shape: dict[torch.Size, list[tuple[str, Tensor]]] = {}
        for name, parameter in named_parameters:
            if parameter.ndim != 2:
                raise ValueError(f"Muon takes matrices; {name} has shape {tuple(parameter.shape)}")
            by_shape.setdefault(parameter.shape, []).append((name, parameter))
        self._stacks = [self._make_stack(members) for members in by_shape.values()]

    def _make_stack(self, members: Sequence[tuple[str, Tensor]]) -> _Stack:
        names = [name for name, _ in members]
        parameters = [parameter for _, parameter in members]
        share = -(-len(parameters) // self._world.size)
        start = min(self._world.rank * share, len(parameters))
        stop = min(start + share, len(parameters))
        momentum = parameters[0].new_zeros((stop - start, *parameters[0].shape))
        return _Stack(names, parameters, start, stop, share, momentum.detach())

    def reduce(self) -> None:
        """Start to sum the gradients over ranks; each rank receives its own matrices."""
        for stack in self._stacks:
            gradients = [p.grad for p in stack.parameters if p.grad is not None]
            padded = _stack_matrices(gradients, stack.matrices_per_rank * self._world.size)
            stack.transfer = self._world.start_reduce_scatter(padded)

    def squared_norm(self) -> Tensor:
        """Wait for `reduce`; the sum of squares of this rank's matrices, 0-d."""
        gradients = []
        for stack in self._stacks:
            assert stack.transfer is not None
            stack.gradient = stack.transfer.wait()[: stack.stop - stack.start]
            gradients.append(stack.gradient)
        return torch.stack(torch._foreach_norm(gradients)).square().sum()

    def update(self, *, scale: Tensor, lr_multiplier: float, momentum: float) -> None:
        """Update this rank's matrices with gradient * scale and start to gather the others.

        scale: 0-d float32. momentum: share of the running average that is kept, 0 .. 1.
        """
        for stack in self._stacks:
            gradient, stack.gradient = stack.gradient, None
            assert gradient is not None
            if len(gradient):
                gradient.mul_(scale)
                stack.momentum.lerp_(gradient, 1.0 - momentum)
                direction = gradient.lerp_(stack.momentum, momentum)  # Nesterov
                self._apply(stack.own, direction, lr_multiplier)
            if self._world.size > 1:
                padded = _stack_matrices(stack.own, stack.matrices_per_rank, like=stack.momentum)
                stack.transfer = self._world.start_all_gather(padded)

    def _apply(self, matrices: list[Tensor], direction: Tensor, lr_multiplier: float) -> None:
        """Move `matrices` against direction (len(matrices), M, N)."""
        rows, columns = direction.shape[-2:]
        learning_rate = self.settings.learning_rate * lr_multiplier
        update = orthogonalize(
            direction, coefficients=self.settings.coefficients, dtype=self.settings.dtype
        )
        if self.settings.weight_decay:
            torch._foreach_mul_(matrices, 1.0 - learning_rate * self.settings.weight_decay)
        # The entries of an orthogonal tall matrix have rms 1 / sqrt(M), of any other 1 / sqrt(N);
        # the factor makes both change a layer's output alike.
        change = learning_rate * max(1.0, rows / columns) ** 0.5
        torch._foreach_add_(matrices, list(update.to(direction.dtype).unbind()), alpha=-change)

    def finish(self) -> None:
        """Put every rank's matrices in place."""
        for stack in self._stacks:
            if self._world.size > 1:
                assert stack.transfer is not None
                gathered = stack.transfer.wait()[: len(stack.parameters)]
                matrices = [parameter.detach() for parameter in stack.parameters]
                torch._foreach_copy_(matrices, list(gathered.unbind()))
            stack.transfer = None

    def state(self) -> dict[str, tuple[Tensor, int]]:
        """What this rank keeps: name -> (matrix, 0: the first row is that of the whole tensor)."""
        return {
            f"{name}.momentum": (matrix, 0)
            for stack in self._stacks
            for name, matrix in zip(
                stack.names[stack.start : stack.stop], stack.momentum.unbind(), strict=True
            )
        }


def orthogonalize(
    matrices: Tensor,
    *,
    coefficients: Sequence[tuple[float, float, float]] = NEWTON_SCHULZ,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Replace the singular values of each matrix by values near 1, keeping its singular vectors.

    matrices: (K, M, N). Returns (K, M, N) in `dtype`, in which the iteration runs. The odd
    polynomial a X + b (X X^T) X + c (X X^T)^2 X acts on singular values alone.
    """
    norm = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)
    x: Tensor = (matrices / (norm + _NORM_EPSILON)).to(dtype)
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    if is_tall:  # the smaller of the two Gram matrices is cheaper
        x = x.mT
    for a, b, c in coefficients:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if is_tall else x


def _stack_matrices(matrices: list[Tensor], count: int, like: Tensor | None = None) -> Tensor:
    """The matrices as one stack (count, M, N), zero behind the last; shape of `like` if none."""
    if len(matrices) == count:
        return torch.stack(matrices)
    reference = matrices[0] if like is None else like
    padded = reference.new_zeros((count, *reference.shape[-2:]))
    for target, matrix in zip(padded, matrices, strict=False):  # the rest stays zero
        target.copy_(matrix)
    return padded
