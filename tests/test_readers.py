"""Launches in each framework's own style are read as the framework would take them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import DocumentError, LaunchError, MeshwrightError
from meshwright.frameworks.check import check
from meshwright.frameworks.launch import FRAMEWORKS, Launch
from meshwright.frameworks.overrides import from_python, from_yaml, value_of
from meshwright.frameworks.read import read_document, read_launch
from meshwright.parallel.layout import to_text

MEGATRON = """#!/bin/bash
#SBATCH --nodes=4
#SBATCH --gres=gpu:h100:8
export CUDA_DEVICE_MAX_CONNECTIONS=1
TP=${TP:-4}; PP=2
DISTRIBUTED_ARGS=(--nproc_per_node 8 --nnodes "$SLURM_NNODES")
MODEL_ARGS=(
    --num-layers 32 --hidden-size 4096 --num-attention-heads 32
    --seq-length 8192 --max-position-embeddings 8192   # context
    --group-query-attention --num-query-groups 8 --ffn-hidden-size 14336
    --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --position-embedding-type rope --normalization RMSNorm
)
srun torchrun ${DISTRIBUTED_ARGS[@]} pretrain_gpt.py ${MODEL_ARGS[@]} \\
    --tensor-model-parallel-size $TP --pipeline-model-parallel-size ${PP} --sequence-parallel \\
    --micro-batch-size 1 --global-batch-size $((32 * 8)) --bf16 --use-distributed-optimizer \\
    --recompute-activations --data-path $DATA --vocab-size 128256 --train-iters 10 --lr 1e-4 "$@"
"""

RECIPE = (
    "torchrun --nproc_per_node=4 scripts/training/run_recipe.py"
    " --recipe llama32_1b_pretrain_config model.tensor_model_parallel_size=2"
    " model.pipeline_model_parallel_size=2 model.sequence_parallel=True train.train_iters=3"
    " train.global_batch_size=8 train.micro_batch_size=1 scheduler.lr_warmup_iters=0"
    " validation.eval_iters=0 validation.eval_interval=0 checkpoint.save_interval=0"
    " logger.log_interval=1"
)

NEMO = """
import nemo.lightning as nl
from nemo.collections import llm
TP = 4
strategy = nl.MegatronStrategy(tensor_model_parallel_size=TP, pipeline_model_parallel_size=2,
    sequence_parallel=True, ddp=DistributedDataParallelConfig(use_distributed_optimizer=True))
recipe = llm.llama3_8b.pretrain_recipe(name="x", num_nodes=4, num_gpus_per_node=8)
recipe.trainer.strategy.context_parallel_size = 2
recipe.trainer.devices = 8
recipe.trainer.num_nodes = 4
recipe.data.global_batch_size = 512
recipe.data.micro_batch_size = 1
recipe.data.seq_length = 8192
"""

SKYRL_SFT = """
uv run --isolated --extra megatron -m skyrl.train.main_sft strategy=megatron \\
  model.path=Qwen/Qwen3-30B-A3B max_length=4096 batch_size=64 micro_train_batch_size_per_gpu=1 \\
  placement.num_nodes=2 placement.num_gpus_per_node=8 \\
  megatron_config.tensor_model_parallel_size=2 megatron_config.pipeline_model_parallel_size=1 \\
  megatron_config.expert_model_parallel_size=8 megatron_config.expert_tensor_parallel_size=1 \\
  ++megatron_config.transformer_config_kwargs.recompute_granularity=null
"""

SKYRL_RL = """
python -m skyrl.train.entrypoints.main_base trainer.strategy=megatron \\
  trainer.policy.model.path=Qwen/Qwen3-8B trainer.placement.policy_num_gpus_per_node=8 \\
  trainer.policy.megatron_config.tensor_model_parallel_size=4 \\
  trainer.policy.megatron_config.pipeline_model_parallel_size=2 \\
  trainer.train_batch_size=128 trainer.policy_mini_batch_size=32 \\
  generator.n_samples_per_prompt=4 trainer.max_prompt_length=1024 \\
  generator.sampling_params.max_generate_length=3072
