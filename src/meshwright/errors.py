"""What goes wrong, told so that it can be put right.

MeshwrightError (a ValueError)      the input cannot work: field, value, rule, remedy
|-- DocumentError                   a file is missing, unreadable, or not what it claims to be
|-- ModelError                      a model description is unknown or incomplete
|-- ClusterError                    a cluster or GPU is unknown or impossible
|-- JobError                        a batch, sequence length, precision or task cannot be
|-- LayoutError                     degrees or choices contradict each other, the model or the GPUs
`-- LaunchError                     processes could not be started, or did not stay alive
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable


class MeshwrightError(ValueError):
    """An input that cannot work.

    Attributes: ``field`` (dotted name of what is wrong), ``value`` (what was given), ``rule``
    (what must hold) and ``remedy`` (what to write instead, with the nearest legal values).
    """

    def __init__(self, field: str, value: object, rule: str, remedy: str) -> None:
        self.field = field
        self.value = value
        self.rule = rule
        self.remedy = remedy
        super().__init__(f"{field} = {value!r}: {rule} {remedy}".rstrip())


class DocumentError(MeshwrightError):
    """A file is missing, unreadable, or not what it claims to be."""


class ModelError(MeshwrightError):
    """A model description is unknown or incomplete."""


class ClusterError(MeshwrightError):
    """A cluster or GPU is unknown or impossible."""


class JobError(MeshwrightError):
    """A batch, sequence length, precision or task cannot be."""


class LayoutError(MeshwrightError):
    """Degrees or choices contradict each other, the model or the GPUs."""


class LaunchError(MeshwrightError):
    """Processes could not be started, or did not stay alive."""


def did_you_mean(value: str, known: Iterable[str], most: int = 3) -> str:
    """Return a remedy: the known spellings nearest to ``value``, or all of them if few."""
    names = sorted(known)
    near = difflib.get_close_matches(value.lower(), [n.lower() for n in names], n=most, cutoff=0.5)
    if near:
        original = {n.lower(): n for n in names}
        return "Did you mean " + " or ".join(original[n] for n in near) + "?"
    # A list a little longer than that is shown whole.
    shown = ", ".join(names if len(names) <= 24 else names[:12])
    more = len(names) - 12 if len(names) > 24 else 0
    return f"Choose from {shown}{f' and {more} more' if more > 0 else ''}."


def divisors(number: int) -> list[int]:
    """Return the divisors of ``number``, ascending."""
    low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*low, *(number // d for d in low)})


def nearest_divisors(number: int, wanted: int, most: int = 2) -> list[int]:
    """Return the divisors of ``number`` nearest to ``wanted``, in ascending order."""
    near = sorted(divisors(number), key=lambda d: (abs(d - wanted), d))
    return sorted(near[:most])
