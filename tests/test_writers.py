"""What is written for a framework is complete, passes its own rules, and reads back as it was."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import meshwright
from launches import MODELS, plans, read_back, said
from meshwright.checks import Case, judge_one
from meshwright.describe.cluster import load_cluster
from meshwright.describe.job import PRECISIONS, Execution, Job, job
from meshwright.describe.model import Model
from meshwright.describe.models import load_model
from meshwright.errors import LaunchError
from meshwright.frameworks.check import check
from meshwright.frameworks.convert import convert
from meshwright.frameworks.launch import FRAMEWORKS
from meshwright.frameworks.read import read_launch
from meshwright.frameworks.resize import resize
from meshwright.frameworks.write import launch_files, unsupported
from meshwright.parallel.layout import Layout, Zero, from_text, table

GOLDEN = Path(__file__).parent / "golden" / "frameworks"
ZERO = {
    "skyrl": (Zero.optim,),
    "torchtitan": (Zero.optim_grads, Zero.optim_grads_params),
}


@pytest.mark.parametrize("framework", FRAMEWORKS)
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
@given(data=plans())
def test_reading_what_was_written_gives_the_same_plan(
    framework: str, data: tuple[Model, Job, Layout[int]]
) -> None:
    """Law: the reader undoes the writer, and the framework's own rules accept what was written."""
    model, wanted, x = data
    if framework in ZERO:
        x = replace(x, zero=int(ZERO[framework][0]))
    assume(not unsupported(model, None, wanted, x, framework))
    for launcher in ("torchrun", "slurm"):
        launch = read_back(launch_files(model, None, wanted, x, framework, launcher))
        layout = launch.layout()
        assert launch.framework == framework
        assert said(launch.job(layout), layout, model) == said(wanted, x, model)
        read = launch.model()
        assert read is not None
        assert read.num_params == model.num_params
        assert [f.message for f in launch.findings if f.severity == "error"] == []
        assert launch.unread == ()


@st.composite
def _switched(draw: st.DrawFn) -> tuple[Model, Job, Layout[int]]:
    """Draw a plan with switches, task, recomputation and pipeline text of its own."""
    model = meshwright.load_model(draw(st.sampled_from(MODELS)))
    pp, tp = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2]))
    recompute = draw(st.sampled_from(["none", "full", "full:block:2", "core_attn", "layernorm"]))
    text = f"tp={tp} pp={pp} dp=4 recompute={recompute}"
    text += f" ep={draw(st.sampled_from([1, 4])) if model.is_moe else 1}"
    half = model.num_layers // 2
    if pp == 2 and draw(st.booleans()):
        mtp = "m" * len(model.mtp_layers)
        text += f" pipeline_layout=E{'t' * half}|{'t' * (model.num_layers - half)}{mtp}L"
    on = st.booleans()
    execution = Execution(
        overlap_grad_reduce=draw(on),
        overlap_param_gather=draw(on),
        overlap_tp_comm=draw(on),
        fused_cross_entropy=draw(on),
        fused_permute=draw(on),
        fused_softmax=draw(on),
        fused_wgrad_accumulation=draw(on),
        grouped_gemm=draw(on),
        flash_attention=draw(on),
        cuda_graphs=draw(st.sampled_from(["none", "none", "partial", "full"])),
        dispatcher=draw(st.sampled_from(["alltoall", "allgather", "deepep"])),
        capacity_factor=draw(st.sampled_from([None, 1.5])),
        optimizer_offload_fraction=draw(st.sampled_from([0.0, 0.5])),
    )
    precisions = ["bf16", "fp16", "fp8", "fp8-cs", "fp8-mx", "fp8-blockwise", "nvfp4"]
    wanted = job(
        seq_len=4096,
        gbs=64,
        precision_name=draw(st.sampled_from(precisions)),
        task=draw(st.sampled_from(["pretrain", "sft", "lora"])),
    )
    rank = draw(st.sampled_from([8, 16, 32]))
    x = from_text(text)
    changed = replace(wanted, execution=execution, lora_rank=rank)
    case = Case(model=model, job=changed, x=table([x]))
    assume(not any(f.severity == "error" for f in judge_one(case)))
    return model, changed, x


