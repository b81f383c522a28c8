"""The choices of a layout that are no degrees, as numbers for columns and as words for people."""

from __future__ import annotations

from enum import IntEnum, IntFlag

from meshwright.errors import LayoutError, did_you_mean


class Zero(IntEnum):
    """What data parallelism shards (Rajbhandari et al., arXiv:1910.02054), in Megatron's words."""

    no_shard = 0
    optim = 1
    optim_grads = 2
    optim_grads_params = 3


class Recompute(IntFlag):
    """What is dropped in the forward pass and computed again in the backward pass.

    The module names are Megatron's ``--recompute-modules``. ``full`` drops whole layers; with
    ``uniform`` every ``recompute_num_layers`` layers share one kept input, with ``block`` the first
    ``recompute_num_layers`` layers of each stage are recomputed and the rest keep everything.
    """

    none = 0
    core_attn = 1
    layernorm = 2
    mlp = 4
    moe_act = 8
    moe = 16
    shared_experts = 32
    mla_up_proj = 64
    full = 128
    block = 256


class CpComm(IntEnum):
    """How context parallelism exchanges keys and values."""

    p2p = 0
    all_gather = 1
    a2a = 2
    a2a_p2p = 3


class Pipeline(IntEnum):
    """Pipeline schedules, by the names of their files in ``parallel/schedules``.

    The numbers stand in columns; a new schedule takes the next one.
    """

    gpipe = 0
    one_f_one_b = 1
    interleaved = 2
    zb_h1 = 3
    zb_v = 4


SCHEDULE_TEXT = {p: "1f1b" if p is Pipeline.one_f_one_b else p.name for p in Pipeline}
CP_COMM_TEXT = {
    CpComm.p2p: "p2p",
    CpComm.all_gather: "all_gather",
    CpComm.a2a: "a2a",
    CpComm.a2a_p2p: "a2a+p2p",
}

CHOICES: dict[str, dict[str, IntEnum]] = {
    "zero": {z.name: z for z in Zero},
    "schedule": {**{t: s for s, t in SCHEDULE_TEXT.items()}, "one_f_one_b": Pipeline.one_f_one_b},
    "cp_comm": {**{t: c for c, t in CP_COMM_TEXT.items()}, "a2a_p2p": CpComm.a2a_p2p},
}
"""Words of each choice, other spellings included."""


def recompute_to_text(recompute: int, num_layers: int) -> str:
    """Return the text form: ``none``, ``core_attn+mlp``, ``full``, ``full:uniform:2``."""
    if recompute & Recompute.full:
        if recompute & Recompute.block:
            return f"full:block:{num_layers}"
        return f"full:uniform:{num_layers}" if num_layers > 1 else "full"
    names = [str(m.name) for m in Recompute if m & recompute and m < Recompute.full]
    return "+".join(names) or "none"


def recompute_from_text(text: str) -> tuple[Recompute, int]:
    """Read ``none``, modules joined by ``+``, ``full``, ``full:uniform:N`` or ``full:block:N``.

    ``full`` is the short form of ``full:uniform:1``: both read as the same layout.
    """
    head, *rest = text.split(":")
    if head == "full":
        if not rest:
            return Recompute.full, 0
        if (
            len(rest) == 2
            and rest[0] in ("uniform", "block")
            and rest[1].isdecimal()
            and rest[1].isascii()
            and 0 < int(rest[1][:12]) < 10**6
        ):
            if rest == ["uniform", "1"]:
                return Recompute.full, 0
            method = Recompute.block if rest[0] == "block" else Recompute.none
            return Recompute.full | method, int(rest[1])
        raise LayoutError(
            "layout.recompute",
            text,
            "Full recomputation takes a method and a number of layers.",
            "Write full, full:uniform:1 or full:block:1.",
        )
    flags = Recompute.none
    for name in () if text == "none" else text.split("+"):
        if name not in _MODULES:
            raise LayoutError(
                "layout.recompute",
                text,
                f"There is no module {name!r} to recompute.",
                did_you_mean(name, ["none", "full", *_MODULES]),
            )
        flags |= Recompute[name]
    return flags, 0


_MODULES = [str(m.name) for m in Recompute if 0 < m < Recompute.full]