"""

VERL = """
n=8
python3 -m verl.trainer.main_ppo --config-name='ppo_megatron_trainer.yaml' \\
  data.train_batch_size=64 data.max_prompt_length=$((1024 * 2)) data.max_response_length=6144 \\
  actor_rollout_ref.model.path="${HF_MODEL:-Qwen/Qwen3-30B-A3B}" \\
  actor_rollout_ref.rollout.n=$n actor_rollout_ref.actor.ppo_mini_batch_size=32 \\
  actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1 \\
  actor_rollout_ref.actor.megatron.tensor_model_parallel_size=2 \\
  actor_rollout_ref.actor.megatron.pipeline_model_parallel_size=2 \\
  actor_rollout_ref.actor.megatron.expert_model_parallel_size=8 \\
  actor_rollout_ref.actor.megatron.expert_tensor_parallel_size=1 \\
  +actor_rollout_ref.actor.megatron.override_transformer_config.recompute_granularity=full \\
  +actor_rollout_ref.actor.megatron.override_transformer_config.recompute_method=uniform \\
  +actor_rollout_ref.actor.megatron.override_transformer_config.recompute_num_layers=1 \\
  trainer.nnodes=4 trainer.n_gpus_per_node=8
"""

TITAN = """
NGPU=${NGPU:-32}
torchrun --nnodes 4 --nproc_per_node 8 -m torchtitan.train --module llama3 --config llama3_8b \\
  --parallelism.tensor_parallel_degree 4 --parallelism.context_parallel_degree=2 \\
  --parallelism.fsdp_reshard_after_forward always --training.max_context_length 8192 \\
  --training.num_tokens_per_microbatch_per_dp_rank 16384 \\
  --training.num_tokens_per_train_step 1048576 --parallelism.spmd_backend spmd_types
"""

TITAN_TOML = """
[model]
name = "llama3"
flavor = "70B"
[training]
local_batch_size = 8
seq_len = 8192
[parallelism]
data_parallel_shard_degree = 2
tensor_parallel_degree = 8
pipeline_parallel_degree = 4
[activation_checkpoint]
mode = "full"
"""

BRIDGE_YAML = """
model:
  num_layers: 16
  hidden_size: 2048
  num_attention_heads: 16
  tensor_model_parallel_size: 2
  seq_length: 4096
