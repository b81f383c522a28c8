"""Why not another layout: the change alone, the best with it, or the rule that forbids it."""

from __future__ import annotations

import pytest

from meshwright import api
from meshwright.describe.cluster import load_cluster
from meshwright.describe.job import Job
from meshwright.errors import LayoutError
from meshwright.parallel.layout import layout_fields, to_text
from meshwright.search import read_space, search
from strategies import dense_model, moe_model

MODEL = dense_model()
CLUSTER = load_cluster("16xH100")
JOB = Job(seq_len=4096, gbs=64)


def test_why_not_changes_what_is_named_and_keeps_the_rest() -> None:
    base = "tp=2 pp=2 mbs=2 recompute=full zero=optim_grads"
    answer = api.why_not(MODEL, CLUSTER, JOB, base, "tp=4")
    assert answer.other is not None
    assert (answer.base.layout.tp, answer.other.layout.tp) == (2, 4)
    for key in ("pp", "mbs", "recompute", "zero"):
        assert getattr(answer.other.layout, key) == getattr(answer.base.layout, key)
    assert answer.other.layout.dp == 2
    told = answer.to_dict()
    assert told["step_time_difference_s"] == pytest.approx(sum(answer.gap()["time"].values()))


def test_why_not_the_same_is_no_difference() -> None:
    answer = api.why_not(MODEL, CLUSTER, JOB, "tp=2 pp=2", "tp=2")
    assert not any(answer.gap()["time"].values())
    assert not any(answer.gap()["memory"].values())


@pytest.mark.parametrize(
    ("base", "change", "follows"),
    [
        ("tp=2", "tp=1", {"sp": "false"}),
        ("tp=1", "tp=2", {"sp": "true"}),
        ("pp=2 vpp=2", "vpp=1", {"schedule": "1f1b"}),
        ("pp=2", "vpp=2", {"schedule": "interleaved"}),
        ("pp=2 pipeline_layout=Et*7|t*9L", "pp=4", {}),
    ],
)
def test_why_not_lets_follow_what_a_change_implies(
    base: str, change: str, follows: dict[str, str]
) -> None:
    answer = api.why_not(MODEL, CLUSTER, JOB, base, change)
    assert answer.other is not None
    shown_fields = layout_fields(to_text(answer.other.layout))
    assert shown_fields | follows == shown_fields


@pytest.mark.parametrize(
    ("change", "field"),
    [("tp=3", "layout.tp"), ("tp=32", "layout"), ("ep=2", "layout.ep"), ("mbs=128", "job.gbs")],
)
def test_why_not_an_illegal_layout_names_the_rule(change: str, field: str) -> None:
    answer = api.why_not(MODEL, CLUSTER, JOB, "tp=2", change)
    assert answer.other is None
    assert answer.refused is not None
    assert answer.refused.field.startswith(field)
    assert answer.gap() == {"time": {}, "memory": {}}
    assert answer.to_dict()["refused"]["remedy"]


def test_why_not_of_a_mixture_of_experts_prices_experts() -> None:
    answer = api.why_not(moe_model(), CLUSTER, JOB, "ep=1", "ep=8")
    gap = answer.gap()
    assert gap["time"]["ep_comm_s"] > 0
    assert gap["memory"]["weights_bytes"] < 0


def test_what_only_other_degrees_allow_is_answered_by_the_best_layout_that_has_it() -> None:
    answer = api.why_not(MODEL, CLUSTER, JOB, "tp=2 pp=2", "dp=8")
    assert answer.refused is not None
    assert answer.other is not None
    best = search(MODEL, CLUSTER, JOB, top=1, space=read_space(["dp=8"])).best[0]
    assert to_text(answer.other.layout) == to_text(best.layout)
    assert "The best layout with dp=8" in answer.verdict()
    assert "alone is not legal" in answer.verdict()


def test_without_a_layout_the_best_of_all_meets_the_best_with_the_change() -> None:
    answer = api.why_not(MODEL, CLUSTER, JOB, None, "tp=8")
    best = search(MODEL, CLUSTER, JOB, top=1, space=read_space(["tp=8"])).best[0]
    assert answer.other is not None
    assert to_text(answer.other.layout) == to_text(best.layout)
    assert answer.base.estimate.step_time_s <= answer.other.estimate.step_time_s


def test_a_given_layout_meets_itself_changed_and_the_best_with_the_change() -> None:
    answer = api.why_not(MODEL, CLUSTER, JOB, "tp=2 pp=4 mbs=2 recompute=full", "tp=4")
    assert answer.other is not None
    assert answer.best is not None
    assert answer.other.layout.pp == 4
    assert answer.best.estimate.step_time_s < answer.other.estimate.step_time_s
    for told in ("Changing tp=4 alone", "The best layout with tp=4"):
        assert told in answer.verdict()
    assert answer.to_dict()["best"] == answer.best.to_dict()


@pytest.mark.parametrize(
    ("change", "nearest"),
    [
        ("dp=5", {"dp": [4, 8]}),
        ("tp=3", {"tp": [2, 4]}),
        ("pp=64", {"pp": [16]}),
        ("tp=8 pp=3", {"pp": [2], "tp": []}),
    ],
)
def test_what_no_layout_has_is_told_with_the_nearest_that_one_has(
    change: str, nearest: dict[str, list[int]]
) -> None:
    answer = api.why_not(MODEL, CLUSTER, JOB, None, change)
    assert answer.other is None
    assert answer.nearest == {k: v for k, v in nearest.items() if v}
    told = answer.to_dict()
    assert told["nearest"] == answer.nearest
    assert told["refused"]["rule"] in told["verdict"]


def test_what_fits_nowhere_is_compared_and_told_so() -> None:
    answer = api.why_not(
        api.load_model("llama3-8b"), CLUSTER, JOB, None, "zero=no_shard tp=1 pp=1 recompute=none"
    )
    assert answer.other is not None
    assert answer.other.estimate.verdict == "does not fit"
    assert "it does not fit" in answer.verdict()


def test_a_key_that_no_search_limits_is_changed_alone() -> None:
    answer = api.why_not(MODEL, CLUSTER, JOB, None, "order=tp-pp-dp")
    assert answer.best is None
    assert answer.other is not None
    assert answer.other.layout.order == "tp-pp-dp"


@pytest.mark.parametrize("change", ["", "tp", "tp=x", "tpp=2", "tp=2 tp=4", "recompute=nothing"])
def test_a_change_that_cannot_be_read_is_refused(change: str) -> None:
    with pytest.raises(LayoutError) as caught:
        api.why_not(MODEL, CLUSTER, JOB, "tp=2", change)
    assert caught.value.remedy
