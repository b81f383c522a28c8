"""Actions and schedules: what every pipeline rank does, in which order, and how one is built.

``F`` is a forward pass, ``B`` a whole backward pass. Schedules that split the backward write ``I``
(gradient of the input) and ``W`` (gradient of the weights) for ``B``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from itertools import chain
from typing import Literal, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from meshwright import registry
from meshwright.errors import LayoutError
from meshwright.parallel.layout import Pipeline, whole_number, written
from meshwright.parallel.placement import stage_ranks

Floats = NDArray[np.float64]
Kind = Literal["F", "B", "I", "W"]
KINDS = "FBIW"

SCHEDULES = "meshwright.parallel.schedules"
MOST_ACTIONS = 2**24
"""The largest schedule that is written out action by action."""

Path = tuple[Floats, Floats, float]
"""A chain of actions: forwards and backwards per virtual stage [S], and transfers between ranks."""


class Action(NamedTuple):
    """One step of one pipeline rank: what, on which of its chunks, for which micro-batch."""

    kind: Kind
    chunk: int
    microbatch: int


@dataclass(frozen=True, eq=False)
class Schedule:
    """The ordered actions of every pipeline rank.

    ``v_shape``: odd chunks run from the last rank back to the first.
    """

    name: str
    pp: int
    vpp: int
    num_microbatches: int
    ranks: tuple[tuple[Action, ...], ...]
    v_shape: bool = False

    @property
    def rank_of_stage(self) -> tuple[int, ...]:
        """The pipeline rank of every virtual stage, in model order."""
        return stage_ranks(self.pp, self.vpp, self.v_shape)

    def stage(self, rank: int, chunk: int) -> int:
        """Return the virtual stage, in model order, that is chunk ``chunk`` of ``rank``."""
        place = self.pp - 1 - rank if self.v_shape and chunk % 2 else rank
        return chunk * self.pp + place

    def text(self) -> list[str]:
        """Return one line per rank: ``F0 F1 B0``, with chunks ``F1.0`` (chunk.micro-batch)."""
        return [" ".join(self.name_of(action) for action in actions) for actions in self.ranks]

    def name_of(self, action: Action) -> str:
        """Return the text form of one action."""
        chunk = f"{action.chunk}." if self.vpp > 1 else ""
        return f"{action.kind}{chunk}{action.microbatch}"


def actions_of(kind: Kind, places: Sequence[tuple[int, int]]) -> list[Action]:
    """Return the actions of one kind at ``(chunk, microbatch)`` places."""
    return [Action(kind, chunk, microbatch) for chunk, microbatch in places]


def one_forward_one_backward(
    forwards: Sequence[Action], backwards: Sequence[Action], warmup: int
) -> tuple[Action, ...]:
    """Return ``warmup`` forwards, then a forward and a backward in turns, then what is left."""
    warmup = min(warmup, len(forwards))
    turns = chain.from_iterable(zip(forwards[warmup:], backwards, strict=False))
    return (*forwards[:warmup], *turns, *backwards[len(forwards) - warmup :])


def single_chunk(name: str, vpp: int) -> None:
    """Raise ``LayoutError`` unless there is one chunk a rank."""
    if vpp != 1:
        rule = f"{name} runs one chunk per pipeline rank."
        raise LayoutError("layout.vpp", vpp, rule, "Use vpp=1, or schedule=interleaved.")


@cache
def aliases() -> dict[str, str]:
    """Return the other spellings of the schedules, from the ``ALIASES`` of their files."""
    found: dict[str, str] = {}
    for name in registry.names(SCHEDULES):
        spellings = cast("Sequence[str]", import_module(f"{SCHEDULES}.{name}").ALIASES)
        found |= {spelling: name for spelling in spellings}
    return found


@cache
def schedule_module(kind: Pipeline | str) -> ScheduleModule:
    """Return the file of a schedule. Raises ``MeshwrightError`` when there is none."""
    name = kind.lower().replace("-", "_") if isinstance(kind, str) else Pipeline(kind).name
    module = registry.load(SCHEDULES, name, field="layout.schedule", aliases=aliases())
    return cast("ScheduleModule", module)


class ScheduleModule(Protocol):
    """What a file in ``schedules`` holds."""

    ALIASES: Sequence[str]
    """Other spellings of its name, in lower case."""
    SPLITS_BACKWARD: bool
    """Whether it runs I and W instead of B."""

    @staticmethod
    def build(pp: int, vpp: int, num_microbatches: int, microbatch_group_size: int = 0) -> Schedule:
        """Return the schedule."""
        ...

    @staticmethod
    def enough_microbatches(
        pp: int, vpp: int, num_microbatches: int, microbatch_group_size: int = 0
    ) -> int:
        """Return a smaller number of micro-batches that holds as many at once."""
        ...

    @staticmethod
    def critical_paths(pp: int, vpp: int, num_microbatches: int) -> list[Path]:
        """Return chains of actions that no run can beat; ``own_work_paths`` at least."""
        ...


def own_work_paths(
    pp: int, vpp: int, num_microbatches: int, *, split: bool = False, v_shape: bool = False
) -> list[Path]:
    """Return, for every rank, the way to its first stage, all its own work, and the way back.

    Nothing on a rank can start before F of the stages above its first; after its last B come those
    of the stages above. A rank of a split schedule may end with W, for which nobody waits.
    """
    ranks = np.array(stage_ranks(pp, vpp, v_shape))
    own = (ranks == np.arange(pp)[:, None]) * float(num_microbatches)
    there = own + np.tri(pp, pp * vpp, -1)
    if split:
        return [(there[rank], own[rank], rank) for rank in range(pp)]
    return [(there[rank], there[rank], 2 * rank) for rank in range(pp)]


def build_schedule(
    kind: Pipeline | str,
    pp: int,
    vpp: int,
    num_microbatches: int,
    microbatch_group_size: int = 0,
) -> Schedule:
    """Return the schedule called ``kind``. ``microbatch_group_size`` 0 means ``pp``.

    Raises ``LayoutError`` when the schedule does not exist for these numbers.
    """
    check_numbers(pp, vpp, num_microbatches, microbatch_group_size)
    module = schedule_module(kind)
    return _build(module, pp, vpp, num_microbatches, microbatch_group_size)


def check_numbers(pp: int, vpp: int, num_microbatches: int, microbatch_group_size: int) -> None:
    """Raise ``LayoutError`` unless these are whole numbers of at least 1 (the group: 0)."""
    whole_number("layout.pp", pp)
    whole_number("layout.vpp", vpp)
    whole_number("num_microbatches", num_microbatches)
    whole_number("layout.microbatch_group_size", microbatch_group_size, low=0)


@lru_cache(maxsize=256)
def _build(
    module: ScheduleModule, pp: int, vpp: int, num_microbatches: int, group: int
) -> Schedule:
    if pp * vpp * num_microbatches * 2 > MOST_ACTIONS:
        most = MOST_ACTIONS // (2 * pp * vpp)
        rule = f"Schedules are written out up to {MOST_ACTIONS} actions."
        remedy = f"Use at most {most}." if most else "Use a smaller pp or vpp."
        raise LayoutError("num_microbatches", num_microbatches, rule, remedy)
    return module.build(pp, vpp, num_microbatches, group)


def schedule_order(
    pp: int,
    num_microbatches: int,
    vpp: int | None = 1,
    name: str | None = None,
    microbatch_group_size: int | None = None,
) -> list[str]:
    """Return, per pipeline rank, the order of its actions as text.

    ``F0 F1 B0`` with one chunk a rank, ``F<chunk>.<microbatch>`` with more. ``name`` left out means
    interleaved when ``vpp`` > 1, else 1F1B: what Megatron-LM runs.

    Raises ``LayoutError`` when the schedule does not exist for these numbers.
    """
    vpp = 1 if vpp is None else whole_number("layout.vpp", vpp)
    if name is None:
        name = "interleaved" if vpp > 1 else "one_f_one_b"
    name = written("layout.schedule", name)
    group = 0 if microbatch_group_size is None else microbatch_group_size
    return build_schedule(name, pp, vpp, num_microbatches, group).text()
