"""Making one layout: what is left out is derived, and both meshes must cover the world."""

from __future__ import annotations

import math

from meshwright.errors import LayoutError, nearest_divisors
from meshwright.parallel.layout.choices import CpComm, Pipeline, Recompute, Zero
from meshwright.parallel.layout.fields import DEFAULT_ORDER, Layout
from meshwright.parallel.layout.values import whole_number
from meshwright.parallel.pipeline_layout import read_pipeline_layout


def layout(
    *,
    tp: int = 1,
    cp: int = 1,
    pp: int = 1,
    vpp: int | None = None,
    ep: int = 1,
    etp: int = 1,
    dp: int | None = None,
    gpus: int | None = None,
    mbs: int = 1,
    sp: bool | None = None,
    zero: Zero = Zero.optim,
    dp_replicate: int = 1,
    recompute: Recompute = Recompute.none,
    recompute_num_layers: int = 0,
    schedule: Pipeline | None = None,
    cp_comm: CpComm = CpComm.p2p,
    first: int = 0,
    last: int = 0,
    account_for_embedding: bool = False,
    account_for_loss: bool = False,
    microbatch_group_size: int = 0,
    order: str = DEFAULT_ORDER,
    pipeline_layout: str | None = None,
    hierarchical_cp: tuple[int, ...] | None = None,
) -> Layout[int]:
    """Make one layout, deriving what is left out.

    ``dp`` comes from ``gpus``, or is the smallest that both meshes allow when neither is given.
    ``vpp`` is what ``pipeline_layout`` spells out, 2 for ``zb_v``, else 1.
    ``sp`` is on when ``tp > 1``. ``schedule`` is ``interleaved`` when ``vpp > 1``, else ``1f1b``.

    Raises ``LayoutError`` when a degree is below 1 or the world does not hold both meshes.
    """
    degrees = {"tp": tp, "cp": cp, "pp": pp, "ep": ep, "etp": etp, "mbs": mbs}
    derived = {"vpp": vpp, "dp": dp, "gpus": gpus}
    stated = {name: value for name, value in derived.items() if value is not None}
    for name, value in {**degrees, "dp_replicate": dp_replicate, **stated}.items():
        whole_number(f"layout.{name}", value)
    if vpp is None:
        vpp = _chunks(pp, pipeline_layout, schedule)
    if dp is None:
        world = minimum_world_size(tp, cp, pp, ep, etp) if gpus is None else gpus
        check_world_size(world, tp=tp, cp=cp, pp=pp, ep=ep, etp=etp)
        dp = world // (tp * cp * pp)
    elif gpus is not None:
        _check_dp(dp, gpus, tp, cp, pp)
    check_world_size(tp * cp * dp * pp, tp=tp, cp=cp, pp=pp, ep=ep, etp=etp)
    if (dp * cp) % dp_replicate:
        raise LayoutError(
            "layout.dp_replicate",
            dp_replicate,
            f"It must divide dp*cp = {dp * cp}.",
            f"Choose from the divisors of {dp * cp}.",
        )
    if schedule is None:
        schedule = Pipeline.interleaved if vpp > 1 else Pipeline.one_f_one_b
    if recompute == Recompute.full and recompute_num_layers == 1:
        recompute_num_layers = 0
    return Layout[int](
        tp=tp,
        cp=cp,
        dp=dp,
        pp=pp,
        vpp=vpp,
        ep=ep,
        etp=etp,
        mbs=mbs,
        dp_replicate=dp_replicate,
        sp=int(tp > 1 if sp is None else sp),
        zero=int(zero),
        recompute=int(recompute),
        recompute_num_layers=recompute_num_layers,
        schedule=int(schedule),
        cp_comm=int(cp_comm),
        first=first,
        last=last,
        account_for_embedding=int(account_for_embedding),
        account_for_loss=int(account_for_loss),
        microbatch_group_size=microbatch_group_size,
        order=order,
        pipeline_layout=pipeline_layout,
        hierarchical_cp=hierarchical_cp,
    )


def _check_dp(dp: int, gpus: int, tp: int, cp: int, pp: int) -> None:
    """Raise ``LayoutError`` unless the degrees of the dense mesh make ``gpus``."""
    if gpus % dp:
        rule = f"Groups of dp have equal size, so it must divide the {gpus} GPUs."
        near = " or ".join(f"dp={d}" for d in nearest_divisors(gpus, dp))
        raise LayoutError("layout.dp", dp, rule, f"Leave dp out, or use {near}.")
    unit = tp * cp * pp
    if gpus != unit * dp:
        raise LayoutError(
            "layout.dp",
            dp,
            f"tp*cp*dp*pp = {tp}*{cp}*{dp}*{pp} = {unit * dp} is not the {gpus} GPUs given.",
            f"Leave dp out, or use dp={gpus // unit}." if gpus >= unit else "",
        )


def _chunks(pp: int, pipeline_layout: str | None, schedule: Pipeline | None) -> int:
    if pipeline_layout is not None:
        return max(1, len(read_pipeline_layout(pipeline_layout)) // pp)
    return 2 if schedule == Pipeline.zb_v else 1


def minimum_world_size(tp: int, cp: int, pp: int, ep: int, etp: int) -> int:
    """Return the smallest world that holds both meshes: PP * lcm(TP*CP, EP*ETP).

    The maximum of the two instead of their least common multiple suffices only when one divides
    the other.
    """
    return pp * math.lcm(tp * cp, ep * etp)


def check_world_size(gpus: int, *, tp: int, cp: int, pp: int, ep: int, etp: int) -> None:
    """Raise ``LayoutError`` unless ``gpus`` is a multiple of PP*lcm(TP*CP, EP*ETP).

    A degree that alone does not divide the GPUs is the one that is named.
    """
    unit = minimum_world_size(tp, cp, pp, ep, etp)
    if gpus % unit == 0:
        return
    nearest = sorted({max(unit, gpus // unit * unit), (gpus // unit + 1) * unit})
    worlds = " or ".join(map(str, nearest))
    for name, degree in (("tp", tp), ("cp", cp), ("pp", pp), ("ep", ep), ("etp", etp)):
        if gpus % degree and degree < gpus:
            near = " or ".join(f"{name}={d}" for d in nearest_divisors(gpus, degree))
            raise LayoutError(
                f"layout.{name}",
                degree,
                f"Groups of {name} have equal size, so it must divide the {gpus} GPUs.",
                f"Use {near}; or {worlds} GPUs.",
            )
    raise LayoutError(
        "layout.world_size",
        gpus,
        f"GPUs must be a multiple of pp*lcm(tp*cp, ep*etp) = {pp}*lcm({tp * cp}, {ep * etp})"
        f" = {unit}, so that the dense and the expert mesh both cover every rank.",
        f"Use {worlds} GPUs, or other degrees.",
    )
