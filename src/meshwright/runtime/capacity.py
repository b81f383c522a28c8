"""Expert capacity: how many tokens an expert takes of a group, and which are dropped.

An expert takes at most ``C = ceil(n k / E * capacity_factor)`` of the ``n`` tokens of a group; a
token beyond that goes on without this expert (Switch Transformers, arXiv:2101.03961, section 2.2).
A group is what one rank of TP x CP holds of a microbatch, as in Megatron-LM: which tokens are
dropped depends on the layout. Another layout drops the same ones when it is told the groups and
its ranks hold whole ones; one process always does.
"""

# torch annotates some functions only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
from __future__ import annotations

import math

import torch
from torch import Tensor

from meshwright.errors import LayoutError
from meshwright.parallel.layout import Layout, to_text
from meshwright.runtime.context_parallel import positions
from meshwright.runtime.groups import Group, cp_levels
from meshwright.runtime.shape import MoeShape


def owners(x: Layout[int], seq_len: int) -> Tensor:
    """Return, for every position, which of the TP x CP ranks routes it: ``cp * TP + tp``."""
    inner, outer = cp_levels(x)
    found = torch.empty(seq_len, dtype=torch.int64)
    for cp in range(x.cp):
        here = positions(seq_len, _member(inner, cp % inner), _member(outer, cp // inner))
        for tp, part in enumerate(here.chunk(x.tp)):
            found[part] = cp * x.tp + tp
    return found


def _member(size: int, index: int) -> Group:
    return Group(tuple(range(size)), index)


def token_groups(x: Layout[int], of: Layout[int], seq_len: int, cp: int, tp: int) -> Tensor:
    """Return the group of each position that rank ``cp``, ``tp`` routes, in its order.

    Groups are the ranks of layout ``of``. Raises ``LayoutError`` unless layout ``x`` has
    microbatches of the same size and no group is cut by a rank's border.
    """
    theirs, ours = owners(of, seq_len), owners(x, seq_len)
    own = ours == cp * x.tp + tp
    cut = bool((torch.isin(theirs, theirs[own]) & ~own).any())
    if x.mbs != of.mbs or cut:
        raise LayoutError(
            "layout",
            to_text(x),
            f"Tokens that compete for an expert's capacity are those of a rank of {to_text(of)}; a "
            "rank has to hold whole groups of them.",
            "Use tp=1 cp=1 with the same mbs, or the same tp, sp, cp and cp_comm.",
        )
    return theirs[own].unique(return_inverse=True)[1]


def capacity(moe: MoeShape, tokens: int) -> int:
    """Return how many of so many tokens an expert takes (Megatron-LM's ``get_capacity``)."""
    return math.ceil(tokens * moe.topk / moe.num_experts * moe.capacity_factor)


def within_capacity(
    moe: MoeShape, chosen_tk: Tensor, weights_tk: Tensor, group_t: Tensor, most: int
) -> Tensor:
    """Return which choices ``[t, k]`` their experts take, at most ``most`` an expert and group.

    ``probs`` takes the tokens of largest weight, ``position`` the first ones; of equal weights the
    first.
    """
    slots = chosen_tk.flatten()
    bucket = group_t.repeat_interleave(moe.topk) * moe.num_experts + slots
    order = torch.arange(len(slots), device=slots.device)
    if moe.drop_policy == "probs":
        order = weights_tk.flatten().argsort(descending=True, stable=True)
    order = order[bucket[order].argsort(stable=True)]
    counts = torch.bincount(bucket)
    first = counts.cumsum(0) - counts
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device) - first[bucket[order]]
    return (place < most).view_as(chosen_tk)
