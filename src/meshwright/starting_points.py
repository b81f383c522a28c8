"""Where the guides begin: their tables as data, and the nearest legal layouts for a cluster.

A starting point is a range with its source, not an answer: the guides disagree with each other and
end with "profile the first iteration". The cost model decides.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, cast

import numpy as np

from meshwright.checks import Case, illegal
from meshwright.describe.cluster import Cluster
from meshwright.describe.gpu import read_hardware
from meshwright.describe.job import Job
from meshwright.describe.model import Model
from meshwright.errors import divisors
from meshwright.parallel.layout import Layout, layout, row, table, take, with_columns
from meshwright.parallel.placement import balanced_layout

Range = tuple[int, int]
Degree = Literal["tp", "pp", "cp", "ep"]
DEGREES: tuple[Degree, ...] = ("tp", "pp", "cp", "ep")


@dataclass(frozen=True, kw_only=True)
class StartingPoint:
    """One row of a guide.

    A degree is the low end of what the row says, ``ranges`` holds both ends where it says more than
    one value; None is left open by the row. ``gpus`` and ``seq_len`` say what the row was written
    for. ``deviations`` tell where a concrete layout had to differ from the row, and why.
    """

    name: str
    source: str
    tp: int | None = None
    pp: int | None = None
    cp: int | None = None
    ep: int | None = None
    sp: bool | None = None
    ranges: Mapping[str, Range] = field(default_factory=dict[str, Range], hash=False)
    gpus: Range | None = None
    seq_len: int | None = None
    note: str = ""
    deviations: tuple[str, ...] = ()

    def choices(self, degree: Degree) -> list[int]:
        """Return the values of a degree to try: the powers of two of its range; [] if open."""
        value = cast("int | None", getattr(self, degree))
        if value is None:
            return []
        low, high = self.ranges.get(degree, (value, value))
        return [low * 2**i for i in range(int(math.log2(high / low)) + 1)]


def _point(
    name: str,
    source: str,
    *,
    sp: bool | None = None,
    gpus: Range | None = None,
    seq_len: int | None = None,
    note: str = "",
    **degrees: int | Range,
) -> StartingPoint:
    """Return a row; a degree is one value or a range."""
    low = {k: v if isinstance(v, int) else v[0] for k, v in degrees.items()}
    ranges = {k: v for k, v in degrees.items() if not isinstance(v, int)}
    made = StartingPoint(
        name=name, source=source, sp=sp, ranges=ranges, gpus=gpus, seq_len=seq_len, note=note
    )
    return replace(made, **low)


_SIZE, _PRODUCTION = "guide: dense by size", "guide: production settings"
_MOE, _CARD = "guide: mixtures of experts", "guide: mixtures of experts by total size"
_TOPOLOGY, _SEQUENCE = "guide: by topology", "guide: by sequence length"

DENSE_BY_SIZE: tuple[tuple[float, float, StartingPoint], ...] = (
    (0, 1e9, _point("below 1B", _SIZE, tp=1, pp=1, gpus=(1, 8), note="DP only.")),
    (1e9, 10e9, _point("1-10B", _SIZE, tp=(2, 4), pp=1, gpus=(8, 16))),
    (10e9, 70e9, _point("10-70B", _SIZE, tp=(4, 8), pp=(2, 4), gpus=(16, 64))),
    (70e9, 175e9, _point("70-175B", _SIZE, tp=8, pp=(4, 8), gpus=(64, 256))),
    (175e9, 500e9, _point("175-500B", _SIZE, tp=8, pp=(8, 16), cp=2, gpus=(256, 1024))),
    (
        500e9,
        math.inf,
        _point(
            "500B and more",
            _SIZE,
            tp=8,
            pp=8,
            cp=2,
            sp=True,
            gpus=(1024, 2**20),
            note="4D or 5D; the degrees are those of the guides' 4D example.",
        ),
    ),
)
"""Parameters from, parameters to, what to begin with."""

_ETP = "ETP is rare: Llama 4 uses ETP=4."
MOE_BY_SIZE: tuple[tuple[float, float, StartingPoint], ...] = (
    (0, 20e9, _point("MoE below 20B", _CARD, tp=1, pp=1, note="EP only.")),
    (20e9, 100e9, _point("MoE 20-100B", _CARD, tp=(1, 2), pp=(2, 4), ep=(8, 16), note=_ETP)),
    (100e9, 500e9, _point("MoE 100-500B", _CARD, tp=(2, 4), pp=(8, 16), ep=(8, 32), note=_ETP)),
    (500e9, math.inf, _point("MoE above 500B", _CARD, tp=2, pp=16, ep=(32, 64), note=_ETP)),
)
"""Total parameters from, to, what to begin with when the model is not listed.