dataset: {seq_length: 4096}
train: {micro_batch_size: 1, global_batch_size: 16}
"""

STYLES = {
    "megatron script": (
        MEGATRON,
        "run.sh",
        "megatron-lm",
        "tp=4 pp=2 vpp=1 cp=1 dp=4 ep=1 etp=1 edp=16 mbs=1 sp=true zero=optim dp_replicate=1"
        " recompute=core_attn schedule=1f1b cp_comm=p2p order=tp-cp-ep-dp-pp",
        (8192, 256, "llama3-8b"),
    ),
    "bridge recipe": (
        RECIPE,
        "run.sh",
        "megatron-bridge",
        "tp=2 pp=2 vpp=1 cp=1 dp=1 ep=1 etp=1 edp=2 mbs=1 sp=true zero=optim dp_replicate=1"
        " recompute=none schedule=1f1b cp_comm=p2p order=tp-cp-ep-dp-pp",
        (4096, 8, "llama3.2-1b"),
    ),
    "nemo python": (
        NEMO,
        "recipe.py",
        "nemo",
        "tp=4 pp=2 vpp=1 cp=2 dp=2 ep=1 etp=1 edp=16 mbs=1 sp=true zero=optim dp_replicate=1"
        " recompute=none schedule=1f1b cp_comm=p2p order=tp-cp-ep-dp-pp",
        (8192, 512, "llama3-8b"),
    ),
    "skyrl sft": (
        SKYRL_SFT,
        "run.sh",
        "skyrl",
        "tp=2 pp=1 vpp=1 cp=1 dp=8 ep=8 etp=1 edp=2 mbs=1 sp=true zero=optim dp_replicate=1"
        " recompute=none schedule=1f1b cp_comm=p2p order=tp-cp-ep-dp-pp",
        (4096, 64, "qwen3-30b-a3b"),
    ),
    "skyrl rl": (
        SKYRL_RL,
        "run.sh",
        "skyrl",
        "tp=4 pp=2 vpp=1 cp=1 dp=1 ep=1 etp=1 edp=4 mbs=1 sp=true zero=optim dp_replicate=1"
        " recompute=full schedule=1f1b cp_comm=p2p order=tp-cp-ep-dp-pp",
        (4096, 128, "qwen3-8b"),
    ),
    "verl": (
        VERL,
        "run.sh",
        "verl",
        "tp=2 pp=2 vpp=1 cp=1 dp=8 ep=8 etp=1 edp=2 mbs=1 sp=true zero=optim dp_replicate=1"
        " recompute=full schedule=1f1b cp_comm=p2p order=tp-cp-ep-dp-pp",
        (8192, 256, "qwen3-30b-a3b"),
    ),
    "torchtitan": (
        TITAN,
        "run.sh",
        "torchtitan",
        "tp=4 pp=1 vpp=1 cp=2 dp=4 ep=1 etp=1 edp=32 mbs=2 sp=true zero=optim_grads_params"
        " dp_replicate=1 recompute=none schedule=1f1b cp_comm=all_gather order=tp-cp-ep-dp-pp",
        (8192, 128, "llama3-8b"),
    ),
    "torchtitan toml": (
        TITAN_TOML,
        "llama3_70b.toml",
        "torchtitan",
        "tp=8 pp=4 vpp=1 cp=1 dp=2 ep=1 etp=1 edp=16 mbs=1 sp=true zero=optim_grads"
        " dp_replicate=1 recompute=full schedule=1f1b cp_comm=p2p order=tp-cp-ep-dp-pp"
        f" pipeline_layout=E{'t' * 20}|{'t' * 21}|{'t' * 20}|{'t' * 19}L",
        (8192, 16, "llama3-70b"),
    ),
    "bridge yaml": (
        BRIDGE_YAML,
        "config.yaml",
        "megatron-bridge",
        "tp=2 pp=1 vpp=1 cp=1 dp=1 ep=1 etp=1 edp=2 mbs=1 sp=false zero=no_shard dp_replicate=1"
        " recompute=none schedule=1f1b cp_comm=p2p order=tp-cp-ep-dp-pp",
        (4096, 16, "gpt"),
    ),
}


@pytest.mark.parametrize("style", STYLES)
def test_each_style_gives_its_layout_job_and_model(style: str) -> None:
    text, name, framework, layout, (seq_len, gbs, model) = STYLES[style]
    launch = read_document(text, name)
    assert launch.framework == framework
    x = launch.layout()
    assert to_text(x) == layout
    job, found = launch.job(x), launch.model()
    assert (job.seq_len, job.gbs, found and found.name) == (seq_len, gbs, model)


def test_every_value_says_where_it_came_from() -> None:
    launch = read_document(MEGATRON, "run.sh")
    origins = {name: s.origin for name, s in launch.settings.items()}
    assert origins["tensor_model_parallel_size"] == (
        "--tensor-model-parallel-size, line 15, through TP"
    )
    assert origins["num_layers"] == "--num-layers, line 8, through MODEL_ARGS"
    assert origins["context_parallel_size"] == "default of Megatron-LM"
    assert launch.gpu == "h100"
    assert launch.env == {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}


def test_what_could_not_be_read_is_listed_and_not_guessed() -> None:
    script = (
        "torchrun --nproc_per_node $GPUS pretrain_gpt.py --num-layers 32 --hidden-size 4096 \\\n"
        "  --num-attention-heads 32 --tensor-model-parallel-size $(nproc) --micro-batch-size 1 $@\n"
    )
    launch = read_document(script, "run.sh")
    listed = "\n".join(launch.unread)
    for lost in ("--nproc_per_node $GPUS", "--tensor-model-parallel-size $(nproc)", "$@"):
        assert lost in listed
    assert launch.gpus is None
    assert launch.words["tensor_model_parallel_size"] == 1


def test_an_argument_dump_is_the_launch_that_made_it() -> None:
    log = """using world size: 16, data-parallel size: 8
