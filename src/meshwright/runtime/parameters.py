"""Parameters that know where they lie in the whole model, and their layout-independent start.

Every parameter has one global name and shape. A rank holds a box of it: ``offsets`` and its own
shape. Initial values are drawn for the whole tensor from a generator seeded by the name, then the
box is cut out, so they do not depend on the layout or on the order of creation.
"""

# torch annotates some functions only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportIncompatibleMethodOverride=false
from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Partial = Literal["", "tp", "kv"]
"""Over which ranks the gradient of a parameter is still to be summed after backward.

``tp``: each TP rank saw only some of the tokens. ``kv``: the TP ranks that hold the same KV head
each saw only some of its queries.
"""


@dataclass(frozen=True, kw_only=True)
class Box:
    """Where a local tensor lies in the global one.

    ``shape`` is the global shape; the local part starts at ``offsets`` and may run past the end
    of dim 0 (vocabulary padding). ``expert`` parameters live on the expert mesh. ``tied`` marks
    a table that other pipeline ranks hold too, ``reused`` one that a forward pass uses more than
    once, ``adapter`` a part of a low-rank change.
    ``counted`` is true for one of all equal copies.
    """

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    init: Literal["normal", "ones", "zeros"] = "normal"
    std: float = 0.02
    expert: bool = False
    partial: Partial = ""
    tied: bool = False
    reused: bool = False
    adapter: bool = False
    counted: bool = True
    decay: bool = True


class ShardedParameter(nn.Parameter):
    """A parameter with its ``box``.

    Data parallelism sets where gradients go: ``receive_gradient`` takes one, ``receive_product``
    the factors of one, ``left.T @ right``.
    """

    box: Box
    receive_gradient: Callable[[Tensor], None]
    receive_product: Callable[[Tensor, Tensor], None]


def parameter(box: Box, local_shape: tuple[int, ...], dtype: torch.dtype) -> ShardedParameter:
    """Make a parameter for ``box``; its lasting storage and values come with ``data_parallel``.

    The memory taken here is never written, so the system never provides it.
    """
    made = ShardedParameter(torch.empty(local_shape, dtype=dtype, device="cpu"))
    made.box = box
    return made


def parameters_of(module: nn.Module) -> Iterator[ShardedParameter]:
    """Yield the parameters of a module, each once, in order of definition."""
    for found in module.parameters():
        assert isinstance(found, ShardedParameter)
        yield found


def initial_values(box: Box, local_shape: tuple[int, ...], seed: int, noise: float = 0.0) -> Tensor:
    """Return the start values of a box, in float32; rows past the end of the tensor are 0.

    normal: std * N(0, 1); ones and zeros are exact, plus ``noise`` * N(0, 1), with which a
    comparison also sees exchanged norm weights and biases. Expert stacks are drawn expert by
    expert, so that no rank draws the experts of the others.
    """
    out = torch.zeros(local_shape, dtype=torch.float32)
    if box.expert:
        for row in range(local_shape[0]):
            expert = box.offsets[0] + row
            whole = _draw(box, f"{box.name}.{expert}", box.shape[1:], seed, noise)
            _cut(out[row], whole, box.offsets[1:])
        return out
    _cut(out, _draw(box, box.name, box.shape, seed, noise), box.offsets)
    return out


def _draw(box: Box, name: str, shape: tuple[int, ...], seed: int, noise: float) -> Tensor:
    std = box.std if box.init == "normal" else noise
    base = 1.0 if box.init == "ones" else 0.0
    if std == 0.0:
        return torch.full(shape, base)
    generator = torch.Generator().manual_seed((seed + zlib.crc32(name.encode())) % 2**63)
    return base + std * torch.randn(shape, generator=generator)


def _cut(out: Tensor, whole: Tensor, offsets: tuple[int, ...]) -> None:
    part = whole[tuple(slice(o, o + n) for o, n in zip(offsets, out.shape, strict=True))]
    out[tuple(slice(0, n) for n in part.shape)] = part
