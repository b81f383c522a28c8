"""The commands check, convert, compare and resize, as a shell uses them."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launches import bridge, megatron
from meshwright.cli import app
from meshwright.errors import LaunchError, LayoutError, MeshwrightError
from meshwright.frameworks.check import check
from meshwright.frameworks.compare import compare
from meshwright.frameworks.convert import convert
from meshwright.frameworks.launch import FRAMEWORKS
from meshwright.frameworks.resize import resize
from test_readers import STYLES

GOOD = (
    "export CUDA_DEVICE_MAX_CONNECTIONS=1\ntorchrun --nproc_per_node 8 --nnodes 4 "
    + " ".join(
        megatron(
            "--tensor-model-parallel-size 4 --pipeline-model-parallel-size 2 --sequence-parallel"
            " --use-distributed-optimizer"
        )
    )
    + "\n"
)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "run.sh"
    path.write_text(GOOD)
    return path


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    return result.exit_code, result.stdout


def run_json(*words: str) -> tuple[int, Any]:
    status, text = run(*words, "--json")
    return status, json.loads(text)


def test_a_good_launch_exits_0_and_shows_both_grids(good: Path) -> None:
    status, shown = run("check", str(good))
    assert status == 0
    assert "dense grid: pp 2 x dp 4 x cp 1 x tp 4 = 32 GPUs" in shown
    assert "expert grid: pp 2 x edp 16 x ep 1 x etp 1 = 32 GPUs" in shown
    assert "--tensor-model-parallel-size, line 2" in shown
    assert "It would start." in shown


def test_a_launch_that_would_fail_exits_1_and_names_the_rule(good: Path) -> None:
    pp = "--pipeline-model-parallel-size"
    good.write_text(GOOD.replace(f"{pp} 2", f"{pp} 3"))
    status, answer = run_json("check", str(good))
    assert status == 1
    first = answer["findings"][0]
    assert first["severity"] == "error"
    assert set(first) == {"id", "severity", "field", "value", "rule", "remedy", "message"}
    assert first["id"].startswith("MLM-")
    assert answer["ok"] is False


def test_a_cluster_adds_memory_and_time(good: Path) -> None:
    status, answer = run_json("check", str(good), "--cluster", "32xH100")
    assert status == 0
    assert answer["layout"]["tp"] == 4
    price = answer["estimate"]
    assert price["verdict"] in ("fits", "borderline", "does not fit")
    assert len(price["stages"]) == 2
    assert sum(price["memory"].values()) == pytest.approx(price["peak_bytes"])
    small, _ = run_json("check", str(good), "--cluster", "16xH100")
    assert small == 1


def test_a_command_after_two_dashes_is_checked() -> None:
    words = megatron("--num-layers 30 --pipeline-model-parallel-size 4")
    status, shown = run("check", "--gpus", "8", "--json", "--", *words)
    assert status == 1
    assert json.loads(shown)["findings"][0]["id"] == "MLM-ARG-layers_pp"


def test_the_layout_no_cluster_of_256_holds_is_told_with_what_would(tmp_path: Path) -> None:
    """Paper: TP2 PP16 EP64 needs 16*lcm(2, 64) = 1024 GPUs; on 256 a guide's EP must be 16."""
    launch = bridge(
        "deepseek_v3_pretrain",
        "model.tensor_model_parallel_size=2 model.pipeline_model_parallel_size=16"
        " model.expert_model_parallel_size=64 model.sequence_parallel=true"
        f" 'model.pipeline_model_parallel_layout=Et*4|{'t*4|' * 14}tmL'",
    )
    told = "\n".join(f.message for f in check(launch, gpus=256).findings if f.severity == "error")
    assert "1024" in told
    assert check(launch, gpus=1024).grids == {
        "dense": {"pp": 16, "dp": 32, "cp": 1, "tp": 2},
        "expert": {"pp": 16, "edp": 1, "ep": 64, "etp": 1},
    }


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("to", FRAMEWORKS)
def test_every_style_converts_to_every_framework_or_says_why_not(
    style: str, to: str, tmp_path: Path
) -> None:
    text, name, *_ = STYLES[style]
    source = tmp_path / name
    source.write_text(text)
    try:
        done = convert(source, to)
    except (LaunchError, LayoutError) as refused:
        assert refused.field.startswith(("layout.", "job.", "model"))
        assert refused.remedy
        return
    folder = tmp_path / "out"
    folder.mkdir()
    for path, written in done.files.items():
        (folder / path).write_text(written)
    again = check(folder / next(iter(done.files)))
    assert again.layout is not None
    assert again.launch.framework == to
    assert again.layout.world_size == done.layout.world_size


