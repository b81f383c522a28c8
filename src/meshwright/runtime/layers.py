"""The pieces of a decoder layer: linear layers, norms, rotary positions, MLP.

Tensors are ``[s, b, h]``. Shapes: s tokens here, b sequences, h hidden features, n heads here,
d features of a head, f feed-forward features here.
"""

# torch annotates some functions only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportIncompatibleMethodOverride=false
from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshwright.parallel.layout import Recompute
from meshwright.runtime.context import Context
from meshwright.runtime.groups import Group
from meshwright.runtime.parameters import Box, Partial, ShardedParameter, parameter
from meshwright.runtime.pointwise import gated_product, rms_norm
from meshwright.runtime.shape import Activation, Rope, yarn_mscale
from meshwright.runtime.tensor_parallel import (
    enter,
    enter_linear,
    leave,
    linear,
    linear_leave,
    sum_over,
)


class Linear(nn.Module):
    """A linear layer of which this rank holds all, some outputs (column) or some inputs (row).

    The caller enters and leaves the tensor-parallel region. ``blocks`` says that the split
    dimension is dealt in ``blocks`` equal parts of which this rank has part ``block`` (KV heads
    that several ranks share have fewer parts than TP).
    """

    def __init__(
        self,
        context: Context,
        name: str,
        in_features: int,
        out_features: int,
        *,
        split: Literal["", "out", "in"] = "",
        bias: bool = False,
        blocks: int = 0,
        block: int = 0,
        partial: Partial = "",
        std: float = 0.0,
    ) -> None:
        super().__init__()
        tp = context.groups.tp
        blocks, block = (blocks, block) if blocks else (tp.size, tp.index)
        self.later, self.split = context.later, split
        shape = [out_features, in_features]
        local, offsets = list(shape), [0, 0]
        if split:
            dim = 0 if split == "out" else 1
            local[dim] //= blocks
            offsets[dim] = block * local[dim]
        replicated: Partial = "tp" if context.sp and not split else ""
        copies = not split or blocks < tp.size
        # Of the ranks that hold the same part the first counts.
        counted = context.groups.kv.index == 0 if split else tp.index == 0
        box = Box(
            name=f"{name}.weight",
            shape=(out_features, in_features),
            offsets=(offsets[0], offsets[1]),
            std=std or context.shape.initializer_range,
            partial=partial or replicated,
            counted=counted if copies else True,
        )
        self.weight = parameter(box, (local[0], local[1]), context.dtype)
        self.bias: ShardedParameter | None = None
        if bias:
            column = split == "out"
            bias_box = replace(
                box,
                name=f"{name}.bias",
                shape=(out_features,),
                offsets=(offsets[0] if column else 0,),
                init="zeros",
                partial=partial if column else ("tp" if context.sp else ""),
                counted=box.counted if column else tp.index == 0,
                decay=False,
            )
            size = local[0] if column else out_features
            self.bias = parameter(bias_box, (size,), context.dtype)
        self.lora: LowRank | None = None
        if context.shape.lora_rank:
            self.lora = LowRank(context, name, box, (local[0], local[1]), split)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product; ``add_bias`` adds a row-parallel layer's bias after leaving."""
        y = linear(x, self.weight, None if self.split == "in" else self.bias, self.later)
        return y if self.lora is None else y + self.lora(x)

    def add_bias(self, y: Tensor) -> Tensor:
        """Add the bias of a row-parallel layer to the reduced output."""
        return y if self.bias is None else y + self.bias


def enter_and_project(context: Context, x: Tensor, *layers: Linear) -> tuple[Tensor, ...]:
    """Enter a tensor-parallel region and apply column-parallel layers, all to the same input."""
    if any(layer.lora is not None for layer in layers):
        x = enter(x, context.groups.tp, sp=context.sp)
        return tuple(layer(x) for layer in layers)
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    return enter_linear(x, context.region, weights, biases)