TP follows the active parameters, EP the number of experts, PP the depth."""

LISTED: tuple[tuple[str, float, StartingPoint], ...] = (
    ("olmoe", 6.9e9, _point("OLMoE 7B/1B", _MOE, tp=1, pp=1, ep=8, note="EP only, one node.")),
    (
        "deepseek_v3",
        16e9,
        _point("Moonlight 16B/3B", _MOE, tp=2, pp=1, ep=8, note="Small TP for the shared layers."),
    ),
    (
        "deepseek_v2",
        236e9,
        _point("DeepSeek-V2 236B/21B", _MOE, tp=1, pp=4, ep=32, gpus=(128, 128), note="No TP."),
    ),
    ("glm4_moe", 106e9, _point("GLM-4.5 Air 106B/12B", _MOE, tp=1, pp=4, ep=8, note="No TP.")),
    ("qwen3_moe", 30.5e9, _point("Qwen3 30B-A3B", _MOE, tp=4, pp=2, ep=4)),
    ("glm4_moe", 355e9, _point("GLM-4.5 355B/32B", _MOE, tp=2, pp=8, ep=16)),
    (
        "qwen3_moe",
        235e9,
        _point("Qwen3 235B-A22B", _MOE, tp=4, pp=16, cp=2, ep=8, note="CP=2 for pretraining."),
    ),
    (
        "deepseek_v3",
        671e9,
        _point(
            "DeepSeek-V3 671B/37B", _MOE, tp=2, pp=16, ep=64, gpus=(1024, 1024), note="TP=2, not 8."
        ),
    ),
    ("kimi_k2", 1026e9, _point("Kimi-K2 1T", _MOE, tp=2, pp=16, ep=32)),
    (
        "mixtral",
        46.7e9,
        _point(
            "Mixtral 8x7B", _MOE, tp=1, pp=4, ep=8, gpus=(64, 64), note="EP = number of experts."
        ),
    ),
    ("mixtral", 141e9, _point("Mixtral 8x22B", _MOE, tp=4, pp=4, ep=8, gpus=(256, 256))),
    (
        "llama",
        8.03e9,
        _point("LLaMA-3 8B", _PRODUCTION, tp=1, pp=1, cp=2, gpus=(8, 8), seq_len=8192),
    ),
    (
        "llama",
        70.6e9,
        _point(
            "LLaMA-3 70B",
            _PRODUCTION,
            tp=4,
            pp=4,
            cp=2,
            gpus=(64, 64),
            seq_len=8192,
            note="mbs 1, gbs 512, bf16. One node at TP=8 is for inference-like loads only.",
        ),
    ),
    (
        "llama",
        405.9e9,
        _point(
            "LLaMA-3.1 405B",
            _PRODUCTION,
            tp=8,
            pp=8,
            cp=2,
            gpus=(256, 1024),
            note="DP=8 on 1024 GPUs, DP=2 on 256.",
        ),
    ),
    ("gpt2", 175e9, _point("GPT-3 175B", _PRODUCTION, tp=4, pp=8, gpus=(128, 512))),
)
"""Model type, total parameters, what to begin with."""

BY_SEQUENCE: tuple[tuple[int, float, StartingPoint], ...] = (
    (0, 2048, _point("below 2K tokens", _SEQUENCE, cp=1, sp=False, note="TP, PP and DP.")),
    (2048, 8192, _point("2K-8K tokens", _SEQUENCE, cp=1, sp=True)),
    (
        8192,
        32768,
        _point("8K-32K tokens", _SEQUENCE, cp=2, sp=True, note="Rather CP than more TP."),
    ),
    (
        32768,
        math.inf,
        _point(
            "32K tokens and more",
            _SEQUENCE,
            cp=(4, 8),
            sp=True,
            note="Consider a2a+p2p for large CP.",
        ),
    ),
)
"""Tokens from, tokens below, what to begin with."""

_NEAR = 0.05
"""Share by which a model may differ from the size of a listed one."""
_BORDER = 0.02
"""Share by which a model may pass the end of a size class and still belong to it."""


def starting_points(model: Model, cluster: Cluster, job: Job) -> list[StartingPoint]:
    """Return every row of the guides that speaks about this case, most specific first.

    Listed models, size classes (both, where a size lies on their border), topology, sequence
    length. For mixtures of experts the list wins over the size class.
    """
    return [
        *_by_model(model),
        _by_topology(cluster),
        _by_sequence(job.seq_len),
    ]


def _by_model(model: Model) -> list[StartingPoint]:
    size = model.num_params
    listed = [
        point
        for model_type, params, point in LISTED
        if model.model_type == model_type and abs(size - params) <= _NEAR * params
    ]
    if listed and model.is_moe:
        return listed
    classes = MOE_BY_SIZE if model.is_moe else DENSE_BY_SIZE
    fitting = [p for low, high, p in classes if low / (1 + _BORDER) <= size < high * (1 + _BORDER)]
    return listed + fitting


def _by_sequence(seq_len: int) -> StartingPoint:
    return next(p for low, high, p in BY_SEQUENCE if low <= seq_len < high)


def _by_topology(cluster: Cluster) -> StartingPoint:
    domain = cluster.scale_up_domain
    if cluster.num_gpus <= domain:
        note = "TP up to the node."
        return _point("one NVLink domain", _TOPOLOGY, tp=(1, domain), note=note)
    kinds: Mapping[str, list[str]] = read_hardware("networks")["kinds"]
    if any(word in cluster.inter_node.name.lower() for word in kinds["ethernet"]):
        note = "Smaller TP, more PP."
        return _point("nodes on Ethernet", _TOPOLOGY, tp=(1, min(4, domain)), note=note)
    note = "TP inside one NVLink domain, PP or DP across."
    return _point("several nodes", _TOPOLOGY, tp=(1, domain), note=note)


def layouts(model: Model, cluster: Cluster, job: Job) -> list[tuple[StartingPoint, Layout[int]]]:
    """Return the layouts that the guides' rows for this model come to on this cluster.

    A range gives a layout for each power of two in it. What a row leaves open is filled from the
    rows for the sequence length, else with 1 (EP: the number of experts). Each is the nearest legal
    layout; the row that is returned with it tells where it differs. Micro-batches hold one sequence
    and the optimizer is sharded, as the guides advise for every run on several GPUs.
    """
    sequence, most_tp = _by_sequence(job.seq_len), _by_topology(cluster).ranges["tp"][1]
    found: dict[tuple[str, str], tuple[StartingPoint, Layout[int]]] = {}
    for point in _by_model(model):
        for wanted in _combinations(point, sequence, model):
            near = _nearest_legal(wanted, model, cluster, job, most_tp)
            if near is not None:
                told = replace(point, deviations=_deviations(wanted, near, cluster))
                key = (point.name, " ".join(str(getattr(near, d)) for d in DEGREES))
                found.setdefault(key, (told, near))
    return list(found.values())


def _combinations(
    point: StartingPoint, sequence: StartingPoint, model: Model
) -> Iterator[dict[Degree, int]]:
    """Yield the degrees that a row may mean; its CP holds for sequences of the row's class."""
    cp = point.choices("cp")
    if not cp or (point.seq_len is not None and _by_sequence(point.seq_len) is not sequence):
        cp = sequence.choices("cp")
    choices: dict[Degree, list[int]] = {
        "tp": point.choices("tp") or [1],
        "pp": point.choices("pp") or [1],
        "cp": cp,
        "ep": (point.choices("ep") or [model.num_experts]) if model.is_moe else [1],
    }
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