def test_convert_writes_files_and_can_change_the_layout(good: Path, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"layout.zero"):
        convert(good, "torchtitan")
    out = tmp_path / "titan"
    change = "zero=optim_grads_params"
    status, answer = run_json(
        "convert", str(good), "--to", "torchtitan", "--set", change, "-o", str(out)
    )
    assert status == 0
    assert set(answer["files"]) == {"run.sh"}
    assert (out / "run.sh").read_text() == answer["files"]["run.sh"]
    assert answer["layout"]["zero"] == "optim_grads_params"
    slurm = convert(good, "megatron-bridge", launcher="slurm").files["run.sbatch"]
    assert "#SBATCH --nodes=4" in slurm


def test_convert_asks_for_the_model_where_the_launch_names_none(tmp_path: Path) -> None:
    source = tmp_path / "run.sh"
    source.write_text(
        "python3 -m verl.trainer.main_ppo actor_rollout_ref.model.path=/data/mine"
        " actor_rollout_ref.actor.strategy=megatron trainer.n_gpus_per_node=8"
        " actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1\n"
    )
    with pytest.raises(LaunchError, match="--model"):
        convert(source, "megatron-lm")
    assert "--num-layers 32" in convert(source, "megatron-lm", model="llama3-8b").files["run.sh"]


