"""The command line: the JSON that is promised, exit statuses, and what it says of bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from meshwright import __version__
from meshwright.__main__ import main
from meshwright.cost.detail import TIME_TERMS
from meshwright.cost.step import MEMORY_TERMS

CONFIG = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
MOE_CONFIG = {
    "model_type": "mixtral",
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
}
BATCH = ("--seq-len", "4096", "--global-batch-size", "64")


@dataclass(frozen=True)
class Answer:
    """What a command printed, and how it ended."""

    status: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Answer]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process."""
    monkeypatch.setenv("COLUMNS", "200")

    def command(*words: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["meshwright", *words])
        status = 0
        try:
            main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        printed = capsys.readouterr()
        return Answer(status, printed.out, printed.err)

    return command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return str(folder)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("moe")
    (folder / "config.json").write_text(json.dumps(MOE_CONFIG))
    return str(folder / "config.json")


NUMBER = (int, float)
TEXT = (str,)
WHOLE = (int,)
FLAG = (bool,)
FINDING = {
    "id": TEXT,
    "severity": TEXT,
    "field": TEXT,
    "value": (object,),
    "rule": TEXT,
    "remedy": TEXT,
    "message": TEXT,
}
LAYOUT = {
    **dict.fromkeys(("tp", "pp", "vpp", "cp", "dp", "ep", "etp", "edp", "mbs"), WHOLE),
    "sp": FLAG,
    "zero": TEXT,
    "recompute": TEXT,
    "schedule": TEXT,
}
TIME = ("compute_s", "tp_comm_s", "cp_comm_s", "ep_comm_s", "dp_comm_s", "pp_comm_s")
MEMORY = ("weights_bytes", "grads_bytes", "optimizer_bytes", "activations_bytes", "logits_bytes")
ESTIMATE = {
    "step_time_s": NUMBER,
    "tokens_per_s_per_gpu": NUMBER,
    "model_flops_per_s_per_gpu": NUMBER,
    "mfu_fraction": NUMBER,
    "time": dict.fromkeys((*TIME, "bubble_s", "optimizer_s"), NUMBER),
    "peak_bytes": NUMBER,
    "capacity_bytes": NUMBER,
    "margin_fraction": NUMBER,
    "fits": FLAG,
    "verdict": TEXT,
    "memory": dict.fromkeys((*MEMORY, "buffers_bytes", "framework_bytes"), NUMBER),
    "stages": (list,),
    "assumed": (list,),
}


def holds(shape: Mapping[str, Any], answer: Mapping[str, Any], where: str = "") -> None:
    """Assert that an answer has the fields of ``shape``, each of its type."""
    for name, kind in shape.items():
        assert name in answer, f"{where}{name} is missing"
        value = answer[name]
        if isinstance(kind, dict):
            holds(kind, value, f"{where}{name}.")
            continue
        assert isinstance(value, kind), f"{where}{name} = {value!r}"
        if kind in (NUMBER, WHOLE):
            assert not isinstance(value, bool), f"{where}{name} = {value!r}"


def holds_estimate(e: dict[str, Any], pp: int) -> None:
    holds(ESTIMATE, e)
    assert all(
        isinstance(v, float) and v >= 0 for v in (*e["time"].values(), *e["memory"].values())
    )
    assert sum(e["time"].values()) == pytest.approx(e["step_time_s"], rel=1e-9)
    assert sum(e["memory"].values()) == pytest.approx(e["peak_bytes"], rel=1e-9)
    margin = (e["capacity_bytes"] - e["peak_bytes"]) / e["capacity_bytes"]
    assert e["margin_fraction"] == pytest.approx(margin)
    assert e["fits"] == (margin >= 0)
    assert e["verdict"] in ("fits", "borderline", "does not fit")
    assert [s["stage"] for s in e["stages"]] == list(range(pp))
    for stage in e["stages"]:
        holds({"stage": WHOLE, "layers": WHOLE, "peak_bytes": NUMBER}, stage)
    assert all(isinstance(line, str) for line in e["assumed"])


