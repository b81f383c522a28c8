"""Whole launches of every framework, converted to every other: what comes out would start."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from meshwright.cli import app
from meshwright.frameworks.check import check
from meshwright.frameworks.convert import convert
from meshwright.frameworks.launch import FRAMEWORKS

SOURCES = {
    "megatron.sh": """
export CUDA_DEVICE_MAX_CONNECTIONS=1
ARGS=(
  --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
  --group-query-attention --num-query-groups 8 --seq-length 8192 --max-position-embeddings 8192
  --swiglu --normalization RMSNorm --position-embedding-type rope --rotary-base 500000
  --disable-bias-linear --untie-embeddings-and-output-weights --vocab-size 128256
  --attention-dropout 0.0 --hidden-dropout 0.0 --init-method-std 0.008
  --tensor-model-parallel-size 4 --pipeline-model-parallel-size 4 --context-parallel-size 2
  --sequence-parallel --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
  --micro-batch-size 1 --global-batch-size 512 --train-samples 1000000 --lr 1.5e-4
  --lr-decay-style cosine --lr-decay-samples 900000 --lr-warmup-samples 10000 --bf16
  --tokenizer-type HuggingFaceTokenizer --tokenizer-model meta-llama/Meta-Llama-3-8B
  --data-path 0.7 /data/web 0.3 /data/code --split 99,1,0 --save $CKPT --load $CKPT
  --save-interval 500 --async-save --eval-iters 10 --wandb-project p --wandb-exp-name e
)
torchrun --nnodes 8 --nproc-per-node 8 pretrain_gpt.py ${ARGS[@]}
""",
    "bridge.sh": """
torchrun --nproc_per_node=8 --nnodes=2 scripts/training/run_recipe.py \\
  --recipe qwen3_30b_a3b_pretrain_config model.tensor_model_parallel_size=2 \\
  model.pipeline_model_parallel_size=2 model.expert_model_parallel_size=4 \\
  model.expert_tensor_parallel_size=1 model.sequence_parallel=True \\
  train.train_iters=2000 train.global_batch_size=256 train.micro_batch_size=1 \\
  model.seq_length=4096 dataset.seq_length=4096 scheduler.lr_warmup_iters=100 \\
  optimizer.lr=2e-5 ddp.grad_reduce_in_fp32=true rng.seed=7 checkpoint.save=/ckpt
""",
    "recipe.py": """
from nemo.collections import llm
recipe = llm.llama3_8b.pretrain_recipe(dir="/ckpt", num_nodes=4, num_gpus_per_node=8)
recipe.trainer.strategy.tensor_model_parallel_size = 2
recipe.trainer.strategy.pipeline_model_parallel_size = 2
recipe.trainer.strategy.sequence_parallel = True
recipe.data.global_batch_size = 512
recipe.data.micro_batch_size = 1
recipe.data.seq_length = 8192
recipe.optim.config.lr = 2e-5
""",
    "sft.sh": """
uv run -m skyrl.train.main_sft strategy=megatron model.path=Qwen/Qwen3-8B dataset_name=a/b \\
  placement.num_nodes=2 placement.num_gpus_per_node=8 max_length=4096 batch_size=128 \\
  micro_train_batch_size_per_gpu=2 megatron_config.tensor_model_parallel_size=2 \\
  megatron_config.pipeline_model_parallel_size=2 num_steps=500 optimizer_config.lr=2e-5
""",
    "verl.sh": """
python3 -m verl.trainer.main_ppo --config-name=ppo_megatron_trainer.yaml \\
  data.train_batch_size=1024 data.max_prompt_length=1024 data.max_response_length=1024 \\
  actor_rollout_ref.model.path=Qwen/Qwen3-8B actor_rollout_ref.actor.ppo_mini_batch_size=256 \\
  actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4 actor_rollout_ref.rollout.n=5 \\
  actor_rollout_ref.actor.megatron.tensor_model_parallel_size=2 \\
  actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.tensor_model_parallel_size=2 \\
  trainer.n_gpus_per_node=8 trainer.nnodes=2
""",
    "titan.sh": """
torchrun --nproc_per_node=8 -m torchtitan.train --module llama3 --config llama3_8b \\
  --training.max_context_length 8192 --training.num_tokens_per_microbatch_per_dp_rank 8192 \\
  --training.num_tokens_per_train_step 524288 --parallelism.tensor_parallel_degree 2