using torch.bfloat16 for parameters ...
------------------------ arguments ------------------------
  global_batch_size ............................... 128
  hidden_size ..................................... 4096
  micro_batch_size ................................ 1
  num_attention_heads ............................. 32
  num_layers ...................................... 32
  num_query_groups ................................ 8
  ffn_hidden_size ................................. 14336
  recompute_granularity ........................... None
  seq_length ...................................... 8192
  sequence_parallel ............................... True
  tensor_model_parallel_size ...................... 2
  use_distributed_optimizer ....................... True
  world_size ...................................... 16
-------------------- end of arguments ---------------------
"""
    launch = read_document(log, "train.log")
    assert launch.gpus == 16
    x = launch.layout()
    assert (x.tp, x.dp, x.sp) == (2, 8, 1)
    assert launch.job(x).precision.name == "bf16"


def test_a_command_and_plain_flags_are_launches() -> None:
    flags = ["--num-layers", "8", "--hidden-size", "1024", "--tensor-model-parallel-size=2"]
    assert read_launch(flags).words["tensor_model_parallel_size"] == 2
    command = ["torchrun", "--nproc_per_node", "4", "pretrain_gpt.py", *flags]
    assert read_launch(command).gpus == 4
    assert read_launch(command, gpus=8).gpus == 8
    overrides = ["model.tensor_model_parallel_size=2", "train.global_batch_size=8"]
    assert read_launch(overrides).framework == "megatron-bridge"


def test_the_last_of_two_settings_counts() -> None:
    """Spec: argparse and Hydra both."""
    flags = ["--num-layers", "8", "--tensor-model-parallel-size", "2"]
    launch = read_launch([*flags, "--tensor-model-parallel-size", "4"])
    assert launch.words["tensor_model_parallel_size"] == 4


def test_a_python_program_beside_the_script_is_read_as_data(tmp_path: Path) -> None:
    (tmp_path / "recipe.py").write_text(NEMO)
    (tmp_path / "run.sh").write_text("torchrun --nproc_per_node 8 --nnodes 4 recipe.py\n")
    launch = read_launch(tmp_path / "run.sh")
    assert launch.framework == "nemo"
    assert (launch.gpus, launch.layout().tp) == (32, 4)


@pytest.mark.parametrize(
    ("text", "name", "error"),
    [
        ("echo hello\n", "run.sh", LaunchError),
        ("", "run.sh", LaunchError),
        ("a: [", "x.yaml", DocumentError),
        ("- 1\n- 2\n", "x.yaml", DocumentError),
        ("a: !!python/object/apply:os.system ['true']", "x.yaml", DocumentError),
        ("[a", "x.toml", DocumentError),
        ("def (", "x.py", DocumentError),
        ("x: 1\n", "x.yaml", LaunchError),
    ],
)
def test_what_is_no_launch_is_refused(text: str, name: str, error: type[MeshwrightError]) -> None:
    with pytest.raises(error) as raised:
        read_document(text, name)
    assert raised.value.rule


def test_a_framework_that_cannot_be_told_can_be_stated() -> None:
    text = "model: {tensor_model_parallel_size: 2}\nactor_rollout_ref: {x: 1}\n"
    with pytest.raises(LaunchError, match="State --framework"):
        read_document(text, "x.yaml")
    assert read_document(text, "x.yaml", framework="megatron-bridge").layout().tp == 2
    with pytest.raises(LaunchError, match="not a known framework"):
        read_launch(["--num-layers", "2"], framework="megatron")


def test_a_missing_file_a_folder_and_a_pipe_are_told(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, rule in (("none.sh", "no such file"), (".", "is a folder"), ("pipe", "is a pipe")):
        with pytest.raises(DocumentError, match=rule):
            read_launch(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1), ("1e-4", 1e-4), ("True", True), ("null", None), ("[a,1]", ["a", 1]), ("'x'", "x")],
)
def test_override_values_are_read_as_hydra_does(text: str, value: object) -> None:
    assert value_of(text) == value


def test_aliases_that_multiply_are_refused() -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
    )
    with pytest.raises(DocumentError, match="aliases"):
        from_yaml(bomb, "x")


def test_python_is_never_run(tmp_path: Path) -> None:
    target = tmp_path / "made"
    from_python(f"x.y = open({str(target)!r}, 'w')\nimport os; os.system('true')\n", "x")
    assert not target.exists()


LINES = st.sampled_from(
    [
        *"\n".join(text for text, *_ in STYLES.values()).splitlines(),
        "fi",
        "done",
        "X=$(",
        "trainer.strategy=megatron",
        "--tensor-model-parallel-size -3",
        "model.tensor_model_parallel_size=[1",
        "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=9999999999999999999999",
        "trainer.policy.megatron_config.tensor_model_parallel_size=0",
        "--parallelism.tensor_parallel_degree x",
    ]
)


def use(launch: Launch) -> None:
    """Ask everything of a launch that a check asks."""
    for ask in (launch.layout, launch.job, launch.model):
        try:
            ask()
        except MeshwrightError as error:
            assert error.rule
    launch.to_dict()


@settings(max_examples=120, deadline=None)
@given(
    lines=st.lists(LINES, max_size=14),
    name=st.sampled_from(["a.sh", "a.yaml", "a.toml", "a.py", "a.log"]),
    framework=st.sampled_from([None, *FRAMEWORKS]),
)
def test_shuffled_launches_end_in_a_launch_or_an_error_of_ours(
    lines: list[str], name: str, framework: str | None
) -> None:
    try:
        use(read_document("\n".join(lines), name, framework=framework))
    except MeshwrightError as error:
        assert error.rule


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=300), name=st.sampled_from(["a.sh", "a.yaml", "a.toml", "a.py"]))
def test_any_text_ends_in_a_launch_or_an_error_of_ours(text: str, name: str) -> None:
    try:
        use(read_document(text, name))
    except MeshwrightError as error:
        assert error.rule


@pytest.mark.parametrize(
    "text",
    [
        "if [ a ]; then\n" * 5000,
        "x y\n" * 30000,
        "pretrain_gpt.py " + "--num-layers 2 " * 25000,
        "pretrain_gpt.py --num-layers 2 --moe-layer-freq '" + "([" * 5000 + "'",
    ],
    ids=["nested blocks", "commands", "flags", "brackets"],
)
def test_what_no_launch_is_as_large_as_ends_in_an_error_of_ours(text: str) -> None:
    try:
        use(read_document(text, "run.sh"))
    except MeshwrightError as error:
        assert error.rule


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.json", "[" * 100_000),
        ("run.json", '{"a":' * 100_000),
        ("run.yaml", "{a: " * 100_000),
        ("run.yaml", "a:\n  " + "- " * 100_000 + "x\n"),
        ("run.yaml", "? " * 100_000 + "x\n"),
        ("run.toml", "a" + ".a" * 30_000 + "=1\n"),
        ("run.toml", "x={a" + ".a" * 30_000 + "=1}\n"),
    ],
)
def test_documents_deeper_than_any_launch_are_refused_at_once(
    name: str, text: str, tmp_path: Path
) -> None:
    """A bug once: composing deep YAML overflowed the stack of the process."""
    path = tmp_path / name
    path.write_text(text)
    begin = time.process_time()
    with pytest.raises(DocumentError, match="more than"):
        check(path)
    assert time.process_time() - begin < 2


def test_brackets_in_a_text_are_no_depth() -> None:
    text = f"x: '{'[' * 5000}'\ntrainer:\n  strategy: {{tensor_model_parallel_size: 2}}\n"
    assert read_document(text, "run.yaml").words["tensor_model_parallel_size"] == 2


def test_a_script_that_only_submits_another_one_says_which(tmp_path: Path) -> None:
    script = tmp_path / "submit.sh"
    script.write_text("cat > job.sbatch <<EOF\nsrun python x.py\nEOF\nsbatch job.sbatch\n")
    with pytest.raises(LaunchError, match=r"line 4 hands over to job\.sbatch"):
        read_launch(script)


def test_the_configuration_file_names_the_model_of_torchtitan() -> None:
    words = ["torchrun", "--nproc_per_node=8", "-m", "torchtitan.train", "--job.config_file"]
    words += ["./torchtitan/models/llama3/train_configs/llama3_8b.toml"]
    words += ["--parallelism.tensor_parallel_degree", "3"]
    launch = read_launch(words)
    assert launch.words["model"] == "llama3_8b"
    assert "TT-MODEL-heads_tp" in {f.id for f in launch.findings}


def test_a_batch_that_does_not_divide_is_told_once() -> None:
    """Ours: of two refusals with one cause the second only confuses."""
    words = ["python", "-m", "skyrl.train.entrypoints.main_base", "trainer.strategy=megatron"]
    words += ["trainer.train_batch_size=128", "trainer.policy_mini_batch_size=48"]
    found = [f.id for f in read_launch(words).findings if f.severity == "error"]
    assert found == ["SKY-RL-train_mini_div"]


INTERPOLATED = """
trainer: {nnodes: 2, n_gpus_per_node: '${oc.env:GPUS,8}'}
sizes: {tp: 4, loop: '${sizes.loop}', far: '${sizes.loop}'}
data: {train_batch_size: 64, max_prompt_length: '${oc.decode:${oc.env:PROMPT,512}}'}
actor_rollout_ref:
  model: {path: '${oc.env:HOME}/models/Qwen3-8B'}
  actor:
    strategy: megatron
    ppo_mini_batch_size: '${data.train_batch_size}'
    ppo_micro_batch_size_per_gpu: '${oc.env:MICRO}'
    megatron:
      tensor_model_parallel_size: ${sizes.tp}
      pipeline_model_parallel_size: ${oc.env:PP,2}
      context_parallel_size: ${sizes.far}
      expert_model_parallel_size: ${eval:'__import__("os").system("true")'}