def holds_plan(plan: dict[str, Any], gpus: int) -> None:
    layout = plan["layout"]
    holds(LAYOUT, layout)
    degrees = [layout[k] for k in ("tp", "pp", "vpp", "cp", "dp", "ep", "etp", "edp", "mbs")]
    assert min(degrees) >= 1
    assert layout["tp"] * layout["pp"] * layout["cp"] * layout["dp"] == gpus
    assert layout["ep"] * layout["etp"] * layout["edp"] * layout["pp"] == gpus
    holds_estimate(plan["estimate"], layout["pp"])
    for finding in plan["findings"]:
        holds(FINDING, finding)
        assert finding["severity"] in ("error", "warning", "note")


def text_of(layout: Mapping[str, Any]) -> str:
    """Return a layout object as key=value text, as a user would print it."""
    shown = {k: str(v).lower() if isinstance(v, bool) else v for k, v in layout.items()}
    return " ".join(f"{k}={v}" for k, v in shown.items())


@pytest.mark.parametrize("kind", ["model", "moe"])
def test_plan_prints_the_promised_json_and_estimate_prices_its_layouts_the_same(
    run: Run, kind: str, request: pytest.FixtureRequest
) -> None:
    model: str = request.getfixturevalue(kind)
    answer = run("plan", model, "16xH100", *BATCH, "--top", "3", "--json")
    assert answer.status == 0
    plans = answer.json()
    holds(dict.fromkeys(("candidates", "legal", "fit"), WHOLE), plans["searched"])
    holds({"seconds": NUMBER}, plans["searched"])
    assert len(plans["plans"]) == 3
    assert plans["searched"]["candidates"] >= plans["searched"]["legal"] >= plans["searched"]["fit"]
    times = [plan["estimate"]["step_time_s"] for plan in plans["plans"]]
    assert times == sorted(times)
    for plan in plans["plans"]:
        holds_plan(plan, 16)
        assert plan["why"] and all(isinstance(line, str) for line in plan["why"])
        if kind == "model":
            assert (plan["layout"]["ep"], plan["layout"]["etp"]) == (1, 1)
            assert plan["layout"]["edp"] == 16 // plan["layout"]["pp"]
        again = run(
            "estimate", model, "16xH100", "--layout", text_of(plan["layout"]), *BATCH, "--json"
        )
        assert again.status == 0
        assert again.json() == {k: plan[k] for k in ("layout", "estimate", "findings")}
        commas = text_of(plan["layout"]).replace(" ", ",")
        same = run("estimate", model, "16xH100", "--layout", commas, *BATCH, "--json")
        assert same.json() == again.json()


def test_plan_keeps_to_its_limits(run: Run, model: str) -> None:
    limits = ("--fix", "tp=4 pp=2", "--fix", "recompute=none", "--max-memory", "60GB")
    answer = run("plan", model, "16xH100", *BATCH, *limits, "--json").json()
    for plan in answer["plans"]:
        layout = plan["layout"]
        assert (layout["tp"], layout["pp"], layout["recompute"]) == (4, 2, "none")
        assert plan["estimate"]["peak_bytes"] <= 60e9


def test_plan_says_what_is_closest_and_which_cluster_is_large_enough(run: Run) -> None:
    words = ("plan", "llama3-70b", "8xH100", *BATCH, "--fix", "recompute=full mbs=1 vpp=1")
    answer = run(*words, "--json")
    assert answer.status == 1
    told = answer.json()
    assert (told["plans"], told["searched"]["fit"]) == ([], 0)
    holds_plan(told["closest"], 8)
    assert told["closest"]["estimate"]["verdict"] != "fits"
    gpus = told["smallest_cluster"]["gpus"]
    assert gpus > 8
    holds_plan(told["smallest_cluster"], gpus)
    assert told["smallest_cluster"]["estimate"]["fits"]
    shown = run(*words)
    assert shown.status == 1
    assert "Nothing fits" in shown.out
    assert f"{gpus} GPUs" in shown.out