@pytest.mark.parametrize("framework", [f for f in FRAMEWORKS if f != "torchtitan"])
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
@given(data=_switched())
def test_switches_precision_and_task_read_back_as_they_were_written(
    framework: str, data: tuple[Model, Job, Layout[int]]
) -> None:
    """Law: what is not refused is exactly said; RL and SFT trainers have no pre-training."""
    model, wanted, x = data
    assume(not unsupported(model, None, wanted, x, framework))
    launch = read_back(launch_files(model, None, wanted, x, framework))
    layout = launch.layout()
    read = launch.job(layout)
    assert said(read, layout, model) == said(wanted, x, model)
    tunes = framework in ("skyrl", "verl") and wanted.task == "pretrain"
    assert read.task == ("sft" if tunes else wanted.task)
    assert wanted.task != "lora" or read.lora_rank == wanted.lora_rank
    assert [f.message for f in launch.findings if f.severity == "error"] == []


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("task", ["sft", "lora"])
def test_the_task_reads_back_or_is_refused_by_name(framework: str, task: str) -> None:
    model, x = meshwright.load_model("llama3-8b"), from_text("tp=2 dp=4")
    wanted = job(seq_len=4096, gbs=64, task=task)
    if framework == "torchtitan":
        x = from_text("tp=2 dp=4 zero=optim_grads_params")
    refused = unsupported(model, None, wanted, x, framework)
    if refused:
        assert [f.field for f in refused] == ["job.task"]
        assert framework == "torchtitan" or task == "lora"
        return
    launch = read_back(launch_files(model, None, wanted, x, framework))
    assert launch.job().task == task


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_scripts_are_valid_shell_and_python(framework: str, launcher: str, tmp_path: Path) -> None:
    """Oracle: bash -n and Python's own parser."""
    model, cluster = meshwright.load_model("mixtral-8x7b"), load_cluster("32xH100")
    zero = " zero=optim_grads_params" if framework == "torchtitan" else ""
    x = from_text(f"tp=2 pp=2 ep=8{zero}", 32)
    files = launch_files(model, cluster, job(seq_len=4096, gbs=64), x, framework, launcher)
    assert next(iter(files)) == ("run.sbatch" if launcher == "slurm" else "run.sh")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        if name.endswith(".py"):
            ast.parse(text)
        else:
            bash = shutil.which("bash") or "bash"
            subprocess.run([bash, "-n", str(tmp_path / name)], check=True, timeout=10)
    if launcher == "slurm":
        assert "#SBATCH --nodes=4" in files["run.sbatch"]


@pytest.mark.parametrize(
    ("framework", "layout", "field"),
    [
        ("skyrl", "tp=2 pp=2 vpp=2 dp=4", "layout.vpp"),
        ("skyrl", "tp=2 dp=4 zero=no_shard", "layout.zero"),
        ("skyrl", "tp=2 cp=4 dp=2 cp_comm=a2a+p2p hierarchical_cp=2x2", "layout.hierarchical_cp"),
        ("verl", "tp=2 dp=4 dp_replicate=2", "layout.dp_replicate"),
        ("torchtitan", "tp=2 dp=4", "layout.zero"),
        ("torchtitan", "tp=16 dp=4 zero=optim_grads", "layout.tp"),
        ("megatron-lm", "pp=4 dp=2 schedule=zb_h1", "layout.schedule"),
        ("megatron-bridge", "pp=4 dp=2 schedule=gpipe", "layout.schedule"),
        ("nemo", "tp=2 pp=2 dp=2 order=pp-tp-cp-ep-dp", "layout.order"),
    ],
)
def test_what_a_framework_cannot_express_is_refused_by_name(
    framework: str, layout: str, field: str
) -> None:
    model, wanted = meshwright.load_model("llama3-8b"), job(seq_len=4096, gbs=64)
    x = from_text(layout)
    refused = unsupported(model, None, wanted, x, framework)
    assert field in [f.field for f in refused]
    assert all(f.severity == "error" and f.remedy for f in refused)
    with pytest.raises(LaunchError) as error:
        launch_files(model, None, wanted, x, framework)
    assert error.value.field == refused[0].field


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", PRECISIONS)
def test_every_precision_is_written_or_refused_by_name(framework: str, name: str) -> None:
    model, wanted = meshwright.load_model("llama3-8b"), job(seq_len=4096, gbs=64)
    wanted = replace(wanted, precision=PRECISIONS[name])
    x = replace(from_text("dp=8"), zero=int(ZERO.get(framework, (Zero.optim,))[0]))
    refused = unsupported(model, None, wanted, x, framework)
    if refused:
        assert {f.field for f in refused} == {"job.precision"}
    else:
        assert launch_files(model, None, wanted, x, framework)