"""


def test_interpolations_are_followed_and_what_they_hide_is_listed() -> None:
    launch = read_document(INTERPOLATED, "ppo.yaml", framework="verl")
    assert launch.gpus == 16
    assert launch.words["tensor_model_parallel_size"] == 4
    assert launch.words["pipeline_model_parallel_size"] == 2
    assert launch.words["global_batch_size"] == 64
    assert "${oc.env:PP,2}" in launch.settings["pipeline_model_parallel_size"].origin
    model = launch.model()
    assert model is not None
    assert model.name == "qwen3-8b"
    for lost in ("context_parallel_size", "expert_model_parallel_size", "ppo_micro_batch_size"):
        assert any(lost in line and "is not known" in line for line in launch.unread)
        assert launch.words.get(lost) is None


def test_an_interpolation_of_the_environment_takes_what_the_script_exports() -> None:
    script = (
        "export TP=4\ntorchrun --nproc_per_node 8 run_recipe.py --recipe llama3_8b_pretrain_config"
        " 'model.tensor_model_parallel_size=${oc.env:TP,2}'\n"
    )
    assert read_document(script, "run.sh").words["tensor_model_parallel_size"] == 4
    script = script.replace("export TP=4\n", "")
    assert read_document(script, "run.sh").words["tensor_model_parallel_size"] == 2


@pytest.mark.parametrize("value", ["[2]", "two", "2.5", "true", "{a: 1}", "${a}"])
@pytest.mark.parametrize("framework", ["megatron-bridge", "nemo", "skyrl", "verl"])
def test_a_degree_that_is_no_whole_number_is_never_silent(framework: str, value: str) -> None:
    path = {
        "megatron-bridge": "model.pipeline_model_parallel_size",
        "nemo": "trainer.strategy.pipeline_model_parallel_size",
        "skyrl": "trainer.policy.megatron_config.pipeline_model_parallel_size",
        "verl": "actor_rollout_ref.actor.megatron.pipeline_model_parallel_size",
    }[framework]
    result = check([f"{path}={value}"], framework=framework, gpus=8)
    told = [f.message for f in result.findings if f.severity == "error"] + list(result.unread)
    assert any("pipeline_model_parallel_size" in line for line in told)


def test_a_model_is_known_by_its_name_wherever_it_lies() -> None:
    script = (
        "python3 -m verl.trainer.main_ppo actor_rollout_ref.model.path=$MODELS/Qwen/Qwen3-8B \\\n"
        "  trainer.n_gpus_per_node=8 actor_rollout_ref.actor.strategy=fsdp\n"
    )
    launch = read_document(script, "run.sh")
    model = launch.model()
    assert model is not None
    assert model.name == "qwen3-8b"
    assert launch.unread == ()
    assert read_document(script.replace("Qwen3-8B", "$NAME"), "run.sh").model() is None


MISTYPED = {
    "nemo": ("trainer.strategy.tensor_modle_parallel_size", "tensor_model_parallel_size"),
    "skyrl": (
        "trainer.policy.megatron_config.tensor_model_paralel_size",
        "tensor_model_parallel_size",
    ),
    "verl": ("actor_rollout_ref.actor.megatorn.context_parallel_size", "actor.megatron.context"),
    "torchtitan": ("parallelism.pipeline_paralell_degree", "pipeline_parallel_degree"),
}


@pytest.mark.parametrize("framework", MISTYPED)
def test_a_mistyped_path_is_told_with_the_one_that_was_meant(framework: str) -> None:
    path, meant = MISTYPED[framework]
    word = f"--{path}=2" if framework == "torchtitan" else f"++{path}=2"
    result = check([word], framework=framework, gpus=8)
    (found,) = [f for f in result.findings if f.id == "unknown_name"]
    assert (found.severity, found.field) == ("warning", path)
    assert meant in found.remedy


def test_a_number_that_is_none_is_told_where_it_is_no_degree_too() -> None:
    words = ["trainer.nnodes=[2]", "trainer.n_gpus_per_node=eight", "data.train_batch_size=1e3"]
    result = check(words, framework="verl", gpus=8)
    told = {f.field: f.remedy for f in result.findings if f.rule == "It is a whole number."}
    assert told == {
        "trainer.nnodes": "Write trainer.nnodes=2.",
        "trainer.n_gpus_per_node": "Write trainer.n_gpus_per_node=1.",
    }


def test_one_setting_of_a_stated_framework_is_a_launch() -> None:
    launch = read_launch(["trainer.nnodes=2"], framework="verl")
    assert launch.gpus == 16


@pytest.mark.parametrize(
    ("framework", "path"),
    [
        ("megatron-bridge", "model.tensor_model_parallel_size"),
        ("nemo", "trainer.strategy.tensor_model_parallel_size"),
        ("skyrl", "++trainer.policy.megatron_config.tensor_model_parallel_size"),
        ("verl", "actor_rollout_ref.actor.megatron.tensor_model_parallel_size"),
    ],
)
def test_a_setting_without_a_value_is_told(framework: str, path: str) -> None:
    result = check(["train.py", "--name", "model.yaml", path, "4"], framework=framework, gpus=8)
    assert [f.field for f in result.findings if f.id == "unusable.override"] == [path]


def test_a_number_of_nodes_that_is_none_is_told() -> None:
    result = check(["trainer.devices=8", "trainer.num_nodes=one"], framework="nemo")
    assert "trainer.num_nodes" in {f.field for f in result.findings if f.severity == "error"}


def test_a_refused_override_leaves_what_the_recipe_says() -> None:
    words = ["run_recipe.py", "--recipe", "llama3_8b_pretrain_config"]
    result = check([*words, "train.global_batch_size=64k"], gpus=8)
    errors = [f.id for f in result.findings if f.severity == "error"]
    assert errors == ["MB-OVERRIDE"]


def test_checkpointing_by_op_is_a_switch_of_the_job() -> None:
    words = ["torchtitan.train", "--model.name", "llama3", "--model.flavor", "8B"]
    words += ["--training.seq_len", "8192", "--activation_checkpoint.mode", "selective"]
    for option, by_op in (("op", True), ("2", False)):
        given = [*words, "--activation_checkpoint.selective_ac_option", option]
        result = check(given, cluster="8xH100", framework="torchtitan")
        assert result.job is not None
        assert result.job.execution.recompute_every_second_matmul is by_op
        assert any("activation_checkpoint.mode" in line for line in result.unread) is not by_op