def test_plan_shows_a_table_where_memory_and_time_go_and_why(run: Run, model: str) -> None:
    answer = run("plan", model, "16xH100", *BATCH)
    assert answer.status == 0
    for text in (
        "tokens/s/GPU",
        "MFU",
        "Where the memory goes",
        "Where the time goes",
        "Why it won",
    ):
        assert text in answer.out
    layout = answer.out.rstrip().splitlines()[-1].strip('"')
    assert run("estimate", model, "16xH100", "--layout", layout, *BATCH).status == 0


def test_plan_writes_a_document_that_reads_back(run: Run, model: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    answer = run("plan", model, "16xH100", *BATCH, "-o", str(path), "--json")
    assert answer.status == 0
    assert path.is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["plan.toml"]


def test_estimate_prints_the_promised_json(run: Run, model: str) -> None:
    answer = run("estimate", model, "16xH100", "--layout", "tp=2 pp=4", *BATCH, "--json")
    assert answer.status == 0
    told = answer.json()
    assert set(told) == {"layout", "estimate", "findings"}
    holds_plan(told, 16)
    assert tuple(told["estimate"]["time"]) == TIME_TERMS
    assert tuple(told["estimate"]["memory"]) == MEMORY_TERMS


def test_estimate_prices_a_layout_that_does_not_fit_and_says_so(run: Run) -> None:
    words = ("estimate", "llama3-70b", "8xH100", "--layout", "tp=1", *BATCH)
    answer = run(*words, "--json")
    assert answer.status == 0
    told = answer.json()["estimate"]
    assert (told["fits"], told["verdict"]) == (False, "does not fit")
    assert told["margin_fraction"] < 0
    assert "does not fit" in run(*words).out


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32", "fp8", "fp8-cs", "fp8-mx", "nvfp4"])
@pytest.mark.parametrize("task", ["pretrain", "sft", "lora"])
def test_every_precision_and_task_is_priced(
    run: Run, model: str, precision: str, task: str
) -> None:
    choice = ("--precision", precision, "--task", task)
    answer = run("estimate", model, "8xB200", "--layout", "tp=2", *BATCH, *choice, "--json")
    assert answer.status == 0
    holds_plan(answer.json(), 8)


def test_what_is_left_out_is_assumed_and_said(run: Run, model: str) -> None:
    told = run("estimate", model, "16xH100", "--layout", "tp=2", "--json").json()
    assumed = " ".join(told["estimate"]["assumed"])
    assert "seq_len" in assumed
    assert "gbs" in assumed
    assert "gpus_per_node" in assumed


def test_ranks_prints_groups_of_every_rank(run: Run) -> None:
    answer = run("ranks", "--gpus", "16", "--layout", "tp=2 pp=2 ep=4", "--json")
    assert answer.status == 0
    groups = answer.json()["groups"]
    for name in ("tp", "cp", "dp", "pp", "ep", "edp", "dp_cp", "embedding"):
        assert name in groups
    for name in ("tp", "cp", "dp", "pp", "ep", "edp"):
        assert sorted(rank for group in groups[name] for rank in group) == list(range(16))
    assert {len(g) for g in groups["tp"]} == {2}
    assert {len(g) for g in groups["ep"]} == {4}


@pytest.mark.parametrize(
    ("what", "fields"),
    [
        ("gpus", {"name": TEXT, "hbm_bytes": NUMBER}),
        ("models", {"name": TEXT, "num_params": WHOLE, "num_active_params": WHOLE}),
        ("checks", {"id": TEXT, "severity": TEXT, "rule": TEXT, "remedy": TEXT}),
        ("schedules", {"name": TEXT, "what": TEXT}),
        ("frameworks", {"name": TEXT}),
        ("terms", {"name": TEXT, "what": TEXT, "source": TEXT}),
    ],
)
def test_list_prints_what_is_known(run: Run, what: str, fields: dict[str, Any]) -> None:
    answer = run("list", what, "--json")
    assert answer.status == 0
    rows = answer.json()
    assert rows
    for one in rows:
        holds(fields, one)
    shown = run("list", what)
    assert shown.status == 0
    assert len(shown.out.splitlines()) > len(rows)


def test_groups_and_schedules_are_shown_as_before(
    run: Run, golden: Callable[[str, str], None]
) -> None:
    golden("cli/ranks.txt", run("ranks", "--gpus", "16", "--layout", "tp=2 pp=2 cp=2").out)
    golden("cli/schedules.txt", run("list", "schedules").out)


def test_explain_shows_every_term_or_one(run: Run, model: str) -> None:
    words = ("explain", model, "16xH100", "--layout", "tp=2 pp=2", *BATCH)
    told = run(*words, "--json").json()
    assert {*TIME_TERMS, *MEMORY_TERMS} <= set(told["terms"])
    for term in told["terms"].values():
        assert isinstance(term["value"], float)
        for formula in term["formulas"]:
            holds({"what": TEXT, "formula": TEXT, "source": TEXT, "left_out": TEXT}, formula)
    one = run(*words[:3], "tp_comm_s", *words[3:], "--json").json()
    assert list(one["terms"]) == ["tp_comm_s"]
    assert run(*words).status == 0
    shown = run(*words[:3], "tp_comm_s", *words[3:])
    assert "source" in shown.out


def test_explain_why_not_adds_up_to_the_gap(run: Run, model: str) -> None:
    words = ("explain", model, "16xH100", "--layout", "tp=2 pp=2", "--why-not", "tp=4", *BATCH)
    told = run(*words, "--json").json()
    by_term = told["difference"]
    assert sum(by_term["time"].values()) == pytest.approx(told["step_time_difference_s"], abs=1e-9)
    assert sum(by_term["memory"].values()) == pytest.approx(told["peak_difference_bytes"], abs=1.0)
    assert "change" in run(*words).out
    refused = run(*words[:6], "tp=3", *BATCH, "--json").json()
    assert refused["refused"]["field"].startswith("layout.")


def test_the_version_and_help_are_printed(run: Run) -> None:
    assert run("--version").out.strip() == __version__
    for word in ("plan", "estimate", "explain", "ranks", "list"):
        shown = run(word, "--help")
        assert shown.status == 0
        assert "--json" in shown.out
    assert run("--help").status == 0


LAYOUTS: list[tuple[str, str]] = [
    ("tp=3", "layout.tp"),
    ("tp=0", "layout.tp"),
    ("tp=-2", "layout.tp"),
    ("tp=1000000000", "layout"),
    ("tp=99999999999999999999999", "layout.tp"),
    ("tp=two", "layout.tp"),
    ("tp=1.5", "layout.tp"),
    ("tp=", "layout.tp"),
    ("tp=32", "layout"),
    ("width=1", "layout.width"),
    ("tp", "layout"),
    ("tp=2 tp=4", "layout.tp"),
    ("pp=7", "layout.pp"),
    ("pp=81", "layout"),
    ("dp=3", "layout.dp"),
    ("ep=2", "layout.ep"),
    ("edp=7", "layout.edp"),
    ("cp=3", "layout.cp"),
    ("sp=maybe", "layout.sp"),
    ("zero=4", "layout.zero"),
    ("recompute=some", "layout.recompute"),
    ("recompute=full:uniform", "layout.recompute"),
    ("recompute=full:block:0", "layout.recompute"),
    ("schedule=fastest", "layout.schedule"),
    ("vpp=3", "layout.vpp"),
    ("pp=4 vpp=64", "layout.vpp"),
    ("order=tp-tp", "layout.order"),
    ("order=up-down", "layout.order"),
    ("pp=4 pipeline_layout=xx", "layout.pipeline_layout"),
    ("pp=4 pipeline_layout=Et|tL", "layout.pipeline_layout"),
    ("mbs=3", "job.gbs"),
    ("mbs=1024", "job.gbs"),
    ("dp_replicate=3", "layout.dp_replicate"),
    ("hierarchical_cp=2x3", "layout.hierarchical_cp"),
    ("pp=4 first=100", "layout"),
    ("microbatch_group_size=-1", "layout.microbatch_group_size"),
    ("pp=4 schedule=zb_v vpp=4", "layout"),
]


@pytest.mark.parametrize(("layout", "field"), LAYOUTS)
def test_an_impossible_layout_is_told_in_one_message(
    run: Run, model: str, layout: str, field: str
) -> None:
    told_in_one_message(run("estimate", model, "16xH100", "--layout", layout, *BATCH), field)


def told_in_one_message(answer: Answer, field: str) -> None:
    assert answer.status == 2
    assert answer.out == ""
    assert answer.err.startswith("error: ")
    assert field in answer.err
    assert " = " in answer.err
    assert "Traceback" not in answer.err
    assert len(answer.err) < 2000


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (("--seq-len", "0", "--global-batch-size", "64"), "job.seq_len"),
        (("--seq-len", "-1", "--global-batch-size", "64"), "job.seq_len"),
        (("--seq-len", "99999999999999999999", "--global-batch-size", "64"), "job.seq_len"),
        (("--seq-len", "4096", "--global-batch-size", "0"), "job.gbs"),
        (("--seq-len", "4096", "--global-batch-size", "63"), "job.gbs"),
        ((*BATCH, "--precision", "fp7"), "job.precision"),
        ((*BATCH, "--task", "dream"), "job.task"),
    ],
)
def test_an_impossible_job_is_told_in_one_message(
    run: Run, model: str, words: tuple[str, ...], field: str
) -> None:
    told_in_one_message(run("estimate", model, "16xH100", "--layout", "tp=2", *words), field)


