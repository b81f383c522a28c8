"""Where layers go: evenly, and otherwise where that shortens the slowest pipeline rank.

The head, the loss and the embedding weigh on the ends of a pipeline: with a large vocabulary the
last stage is through early only if it holds fewer layers. What they weigh, in layers, is asked of
the cost model for a few layouts; the search then prices the placements like any other choice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from meshwright.cost.columns import Floats
from meshwright.cost.factors import Factors
from meshwright.cost.step import price
from meshwright.describe.cluster import Cluster
from meshwright.describe.job import Job
from meshwright.describe.model import Model
from meshwright.errors import LayoutError
from meshwright.parallel.layout import Layout, Pipeline, table
from meshwright.parallel.placement import place_by, stage_ranks

WORTH_FRACTION = 0.01
"""What an uneven placement must take off the slowest rank to be tried beside the even one."""
_POWER = 8
"""Stages as equal as can be: the sum of their seconds to this power is least."""


@dataclass(frozen=True)
class Work:
    """Seconds of a micro-batch, forward and backward: [L] layers, the ends beside them."""

    layers: Floats
    embedding: float
    ending: float


def work_of(
    model: Model, cluster: Cluster, job: Job, samples: list[Layout[int]], factors: Factors
) -> list[Work]:
    """Return what the blocks of a model take under some layouts. The ending: MTP, head and loss."""
    priced = price(model, cluster, job, table(samples), factors)
    seconds = (priced.forward + priced.backward)[priced.inverse]
    kinds, depths = len(model.layer_kinds), len(model.mtp_layers)
    mtp = seconds[:, kinds + 2 :].sum(axis=1) + depths * seconds[:, kinds]
    ending = mtp + (1 + depths) * seconds[:, kinds + 1]
    pattern = list(model.layer_pattern)
    return [
        Work(row[pattern], float(row[kinds]), float(end))
        for row, end in zip(seconds, ending, strict=True)
    ]


def spread(work: Work, stages: int) -> tuple[int, ...]:
    """Return the layers of each stage that make the slowest short and the others alike.

    min over all splits into consecutive layers of sum over stages of seconds^8, by dynamic
    programming; stages between the ends hold a layer at least.
    """
    n = len(work.layers)
    total = np.concatenate([[0.0], np.cumsum(work.layers)])
    most = min(2 * -(-n // stages) + 2, n)
    took, ends = np.arange(most + 1)[:, None], np.arange(n + 1)[None, :]
    before = np.maximum(ends - took, 0)
    of_layers = np.where(took <= ends, total[ends] - total[before], np.inf)
    mean = (total[-1] + work.embedding + work.ending) / stages
    middle = (of_layers / mean) ** _POWER
    middle[0] = np.inf
    least = np.where(ends[0] == 0, 0.0, np.inf)
    chosen: list[np.ndarray] = []
    for stage in range(stages):
        here = middle
        if stage in (0, stages - 1):
            fixed = work.embedding * (stage == 0) + work.ending * (stage == stages - 1)
            here = ((of_layers + fixed) / mean) ** _POWER
        options = least[before] + here
        chosen.append(options.argmin(axis=0))
        least = options.min(axis=0)
    counts: list[int] = []
    for best in reversed(chosen):
        counts.append(int(best[n - sum(counts)]))
    return tuple(counts[::-1])


def slowest_rank_s(work: Work, counts: tuple[int, ...], pp: int, schedule: Pipeline) -> float:
    """Return the seconds that the busiest pipeline rank computes for a micro-batch."""
    edges = np.cumsum((0, *counts))
    total = np.concatenate([[0.0], np.cumsum(work.layers)])
    seconds = np.diff(total[edges])
    seconds[0] += work.embedding
    seconds[-1] += work.ending
    ranks = stage_ranks(pp, len(counts) // pp, schedule == Pipeline.zb_v)
    return float(np.bincount(ranks, seconds).max())


def worth_trying(
    works: list[Work], even: tuple[int, ...] | None, pp: int, stages: int, schedule: Pipeline
) -> tuple[int, ...] | None:
    """Return the split that is good for all of ``works``, unless ``even`` is as good."""
    options = {spread(work, stages) for work in works}
    if even is not None:
        options.add(even)
    seconds = {c: [slowest_rank_s(w, c, pp, schedule) for w in works] for c in options}
    least = np.min(list(seconds.values()), axis=0)
    best = min(sorted(options), key=lambda c: float(np.max(seconds[c] / least)))
    if even is None:
        return best
    gain = 1.0 - np.array(seconds[best]) / seconds[even]
    return best if gain.max() > WORTH_FRACTION else None


@dataclass(frozen=True, kw_only=True)
class PipelineChoice:
    """Degrees, schedule and placement of a pipeline, in the words of a layout."""

    pp: int
    vpp: int
    schedule: Pipeline
    first: int = 0
    last: int = 0
    account_for_embedding: int = 0
    account_for_loss: int = 0
    pipeline_layout: str | None = None


def choice_for(counts: tuple[int, ...], pp: int, schedule: Pipeline, mtp: int) -> PipelineChoice:
    """Return the shortest way to tell a placement: a switch, ends of their own, or a string."""
    plain = PipelineChoice(pp=pp, vpp=len(counts) // pp, schedule=schedule)
    first, last = sum(counts[::pp]), sum(counts[pp - 1 :: pp])
    ways = [
        plain,
        replace(plain, account_for_loss=1),
        replace(plain, account_for_embedding=1),
        replace(plain, account_for_embedding=1, account_for_loss=1),
        replace(plain, last=last),
        replace(plain, first=first),
        replace(plain, first=first, last=last),
    ]
    for way in ways:
        if _places(way, counts):
            return way
    return replace(plain, pipeline_layout="E" + _spelled(counts) + "m" * mtp + "L")


def _places(way: PipelineChoice, counts: tuple[int, ...]) -> bool:
    try:
        return tuple(map(len, place_by(way, sum(counts), 0).layers)) == counts
    except LayoutError:
        return False


def _spelled(counts: tuple[int, ...]) -> str:
    """Return stages as letters, three or more equal ones together: ``t*5|(t*4|)*13tt``."""
    text = ""
    runs = [(count, len(list(run))) for count, run in groupby(counts[:-1])]
    for count, times in runs:
        stage = f"t*{count}|" if count > 2 else "t" * count + "|"
        text += f"({stage})*{times}" if times > 2 else stage * times
    return text + (f"t*{counts[-1]}" if counts[-1] > 2 else "t" * counts[-1])
