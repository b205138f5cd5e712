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

from nanochat.kernels import training
from nanochat.runtime import Pending, World

# Quintic a x + b x^3 + c x^5, iterated 5 times: steep at zero instead of convergent, so that
# singular values end anywhere in about 0.7 .. 1.2 (coefficients of the post above).
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5
_NORM_EPSILON = 1e-7  # a zero gradient stays zero
# Polar Express (arXiv:2505.16932): for each iteration the coefficients that bring the worst
# singular value nearest to 1, made for 5 of them with a safety margin of 2 %.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
_POLAR_MARGIN, _POLAR_EPSILON = 1.01, 1e-6  # rounding must not lift a singular value above 1
_LEAST_NORM, _LEAST_VARIANCE = 1e-6, 1e-10


@dataclass(frozen=True)
class MuonSettings:
    """What all matrices are updated with. `coefficients`: one (a, b, c) per iteration.

    is_refined: equal rows before, Polar Express, and equal norm and variance after the
    orthogonalisation (`refined_direction`); weights decay only where the update shrinks them.
    """

    learning_rate: float = 0.02
    weight_decay: float = 0.0
    coefficients: tuple[tuple[float, float, float], ...] = NEWTON_SCHULZ
    dtype: torch.dtype = torch.bfloat16
    is_refined: bool = False
    beta2: float = 0.9
    """Share of the running variance that is kept at each step, if refined."""


@dataclass
class _Stack:
    """Matrices of one shape, and those of them that this rank owns."""

    names: list[str]
    parameters: list[Tensor]  # K of (M, N)
    start: int
    stop: int
    matrices_per_rank: int  # k
    momentum: Tensor  # (stop - start, M, N)
    variance: Tensor | None  # (stop - start, M, 1) or (stop - start, 1, N), if refined
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
        momentum, variance = momentum.detach(), None
        if self.settings.is_refined:
            variance = momentum.new_zeros(variance_shape(momentum.shape))
        return _Stack(names, parameters, start, stop, share, momentum, variance)

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

    def drop(self) -> None:
        """Forget what `reduce` has brought, instead of the phases behind it."""
        for stack in self._stacks:
            stack.gradient = stack.transfer = None

    def update(
        self,
        *,
        scale: Tensor,
        lr_multiplier: float,
        momentum: float,
        decay_multiplier: float = 1.0,
    ) -> None:
        """Update this rank's matrices with gradient * scale and start to gather the others.

        scale: 0-d float32. momentum: share of the running average that is kept, 0 .. 1.
        decay_multiplier: of the weight decay.
        """
        for stack in self._stacks:
            gradient, stack.gradient = stack.gradient, None
            assert gradient is not None
            if len(gradient):
                gradient.mul_(scale)
                stack.momentum.lerp_(gradient, 1.0 - momentum)
                direction = gradient.lerp_(stack.momentum, momentum)  # Nesterov
                direction = update_direction(direction, self.settings, stack.variance)
                decay = self.settings.weight_decay * decay_multiplier
                self._apply(stack.own, direction, lr_multiplier, decay)
            if self._world.size > 1:
                padded = _stack_matrices(stack.own, stack.matrices_per_rank, like=stack.momentum)
                stack.transfer = self._world.start_all_gather(padded)

    def _apply(
        self, matrices: list[Tensor], update: Tensor, lr_multiplier: float, decay: float
    ) -> None:
        """Move `matrices` against update (len(matrices), M, N)."""
        rows, columns = update.shape[-2:]
        learning_rate = self.settings.learning_rate * lr_multiplier
        # The entries of an orthogonal tall matrix have rms 1 / sqrt(M), of any other 1 / sqrt(N);
        # the factor makes both change a layer's output alike.
        change = learning_rate * max(1.0, rows / columns) ** 0.5
        if self.settings.is_refined:
            update = with_cautious_decay(update, torch.stack(matrices), decay)
        elif decay:
            torch._foreach_mul_(matrices, 1.0 - learning_rate * decay)
        torch._foreach_add_(matrices, list(update.unbind()), alpha=-change)

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
        kept: dict[str, tuple[Tensor, int]] = {}
        for stack in self._stacks:
            for key, tensor in (("momentum", stack.momentum), ("variance", stack.variance)):
                own = [] if tensor is None else tensor.unbind()
                for name, matrix in zip(stack.names[stack.start : stack.stop], own, strict=False):
                    kept[f"{name}.{key}"] = (matrix, 0)
        return kept


def update_direction(nesterov: Tensor, settings: MuonSettings, variance: Tensor | None) -> Tensor:
    """What matrices (K, M, N) are moved against, in their dtype. Advances `variance` if refined."""
    if settings.is_refined:
        assert variance is not None
        return refined_direction(nesterov, variance, beta2=settings.beta2, dtype=settings.dtype)
    orthogonal = orthogonalize(nesterov, coefficients=settings.coefficients, dtype=settings.dtype)
    return orthogonal.to(nesterov.dtype)