@pytest.mark.parametrize(
    "cluster",
    [
        *("64xH1000", "64x", "0xH100", "8x0xH100", "99999999999999999999xH100", "", "12xH100"),
        *("H100", "xH100", "6.5xH100", "no-such.toml", "/"),
    ],
)
def test_an_impossible_cluster_is_told_in_one_message(run: Run, model: str, cluster: str) -> None:
    told_in_one_message(run("estimate", model, cluster, "--layout", "tp=2", *BATCH), "")


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("", "model"),
        ('{"model_type": "llama", "hidden_size":', "model"),
        ("[1, 2]", "model"),
        ('{"hidden_size": 1024}', "config.model_type"),
        ('{"model_type": "perceptron"}', "config.model_type"),
        ('{"model_type": "llama", "hidden_size": -1}', "config.hidden_size"),
        ('{"model_type": "llama", "hidden_size": 0}', "config.hidden_size"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "config.hidden_size"),
        ('{"model_type": "llama", "hidden_size": 1e30}', "config.hidden_size"),
        ('{"model_type": "llama", "hidden_size": [1]}', "config.hidden_size"),
        ('{"model_type": "llama", "num_hidden_layers": 0}', "config.num_hidden_layers"),
        ('{"model_type": "llama", "num_attention_heads": 7, "num_key_value_heads": 2}', "heads"),
    ],
)
def test_an_unusable_config_is_told_in_one_message(
    run: Run, tmp_path: Path, text: str, field: str
) -> None:
    (tmp_path / "config.json").write_text(text)
    words = ("16xH100", "--layout", "tp=2", *BATCH)
    told_in_one_message(run("estimate", str(tmp_path), *words), field)


