"""Pipeline schedules: each file, and all that the folder holds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest

import meshwright
from meshwright import registry
from meshwright.errors import LayoutError, MeshwrightError
from meshwright.parallel.actions import (
    SCHEDULES,
    Schedule,
    aliases,
    build_schedule,
    schedule_module,
    schedule_order,
)
from meshwright.parallel.layout import SCHEDULE_TEXT, Pipeline
from oracles import rows

NAMES = registry.names(SCHEDULES)
CHUNKS = {"interleaved": (2, 3), "zb_h1": (1, 2), "zb_v": (2,)}
SHAPES = [(1, 1), (1, 4), (2, 3), (2, 8), (3, 6), (4, 2), (4, 8), (4, 12), (5, 10), (8, 16)]


def found(name: str) -> list[Schedule]:
    """Every shape of the list for which the schedule exists."""
    made: list[Schedule] = []
    for pp, m in SHAPES:
        for vpp in CHUNKS.get(name, (1,)):
            try:
                made.append(build_schedule(name, pp, vpp, m))
            except LayoutError as error:
                assert error.remedy
    return made


def order_arguments(oracle: dict[str, Any]) -> dict[str, Any]:
    outside = ("overlap_p2p", "overlap_moe_ep_comm", "forward_only")
    return {k: v for k, v in oracle["config"].items() if k not in outside}


@pytest.mark.parametrize("oracle", rows("schedules.jsonl.gz"), ids=lambda r: r["id"])
def test_megatrons_schedules_run_in_its_order(oracle: dict[str, Any]) -> None:
    """Provenance: spec (Megatron-LM)."""
    if not oracle["accepted"]:
        with pytest.raises(LayoutError):
            schedule_order(**order_arguments(oracle))
        return
    lines = schedule_order(**order_arguments(oracle))
    assert len(lines) == len(oracle["ranks"])
    for line, truth in zip(lines, oracle["ranks"], strict=True):
        if oracle["config"].get("forward_only"):
            line = " ".join(action for action in line.split() if action[0] == "F")
        if "order_sha256" not in truth:
            continue  # overlapped experts warm up with one more, and the order was not recorded
        assert hashlib.sha256(line.encode()).hexdigest() == truth["order_sha256"]
        assert line == truth.get("order", line)


@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_does_each_pass_once_forward_first(name: str) -> None:
    """Provenance: law."""
    backward = ("I", "W") if schedule_module(name).SPLITS_BACKWARD else ("B",)
    made = found(name)
    assert len(made) >= 5
    for schedule in made:
        for actions in schedule.ranks:
            assert len(set(actions)) == len(actions)
            places = [(c, i) for c in range(schedule.vpp) for i in range(schedule.num_microbatches)]
            at = {action: step for step, action in enumerate(actions)}
            for place in places:
                steps = [at[(kind, *place)] for kind in ("F", *backward)]
                assert steps == sorted(steps)
            assert len(actions) == len(places) * (1 + len(backward))


@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_is_found_by_all_its_names(name: str) -> None:
    """Provenance: ours."""
    module = schedule_module(name)
    spellings = [name, name.upper(), *module.ALIASES, SCHEDULE_TEXT[Pipeline[name]]]
    assert all(schedule_module(spelling) is module for spelling in spellings)
    assert schedule_module(Pipeline[name]) is module
    assert module.__doc__ is not None
    assert "arXiv" in module.__doc__
    assert set(aliases().values()) == set(NAMES)


def stage_csv(schedule: Schedule) -> str:
    """Return PyTorch's text form: one line per rank of <stage><kind><micro-batch>."""
    return "".join(
        ",".join(f"{schedule.stage(r, a.chunk)}{a.kind}{a.microbatch}" for a in actions) + "\n"
        for r, actions in enumerate(schedule.ranks)
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_small_schedule_reads_as_its_golden_file(
    name: str, golden: Callable[[str, str], None]
) -> None:
    """Provenance: spec, through the oracles of this file."""
    vpp = CHUNKS.get(name, (1,))[0]
    golden(f"schedules/{name}_pp4_vpp{vpp}_m8.csv", stage_csv(build_schedule(name, 4, vpp, 8)))


TORCH_KINDS = {
    "FORWARD": "F",
    "FULL_BACKWARD": "B",
    "BACKWARD_INPUT": "I",
    "BACKWARD_WEIGHT": "W",
}


def torch_csv(class_name: str, pp: int, vpp: int, m: int) -> str:
    """Return the order of PyTorch's class, made without stages and process groups."""
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    of_class = getattr(schedules, class_name)
    bare = object.__new__(of_class)
    bare.pp_group_size, bare.n_local_stages = pp, vpp
    bare.num_stages = bare._num_stages = pp * vpp
    bare._n_microbatches = m
    bare.number_of_rounds = max(1, m // pp)
    bare.microbatches_per_round = m // bare.number_of_rounds
    if hasattr(of_class, "_calculate_single_rank_operations"):
        by_rank = [bare._calculate_single_rank_operations(rank) for rank in range(pp)]
    else:
        orders = bare._get_pipeline_order()
        by_rank = [orders[rank] for rank in range(pp)]
    lines: list[str] = []
    for actions in by_rank:
        named = [(a, TORCH_KINDS.get(a.computation_type.name)) for a in actions if a is not None]
        # Gradient reduction is the runtime's affair, not a step of the pipeline.
        lines.append(",".join(f"{a.stage_index}{k}{a.microbatch_index}" for a, k in named if k))
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("name", "class_name"),
    [
        ("gpipe", "ScheduleGPipe"),
        ("zb_h1", "ScheduleInterleavedZeroBubble"),
        ("zb_v", "ScheduleZBVZeroBubble"),
    ],
)
def test_orders_equal_those_of_pytorch(name: str, class_name: str) -> None:
    """Provenance: spec (PyTorch). Its 1F1B table is left out: it skips F0 on the last rank."""
    for schedule in found(name):
        m = schedule.num_microbatches
        assert stage_csv(schedule) == torch_csv(class_name, schedule.pp, schedule.vpp, m)


def test_text_names_chunks_only_where_there_are_several() -> None:
    """Provenance: spec (the contract)."""
    assert schedule_order(2, 4) == ["F0 F1 B0 F2 B1 F3 B2 B3", "F0 B0 F1 B1 F2 B2 F3 B3"]
    assert schedule_order(2, 2, vpp=2)[1] == "F0.0 F0.1 F1.0 B1.0 F1.1 B1.1 B0.0 B0.1"
    assert schedule_order(2, 2, name="zb_h1") == ["F0 F1 I0 W0 I1 W1", "F0 I0 F1 I1 W0 W1"]
    assert schedule_order(1, 2, name="GPipe") == ["F0 F1 B0 B1"]


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"pp": 0, "num_microbatches": 4}, "layout.pp"),
        ({"pp": -2, "num_microbatches": 4}, "layout.pp"),
        ({"pp": "2", "num_microbatches": 4}, "layout.pp"),
        ({"pp": 2, "num_microbatches": 0}, "num_microbatches"),
        ({"pp": 2, "num_microbatches": None}, "num_microbatches"),
        ({"pp": 2, "num_microbatches": 2**31 - 1}, "num_microbatches"),
        ({"pp": 2**31 - 1, "num_microbatches": 1}, "num_microbatches"),
        ({"pp": 2, "num_microbatches": 4, "vpp": 0}, "layout.vpp"),
        ({"pp": 1, "num_microbatches": 4, "vpp": 2}, "layout.pp"),
        ({"pp": 4, "num_microbatches": 3, "vpp": 2}, "num_microbatches"),
        ({"pp": 4, "num_microbatches": 6, "vpp": 2}, "num_microbatches"),
        (
            {"pp": 4, "num_microbatches": 8, "vpp": 2, "microbatch_group_size": 3},
            "layout.microbatch_group_size",
        ),
        (
            {"pp": 4, "num_microbatches": 8, "vpp": 2, "microbatch_group_size": 9},
            "layout.microbatch_group_size",
        ),
        ({"pp": 2, "num_microbatches": 4, "name": "interleaved"}, "layout.vpp"),
        ({"pp": 2, "num_microbatches": 4, "vpp": 2, "name": "1f1b"}, "layout.vpp"),
        ({"pp": 2, "num_microbatches": 4, "vpp": 2, "name": "gpipe"}, "layout.vpp"),
        ({"pp": 2, "num_microbatches": 4, "vpp": 3, "name": "zb_v"}, "layout.vpp"),
        ({"pp": 4, "num_microbatches": 11, "name": "zb_h1"}, "num_microbatches"),
        (
            {"pp": 2, "num_microbatches": 4, "name": "zb_h1", "microbatch_group_size": 3},
            "layout.microbatch_group_size",
        ),
        (
            {
                "pp": 2,
                "num_microbatches": 4,
                "vpp": 2,
                "name": "zb_v",
                "microbatch_group_size": 2,
            },
            "layout.microbatch_group_size",
        ),
        ({"pp": 2, "num_microbatches": 4, "name": "dualpipe"}, "layout.schedule"),
        ({"pp": 2, "num_microbatches": 4, "name": 5}, "layout.schedule"),
    ],
)
def test_a_schedule_that_cannot_be_names_field_rule_and_remedy(
    wrong: dict[str, Any], field: str
) -> None:
    """Provenance: ours."""
    with pytest.raises(meshwright.MeshwrightError) as error:
        meshwright.schedule_order(**wrong)
    assert error.value.field == field
    assert error.value.rule
    assert error.value.remedy


@pytest.mark.parametrize(
    ("name", "pp", "vpp", "m"), [("interleaved", 4, 2, 6), ("zb_h1", 4, 1, 11)]
)
def test_the_micro_batches_that_a_remedy_names_work(name: str, pp: int, vpp: int, m: int) -> None:
    """Provenance: ours."""
    with pytest.raises(LayoutError) as error:
        build_schedule(name, pp, vpp, m)
    for number in error.value.remedy.removeprefix("Use ").removesuffix(".").split(" or "):
        assert build_schedule(name, pp, vpp, int(number)).num_microbatches == int(number)


def test_an_unknown_schedule_suggests_the_nearest() -> None:
    """Provenance: ours."""
    with pytest.raises(MeshwrightError, match="Did you mean interleaved"):
        build_schedule("interleave", 2, 2, 4)
