"""The guides' tables: their rows, their contradictions, and what they come to on a cluster."""

from __future__ import annotations

from functools import cache

import pytest

from meshwright.checks import Case, illegal
from meshwright.describe.cluster import build_cluster, load_cluster
from meshwright.describe.job import Job
from meshwright.describe.model import Model
from meshwright.describe.models import load_model
from meshwright.parallel.layout import Layout, table
from meshwright.starting_points import (
    BY_SEQUENCE,
    DENSE_BY_SIZE,
    LISTED,
    MOE_BY_SIZE,
    StartingPoint,
    layouts,
    starting_points,
)


@cache
def model_called(name: str) -> Model:
    return load_model(name)


def job(seq_len: int = 8192, gbs: int = 512) -> Job:
    return Job(seq_len=seq_len, gbs=gbs)


def points(model: str, cluster: str, seq_len: int = 8192) -> dict[str, StartingPoint]:
    found = starting_points(model_called(model), load_cluster(cluster), job(seq_len))
    return {point.name: point for point in found}


def degrees(x: Layout[int]) -> tuple[int, int, int, int]:
    return x.tp, x.pp, x.cp, x.ep


def reached(
    model: str, cluster: str, seq_len: int = 8192, gbs: int = 512
) -> list[tuple[StartingPoint, Layout[int]]]:
    return layouts(model_called(model), load_cluster(cluster), job(seq_len, gbs))


# --- the rows


@pytest.mark.parametrize(
    ("model", "name", "tp", "pp", "ep"),
    [
        ("olmoe-1b-7b", "OLMoE 7B/1B", 1, 1, 8),
        ("moonlight-16b-a3b", "Moonlight 16B/3B", 2, 1, 8),
        ("deepseek-v2", "DeepSeek-V2 236B/21B", 1, 4, 32),
        ("glm-4.5-air", "GLM-4.5 Air 106B/12B", 1, 4, 8),
        ("qwen3-30b-a3b", "Qwen3 30B-A3B", 4, 2, 4),
        ("glm-4.5", "GLM-4.5 355B/32B", 2, 8, 16),
        ("qwen3-235b-a22b", "Qwen3 235B-A22B", 4, 16, 8),
        ("deepseek-v3", "DeepSeek-V3 671B/37B", 2, 16, 64),
        ("kimi-k2", "Kimi-K2 1T", 2, 16, 32),
        ("mixtral-8x7b", "Mixtral 8x7B", 1, 4, 8),
        ("mixtral-8x22b", "Mixtral 8x22B", 4, 4, 8),
    ],
)
def test_a_listed_mixture_has_its_own_row_and_no_size_class(
    model: str, name: str, tp: int, pp: int, ep: int
) -> None:
    found = points(model, "1024xH100")
    assert (found[name].tp, found[name].pp, found[name].ep) == (tp, pp, ep)
    assert not any("by total size" in point.source for point in found.values())


def test_four_listed_rows_lie_outside_the_ranges_of_their_size_class() -> None:
    outside: set[str] = set()
    for _, params, row in LISTED:
        (size,) = (p for low, high, p in MOE_BY_SIZE if low <= params < high)
        for name, (low, high) in size.ranges.items():
            if row.ep is not None and not low <= getattr(row, name) <= high:
                outside.add(row.name)
    assert outside == {
        "DeepSeek-V2 236B/21B",
        "GLM-4.5 Air 106B/12B",
        "Qwen3 30B-A3B",
        "Mixtral 8x22B",
    }


@pytest.mark.parametrize(
    ("model", "tp", "pp", "cp"),
    [
        ("llama3-8b", 1, 1, 2),
        ("llama3-70b", 4, 4, 2),
        ("llama3.1-405b", 8, 8, 2),
        ("gpt3-175b", 4, 8, None),
    ],
)
def test_a_dense_model_run_in_production_has_a_row_beside_its_size_class(
    model: str, tp: int, pp: int, cp: int | None
) -> None:
    first, *others = points(model, "256xH100").values()
    assert (first.tp, first.pp, first.cp) == (tp, pp, cp)
    assert any(point.source == "guide: dense by size" for point in others)


