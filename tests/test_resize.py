"""A launch moved to other GPUs in its own file: what changes, what stays, and what is said."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from launches import plans
from meshwright.cli import app
from meshwright.describe.job import Job, job
from meshwright.describe.model import Model
from meshwright.describe.models import load_model
from meshwright.errors import LaunchError, LayoutError, MeshwrightError
from meshwright.frameworks.check import check
from meshwright.frameworks.launch import FRAMEWORKS
from meshwright.frameworks.nearest import nearest_legal
from meshwright.frameworks.read import read_launch
from meshwright.frameworks.resize import Resized, resize
from meshwright.frameworks.rewritings import batch_options
from meshwright.frameworks.write import launch_files
from meshwright.parallel.layout import CpComm, Layout, layout, to_dict

SHAPE = (
    "--num-layers 80 --hidden-size 8192 --ffn-hidden-size 28672 --num-attention-heads 64"
    " --group-query-attention --num-query-groups 8 --seq-length 8192 --vocab-size 128256"
    " --max-position-embeddings 8192 --swiglu --normalization RMSNorm --disable-bias-linear"
    " --position-embedding-type rope --untie-embeddings-and-output-weights --bf16"
)
BATCH = f"""#!/bin/bash
#SBATCH --job-name=llama70b   # mine
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --mail-user=ana@example.org

# tuned by Ana, do not touch the learning rate
export NCCL_IB_HCA=mlx5_0
NNODES=${{SLURM_NNODES:-8}}
GPUS_PER_NODE=8
TP=4
PP=4
CP=2

PARALLEL=(
  --tensor-model-parallel-size $TP
  --pipeline-model-parallel-size $PP
  --num-layers-per-virtual-pipeline-stage 5
  --context-parallel-size $CP   # long documents
  --sequence-parallel --use-distributed-optimizer
)
srun torchrun --nnodes $NNODES --nproc_per_node $GPUS_PER_NODE pretrain_gpt.py {SHAPE} \\
  "${{PARALLEL[@]}}" --micro-batch-size 1 --global-batch-size 512 --lr 1.5e-4 "$@"
"""
COMPUTED = f"""#!/bin/bash
GPUS_PER_NODE=8
NNODES=4
WORLD_SIZE=$((GPUS_PER_NODE * NNODES))
TP=4; PP=2
DP=$(( WORLD_SIZE / TP / PP ))
ACC=64
GBS=$(( DP * ACC ))   # keep it at 256
DISTRIBUTED="--nproc_per_node $GPUS_PER_NODE --nnodes $NNODES --node_rank ${{NODE_RANK:-0}}"
torchrun $DISTRIBUTED pretrain_gpt.py {SHAPE} --tensor-model-parallel-size $TP \\
  --pipeline-model-parallel-size $PP --sequence-parallel --use-distributed-optimizer \\
  --micro-batch-size 1 --global-batch-size $GBS
"""
SKYRL = """: "${NUM_GPUS:=8}"   # a node
TP=2
uv run -m skyrl.train.entrypoints.main_base trainer.strategy=megatron \\
  trainer.policy.model.path="Qwen/Qwen3-8B" trainer.placement.colocate_all=true \\
  trainer.placement.policy_num_gpus_per_node=$NUM_GPUS \\
  trainer.placement.ref_num_gpus_per_node=$NUM_GPUS \\
  generator.inference_engine.num_engines=4 generator.inference_engine.tensor_parallel_size=2 \\
  trainer.policy.megatron_config.tensor_model_parallel_size=$TP \\
  trainer.ref.megatron_config.tensor_model_parallel_size=$TP \\
  trainer.train_batch_size=128 trainer.policy_mini_batch_size=64
"""
YAML = """# ours
actor_rollout_ref:
  model: {path: Qwen/Qwen3-30B-A3B}
  actor:
    strategy: megatron
    ppo_mini_batch_size: 128
    ppo_micro_batch_size_per_gpu: 1   # fits
    megatron:
      tensor_model_parallel_size: 2
      pipeline_model_parallel_size: 2
      expert_model_parallel_size: 8
      expert_tensor_parallel_size: 1
  rollout: {n: 8, tensor_model_parallel_size: 4}
data: {max_prompt_length: 1024, max_response_length: 3072, train_batch_size: 512}
trainer:
  nnodes: 4
  n_gpus_per_node: 8
