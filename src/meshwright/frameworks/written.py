"""What a framework's writer hands over, and the scripts that are made of it.

A writer says which program runs with which arguments, variables and environment; this module puts
that into a script for ``torchrun`` or Slurm. Frameworks whose processes are started by Ray run one
driver instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from meshwright.describe.cluster import Cluster
from meshwright.describe.job import Job
from meshwright.describe.model import Model
from meshwright.errors import LaunchError, did_you_mean
from meshwright.findings import Finding
from meshwright.frameworks.carried import Carried, Unexpanded
from meshwright.frameworks.words_model import beyond_words
from meshwright.parallel.layout import DEFAULT_ORDER, Layout, Pipeline, Recompute, Zero, to_text

LAUNCHERS: Final = ("torchrun", "slurm")

_SAFE: Final = re.compile(r"[A-Za-z0-9_./:=,+@%^-]+")
_LIST_OF_WORDS: Final = re.compile(r"\$\{?(\w+)\}?")


@dataclass(frozen=True, kw_only=True)
class Variable:
    """A variable at the top of a script: what only the user knows, with a placeholder."""

    name: str
    default: str
    comment: str


@dataclass(frozen=True, kw_only=True)
class Written:
    """One framework's launch before it is put into a script.

    ``program`` is shell text; ``arguments`` maps the name of an array to its lines, each a list of
    words (``Unexpanded`` where they hold variables). ``files`` are further files that the program
    needs. ``remarks`` stand as comments at the top of the script. ``by_ray``: one driver starts the
    processes.
    """

    program: str
    arguments: Mapping[str, Sequence[Sequence[str]]]
    variables: Sequence[Variable] = ()
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    unset: Sequence[str] = ()
    files: Mapping[str, str] = field(default_factory=dict[str, str])
    remarks: Sequence[str] = ()
    by_ray: bool = False


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is to be written: a model, a job and a layout, on a cluster where it is known.

    ``carried`` is what another launch said besides.
    """

    model: Model
    job: Job
    layout: Layout[int]
    cluster: Cluster | None = None
    carried: Carried = field(default_factory=Carried)

    @property
    def gpus_per_node(self) -> int:
        """GPUs of a node: the cluster's, or 8 where whole nodes of them make up the world."""
        world = self.layout.world_size
        if self.cluster is not None and world % self.cluster.gpus_per_node == 0:
            return self.cluster.gpus_per_node
        return next(n for n in (8, 4, 2, 1) if world % n == 0) if world > 8 else world

    @property
    def nodes(self) -> int:
        """Nodes that hold the world."""
        return self.layout.world_size // self.gpus_per_node

    @property
    def is_blackwell(self) -> bool:
        """Whether the GPUs are known to be Blackwell, which needs no connection limit."""
        name = "" if self.cluster is None else self.cluster.gpu.name.lower()
        return re.match(r"g?b[23]00", name) is not None


def refusal(field_name: str, value: object, rule: str, remedy: str) -> Finding:
    """Return the finding that a framework cannot express something."""
    return Finding(
        id=f"unsupported.{field_name.rpartition('.')[2]}",
        severity="error",
        field=field_name,
        value=value,
        rule=rule,
        remedy=remedy,
        message=f"{field_name} = {value}: {rule} {remedy}",
    )


def megatron_refusals(target: Target, title: str) -> list[Finding]:
    """Return what no framework on Megatron Core can express of a plan."""
    x = target.layout
    found: list[Finding] = []
    if x.schedule not in (Pipeline.one_f_one_b, Pipeline.interleaved):
        rule = f"{title} runs 1f1b, or interleaved with virtual stages."
        name = Pipeline(x.schedule).name
        found.append(refusal("layout.schedule", name, rule, "Use 1f1b or interleaved."))
    elif (x.schedule == Pipeline.interleaved) != (x.vpp > 1):
        rule = f"{title} interleaves exactly when there are virtual stages."
        name = Pipeline(x.schedule).name
        found.append(refusal("layout.schedule", name, rule, "Use 1f1b with vpp=1."))
    if x.order not in (DEFAULT_ORDER, "tp-cp-ep-pp-dp"):
        rule = f"{title} lays ranks out as {DEFAULT_ORDER} or tp-cp-ep-pp-dp."
        found.append(refusal("layout.order", x.order, rule, f"Use order={DEFAULT_ORDER}."))
    found += _switch_refusals(target, title)
    if target.job.precision.name == "fp8-rowwise":
        rule = f"{title} scales FP8 by tensor or by block, not by row."
        found.append(refusal("job.precision", "fp8-rowwise", rule, "Use fp8-cs."))
    if x.zero == Zero.no_shard and x.dp_replicate > 1:
        rule = f"{title} counts replicas of a sharded optimizer; this layout shards none."
        found.append(refusal("layout.dp_replicate", x.dp_replicate, rule, "Use dp_replicate=1."))
    return found


