"""How far from its prediction a run may be: half-widths of intervals, as logarithms.

A run that nobody measured is predicted as the runs of a model that was left out of the fit are.
What makes those worse adds its share: settings that are not stated, experts, routing that nothing
balances, adapters, a GPU type without a measured run. The shares are independent, so they add as
squares: w = sqrt(sum of shares^2), and the measured value is within prediction * exp(+-w) in
``HELD_FRACTION`` of the runs. Ref: ``python bench/fit_factors.py``, which prints the share of
left-out runs that the intervals hold.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from meshwright.cost.memory import Statistic
from meshwright.describe.job import Job
from meshwright.describe.model import Model

HELD_FRACTION = 0.9
"""The share of runs whose measured value an interval is to hold."""

KNOWN_RUN = 0.105
"""A dense model, every setting stated, on a GPU type that was measured."""

NOT_STATED = 0.2
"""A setting that moves the time, such as the micro-batch or what is recomputed, is supplied."""

EXPERTS = 0.22
"""Routed experts: dispatchers and grouped kernels differ by release."""

FREE_ROUTING = 0.5
"""... that nothing balances: the fullest rank is of the data."""

ADAPTERS = 0.2
"""LoRA: small kernels that frameworks run differently."""

UNMEASURED_GPU = 0.15
"""What the datasheet of a GPU type without a measured run leaves open."""

MEASURED_GPUS = (
    "A100-PCIE-80GB",
    "A100-SXM-40GB",
    "A100-SXM-80GB",
    "B200-SXM-180GB",
    "B300-SXM-288GB",
    "GB200-186GB",
    "GB300-288GB",
    "H100-SXM-80GB",
    "H100-SXM-96GB",
)
"""The GPU types of the runs that the factors are fitted to."""

PEAK: dict[Statistic, float] = {"allocated": 0.08, "nvidia-smi": 0.15, "reserved": 0.5}
"""Half-widths of peak memory by what is asked for."""


def step_time_width(model: Model, job: Job, gpu: str, assumed: Collection[str]) -> float:
    """Return the half-width of a step time's interval, as a logarithm.

    ``gpu`` is the public name of the card, ``assumed`` what had to be supplied.
    """
    has_experts = model.num_experts > 1
    shares = (
        (KNOWN_RUN, True),
        (NOT_STATED, any("not stated" in text for text in assumed)),
        (EXPERTS, has_experts),
        (FREE_ROUTING, has_experts and not job.execution.forced_balance),
        (ADAPTERS, job.task == "lora"),
        (UNMEASURED_GPU, gpu not in MEASURED_GPUS),
    )
    return math.hypot(*(share for share, counts in shares if counts))