"""
TOML = """# a file of 2025
[model]
name = "llama3"
flavor = "70B"
[training]
local_batch_size = 8
global_batch_size = 256   # agreed
seq_len = 8192
[parallelism]
data_parallel_shard_degree = 8
tensor_parallel_degree = 8
"""
RECIPE = """from nemo.collections import llm

NODES = 8

recipe = llm.llama3_70b.pretrain_recipe(name="l70")
recipe.trainer.strategy.tensor_model_parallel_size = 4  # NVLink
recipe.trainer.strategy.pipeline_model_parallel_size = 4
recipe.trainer.strategy.context_parallel_size = 2
recipe.trainer.strategy.sequence_parallel = True
recipe.trainer.num_nodes = NODES
recipe.trainer.devices = 8
recipe.data.global_batch_size = 512
recipe.data.micro_batch_size = 1
recipe.data.seq_length = 8192
"""
ONE_NODE = f"""torchrun --nproc_per_node=8 pretrain_gpt.py {SHAPE} --micro-batch-size 1 \\
  --tensor-model-parallel-size 8 --sequence-parallel --use-distributed-optimizer \\
  --global-batch-size 64
"""
OURS = {
    "batch.sh": BATCH,
    "computed.sh": COMPUTED,
    "skyrl.sh": SKYRL,
    "verl.yaml": YAML,
    "titan.toml": TOML,
    "recipe.py": RECIPE,
    "one_node.sh": ONE_NODE,
}


def moved(tmp_path: Path, name: str, gpus: int) -> tuple[Resized, list[str]]:
    """Resize one of the launches; return what came of it and the lines that differ."""
    path = tmp_path / name
    path.write_text(OURS[name])
    done = resize(path, gpus)
    assert done.in_place, done.by_hand
    (text,) = done.files.values()
    return done, sorted(set(text.splitlines()) - set(OURS[name].splitlines()))


@pytest.mark.parametrize(
    ("name", "gpus", "lines"),
    [
        (
            "batch.sh",
            128,
            ["#SBATCH --nodes=16", "NNODES=${SLURM_NNODES:-16}"],
        ),
        (
            "batch.sh",
            16,
            ["#SBATCH --nodes=2", "CP=1", "NNODES=${SLURM_NNODES:-2}"],
        ),
        (
            "batch.sh",
            4,
            [
                "#SBATCH --gpus-per-node=4",
                "#SBATCH --nodes=1",
                "  --num-layers-per-virtual-pipeline-stage 10",
                *("CP=1", "GPUS_PER_NODE=4", "NNODES=${SLURM_NNODES:-1}", "PP=2", "TP=2"),
            ],
        ),
        ("computed.sh", 64, ["ACC=32", "NNODES=8"]),
        (
            "skyrl.sh",
            16,
            [
                "  generator.inference_engine.num_engines=8"
                " generator.inference_engine.tensor_parallel_size=2 \\",
                "  trainer.placement.policy_num_nodes=2 \\",
                "  trainer.placement.ref_num_nodes=2 \\",
            ],
        ),
        (
            "skyrl.sh",
            4,
            [
                "  generator.inference_engine.num_engines=2"
                " generator.inference_engine.tensor_parallel_size=2 \\",
                ': "${NUM_GPUS:=4}"   # a node',
            ],
        ),
        ("verl.yaml", 64, ["  nnodes: 8"]),
        ("titan.toml", 128, ["data_parallel_shard_degree = 16"]),
        ("recipe.py", 128, ["NODES = 16"]),
        ("one_node.sh", 4, None),
        ("one_node.sh", 16, None),
    ],
)
def test_only_the_lines_that_place_the_launch_change(
    tmp_path: Path, name: str, gpus: int, lines: list[str] | None
) -> None:
    """Law: what was edited reads as the resized plan, with the batch that it had."""
    done, changed = moved(tmp_path, name, gpus)
    if lines is not None:
        assert changed == sorted(lines)
    again = tmp_path / f"again_{name}"
    again.write_text(next(iter(done.files.values())))
    launch = read_launch(again)
    assert launch.gpus == gpus
    assert to_dict(launch.layout(gpus)) == to_dict(done.layout)
    job = launch.job(done.layout)
    assert (job.gbs, job.seq_len) == (done.job.gbs, done.job.seq_len)


@pytest.mark.parametrize("name", OURS)
def test_resizing_to_the_same_gpus_changes_no_byte(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(OURS[name])
    world = check(path).launch.gpus
    assert world is not None
    done = resize(path, world)
    assert list(done.files.values()) == [OURS[name]]
    assert (done.diff, done.changes) == ("", {})


@pytest.mark.parametrize("framework", FRAMEWORKS)
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plan=plans(), slurm=st.booleans(), gpus=st.sampled_from([8, 16, 64, 128]))
def test_every_written_launch_resizes_in_place(
    framework: str, plan: tuple[Model, Job, Layout[int]], slurm: bool, gpus: int
) -> None:
    """Law: edited files read as the layout that was computed; the same GPUs change nothing."""
    model, wanted, x = plan
    try:
        files = launch_files(
            model, None, wanted, x, framework, launcher="slurm" if slurm else "torchrun"
        )
        nearest_legal(model, wanted, x, gpus)
    except MeshwrightError:
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / name).write_text(text)
        main = Path(folder) / next(iter(files))
        assert resize(main, x.world_size).diff == ""
        done = resize(main, gpus)
        assert done.in_place or done.by_hand
        if not done.in_place:
            return
        for name, text in done.files.items():
            (Path(folder) / Path(name).name).write_text(text)
        again = resize(main, gpus)
        assert to_dict(again.before) == to_dict(done.layout)
        assert (again.changes, again.diff) == ({}, "")


def test_one_variable_for_two_degrees_is_left_to_the_user(tmp_path: Path) -> None:
    """Ours: TP stays and PP halves, which no number of the script says alone."""
    path = tmp_path / "run.sh"
    path.write_text(BATCH.replace("PP=4", "PP=$TP"))
    done = resize(path, 8)
    assert (done.layout.tp, done.layout.pp) == (4, 2)
    assert not done.in_place
    assert done.diff == ""
    place = "--pipeline-model-parallel-size, line 18, through PARALLEL, PP, TP"
    assert f"pp ({place}): 4 -> 2" in done.by_hand
    assert "--pipeline-model-parallel-size 2" in done.files["run.sh"]


def test_what_could_not_be_read_is_told(tmp_path: Path) -> None:
    path = tmp_path / "run.sh"
    path.write_text(BATCH)
    assert any("$@" in note for note in resize(path, 16).notes)


def test_what_nothing_read_depends_on_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.sh"
    path.write_text(COMPUTED.replace("ACC=64", "ACC=64\nMONITOR_GPUS=32"))
    notes = resize(path, 64).notes
    assert any("line 8 still says MONITOR_GPUS=32" in note for note in notes)


def test_several_nodes_after_one_need_a_rendezvous(tmp_path: Path) -> None:
    done, _ = moved(tmp_path, "one_node.sh", 16)
    assert "--nnodes=2 --nproc_per_node=8" in next(iter(done.files.values()))
    assert any("start it on every node" in note for note in done.notes)


def test_a_command_is_resized_as_one_line() -> None:
    words = ["torchrun", "--nproc_per_node=8", "pretrain_gpt.py", *SHAPE.split()]
    words += ["--tensor-model-parallel-size", "8", "--micro-batch-size", "1"]
    done = resize([*words, "--global-batch-size", "64", "--use-distributed-optimizer"], 4)
    assert done.in_place
    assert "--nproc_per_node=4" in done.files["command.sh"]
    assert "--tensor-model-parallel-size 4" in done.files["command.sh"]


def test_an_impossible_number_names_the_nearest_ones_on_both_sides(tmp_path: Path) -> None:
    """Law: 80 layers and 512 sequences share the divisors 2 and 5 with these, not 3."""
    path = tmp_path / "run.sh"
    path.write_text(BATCH)
    with pytest.raises(LayoutError) as refused:
        resize(path, 48)
    assert refused.value.remedy == "Use 40 or 64 GPUs."


def test_the_levels_of_context_parallelism_stay_where_its_size_stays() -> None:
    x = layout(tp=2, cp=4, gpus=32, sp=True, cp_comm=CpComm.a2a_p2p, hierarchical_cp=(2, 2))
    model = load_model("llama3-8b")
    assert to_dict(nearest_legal(model, job(seq_len=8192, gbs=64), x, 32)) == to_dict(x)
    assert nearest_legal(model, job(seq_len=8192, gbs=64), x, 64).hierarchical_cp == (2, 2)


def test_no_byte_changes_that_is_no_number(tmp_path: Path) -> None:
    """Law: line ends and bytes that are not UTF-8 come out as they went in."""
    path, out = tmp_path / "run.sh", tmp_path / "out.sh"
    text = BATCH.replace("\n", "\r\n").replace(" \\\r\n", " ").encode()
    path.write_bytes(text.replace(b"tuned by Ana", b"r\xe9gl\xe9 par Ana"))
    words = ["resize", str(path), "--gpus", "128"]
    assert CliRunner().invoke(app, [*words, "-o", str(out)]).exit_code == 0
    moved_text = path.read_bytes().replace(b"nodes=8", b"nodes=16")
    assert out.read_bytes() == moved_text.replace(b"NNODES:-8", b"NNODES:-16")
    assert CliRunner().invoke(app, words).stdout_bytes == out.read_bytes()


def test_a_diff_shows_the_changed_lines_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.sh"
    path.write_text(BATCH)
    shown = CliRunner().invoke(app, ["resize", str(path), "--gpus", "128", "--diff"]).stdout
    changed = [x for x in shown.splitlines() if x[:1] in "+-" and x[:3] not in ("+++", "---")]
    assert changed == [
        *("-#SBATCH --nodes=8", "+#SBATCH --nodes=16"),
        *("-NNODES=${SLURM_NNODES:-8}", "+NNODES=${SLURM_NNODES:-16}"),
    ]


def test_a_plan_is_planned_anew_and_a_log_written_anew(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    flags = {"num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "world_size": 8}
    flags |= {"seq_length": 4096, "micro_batch_size": 1, "global_batch_size": 64}
    lines = [f"  {name} {'.' * (48 - len(name))} {value}" for name, value in flags.items()]
    ends = "------------------------ arguments ------------------------", "-" * 20
    log.write_text("\n".join([ends[0], *lines, f"{ends[1]} end of arguments {ends[1]}"]))
    done = resize(log, 16)
    assert not done.in_place
    assert any("a new script is written" in note for note in done.notes)
    plan = tmp_path / "plan.toml"
    words = ["plan", "llama3-8b", "8xH100", "--seq-len", "4096", "--global-batch-size", "64"]
    assert CliRunner().invoke(app, [*words, "--top", "1", "-o", str(plan)]).exit_code == 0
    with pytest.raises(LaunchError, match="Plan anew"):
        resize(plan, 16)


def test_a_new_script_for_the_rl_trainer_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "run.sh"
    path.write_text(SKYRL)
    with pytest.raises(LaunchError):
        resize(path, 16, fresh=True)


@pytest.mark.parametrize(
    ("line", "moved_line"),
    [
        ("#SBATCH -N 4", "#SBATCH -N 8"),
        ("#SBATCH -N4 --gres=gpu:h100:8", "#SBATCH -N8 --gres=gpu:h100:4"),
        ("#SBATCH --ntasks=32", "#SBATCH --ntasks=32"),
        ("#SBATCH --ntasks-per-node=1", "#SBATCH --ntasks-per-node=1"),
        ("#SBATCH --nodes=4-8", "#SBATCH --nodes=4-8"),
        ("#SBATCH -n 4 # nodes", "#SBATCH -n 8 # nodes"),
        ("#SBATCH --cpus-per-task=8", "#SBATCH --cpus-per-task=8"),
    ],
)
def test_batch_options_change_in_their_role_only(line: str, moved_line: str) -> None:
    """Spec: Slurm's options; 4 nodes of 8 become 8 nodes of 4."""
    assert batch_options(line + "\n", (4, 8), (8, 4)) == moved_line + "\n"


def test_a_layout_that_the_framework_cannot_run_is_not_chosen(tmp_path: Path) -> None:
    """Spec: SkyRL's batch is a multiple of gpus/(tp*pp), so 64 sequences on 256 GPUs need both."""
    path = tmp_path / "sft.sh"
    path.write_text(
        "python -m skyrl.train.main_sft strategy=megatron model.path=Qwen/Qwen3-8B batch_size=64"
        " micro_train_batch_size_per_gpu=1 max_length=4096 placement.num_nodes=2"
        " placement.num_gpus_per_node=8 megatron_config.tensor_model_parallel_size=2"
        " megatron_config.pipeline_model_parallel_size=1\n"
    )
    done = resize(path, 256)
    assert done.in_place
    assert 64 % (256 // (done.layout.tp * done.layout.pp)) == 0


def test_a_batch_that_follows_the_ranks_is_written_down(tmp_path: Path) -> None:
    """Spec: torchtitan's batch of a step is local_batch_size times the data parallel ranks."""
    path = tmp_path / "run.toml"
    path.write_text(TOML.replace("global_batch_size = 256   # agreed\n", ""))
    done = resize(path, 32)
    assert done.in_place
    assert "global_batch_size = 64\n" in next(iter(done.files.values()))