def orthogonalize(
    matrices: Tensor,
    *,
    coefficients: Sequence[tuple[float, float, float]] = NEWTON_SCHULZ,
    dtype: torch.dtype = torch.bfloat16,
    margin: float = 1.0,
    epsilon: float = _NORM_EPSILON,
) -> Tensor:
    """Replace the singular values of each matrix by values near 1, keeping its singular vectors.

    matrices: (K, M, N). Returns (K, M, N) in `dtype`, in which the iteration runs. The odd
    polynomial a X + b (X X^T) X + c (X X^T)^2 X acts on singular values alone, from the norm times
    1 / margin on.
    """
    norm = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)
    return _iterate((matrices / (norm * margin + epsilon)).to(dtype), coefficients)


def _iterate(x: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
    """The iterations of `orthogonalize` on matrices (K, M, N) of norms up to 1, in their dtype.

    Uses x up.
    """
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:  # the smaller of the two Gram matrices is cheaper
        x = x.mT
    if _kernel_takes(x):
        x = training.newton_schulz_(x.contiguous(), coefficients)
    else:
        for a, b, c in coefficients:
            gram = x @ x.mT
            polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if is_tall else x


def _kernel_takes(x: Tensor) -> bool:
    """Whether the kernel iterates on x (K, M, N), which works on a matrix with one thread."""
    is_for_all_threads = x.size(0) >= torch.get_num_threads()
    return is_for_all_threads and training.fits(x, x.mT) and training.load() is not None


def refined_direction(
    matrices: Tensor, variance: Tensor, *, beta2: float, dtype: torch.dtype
) -> Tensor:
    """Orthogonalised matrices (K, M, N) whose rows, norms and lines are evened out.

    In this order: each row is brought to the root mean square of all rows' norms
    (arXiv:2603.28254); the matrix is orthogonalised, and scaled to the norm of an orthogonal one,
    sqrt(min(M, N)) (arXiv:2602.21545); each line is divided by its running root mean square, and
    the norm restored (arXiv:2510.05491). All but the second are factors of lines, found from the
    lines' norms alone: what this costs on a CPU is passes over the matrices.

    variance: (K, M, 1) or (K, 1, N), see `variance_shape`; updated in place.
    """
    norms = torch.linalg.vector_norm(matrices, dim=-1, keepdim=True)
    common = norms.square().mean(dim=-2, keepdim=True).sqrt()
    even = common / norms.clamp_min(_LEAST_NORM)
    scale = even / (_norm(norms * even) * _POLAR_MARGIN + _POLAR_EPSILON)
    orthogonal = _iterate((matrices * scale).to(dtype), POLAR_EXPRESS)

    along = -1 if variance.size(-1) == 1 else -2
    norms = torch.linalg.vector_norm(orthogonal, dim=along, keepdim=True, dtype=matrices.dtype)
    scale = min(matrices.shape[-2:]) ** 0.5 / _norm(norms).clamp_min(_LEAST_NORM)
    norms = norms * scale
    variance.lerp_(norms.square() / matrices.size(along), 1.0 - beta2)
    even = variance.clamp_min(_LEAST_VARIANCE).rsqrt()
    restored = _norm(norms) / _norm(norms * even).clamp_min(_LEAST_VARIANCE)
    refined: Tensor = orthogonal * (scale * even * restored)  # in the dtype of the factors
    return refined


def _norm(of_lines: Tensor) -> Tensor:
    """Norms of whole matrices (K, 1, 1), from those of their lines."""
    norms: Tensor = torch.linalg.vector_norm(of_lines, dim=(-2, -1), keepdim=True)
    return norms


def variance_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Of the variances of matrices (..., M, N): one for each line along the longer side."""
    *batch, rows, columns = shape
    return (*batch, rows, 1) if rows >= columns else (*batch, 1, columns)


def with_cautious_decay(update: Tensor, weights: Tensor, decay: float) -> Tensor:
    """The update plus the decay of those weights that it shrinks (arXiv:2510.12402)."""
    shrinks = (update * weights).ge_(0.0)
    return torch.addcmul(update, weights, shrinks, value=decay)


def _stack_matrices(matrices: list[Tensor], count: int, like: Tensor | None = None) -> Tensor:
    """The matrices as one stack (count, M, N), zero behind the last; shape of `like` if none."""
    if len(matrices) == count:
        return torch.stack(matrices)
    reference = matrices[0] if like is None else like
    padded = reference.new_zeros((count, *reference.shape[-2:]))
    for target, matrix in zip(padded, matrices, strict=False):  # the rest stays zero
        target.copy_(matrix)
    return padded