_WEIGHTS: Mapping[Degree, float] = {"tp": 1.2, "pp": 1.1, "cp": 1.0, "ep": 0.9}
"""Cost of doubling or halving a degree: TP is given up last, EP, which only must divide, first."""


def _nearest_legal(
    wanted: Mapping[Degree, int], model: Model, cluster: Cluster, job: Job, most_tp: int
) -> Layout[int] | None:
    """Return the legal layout whose degrees differ least, in doublings, from ``wanted``."""
    gpus, stages = cluster.num_gpus, wanted["pp"]
    degrees: dict[Degree, list[int]] = {
        "tp": [d for d in divisors(gpus) if d <= most_tp],
        "pp": [d for d in divisors(gpus) if d <= model.num_layers],
        "cp": [d for d in divisors(gpus) if d <= max(8, wanted["cp"])],
        "ep": [d for d in divisors(model.num_experts or 1) if gpus % d == 0],
    }
    rows = np.array(list(itertools.product(*degrees.values())), dtype=np.int64)
    tp, pp, cp, ep = rows[gpus % (rows[:, 0] * rows[:, 1] * rows[:, 2]) == 0].T
    counted = (model.num_layers % pp != 0) & ((model.num_layers + 2) % pp == 0)
    x = with_columns(
        take(table([layout()]), np.zeros(len(tp), dtype=np.int64)),
        tp=tp,
        pp=pp,
        cp=cp,
        ep=ep,
        dp=gpus // (tp * pp * cp),
        sp=(tp > 1) & (model.is_moe or job.seq_len >= BY_SEQUENCE[1][0]),
        account_for_embedding=counted,
        account_for_loss=counted,
    )
    uneven = np.flatnonzero((pp == stages) & (model.num_layers % pp != 0) & ~counted)
    text = balanced_layout(model.num_layers, min(stages, model.num_layers), len(model.mtp_layers))
    tables = [x, replace(take(x, uneven), pipeline_layout=text)]
    best: tuple[float, Layout[int]] | None = None
    for candidates in tables:
        legal = take(candidates, ~illegal(Case(model, job, candidates, cluster)))
        away = sum(
            weight * np.abs(np.log2(getattr(legal, name) / wanted[name]))
            for name, weight in _WEIGHTS.items()
        )
        if len(legal.tp) and (best is None or float(np.min(away)) < best[0]):
            best = float(np.min(away)), row(legal, int(np.argmin(away)))
    return best[1] if best else None


def _deviations(
    wanted: Mapping[Degree, int], near: Layout[int], cluster: Cluster
) -> tuple[str, ...]:
    said = [
        f"{name}={getattr(near, name)} instead of {value}: the nearest that is legal on "
        f"{cluster.num_gpus} GPUs"
        for name, value in wanted.items()
        if getattr(near, name) != value
    ]
    if near.pipeline_layout is not None:
        said.append(f"pipeline_layout={near.pipeline_layout}: pp={near.pp} does not divide layers")
    if near.account_for_embedding:
        said.append(f"embedding and loss count as layers, so that pp={near.pp} divides them")
    return tuple(said)