@pytest.mark.parametrize("name", ["no/such/config.json", "lama3-70b", "", "/", "/dev/null"])
def test_a_missing_model_is_told_in_one_message(run: Run, name: str) -> None:
    told_in_one_message(run("plan", name, "16xH100", *BATCH), "model")


def test_a_binary_file_is_no_config(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(bytes(range(256)))
    told_in_one_message(run("plan", str(path), "16xH100", *BATCH), "model")


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (("--fix", "width=2"), "fix"),
        (("--fix", "tp=0"), "fix.tp"),
        (("--fix", "tp=3"), "plan"),
        (("--fix", "tp=1..9999999999"), "fix.tp"),
        (("--fix", "tp=2", "--fix", "tp=4"), "fix.tp"),
        (("--max-memory", "0GB"), "max_memory"),
        (("--max-memory", "-5GB"), "max_memory"),
        (("--max-memory", "plenty"), "max_memory"),
        (("--for", "abacus"), "framework"),
    ],
)
def test_an_impossible_search_is_told_in_one_message(
    run: Run, model: str, words: tuple[str, ...], field: str
) -> None:
    told_in_one_message(run("plan", model, "16xH100", *BATCH, *words), field)


def test_a_batch_that_no_layout_divides_is_told_in_one_message(run: Run, model: str) -> None:
    words = ("--seq-len", "4096", "--global-batch-size", "1", "--fix", "dp=2")
    told_in_one_message(run("plan", model, "16xH100", *words), "plan")


