"""The levels of context parallelism: ranks that exchange heads inside, a ring of them outside."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from meshwright.parallel.layout import CpComm, Ints


def most_square_level(cp: int) -> int:
    """Return the inner of the two levels of ``cp`` that differ least: 2 of 8, 4 of 16, 1 of 7."""
    return max(d for d in range(1, math.isqrt(cp) + 1) if cp % d == 0)


def exchanging_ranks(cp: Ints, cp_comm: Ints, hierarchical_cp: Sequence[int] | None) -> Ints:
    """Return how many ranks [N] of a context-parallel group exchange heads by all-to-all.

    ``a2a``: all of them; ``a2a+p2p``: the first level, by default of the most square split; else 1.
    The others, cp / ranks of them, pass keys and values in a ring. Ref: Megatron-LM,
    ``hierarchical_context_parallel_sizes`` (innermost first).
    """
    ranks = np.where(cp_comm == CpComm.a2a, cp, np.ones_like(cp))
    both = cp_comm == CpComm.a2a_p2p
    for size in np.unique(cp[both]).tolist():
        inner = min(hierarchical_cp[0], size) if hierarchical_cp else most_square_level(size)
        ranks = np.where(both & (cp == size), inner, ranks)
    return ranks