""",
}
PAIRS = [
    (source, to)
    for source in SOURCES
    for to in FRAMEWORKS
    if to != "torchtitan" or source not in ("sft.sh", "verl.sh")
]
"""torchtitan pre-trains only, and says so."""


def changes(source: str, to: str) -> list[str]:
    """Return what of a layout must change for a framework, as its refusals say."""
    if to == "torchtitan":
        return ["zero=optim_grads_params", "cp_comm=all_gather", "recompute=none"]
    return ["zero=optim"] if source == "titan.sh" and to == "skyrl" else []


@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
@pytest.mark.parametrize(("source", "to"), PAIRS)
def test_what_would_start_still_would_after_converting(
    source: str, to: str, launcher: str, tmp_path: Path
) -> None:
    """Law: no written launch is refused by the rules of its own framework."""
    path = tmp_path / source
    path.write_text(SOURCES[source])
    assert check(path).ok
    done = convert(path, to, launcher=launcher, changes=changes(source, to))
    out = tmp_path / "out"
    out.mkdir()
    for name, text in done.files.items():
        (out / name).write_text(text)
    script = out / next(iter(done.files))
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=20)
    result = check(script)
    assert [f.message for f in result.findings if f.severity == "error"] == []
    assert result.layout is not None
    assert result.layout.world_size == done.layout.world_size


@pytest.mark.parametrize("source", SOURCES)
def test_nothing_is_lost_where_the_framework_stays(source: str, tmp_path: Path) -> None:
    path = tmp_path / source
    path.write_text(SOURCES[source])
    framework = check(path).launch.framework
    assert convert(path, framework).carried.lost == []


def test_samples_become_iterations_for_bridge(tmp_path: Path) -> None:
    """Spec: a recipe counts iterations, and Bridge takes one way of counting (train_mode_one)."""
    path = tmp_path / "run.sh"
    path.write_text(SOURCES["megatron.sh"])
    text = convert(path, "megatron-bridge").files["run.sh"]
    assert "train.train_iters=1954" in text
    assert "scheduler.lr_decay_iters=1758" in text
    assert "samples" not in text


def test_a_recipe_of_nemo_shards_its_optimizer(tmp_path: Path) -> None:
    """Spec: NeMo's recipes take the distributed optimizer; sizes may stand in the recipe's call."""
    path = tmp_path / "recipe.py"
    path.write_text(SOURCES["recipe.py"])
    result = check(path)
    assert result.layout is not None
    assert (result.layout.world_size, result.layout.zero) == (32, 1)
    assert any("distributed optimizer" in line for line in result.launch.assumed)


def test_graphs_that_only_a_default_turns_on_are_left_and_named(tmp_path: Path) -> None:
    path = tmp_path / "run.sh"
    path.write_text(SOURCES["titan.sh"])
    done = convert(path, "nemo")
    assert "cuda_graphs: on by torchtitan's default only; left off" in done.notes
    assert convert(path, "torchtitan").notes == []


def test_a_plan_is_converted_like_a_launch(tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    words = ["plan", "llama3-8b", "8xH100", "--seq-len", "4096", "--global-batch-size", "64"]
    assert CliRunner().invoke(app, [*words, "--top", "1", "-o", str(plan)]).exit_code == 0
    done = convert(plan, "megatron-bridge")
    assert done.layout.world_size == 8
    assert "train.global_batch_size=64" in done.files["run.sh"]


@pytest.mark.parametrize("to", ["megatron-bridge", "nemo", "torchtitan"])
def test_gradients_in_16_bits_are_named_where_they_are_not_carried(to: str) -> None:
    flags = "--num-layers 32 --hidden-size 4096 --num-attention-heads 32 --seq-length 4096"
    flags += " --max-position-embeddings 4096 --micro-batch-size 1 --global-batch-size 64 --bf16"
    start = ["torchrun", "--nproc-per-node", "8", "pretrain_gpt.py", *flags.split()]
    changes = ["zero=optim_grads_params"] if to == "torchtitan" else []
    for given in ([], ["--grad-reduce-in-bf16"]):
        notes = convert([*start, *given], to, model="llama3-8b", changes=changes).notes
        assert any("gradients in 16 bits" in note for note in notes) is bool(given)