def model_refusals(target: Target, title: str) -> list[Finding]:
    """Return what a model has that a launch which shapes it layer by layer does not say."""
    rule = f"It has {{}}, which no flag written here gives {title}."
    remedy = "Use a framework that loads the model by name: megatron-bridge, skyrl or verl."
    name = target.model.name
    return [
        refusal("model", name, rule.format(text), remedy) for text in beyond_words(target.model)
    ]


def _switch_refusals(target: Target, title: str) -> list[Finding]:
    x, execution, found = target.layout, target.job.execution, list[Finding]()
    if execution.cuda_graphs == "partial" and x.recompute & Recompute.full:
        rule = f"{title} recomputes whole layers with a graph of the whole iteration only."
        found.append(refusal("job.cuda_graphs", "partial", rule, "Use none or full."))
    sharded = x.zero == Zero.optim and x.dp * x.cp > 1
    if sharded and execution.overlap_param_gather and not execution.overlap_grad_reduce:
        rule = f"{title} overlaps the gather of parameters where it overlaps gradients."
        remedy = "Use overlap_param_gather=false."
        found.append(refusal("job.overlap_param_gather", True, rule, remedy))
    if x.recompute & Recompute.moe_act and not execution.grouped_gemm:
        rule = f"{title} recomputes the activation of experts in grouped products only."
        found.append(refusal("job.grouped_gemm", False, rule, "Use grouped_gemm=true."))
    return found