@pytest.mark.parametrize(
    ("model", "name", "tp", "pp"),
    [
        ("qwen2.5-0.5b", "below 1B", [1], [1]),
        ("qwen2.5-7b", "1-10B", [2, 4], [1]),
        ("qwen2.5-32b", "10-70B", [4, 8], [2, 4]),
        ("mistral-large-123b", "70-175B", [8], [4, 8]),
        ("nemotron-4-340b", "175-500B", [8], [8, 16]),
    ],
)
def test_a_dense_size_is_a_range(model: str, name: str, tp: list[int], pp: list[int]) -> None:
    point = points(model, "1024xH100")[name]
    assert (point.choices("tp"), point.choices("pp")) == (tp, pp)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("qwen1.5-moe-a2.7b", "MoE below 20B"),
        ("qwen3-next-80b-a3b", "MoE 20-100B"),
        ("gpt-oss-120b", "MoE 100-500B"),
        ("glm-5", "MoE above 500B"),
    ],
)
def test_a_mixture_that_is_not_listed_goes_by_its_total_size(model: str, name: str) -> None:
    assert name in points(model, "1024xH100")


def test_size_classes_and_sequence_classes_cover_everything_once() -> None:
    for classes in (DENSE_BY_SIZE, MOE_BY_SIZE, BY_SEQUENCE):
        starts, ends = [low for low, _, _ in classes], [high for _, high, _ in classes]
        assert starts[0] == 0
        assert starts[1:] == ends[:-1]
        assert ends[-1] == float("inf")


@pytest.mark.parametrize(
    ("seq_len", "cp", "sp"),
    [
        (1024, [1], False),
        (2048, [1], True),
        (4096, [1], True),
        (8192, [2], True),
        (32768, [4, 8], True),
        (131072, [4, 8], True),
    ],
)
def test_a_sequence_length_asks_for_its_context_parallelism(
    seq_len: int, cp: list[int], sp: bool
) -> None:
    *_, point = points("llama3-70b", "64xH100", seq_len).values()
    assert (point.choices("cp"), point.sp) == (cp, sp)


def test_tensor_parallelism_stays_in_the_domain_and_is_small_on_ethernet() -> None:
    assert points("llama3-70b", "64xH100")["several nodes"].ranges["tp"] == (1, 8)
    assert points("llama3-70b", "8xH100")["one NVLink domain"].ranges["tp"] == (1, 8)
    slow = build_cluster("H100", 64, network="8x100Gb Ethernet")
    found = starting_points(model_called("llama3-70b"), slow, job())
    (point,) = (p for p in found if p.source == "guide: by topology")
    assert point.ranges["tp"] == (1, 4)
    assert {x.tp for _, x in layouts(model_called("llama3-70b"), slow, job())} == {4}


# --- what they come to


CASES = [
    ("llama3-70b", "64xH100", 8192, 512),
    ("llama3-8b", "8xH100", 8192, 64),
    ("llama3.1-405b", "1024xH100", 8192, 512),
    ("deepseek-v3", "1024xH100", 4096, 8192),
    ("deepseek-v3", "256xH100", 4096, 2048),
    ("mixtral-8x7b", "64xH100", 4096, 256),
    ("qwen2.5-0.5b", "8xA100", 1024, 64),
    ("gpt-oss-120b", "64xB200", 16384, 256),
    ("nemotron-h-8b", "16xH100", 8192, 128),
    ("llama3-70b", "24xH100", 65536, 240),
    ("llama3-70b", "144xGB200", 4096, 576),
]