@pytest.mark.parametrize("path", ["missing/plan.toml", "", "."])
def test_an_output_that_cannot_be_written_is_told_before_the_search(
    run: Run, model: str, tmp_path: Path, path: str
) -> None:
    target = str(tmp_path / path) if path else ""
    told_in_one_message(run("plan", model, "16xH100", *BATCH, "-o", target), "output")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ("plan", "MODEL", "16xH100", "--top", "0"),
        ("plan", "MODEL", "16xH100", "--top", "many"),
        ("plan", "MODEL", "16xH100", "--seq-len", "long"),
        ("plan", "MODEL"),
        ("estimate", "MODEL", "16xH100"),
        ("ranks",),
        ("list",),
        ("dance",),
        ("plan", "MODEL", "16xH100", "--loud"),
    ],
)
def test_wrong_usage_exits_with_2_and_points_at_help(
    run: Run, model: str, words: tuple[str, ...]
) -> None:
    answer = run(*(model if w == "MODEL" else w for w in words))
    assert answer.status == 2
    assert "Traceback" not in answer.err
    assert "--help" in answer.err or "-h" in answer.err


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (("explain", "MODEL", "16xH100", "speed_s", "--layout", "tp=2", *BATCH), "term"),
        (("explain", "MODEL", "16xH100", "--layout", "tp=3", *BATCH), "layout.tp"),
        (("explain", "MODEL", "16xH100", "--layout", "tp=2", "--why-not", "x", *BATCH), "layout"),
        (("list", "everything"), "list"),
        (("ranks", "--gpus", "0"), "layout.gpus"),
        (("ranks", "--gpus", "12", "--layout", "tp=8"), "layout.tp"),
        (("ranks", "--gpus", "1000000000"), "layout.world_size"),
        (("ranks", "--gpus", "8", "--layout", "width=2"), "layout.width"),
    ],
)
def test_other_bad_input_is_told_in_one_message(
    run: Run, model: str, words: tuple[str, ...], field: str
) -> None:
    told_in_one_message(run(*(model if w == "MODEL" else w for w in words)), field)


def test_with_json_an_error_is_json_too(run: Run, model: str) -> None:
    answer = run("estimate", model, "16xH100", "--layout", "tp=3", *BATCH, "--json")
    assert answer.status == 2
    holds(dict.fromkeys(("field", "rule", "remedy"), TEXT), answer.json()["error"])
    assert answer.err.startswith("error: layout.tp = 3")


def as_process(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "meshwright", *words]
    plain = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, cwd=cwd, env=plain, check=False
    )


def test_a_process_ends_with_the_same_status_and_streams(model: str, tmp_path: Path) -> None:
    words = ("estimate", model, "16xH100", *BATCH, "--json", "--layout")
    good = as_process(*words, "tp=2", cwd=tmp_path)
    assert (good.returncode, good.stderr) == (0, "")
    assert json.loads(good.stdout)["layout"]["tp"] == 2
    bad = as_process(*words, "tp=3", cwd=tmp_path)
    assert bad.returncode == 2
    assert "Traceback" not in bad.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_early_is_no_error(model: str) -> None:
    command = f"{sys.executable} -m meshwright list models | head -n 1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""
