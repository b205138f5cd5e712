"""A model that computes in a lower precision: fp32 master weights, and layers of another kind.

Every matrix exists twice: the model holds it in the compute dtype, and the optimizer updates an
fp32 original.
Casting once per optimizer step, not once per use, is what makes bf16 pay on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from nanochat.fused_native import has_bias
from nanochat.gpt import GPT


class MasterWeights:
    """The fp32 parameters of a GPT, whose matrices are replaced by copies in the compute dtype.

    Gradients of a copy are added to its original in fp32 as soon as autograd has made them, so
    accumulation over
    micro-batches loses nothing to rounding. With an fp32 compute dtype originals and model are the
    same tensors.
    """

    def __init__(self, model: GPT, compute_dtype: torch.dtype) -> None:
        """Take over the fp32 `model`: its Linear weights become `compute_dtype`."""
        self._named: dict[str, nn.Parameter] = {}
        self._masters: list[Tensor] = []
        self._copies: list[Tensor] = []
        matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
        for name, parameter in model.named_parameters():
            if compute_dtype == torch.float32 or id(parameter) not in matrices:
                self._named[name] = parameter
                continue
            master = nn.Parameter(parameter.detach().clone())
            parameter.data = parameter.data.to(compute_dtype)
            parameter.register_post_accumulate_grad_hook(_MoveGradientTo(master))  # type: ignore[no-untyped-call]
            self._named[name] = master
            self._masters.append(master.data)
            self._copies.append(parameter.data)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """fp32 parameters under the model's names, in the model's order."""
        return list(self._named.items())

    def publish(self) -> None:
        """Copy the originals into the model, after an optimizer step or a load."""
        if self._masters:
            torch._foreach_copy_(self._copies, self._masters)

    def gathered(self) -> AbstractContextManager[None]:
        """Nothing to do: every rank has the whole model at any time; see `fullshard`."""
        return nullcontext()

    def state_dict(self) -> dict[str, Tensor]:
        """fp32 weights by name; the tensors themselves, not copies."""
        return {name: parameter.data for name, parameter in self._named.items()}

    def load_state_dict(self, weights: dict[str, Tensor]) -> None:
        """Take fp32 weights by name and publish them."""
        for name, parameter in self._named.items():
            parameter.data.copy_(weights[name])
        self.publish()


def convert_linears(
    model: nn.Module, kind: type[nn.Linear], takes: Callable[[str, nn.Linear], bool]
) -> int:
    """Make plain bias-free Linear layers ones of `kind`, in place, around the same weights.

    takes: asked with a layer's name within its parent, and the layer. Returns how many there were.
    """
    chosen = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and not has_bias(child) and takes(name, child)
    ]
    for parent, name, child in chosen:
        converted = kind(1, 1, bias=False, device="meta")
        converted.in_features, converted.out_features = child.in_features, child.out_features
        converted.weight = child.weight
        setattr(parent, name, converted)
    return len(chosen)


class _MoveGradientTo:
    """Autograd hook: add the gradient to the master's, in fp32, and free it."""

    def __init__(self, master: nn.Parameter) -> None:
        self.master = master

    def __call__(self, copy: Tensor) -> None:
        assert copy.grad is not None
        if self.master.grad is None:
            self.master.grad = copy.grad.float()
        else:
            self.master.grad += copy.grad
        copy.grad = None