@pytest.mark.parametrize(("model", "cluster", "seq_len", "gbs"), CASES)
def test_a_starting_point_comes_to_legal_layouts_that_fill_the_cluster(
    model: str, cluster: str, seq_len: int, gbs: int
) -> None:
    found = reached(model, cluster, seq_len, gbs)
    assert found
    for point, x in found:
        machine = load_cluster(cluster)
        assert x.world_size == machine.num_gpus
        assert not illegal(Case(model_called(model), job(seq_len, gbs), table([x]), machine))[0]
        for name in ("tp", "pp", "cp", "ep"):
            stated = point.choices(name)
            said = any(text.startswith(f"{name}={getattr(x, name)} ") for text in point.deviations)
            assert said or not stated or getattr(x, name) in stated or name == "cp"


def test_a_batch_that_no_layout_can_split_has_no_starting_point() -> None:
    assert reached("llama3-8b", "64xH100", 8191, 1) == []


@pytest.mark.parametrize(("seq_len", "cp", "dp"), [(4096, 1, 4), (8192, 2, 2)])
def test_llama3_70b_runs_with_dp_4_or_2_depending_on_the_sequence(
    seq_len: int, cp: int, dp: int
) -> None:
    (_, x), *_ = reached("llama3-70b", "64xH100", seq_len)
    assert (*degrees(x), x.dp) == (4, 4, cp, 1, dp)


@pytest.mark.parametrize(("gpus", "dp"), [(1024, 8), (256, 2)])
def test_llama_405b_divides_what_is_left_into_replicas(gpus: int, dp: int) -> None:
    (point, x), *_ = reached("llama3.1-405b", f"{gpus}xH100")
    assert (*degrees(x), x.dp) == (8, 8, 2, 1, dp)
    assert any("pipeline_layout" in text or "count as layers" in text for text in point.deviations)


def test_deepseek_v3_begins_with_tp_2_on_1024_gpus() -> None:
    ((_, x),) = reached("deepseek-v3", "1024xH100", 4096, 8192)
    assert (*degrees(x), x.dp, x.edp, x.sp) == (2, 16, 1, 64, 32, 1, 1)


def test_deepseek_v3_on_256_gpus_keeps_its_pipeline_and_lowers_ep() -> None:
    ((point, x),) = reached("deepseek-v3", "256xH100", 4096, 2048)
    assert degrees(x) == (2, 16, 1, 16)
    assert "ep=16 instead of 64: the nearest that is legal on 256 GPUs" in point.deviations


def test_deepseek_v2_runs_on_128_gpus_without_tp_and_sp() -> None:
    ((_, x),) = reached("deepseek-v2", "128xH100", 4096, 2048)
    assert (*degrees(x), x.sp) == (1, 4, 1, 32, 0)


def test_mixtral_begins_with_as_many_expert_ranks_as_experts() -> None:
    ((point, x),) = reached("mixtral-8x7b", "64xH100", 4096, 256)
    assert (*degrees(x), x.dp, x.edp) == (1, 4, 1, 8, 16, 2)
    assert point.deviations == ()


# --- where the guides disagree: a starting point is a range with its source


def test_the_guides_disagree_about_llama3_8b_and_gpt3() -> None:
    llama = points("llama3-8b", "8xH100")
    assert llama["LLaMA-3 8B"].tp == 1
    assert llama["1-10B"].choices("tp") == [2, 4]
    gpt = points("gpt3-175b", "256xH100")
    assert gpt["GPT-3 175B"].tp == 4
    assert gpt["70-175B"].tp == gpt["175-500B"].tp == 8


def test_a_size_on_the_border_of_two_classes_belongs_to_both() -> None:
    assert {"10-70B", "70-175B"} <= set(points("llama3-70b", "64xH100"))


def test_what_a_row_does_not_say_stays_open() -> None:
    open_rows = [row for _, _, row in LISTED if row.cp is None]
    assert len(open_rows) > 5
    assert all(row.choices("cp") == [] for row in open_rows)
    assert points("olmoe-1b-7b", "8xH100")["OLMoE 7B/1B"].gpus is None


def test_every_row_names_its_source() -> None:
    every = [row for classes in (DENSE_BY_SIZE, MOE_BY_SIZE, BY_SEQUENCE) for _, _, row in classes]
    for row in every + [row for _, _, row in LISTED]:
        assert row.source.startswith("guide: ")
        assert row.name