def test_compare_names_the_difference_that_explains_the_memory(good: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.sh"
    other.write_text(GOOD.replace(" --sequence-parallel", ""))
    status, answer = run_json("compare", str(good), str(other), "--cluster", "32xH100")
    assert status == 0
    fields = {d["field"]: d for d in answer["differences"]}
    assert set(fields) >= {"layout.sp"}
    assert fields["layout.sp"]["peak_bytes"] > 0
    assert answer["explains"]["peak_bytes"] == "layout.sp"
    change = sum(term["change"] for term in answer["memory"].values())
    both = [answer[s]["estimate"]["peak_bytes"] for s in ("a", "b")]
    assert change == pytest.approx(both[1] - both[0])
    shown = run("compare", str(good), str(other), "--cluster", "32xH100")[1]
    assert "layout.sp: True -> False" in shown
    assert "together" in shown


def compared(good: Path, before: str, after: str) -> str:
    """Return what is shown of a launch beside itself with one thing changed."""
    other = good.parent / "other.sh"
    assert before in GOOD
    other.write_text(GOOD.replace(before, after))
    return run("compare", str(good), str(other), "--cluster", "32xH100")[1]


def test_compare_says_whether_each_fits_and_which_term_it_is(good: Path) -> None:
    shown = compared(good, "--micro-batch-size 1", "--micro-batch-size 32")
    assert "layout.mbs (1 -> 32) alone makes" in shown
    assert "fits -> does not fit" in shown
    assert "most of it in activations_bytes" in shown


def test_compare_names_arguments_that_no_price_knows(good: Path) -> None:
    shown = compared(good, "--micro-batch-size 1", "--micro-batch-size 1 --num-workers 4")
    assert "--num-workers: None -> 4" in shown
    assert "nothing that differs changes it" in shown


def test_compare_says_why_the_other_launch_would_not_start(good: Path) -> None:
    shown = compared(good, "--bf16", "--bf16 --fp16")
    assert "would not start" in shown


def test_compare_prices_the_number_of_gpus_alone(good: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.sh"
    other.write_text(next(iter(resize(good, 64).files.values())))
    answer = run_json("compare", str(good), str(other), "--cluster", "32xH100")[1]
    (dp,) = (d for d in answer["differences"] if d["field"] == "layout.dp")
    assert dp["step_time_s"] < 0
    assert answer["explains"]["step_time_s"] == "layout.dp"


def test_a_launch_compared_with_itself_differs_in_nothing(good: Path) -> None:
    same = compare(good, good, cluster="32xH100")
    assert same.differences == []
    assert same.explains == {}


@pytest.mark.parametrize("gpus", [8, 16, 64, 128])
def test_resizing_keeps_the_batch_and_stays_legal(good: Path, gpus: int) -> None:
    moved = resize(good, gpus)
    assert moved.layout.world_size == gpus
    path = good.parent / "moved.sh"
    path.write_text(next(iter(moved.files.values())))
    result = check(path)
    assert result.ok, [f.message for f in result.findings if f.severity == "error"]
    assert result.job is not None
    assert (result.job.gbs, result.job.seq_len) == (128, 4096)
    if gpus in (16, 64, 128):
        assert (moved.layout.tp, moved.layout.pp) == (4, 2)


def test_resizing_to_what_cannot_be_offers_what_can(good: Path) -> None:
    """Law: neither 128 sequences nor 32 layers split by the 3 in 96."""
    with pytest.raises(LayoutError) as refused:
        resize(good, 96)
    assert refused.value.remedy == "Use 64 or 128 GPUs."


def test_resize_writes_the_script(good: Path, tmp_path: Path) -> None:
    out = tmp_path / "big.sh"
    status, _ = run("resize", str(good), "--gpus", "64", "-o", str(out))
    assert status == 0
    assert check(out).launch.gpus == 64


@pytest.mark.parametrize(
    "words",
    [
        ["check", "no-such-file.sh"],
        ["check", "--gpus", "8", "--", "ls"],
        ["check", "--cluster", "8xNothing", "--", "pretrain_gpt.py", "--num-layers", "2"],
        ["convert", "no-such-file.sh", "--to", "nemo"],
        ["compare", "a.sh", "b.sh"],
        ["resize", "a.sh", "--gpus", "8"],
        ["check", "--framework", "nothing", "--", "x.py", "--num-layers", "2"],
    ],
)
def test_unusable_input_exits_2_without_a_traceback(words: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "meshwright", *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")


def test_a_second_check_takes_milliseconds(good: Path) -> None:
    """Ours: rules alone, so that thousands of launches can be examined."""
    check(good)
    began = time.process_time()
    for _ in range(20):
        check(good)
    assert time.process_time() - began < 20 * 0.1


def test_every_finding_of_every_style_has_a_rule_and_a_message(tmp_path: Path) -> None:
    for text, name, *_ in STYLES.values():
        path = tmp_path / name
        path.write_text(text)
        try:
            found = check(path).findings
        except MeshwrightError as error:
            pytest.fail(str(error))
        for finding in found:
            assert finding.id
            assert finding.rule
            assert finding.message


def test_notes_are_counted_and_shown_only_when_asked_for(good: Path) -> None:
    _, short = run("check", str(good))
    _, long = run("check", str(good), "--notes")
    notes = sum(line.startswith("note:") for line in long.splitlines())
    assert notes > 0
    assert "note:" not in short
    assert f"{notes} notes more: --notes shows them." in short
    assert "notes more" not in long


def test_a_dense_launch_is_told_nothing_about_experts_or_chunks(good: Path) -> None:
    good.write_text(GOOD.replace("--pipeline-model-parallel-size 2", ""))
    _, answer = run_json("check", str(good))
    ids = {f["id"] for f in answer["findings"]}
    assert not ids & {"MLM-ARG-etp_default", "MLM-MPC-group_default"}


def test_an_error_of_the_environment_does_not_hide_memory_and_time(good: Path) -> None:
    good.write_text(GOOD.replace("CONNECTIONS=1", "CONNECTIONS=8"))
    status, answer = run_json("check", str(good), "--cluster", "4x8xH100")
    assert status == 1
    assert answer["findings"][0]["severity"] == "error"
    assert answer["estimate"]["verdict"] == "fits"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (("", ""), "give --cluster"),
        (("--num-attention-heads 32", "--num-attention-heads 30"), "divide"),
        (("--seq-length 4096", ""), "seq"),
    ],
)
def test_what_is_not_priced_says_why(change: tuple[str, str], why: str, good: Path) -> None:
    good.write_text(GOOD.replace(*change))
    options = [] if "cluster" in why else ["--cluster", "4x8xH100"]
    _, answer = run_json("check", str(good), *options)
    assert "estimate" not in answer
    assert why in answer["unpriced"]
    assert f"not priced: {answer['unpriced']}" in run("check", str(good), *options)[1]


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan.toml"
    batch = ("--seq-len", "4096", "--global-batch-size", "64")
    status, _ = run("plan", "llama3-8b", "8xH100", *batch, "--top", "1", "-o", str(path))
    assert status == 0
    return path


def test_a_plan_document_is_checked_as_what_it_is(plan: Path) -> None:
    status, answer = run_json("check", str(plan))
    assert status == 0
    assert answer["framework"] == "meshwright"
    assert answer["estimate"]["verdict"] == "fits"
    assert run("check", str(plan))[1].startswith("A plan of meshwright, 8 GPUs")
    with pytest.raises(LaunchError, match="8 GPUs"):
        check(plan, gpus=16)
    smaller = check(plan, cluster="4xH100")
    assert "cluster_size" in {f.id for f in smaller.findings}


def test_of_two_launches_the_one_that_can_be_priced_is(good: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.sh"
    other.write_text(GOOD.replace("--num-attention-heads 32", "--num-attention-heads 30"))
    found = compare(good, other, cluster="4x8xH100")
    assert found.a.estimate is not None
    assert found.b.estimate is None
    assert any("other.sh is not priced" in n and "divide" in n for n in found.notes)


def started(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "meshwright", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_wrong_option_is_told_in_json_too() -> None:
    done = started("check", "--bogus", "--json")
    assert done.returncode == 2
    assert "--bogus" in json.loads(done.stdout)["error"]["rule"]
    assert "--bogus" in done.stderr
    assert "Traceback" not in done.stderr


def test_unusable_runs_are_told_as_every_other_bad_input(tmp_path: Path) -> None:
    done = started("accuracy", str(tmp_path / "none.csv"), "--models", "none.json", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["field"] == "runs"
    assert done.stderr.startswith("error: ")


def test_a_reader_that_leaves_early_hears_no_complaint(good: Path) -> None:
    command = f"{sys.executable} -m meshwright check {good} --settings --json"
    shell = ["bash", "-c", f"{command} | head -c 1 >/dev/null; echo ${{PIPESTATUS[0]}}"]
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert done.stdout.strip() in ("0", "141")
    assert done.stderr == ""


def test_the_gpu_that_a_script_asks_slurm_for_is_the_one_that_rules_ask_about(
    tmp_path: Path,
) -> None:
    words = shlex.join(megatron("--tensor-model-parallel-size 2 --sequence-parallel"))
    asked = ("--gres=gpu:h100:8", "--gpus-per-node=h100:8", "--gpus=h100:16", "-G h100:16")
    for option in (*asked, *(text.replace("h100", "b200") for text in asked)):
        refused = "h100" in option
        script = tmp_path / "run.sh"
        head = f"#!/bin/bash\n#SBATCH --nodes=2\n#SBATCH {option}\n"
        script.write_text(f"{head}srun torchrun --nproc-per-node 8 --nnodes 2 {words}\n")
        result = check(script)
        assert result.cluster is not None
        assert ("MLM-ARG-conn" in {f.id for f in result.findings}) is refused


def test_a_rule_of_older_gpus_says_that_the_gpu_decides_where_none_is_known() -> None:
    words = megatron("--tensor-model-parallel-size 2 --sequence-parallel")
    launch = ["torchrun", "--nproc-per-node", "8", *words]
    told = {
        cluster: {f.id: f.message for f in check(launch, cluster=cluster).findings}
        for cluster in (None, "8xH100", "8xB200")
    }
    assert "--cluster decides" in told[None]["MLM-ARG-conn"]
    assert "--cluster decides" not in told["8xH100"]["MLM-ARG-conn"]
    assert "MLM-ARG-conn" not in told["8xB200"]


def test_what_every_gpu_refuses_asks_for_none() -> None:
    words = megatron("--tensor-model-parallel-size 3")
    result = check(["torchrun", "--nproc-per-node", "8", *words])
    (told,) = [f.message for f in result.findings if f.id == "MLM-ARG-world_div"]
    assert "--cluster" not in told
