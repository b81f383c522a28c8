"""What a rank really sends: every message that reaches the process groups, in bytes.

The counter sits in PyTorch's dispatcher, below all code of the runtime, so nothing can be sent
beside it. Bytes are what a rank puts on its link with ring algorithms, as the cost model counts:
of a tensor of B bytes (gathered, or before it is scattered) and a group of g ranks

| all-gather, reduce-scatter | B (g-1)/g |
| all-reduce | 2 B (g-1)/g |
| all-to-all | what is addressed to others |
| send | B |
"""

# torch annotates some functions only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Ranks = frozenset[int]

BOOKKEEPING = (torch.int64, torch.float64)
"""Counts, norms and losses travel in these types; weights and activations of a float32 run not."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One call of a collective, or one send, as one rank sees it."""

    kind: str
    ranks: Ranks
    dtype: torch.dtype
    sent_bytes: float


class Ledger(TorchDispatchMode):
    """Notes every message of this rank while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[Message] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func.namespace == "c10d":
            self._note(func.name().partition("::")[2], args)
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, args: tuple[Any, ...]) -> None:
        kind = name.partition(".")[0]
        if kind in _SENDS_NOTHING:
            return
        count = _SENT[kind]
        handle = next(a for a in args if isinstance(a, torch.ScriptObject))
        group = cast("Any", dist.ProcessGroup).unbox(handle)
        ranks = frozenset(dist.get_process_group_ranks(group))
        first = args[0][0] if isinstance(args[0], list) else args[0]
        self.messages.append(
            Message(
                kind=kind.strip("_"),
                ranks=ranks,
                dtype=cast("Tensor", first).dtype,
                sent_bytes=count(args, len(ranks), dist.get_rank(group)),
            )
        )

    def sent_bytes(self) -> dict[Ranks, float]:
        """Return the bytes sent to each group, without bookkeeping."""
        found: dict[Ranks, float] = {}
        for message in self.messages:
            if message.dtype not in BOOKKEEPING:
                found[message.ranks] = found.get(message.ranks, 0.0) + message.sent_bytes
        return found


def _size_bytes(x: Tensor) -> float:
    return float(x.numel() * x.element_size())


_Count = Callable[[tuple[Any, ...], int, int], float]


def _whole(position: int, times: float) -> _Count:
    def count(args: tuple[Any, ...], size: int, index: int) -> float:
        x = args[position]
        whole = _size_bytes(x[0] if isinstance(x, list) else x)
        return times * whole * (size - 1) / size

    return count


def _to_others(args: tuple[Any, ...], size: int, index: int) -> float:
    x, splits = cast("Tensor", args[1]), cast("list[int]", args[4])
    if not splits:
        return _size_bytes(x) * (size - 1) / size
    row_bytes = _size_bytes(x) / max(1, x.shape[0])
    return row_bytes * (sum(splits) - splits[index])


_SENT: dict[str, _Count] = {
    "allreduce_": _whole(0, 2.0),
    "_allgather_base_": _whole(0, 1.0),
    "_reduce_scatter_base_": _whole(1, 1.0),
    "alltoall_base_": _to_others,
    "send": lambda args, size, index: _size_bytes(args[0][0]),
}
"""Bytes that a call sends, from its arguments, the size of the group and the place in it. A call
that is not here is an error: it would go uncounted."""

_SENDS_NOTHING = ("recv_", "barrier")
