"""Where a parameter lies in a Hugging Face checkpoint: names, fused tensors, stacked experts.

Our names are those of Hugging Face, one tensor a projection. Some families have other words, fuse
projections into one tensor, or stack experts; the experts of a layer are always one stack here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from meshwright.runtime.parameters import Box
from meshwright.runtime.shape import ModelShape

_EXPERTS = re.compile(r"^(.*)\.experts\.(gate_proj|up_proj|down_proj)(_bias)?$")
_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_WORDS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "mixtral": ((".mlp.", ".block_sparse_moe."),),
    "minimax_m2": (
        (".mlp.gate.e_score", ".mlp.e_score"),
        (".mlp.", ".block_sparse_moe."),
    ),
    "gpt_oss": ((".mlp.gate.", ".mlp.router."),),
    "glm4": (
        (".post_attention_layernorm.", ".post_self_attn_layernorm."),
        (".pre_feedforward_layernorm.", ".post_attention_layernorm."),
        (".post_feedforward_layernorm.", ".post_mlp_layernorm."),
    ),
}
"""Other words of a model type, replaced in this order."""
_FUSED_QKV = ("phi3",)
_FUSED_GATE = ("phi3", "glm", "glm4")


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A matrix (or vector) of ours inside a tensor of a checkpoint.

    It is every ``step``-th row (or column: ``dim``) of tensor ``name``, which has ``shape``, from
    ``start``; of expert ``expert`` if experts are stacked there, and transposed if said so.
    """

    name: str
    shape: tuple[int, ...]
    expert: int | None = None
    dim: int = 0
    start: int = 0
    step: int = 1
    transposed: bool = False

    def place(self, part: tuple[slice, ...]) -> tuple[slice, ...]:
        """Return where a part of ours lies in the tensor."""
        order = part[::-1] if self.transposed else part
        found = [
            slice(
                self.start + self.step * s.start,
                self.start + self.step * (s.stop - 1) + 1 if s.stop > s.start else self.start,
                self.step,
            )
            if dim == self.dim
            else s
            for dim, s in enumerate(order)
        ]
        if self.expert is None:
            return tuple(found)
        return (slice(self.expert, self.expert + 1), *found)

    def ours(self, placed: Tensor) -> Tensor:
        """Return what was cut out of the tensor at a place as we hold it."""
        found = placed if self.expert is None else placed.squeeze(0)
        return found.T if self.transposed and found.dim() == 2 else found


def stored(box: Box, shape: ModelShape) -> list[Stored]:
    """Return where a parameter lies: one place, or one per expert of the whole stack."""
    experts = _EXPERTS.match(box.name)
    if experts is None:
        return [_fused(box, shape)]
    part, bias = experts[2], experts[3] or ""
    prefix = _renamed(f"{experts[1]}.", shape).rstrip(".")
    if shape.moe is not None and shape.moe.names == "gpt_oss":
        return [
            _stacked(box, f"{prefix}.experts", part, bias, expert) for expert in range(box.shape[0])
        ]
    if shape.moe is not None and shape.moe.names == "mixtral":
        part = _MIXTRAL[part]
    return [
        Stored(name=f"{prefix}.experts.{expert}.{part}.weight", shape=box.shape[1:])
        for expert in range(box.shape[0])
    ]


def _renamed(name: str, shape: ModelShape) -> str:
    for ours, theirs in _WORDS.get(shape.model_type, ()):
        name = name.replace(ours, theirs)
    return name


def _fused(box: Box, shape: ModelShape) -> Stored:
    name = _renamed(box.name, shape)
    part = name.split(".")[-2] if "." in name else ""
    q, kv = (n * shape.head_dim for n in (shape.num_heads, shape.num_kv_heads))
    starts: dict[str, tuple[str, int, int]] = {}
    if shape.model_type in _FUSED_QKV:
        whole = q + 2 * kv
        starts |= {
            "q_proj": ("qkv_proj", 0, whole),
            "k_proj": ("qkv_proj", q, whole),
            "v_proj": ("qkv_proj", q + kv, whole),
        }
    if shape.model_type in _FUSED_GATE:
        f = shape.ffn_hidden_size
        starts |= {"gate_proj": ("gate_up_proj", 0, 2 * f), "up_proj": ("gate_up_proj", f, 2 * f)}
    if part not in starts:
        return Stored(name=name, shape=box.shape)
    fused, start, rows = starts[part]
    return Stored(
        name=name.replace(f".{part}.", f".{fused}."), shape=(rows, *box.shape[1:]), start=start
    )


def _stacked(box: Box, prefix: str, part: str, bias: str, expert: int) -> Stored:
    """gpt-oss: ``[E, h, 2f]`` with gate and up in turn, and ``[E, f, h]``."""
    inside = box.shape[1:][::-1]
    if part == "down_proj":
        name = f"{prefix}.down_proj{bias}"
        return Stored(name=name, shape=(box.shape[0], *inside), expert=expert, transposed=True)
    return Stored(
        name=f"{prefix}.gate_up_proj{bias}",
        shape=(box.shape[0], *inside[:-1], 2 * inside[-1]),
        expert=expert,
        dim=len(inside) - 1,
        start=int(part == "up_proj"),
        step=2,
        transposed=True,
    )