def project_and_leave(context: Context, x: Tensor, layer: Linear, *, last: bool = False) -> Tensor:
    """Apply a row-parallel layer and leave the tensor-parallel region.

    ``last``: what is recomputed ends here. Then the two stay apart, as backward needs the input
    alone and makes no sum again.
    """
    if last or layer.lora is not None:
        return layer.add_bias(leave(layer(x), context.groups.tp, sp=context.sp))
    return layer.add_bias(linear_leave(x, layer.weight, context.region))


class LowRank(nn.Module):
    """The trained low-rank change of a frozen linear layer (LoRA, arXiv:2106.09685).

    ``A`` follows the split of the inputs, ``B`` that of the outputs; the other of the two is whole
    on every TP rank, which sees a part of what its gradient is made of.
    """

    def __init__(
        self,
        context: Context,
        name: str,
        base: Box,
        local: tuple[int, int],
        split: Literal["", "out", "in"],
    ) -> None:
        super().__init__()
        shape, tp = context.shape, context.groups.tp
        rank = shape.lora_rank
        self.later, self.scale = context.later, shape.lora_alpha / rank
        whole: Partial = "tp" if tp.size > 1 and (split or context.sp) else ""
        first = tp.index == 0
        a = replace(
            base,
            name=f"{name}.lora_A.weight",
            shape=(rank, base.shape[1]),
            offsets=(0, base.offsets[1]),
            std=base.shape[1] ** -0.5,
            adapter=True,
            partial="" if split == "in" else whole,
            counted=True if split == "in" else first,
        )
        b = replace(
            base,
            name=f"{name}.lora_B.weight",
            shape=(base.shape[0], rank),
            offsets=(base.offsets[0], 0),
            init="zeros",
            adapter=True,
            partial=base.partial if split == "out" else whole,
            counted=base.counted if split == "out" else first,
        )
        self.lora_A = parameter(a, (rank, local[1]), context.dtype)
        self.lora_B = parameter(b, (local[0], rank), context.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``alpha / r * B A x``."""
        return self.scale * linear(
            linear(x, self.lora_A, None, self.later), self.lora_B, None, self.later
        )


class RmsNorm(nn.Module):
    """Root mean square norm (arXiv:1910.07467), computed in at least float32.

    With ``norm_offset`` weights are kept as what they are beyond 1.

    ``over`` is the group whose ranks hold the other features when they are spread (norms over all
    heads at once under TP).
    """

    def __init__(
        self,
        context: Context,
        name: str,
        size: int,
        *,
        partial: Partial | None = None,
        over: Group | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.over = context.shape.norm_eps, over
        self.offset = context.shape.norm_offset
        spread = over is not None and over.size > 1
        if partial is None:
            partial = "tp" if context.sp and not spread else ""
        index = over.index if over is not None else 0
        local = size // over.size if over is not None else size
        box = Box(
            name=f"{name}.weight",
            shape=(size,),
            offsets=(index * local,),
            init="zeros" if self.offset else "ones",
            partial=partial,
            counted=spread or context.groups.tp.index == 0,
            decay=False,
        )
        self.size = size
        self.weight = parameter(box, (local,), context.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x / rms(x) * weight`` over the last dimension."""
        spread = self.over is not None and self.over.size > 1
        if not (spread or self.offset):
            return rms_norm(x, self.weight, self.eps)
        wide = x if x.dtype == torch.float64 else x.float()
        if not spread:
            weight = self.weight.to(wide.dtype) + 1.0
            return F.rms_norm(wide, (self.size,), weight, self.eps).to(x.dtype)
        assert self.over is not None
        squares = sum_over(wide.square().sum(-1, keepdim=True), self.over)
        return (wide * torch.rsqrt(squares / self.size + self.eps)).to(x.dtype) * self.weight


def rope_tables(rope: Rope, dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin ``[s, dim]`` in float32, as ``transformers`` computes them."""
    exponent = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    inverse = 1.0 / (rope.theta**exponent)
    attention = 1.0
    if rope.kind == "linear":
        inverse = inverse / rope.factor
    elif rope.kind == "llama3":
        inverse = _llama3(inverse, rope)
    elif rope.kind == "yarn":
        inverse, attention = _yarn(inverse, rope, dim)
    angles = positions.cpu().float()[:, None] * inverse[None, :]
    angles = torch.cat([angles, angles], dim=-1)
    tables = angles.cos() * attention, angles.sin() * attention
    return tables[0].to(positions.device), tables[1].to(positions.device)


def _llama3(inverse: Tensor, rope: Rope) -> Tensor:
    """Long wavelengths are divided by the factor, short ones kept, those between blended."""
    wavelength = 2 * math.pi / inverse
    low = rope.original_max_seq_len / rope.low_freq_factor
    high = rope.original_max_seq_len / rope.high_freq_factor
    scaled = torch.where(wavelength > low, inverse / rope.factor, inverse)
    smooth = (rope.original_max_seq_len / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - smooth) * scaled / rope.factor + smooth * scaled
    between = ~(wavelength < high) & ~(wavelength > low)
    return torch.where(between, blended, scaled)


def _yarn(inverse: Tensor, rope: Rope, dim: int) -> tuple[Tensor, float]:
    """Slow frequencies interpolated, fast ones kept, a ramp between; and the temperature."""

    def turns(rotations: float) -> float:
        ratio = rope.original_max_seq_len / (rotations * 2 * math.pi)
        return dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = turns(rope.beta_fast), turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2).float() - low) / (max(high - low, 0.001))
    keep = 1 - ramp.clamp(0, 1)
    mixed = inverse / rope.factor * (1 - keep) + inverse * keep
    if rope.attention_factor is not None:
        return mixed, rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        ratio = yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(
            rope.factor, rope.mscale_all_dim
        )
        return mixed, ratio
    return mixed, yarn_mscale(rope.factor, 1.0)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor], *, interleaved: bool = False) -> Tensor:
    """Rotate ``[b, n, s, d]`` by its positions, as many features as the tables have."""
    cos, sin = rope[0].to(x.dtype), rope[1].to(x.dtype)
    if cos.shape[-1] < x.shape[-1]:
        rotated, kept = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
        return torch.cat([rotate(rotated, rope, interleaved=interleaved), kept], dim=-1)
    if interleaved:
        x = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


def gated(activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
    """Return what a gated feed-forward network multiplies down.

    silu: SwiGLU, gelu_tanh: GeGLU (both arXiv:2002.05202). clamped_swish (gpt-oss,
    arXiv:2508.10925): ``g sigmoid(1.702 g) (u + 1)`` with g at most 7 and u within -7 and 7.
    """
    if activation != "clamped_swish":
        return gated_product(gate, up, activation)
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


class Mlp(nn.Module):
    """A gated feed-forward network; its features are divided by TP."""

    def __init__(
        self, context: Context, name: str, size: int, flag: Recompute = Recompute.mlp
    ) -> None:
        super().__init__()
        self.context, self.flag = context, flag
        shape = context.shape
        h, bias = shape.hidden_size, shape.mlp_bias
        self.gate_proj = Linear(context, f"{name}.gate_proj", h, size, split="out", bias=bias)
        self.up_proj = Linear(context, f"{name}.up_proj", h, size, split="out", bias=bias)
        self.down_proj = Linear(
            context, f"{name}.down_proj", size, h, split="in", bias=bias, std=residual_std(context)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the branch's output for the tokens here."""
        return self.context.recomputed(self.flag, self._compute, x)

    def _compute(self, x: Tensor) -> Tensor:
        context = self.context
        gate, up = enter_and_project(context, x, self.gate_proj, self.up_proj)
        out = gated(context.shape.activation, gate, up)
        last = bool(context.layout.recompute & (Recompute.full | self.flag))
        return project_and_leave(context, out, self.down_proj, last=last)


def residual_std(context: Context) -> float:
    """Return the start deviation of what feeds the residual stream: std / sqrt(2 L) (GPT-2)."""
    shape = context.shape
    return shape.initializer_range / math.sqrt(2 * shape.num_layers)
