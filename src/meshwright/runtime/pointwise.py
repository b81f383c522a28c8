"""Pointwise pieces of a layer that keep for backward no more than fused kernels do.

PyTorch composes them of single operations on CPU and keeps every result between: one copy of the
input more for a norm and for a gated activation. Where it has the fused kernel (norms on CUDA), or
makes one (``torch.compile``), that runs. Shapes: h features, any leading dimensions.
"""

# torch annotates some functions only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportIncompatibleMethodOverride=false
from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

_aten: Any = torch.ops.aten


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = _wide(x)
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = (length.square_() / x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, weight)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, scale, weight = ctx.saved_tensors
        grad = _wide(grad)
        unit = _wide(x) * scale
        along = grad * unit
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = along.flatten(0, -2).sum(0).to(weight.dtype)
        mean = along.mul_(weight).mean(-1, keepdim=True)
        of_x = torch.mul(grad, weight, out=along).sub_(unit.mul_(mean)).mul_(scale)
        return of_x.to(x.dtype), of_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return ``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, ``[..., h]``.

    Computed in at least float32; keeps ``x`` and one number a row.
    Ref: Zhang and Sennrich, arXiv:1910.07467.
    """
    if x.is_cuda or torch.compiler.is_compiling():
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    return _RmsNorm.apply(x, weight, eps)


class _Gated(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _activated(gate, activation).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        of_up = _activated(gate, ctx.activation).mul_(grad)
        if ctx.activation == "silu":
            return _aten.silu_backward(grad * up, gate), of_up, None
        return _aten.gelu_backward(grad * up, gate, approximate="tanh"), of_up, None


def _activated(gate: Tensor, activation: str) -> Tensor:
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


def gated_product(gate: Tensor, up: Tensor, activation: Literal["silu", "gelu_tanh"]) -> Tensor:
    """Return ``activation(gate) * up``, keeping the two alone (arXiv:2002.05202)."""
    if torch.compiler.is_compiling():
        return _activated(gate, activation) * up
    return _Gated.apply(gate, up, activation)
