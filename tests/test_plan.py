"""A plan: its layouts, its reasons, what it says when nothing fits, and its document."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright import api, plan_document
from meshwright.cost.detail import estimate
from meshwright.describe.cluster import load_cluster
from meshwright.describe.job import Execution, Job, job, precision
from meshwright.describe.models import load_model
from meshwright.errors import DocumentError, JobError, LayoutError, MeshwrightError
from meshwright.parallel.layout import Layout, from_text, layout, to_dict, to_text
from meshwright.plans import Plan, Plans, estimate_plan, plan, with_gpus
from strategies import Situation, dense_model, moe_model, situations_with_layout

MODEL = dense_model()
CLUSTER = load_cluster("16xH100")
JOB = Job(seq_len=4096, gbs=64)
PLANS = plan(MODEL, CLUSTER, JOB, top=4, with_pareto=True)


def test_plans_are_in_order_and_each_is_priced_in_full() -> None:
    times = [p.estimate.step_time_s for p in PLANS.plans]
    assert times == sorted(times)
    for one in PLANS.plans:
        assert one.estimate == estimate(MODEL, CLUSTER, JOB, one.layout)
        assert not [f for f in one.findings if f.severity == "error"]


def test_the_best_plan_says_why_and_the_others_by_how_much_they_lose() -> None:
    best, *others = PLANS.plans
    assert len(best.why) >= 3
    assert f"{PLANS.found.fit:,} layouts that fit" in best.why[0]
    for one in others:
        (gap,) = one.why
        assert "longer than the best" in gap


def test_starting_points_of_the_guides_are_priced_beside_the_plan() -> None:
    assert PLANS.starting_points
    for start in PLANS.starting_points:
        assert start.name
        assert start.source
        assert start.plan.estimate == estimate(MODEL, CLUSTER, JOB, start.plan.layout)
        # Nothing that a guide proposes beats the best of the search.
        assert (
            start.plan.estimate.verdict != "fits"
            or start.plan.estimate.step_time_s >= PLANS.plans[0].estimate.step_time_s * (1 - 1e-9)
        )


def test_the_answer_as_json_holds_what_is_promised() -> None:
    told = PLANS.to_dict()
    assert set(told) == {"searched", "plans", "pareto", "starting_points"}
    assert told["plans"][0]["layout"] == to_dict(PLANS.plans[0].layout)
    assert set(told["searched"]) >= {"candidates", "legal", "fit", "seconds"}


def nothing_fits(limit: float) -> Plans:
    return plan(MODEL, load_cluster("8xH100"), JOB, max_memory_bytes=limit)


def test_when_nothing_fits_the_closest_misses_by_what_is_said() -> None:
    answer = nothing_fits(1e9)
    assert answer.plans == []
    assert answer.closest is not None
    missing = answer.closest.estimate.peak_bytes - 1e9
    assert answer.missing_bytes == pytest.approx(missing)
    assert answer.to_dict()["closest"]["missing_bytes"] == pytest.approx(missing)


def test_the_smallest_cluster_is_the_first_on_which_something_fits() -> None:
    model, few = load_model("llama3-8b"), load_cluster("1xH100")
    answer = plan(model, few, JOB)
    assert answer.plans == []
    small = answer.smallest_cluster
    assert small is not None
    assert small.estimate.margin_fraction >= 0
    assert small.layout.world_size == small.cluster.num_gpus > 1
    half = plan(model, with_gpus(few, small.cluster.num_gpus // 2), JOB)
    assert half.plans == [] or half.plans[0].layout.world_size == 1


def test_no_cluster_is_large_enough_for_a_limit_that_cannot_be() -> None:
    answer = plan(MODEL, load_cluster("8xH100"), Job(seq_len=4096, gbs=8), max_memory_bytes=1e6)
    assert answer.smallest_cluster is None
    assert "smallest_cluster" not in answer.to_dict()


def test_no_legal_layout_is_an_error_that_says_the_rules() -> None:
    with pytest.raises(LayoutError, match=r"No layout is legal.*multiple of mbs\*dp"):
        api.plan(MODEL, CLUSTER, JOB, fix=["tp=3"])


@pytest.mark.parametrize(
    ("framework", "task", "fix", "field"),
    [
        ("megatron-lm", "lora", (), "job.task"),
        ("torchtitan", "pretrain", ("cp=2", "cp_comm=p2p"), "layout.cp_comm"),
    ],
)
def test_a_framework_that_can_run_nothing_that_fits_says_why(
    framework: str, task: str, fix: tuple[str, ...], field: str
) -> None:
    job = api.job(MODEL, 8192, 64, task=task)
    with pytest.raises(LayoutError, match=f"most often for {field}: ") as caught:
        api.plan(MODEL, CLUSTER, job, framework=framework, fix=fix)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("change", "field"),
    [({"tp": 32}, "layout.tp"), ({"pp": 3}, "layout.pp"), ({"mbs": 128}, "job.gbs")],
)
def test_an_illegal_layout_is_refused_with_its_rule(change: dict[str, int], field: str) -> None:
    one = layout(**change)  # pyright: ignore[reportArgumentType]
    with pytest.raises(LayoutError) as caught:
        estimate_plan(MODEL, with_gpus(CLUSTER, one.world_size), JOB, one)
    assert caught.value.field == field
    assert caught.value.remedy


def test_a_cluster_of_another_size_keeps_its_gpus_and_links() -> None:
    for text, gpus in (("64xGB200", 128), ("8xH100", 32), ("4x4xA100", 8)):
        cluster = load_cluster(text)
        other = with_gpus(cluster, gpus)
        assert other.num_gpus == gpus
        assert (other.gpu, other.inter_node) == (cluster.gpu, cluster.inter_node)
        assert other.gpus_per_node == cluster.gpus_per_node


@settings(max_examples=15)
@given(situations_with_layout())
def test_a_layout_as_text_and_as_json_reads_back_and_prices_the_same(
    drawn: tuple[Situation, Layout[int]],
) -> None:
    s, x = drawn
    shown = to_dict(x)
    words = [f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in shown.items()]
    for text in (to_text(x), " ".join(words), ",".join(words), ", ".join(words)):
        again = from_text(text, gpus=s.cluster.num_gpus)
        assert to_text(again) == to_text(x)
    first = estimate(s.model, s.cluster, s.job, x)
    assert estimate(s.model, s.cluster, s.job, from_text(to_text(x))) == first


def saved(tmp_path: Path, model: str, cluster: str, of: Plan) -> Path:
    path = tmp_path / "plan.toml"
    api.save_plan(of, str(path), model_text=model, cluster_text=cluster)
    return path


@pytest.mark.parametrize("recipe", ["bf16", "fp8-mx"])
@pytest.mark.parametrize("task", ["pretrain", "lora"])
def test_a_saved_plan_reads_back_and_prices_the_same(
    tmp_path: Path, recipe: str, task: str
) -> None:
    model, cluster = load_model("llama3-8b"), load_cluster("16xH100")
    made = job(seq_len=8192, gbs=32, precision_name=recipe, task=task)
    one = estimate_plan(model, cluster, made, from_text("tp=2 pp=4 vpp=2 mbs=2", gpus=16))
    path = saved(tmp_path, "llama3-8b", "16xH100", one)
    again = plan_document.load(path)
    assert (again.model, again.cluster, again.job) == (model, cluster, made)
    assert to_text(again.layout) == to_text(one.layout)
    priced = estimate(again.model, again.cluster, again.job, again.layout)
    assert priced == one.estimate
    assert tomllib.loads(path.read_text())["estimate"]["step_time_s"] == priced.step_time_s
    assert [p.name for p in tmp_path.iterdir()] == ["plan.toml"]


@settings(max_examples=50)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_any_name_of_a_model_survives_the_document(name: str) -> None:
    text = plan_document.to_toml(PLANS.plans[0], model_text=name, cluster_text="16xH100")
    assert tomllib.loads(text)["model"] == name


def test_a_document_is_readable_by_all_that_may_read_new_files(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    path = saved(tmp_path, "llama3-8b", "16xH100", PLANS.plans[0])
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_settings_that_a_document_cannot_hold_are_not_lost_silently(tmp_path: Path) -> None:
    other = replace(JOB, execution=Execution(flash_attention=False))
    one = estimate_plan(MODEL, CLUSTER, other, layout(gpus=16))
    with pytest.raises(DocumentError):
        saved(tmp_path, "x", "16xH100", one)
    assert list(tmp_path.iterdir()) == []


def without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda document: document.pop(key)


def setting(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        table, _, name = key.rpartition(".")
        (document[table] if table else document)[name] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        without("model"),
        without("cluster"),
        without("layout"),
        without("job"),
        setting("model", 3),
        setting("model", "no-such-model"),
        setting("cluster", "64xH1000"),
        setting("layout", "tp=3"),
        setting("layout", ""),
        setting("job", "large"),
        setting("job.seq_len", "long"),
        setting("job.seq_len", True),
        setting("job.gbs", -1),
        setting("job.precision", "fp7"),
        setting("job.task", "dream"),
    ],
)
def test_a_document_that_is_wrong_is_told_what(change: Callable[[dict[str, Any]], None]) -> None:
    document: dict[str, Any] = {
        "model": "llama3-8b",
        "cluster": "16xH100",
        "layout": "tp=2",
        "job": {"seq_len": 4096, "gbs": 64, "precision": "bf16", "task": "pretrain"},
    }
    assert plan_document.from_document(document, "plan.toml").layout.tp == 2
    change(document)
    if document.get("layout") == "":
        # Everything left out is its default.
        assert plan_document.from_document(document, "plan.toml").layout.tp == 1
        return
    with pytest.raises(MeshwrightError) as caught:
        plan_document.from_document(document, "plan.toml")
    assert caught.value.rule
    assert caught.value.remedy


@pytest.mark.parametrize("content", [b"tp = = 2", b"\xff\xfe\x00", None])
def test_a_file_that_is_no_document_is_told_so(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "plan.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DocumentError):
        plan_document.load(path)


@pytest.mark.parametrize("name", ["missing/plan.toml", ".", ""])
def test_an_output_that_cannot_be_is_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DocumentError) as caught:
        api.check_output(name)
    assert caught.value.field == "output"


def test_a_job_assumes_what_is_left_out_and_says_so() -> None:
    made = api.job(load_model("llama3-8b"))
    assert made.seq_len * made.gbs == pytest.approx(4 * 2**20, rel=0.5)
    assert len(made.assumed) == 3  # both sizes, and what the framework does
    assert api.job(load_model("llama3-8b"), 8192, 512).assumed == (api.TUNED,)
    assert math.log2(made.gbs).is_integer()


@pytest.mark.parametrize(
    "wrong",
    [
        {"seq_len": 0},
        {"seq_len": -5},
        {"global_batch_size": 0},
        {"seq_len": 2**60},
        {"precision": "fp7"},
        {"task": "dream"},
    ],
)
def test_a_job_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(JobError):
        api.job(MODEL, **wrong)


def test_a_mixture_of_experts_and_a_narrow_format_are_planned() -> None:
    small = Job(seq_len=4096, gbs=64, precision=precision("fp8-mx"))
    answer = plan(moe_model(mtp=1), load_cluster("8xB200"), small, top=2)
    assert len(answer.plans) == 2
    assert answer.plans[0].estimate.mfu_fraction < 1