def megatron_environment(target: Target) -> dict[str, str]:
    """Return the variables that the layout's overlap needs.

    One connection orders communication before compute for TP and CP overlap on GPUs before
    Blackwell; overlapped expert all-to-alls need many; sharded training needs it unset. CUDA graphs
    of Transformer Engine and expandable segments go together without NCCL's registration, and
    modules whose activations are offloaded need its first offloading code.
    """
    x, execution = target.layout, target.job.execution
    env = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    if execution.cuda_graphs == "partial":
        env["NCCL_GRAPH_REGISTER"] = "0"
    if execution.offloaded_modules:
        env["NVTE_CPU_OFFLOAD_V1"] = "1"
    if x.zero > Zero.optim:
        return env
    if execution.overlap_ep_comm and x.ep > 1:
        env["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"
    elif (x.tp > 1 or x.cp > 1) and not target.is_blackwell:
        env["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    return env


def no_cuda_graphs(target: Target, title: str) -> list[Finding]:
    """Return a refusal of CUDA graphs by a framework whose sequences differ in length."""
    graphs = target.job.execution.cuda_graphs
    if graphs == "none":
        return []
    rule = f"{title} exchanges sequences of any length, which no graph can hold."
    return [refusal("job.cuda_graphs", graphs, rule, "Use none.")]


def zero_refusal(x: Layout[int], title: str, allowed: Sequence[Zero]) -> list[Finding]:
    """Return a refusal when the framework cannot shard data parallelism in this way."""
    if Zero(x.zero) in allowed:
        return []
    names = " or ".join(z.name for z in allowed)
    rule = f"{title} shards data parallelism as {names} only."
    return [refusal("layout.zero", Zero(x.zero).name, rule, f"Use zero={allowed[0].name}.")]


def absent(x: Layout[int], title: str, defaults: Mapping[str, Any]) -> list[Finding]:
    """Return refusals for fields that the framework has no setting for."""
    found: list[Finding] = []
    for name, default in defaults.items():
        value = getattr(x, name)
        if value != default:
            rule = f"{title} has no setting for it."
            remedy = f"Leave {name} out." if default in (0, None) else f"Use {name}={default}."
            found.append(refusal(f"layout.{name}", value, rule, remedy))
    return found


def quoted(word: str) -> str:
    """Return a word as the shell reads it back; of ``Unexpanded`` text the variables stay."""
    if isinstance(word, Unexpanded):
        many = _LIST_OF_WORDS.fullmatch(word)
        if word in ("$@", "${@}"):
            return '"$@"'
        if many is not None and "ARGS" in word:
            return f"${{{many[1]}:-}}"
        return '"' + re.sub(r'(["\\`])', r"\\\1", word) + '"'
    if _SAFE.fullmatch(word):
        return word
    return "'" + word.replace("'", "'\\''") + "'"


def script(target: Target, written: Written, launcher: str, title: str) -> str:
    """Return the script that starts a launch. Raises ``LaunchError`` on an unknown launcher."""
    if launcher not in LAUNCHERS:
        rule, remedy = "Unknown launcher.", did_you_mean(launcher, LAUNCHERS)
        raise LaunchError("launcher", launcher, rule, remedy)
    slurm = launcher == "slurm"
    if target.carried.own:
        kept = {**written.arguments, "KEPT_ARGS": target.carried.own}
        written = replace(written, arguments=kept)
    parts = ["#!/bin/bash", *(_sbatch(target) if slurm else [])]
    parts += [_heading(target, title), *_remarks(target, written), "set -euo pipefail", ""]
    if written.variables:
        parts += ["# Yours to fill in.", *map(_variable, written.variables), ""]
    parts += [*_environment(target, written), ""]
    if not slurm:
        parts += [*_nodes(target, written), ""]
    for name, lines in written.arguments.items():
        parts += [f"{name}=(", *("  " + " ".join(map(quoted, line)) for line in lines), ")", ""]
    start = _by_ray(target, written, slurm) if written.by_ray else _by_torchrun(written, slurm)
    return "\n".join([*parts, *start]) + "\n"


def _heading(target: Target, title: str) -> str:
    x, job = target.layout, target.job
    return (
        f"# {target.model.name} with {title} on {x.world_size} GPUs, "
        f"{job.gbs} sequences of {job.seq_len} tokens a step.\n# {to_text(x)}"
    )


def _variable(variable: Variable) -> str:
    return f'{variable.name}="${{{variable.name}:-{variable.default}}}"  # {variable.comment}'


def _remarks(target: Target, written: Written) -> Iterable[str]:
    remarks = list(written.remarks)
    if target.carried.lost:
        remarks += ["Not carried from the launch that was read:", *target.carried.lost]
    own = {variable.name for variable in written.variables}
    outside = [name for name in target.carried.outside() if name not in own]
    if outside:
        remarks.append(f"Set outside, as for the launch that was read: {', '.join(outside)}.")
    for remark in remarks:
        yield "# " + " ".join(remark.split())


def _environment(target: Target, written: Written) -> Iterable[str]:
    for name in written.unset:
        yield f"unset {name}  # with 1, sharded training loses its overlap"
    carried = {
        name: value
        for name, value in target.carried.env.items()
        if name not in written.unset and name not in _STARTED_WITH
    }
    for name, value in {**carried, **written.env}.items():
        yield f"export {name}={quoted(Unexpanded(value) if '$' in value else value)}"


_STARTED_WITH: Final = frozenset(
    {
        *("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "NODE_RANK", "LOCAL_RANK", "NGPU"),
        *("NNODES", "GPUS_PER_NODE", "CUDA_DEVICE_MAX_CONNECTIONS", "CONFIG_FILE", "CONFIG"),
    }
)
"""Variables of the launch itself: the script sets its own."""


def _sbatch(target: Target) -> list[str]:
    name = re.sub(r"[^a-z0-9]+", "-", target.model.name.lower()).strip("-") or "train"
    return [
        f"#SBATCH --job-name={name}",
        f"#SBATCH --nodes={target.nodes}",
        "#SBATCH --ntasks-per-node=1",
        f"#SBATCH --gpus-per-node={target.gpus_per_node}",
        "#SBATCH --exclusive",
        "#SBATCH --time=04:00:00",
    ]


def _nodes(target: Target, written: Written) -> list[str]:
    if written.by_ray:
        return []
    return [
        "# Run this on every node, with its own NODE_RANK and the first node as MASTER_ADDR.",
        f'NNODES="${{NNODES:-{target.nodes}}}"',
        f'GPUS_PER_NODE="${{GPUS_PER_NODE:-{target.gpus_per_node}}}"',
        'NODE_RANK="${NODE_RANK:-0}"',
        'MASTER_ADDR="${MASTER_ADDR:-localhost}"',
        'MASTER_PORT="${MASTER_PORT:-29500}"',
    ]


def _all_arguments(written: Written) -> list[str]:
    return [f'  "${{{name}[@]}}"' for name in written.arguments]


def _joined(lines: Sequence[str]) -> list[str]:
    return [f"{line} \\" for line in lines[:-1]] + [lines[-1]]


def _by_torchrun(written: Written, slurm: bool) -> list[str]:
    if slurm:
        head = [
            'MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"',
            'srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_PER_NODE"',
            '  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:29500"',
        ]
    else:
        head = [
            'torchrun --nnodes "$NNODES" --nproc-per-node "$GPUS_PER_NODE"',
            '  --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT"',
        ]
    first = [head.pop(0)] if slurm else []
    return [*first, *_joined([*head, f"  {written.program}", *_all_arguments(written)])]


def _by_ray(target: Target, written: Written, slurm: bool) -> list[str]:
    driver = _joined([written.program, *_all_arguments(written)])
    if not slurm:
        if target.nodes == 1:
            return driver
        return [
            f"# Start Ray first: `ray start --head` on this node, and on each of the other"
            f" {target.nodes - 1}",
            "# `ray start --address <this node>:6379`. Then run this once.",
            *driver,
        ]
    return [
        'HEAD="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"',
        'srun --nodes=1 --ntasks=1 -w "$HEAD" ray start --head --port=6379 --block &',
        "sleep 20",
        *(
            [
                f"srun --nodes={target.nodes - 1} --ntasks={target.nodes - 1} --exclude"
                ' "$HEAD" ray start --address "$HEAD:6379" --block &',
                "sleep 20",
            ]
            if target.nodes > 1
            else []
        ),
        'export RAY_ADDRESS="$HEAD:6379"',
        *driver,
    ]