def test_connections_follow_the_overlap_and_the_gpu() -> None:
    """Spec: one before Blackwell for TP and CP, none when gradients are sharded, 32 for experts."""
    model, wanted = meshwright.load_model("llama3-8b"), job(seq_len=4096, gbs=64)
    line = "export CUDA_DEVICE_MAX_CONNECTIONS=1\n"

    def script(layout: str, cluster: str, framework: str = "megatron-lm") -> str:
        machine = load_cluster(cluster)
        x = from_text(layout, machine.num_gpus)
        return launch_files(model, machine, wanted, x, framework)["run.sh"]

    assert line in script("tp=2", "8xH100")
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in script("tp=2", "8xB200")
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in script("tp=1", "8xH100")
    sharded = script("tp=2 zero=optim_grads_params", "8xH100")
    assert "unset CUDA_DEVICE_MAX_CONNECTIONS" in sharded
    assert "--use-megatron-fsdp" in sharded
    assert "CONNECTIONS=32" in script("tp=2 zero=optim_grads", "8xH100", "torchtitan")


def test_a_model_that_is_no_gpt_is_refused_where_its_shape_must_be_written() -> None:
    model = meshwright.load_model("llama3-8b")
    nameless = replace(model, facts=None)
    wanted, x = job(seq_len=4096, gbs=64), from_text("tp=2 dp=4")
    assert [f.field for f in unsupported(nameless, None, wanted, x, "megatron-lm")] == ["model"]
    assert unsupported(nameless, None, wanted, x, "verl") == []


@pytest.mark.parametrize(
    ("name", "lack"),
    [
        ("bloom-7b1", "attention without rotary positions"),
        ("deepseek-v3.2", "an indexer"),
        ("olmoe-1b-7b", "norms of queries and keys"),
    ],
)
def test_a_model_with_more_than_the_flags_say_is_refused_by_name(name: str, lack: str) -> None:
    """Law: a launch that leaves out what a model has would train another model."""
    model = meshwright.load_model(name)
    wanted, x = job(seq_len=2048, gbs=64), from_text("tp=2 dp=4")
    for framework in ("megatron-lm", "nemo"):
        assert lack in unsupported(model, None, wanted, x, framework)[0].rule
    assert unsupported(model, None, wanted, x, "megatron-bridge") == []


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("llama3.1-8b", ["--rotary-base 500000", "--use-rope-scaling", "--norm-epsilon 1e-05"]),
        ("mixtral-8x7b", ["--rotary-base 1000000"]),
        ("gpt-oss-20b", ["--softmax-type learnable", "--window-size 128,0"]),
        ("deepseek-v3", ["--moe-router-group-topk 4", "--rotary-scaling-factor 40.0"]),
    ],
)
def test_a_known_models_own_numbers_are_written(name: str, flags: list[str]) -> None:
    """Spec: the config.json of the models."""
    model = meshwright.load_model(name)
    wanted, x = job(seq_len=4096, gbs=64), from_text("tp=2 dp=4 sp=true")
    files = launch_files(model, None, wanted, x, "megatron-lm")
    for flag in flags:
        assert f"  {flag}\n" in files["run.sh"]
    again = read_back(files).model()
    assert again is not None
    # The 768 biases of gpt-oss's routers have no flag.
    assert again.num_params == pytest.approx(model.num_params, rel=1e-7)
    assert again.facts is not None
    assert model.facts is not None
    assert [x.mixer for x in again.facts.layers] == [x.mixer for x in model.facts.layers]


def test_rollouts_by_vllm_take_no_expandable_segments() -> None:
    """Spec: vLLM's memory pool, which frees the cache between phases, refuses them."""
    model = meshwright.load_model("llama3-8b")
    wanted, x = job(seq_len=4096, gbs=64), from_text("tp=2 dp=4 sp=true")
    assert "expandable" not in launch_files(model, None, wanted, x, "verl")["run.sh"]
    assert "expandable" in launch_files(model, None, wanted, x, "skyrl")["run.sh"]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_written_files_are_as_reviewed(framework: str) -> None:
    """Golden: a change of what is written shows as a diff of these files."""
    model, cluster = meshwright.load_model("mixtral-8x7b"), load_cluster("32xH100")
    zero = " zero=optim_grads_params" if framework == "torchtitan" else ""
    x = from_text(f"tp=2 pp=2 ep=8 recompute=full{zero}", 32)
    files = launch_files(model, cluster, job(seq_len=4096, gbs=64), x, framework, "slurm")
    for name, text in files.items():
        assert (GOLDEN / framework / name).read_text() == text


LAUNCH = """
#!/bin/bash
#SBATCH --nodes=4 --gpus-per-node=8
export NCCL_IB_HCA=mlx5
TP=4
ARGS=(
  --tensor-model-parallel-size ${TP} --pipeline-model-parallel-size 2 --sequence-parallel
  --num-layers 32 --hidden-size 4096 --num-attention-heads 32 --vocab-size 32000
  --seq-length 4096 --max-position-embeddings 4096 --micro-batch-size 1 --global-batch-size 64
  --use-distributed-optimizer --bf16 --train-samples 6400 --lr 1e-4 --lr-warmup-fraction 0.1
  --data-path 0.5 /data/a 0.5 ${DATA_PATH} --split 98,2,0 --tokenizer-type HuggingFaceTokenizer
  --tokenizer-model /tok --save $CKPT/run --load $CKPT/run --save-interval 50 --seed 7
  --moe-router-dtype fp32 --wandb-project p --log-throughput --no-check-for-nan-in-loss-and-grad
)
torchrun --nproc_per_node 8 --nnodes 4 pretrain_gpt.py ${ARGS[@]} $EXTRA_ARGS --adam-eps 1e-9
"""


def test_data_tokenizer_checkpoints_and_optimizer_are_carried_where_they_have_a_counterpart(
    tmp_path: Path,
) -> None:
    source = tmp_path / "run.sh"
    source.write_text(LAUNCH)
    bridge = convert(source, "megatron-bridge").files["run.sh"]
    for line in (
        '"dataset.data_path=[\\"0.5\\", \\"/data/a\\", \\"0.5\\", \\"${DATA_PATH}\\"]"',
        "tokenizer.tokenizer_model=/tok",
        '"checkpoint.load=$CKPT/run"',
        "checkpoint.save_interval=50",
        "train.train_iters=100",
        "scheduler.lr_warmup_iters=10",
        "optimizer.adam_eps=1e-9",
        "rng.seed=7",
        "logger.wandb_project=p",
        "rerun_state_machine.check_for_nan_in_loss=false",
        "export NCCL_IB_HCA=mlx5",
    ):
        assert line in bridge, line
    nemo = convert(source, "nemo").files["pretrain.py"]
    assert "paths=['0.5', '/data/a', '0.5', os.path.expandvars('${DATA_PATH}')]" in nemo
    assert "max_steps=100" in nemo
    assert "warmup_steps=10" in nemo
    assert "lr=1e-4" in nemo


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_everything_a_launch_says_is_in_its_plan_or_carried_or_named(
    framework: str, tmp_path: Path
) -> None:
    """Law: no argument is dropped without a word."""
    source = tmp_path / "run.sh"
    source.write_text(LAUNCH)
    changes = ["zero=optim_grads_params", "recompute=none"] if framework == "torchtitan" else []
    done = convert(source, framework, changes=changes, model="llama-2-7b")
    lost = " ".join(done.carried.lost)
    carried = done.carried.training
    kept = [word for line in done.carried.own for word in line]
    for flag, name in (
        ("--data-path", "data_path"),
        ("--tokenizer-model", "tokenizer_model"),
        ("--load", "load"),
        ("--seed", "seed"),
        ("--moe-router-dtype", "moe_router_dtype"),
        ("--wandb-project", "wandb_project"),
        ("--adam-eps", "adam_eps"),
        ("--log-throughput", "log_throughput"),
    ):
        assert (flag in lost) != (name in carried), flag
        assert flag not in lost or flag in " ".join(done.files[next(iter(done.files))].split())
    assert ("$EXTRA_ARGS" in lost) != ("$EXTRA_ARGS" in kept)


def test_a_resized_launch_keeps_every_argument_that_its_layout_does_not_change(
    tmp_path: Path,
) -> None:
    """Law: what was given is given again; nothing is added."""
    source = tmp_path / "run.sh"
    source.write_text(LAUNCH)
    text = resize(source, 16, fresh=True).files["run.sh"]
    (tmp_path / "again.sh").write_text(text)
    before, after = (read_launch(tmp_path / name) for name in ("run.sh", "again.sh"))
    moved = {s for s in before.words if before.words[s] != after.words.get(s)}
    assert moved == set()
    for kept in ("--lr 1e-4", "--seed 7", "--adam-eps 1e-9", "${EXTRA_ARGS:-}", '--save "$CKPT'):
        assert kept in text, kept
    for added in ("--weight-decay", "--min-lr", "--clip-grad"):
        assert added not in text
    assert after.gpus == 16


def test_a_router_that_picks_one_expert_is_written_so_that_it_learns(tmp_path: Path) -> None:
    known = Path(meshwright.__file__).parent / "describe/configs/mixtral-8x7b.json"
    config = json.loads(known.read_text()) | {"num_experts_per_tok": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_model(str(tmp_path / "config.json"))
    layout = from_text("tp=1 ep=8 pp=1", 16)
    for framework in ("megatron-lm", "megatron-bridge"):
        files = launch_files(
            model, load_cluster("16xB200"), job(seq_len=8192, gbs=64), layout, framework
        )
        (tmp_path / "run.sh").write_text(files["run.sh"])
        result = check(tmp_path / "run.sh", cluster="16xB200")
        assert "MLM-TC-topk1" not in {f.id for f in result.findings}
