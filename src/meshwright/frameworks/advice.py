"""Notes that follow from model, layout and machine together, with their numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshwright.describe.job import Job
from meshwright.describe.model import Model
from meshwright.findings import Finding
from meshwright.frameworks.launch import Launch
from meshwright.frameworks.launch_findings import said
from meshwright.parallel.layout import Layout, Recompute
from meshwright.units import format_bytes

if TYPE_CHECKING:
    from meshwright.describe.cluster import Cluster

SAVES_LITTLE = 0.05
SAVES_MUCH = 0.2


def advice(
    launch: Launch, model: Model, job: Job, x: Layout[int], cluster: Cluster | None
) -> list[Finding]:
    """Return what is worth knowing of a launch whose model, job and layout are known."""
    found = [*_gathered_by_adapters(model, job, x), *_read_by_every_process(launch, model)]
    return found if cluster is None else [*found, *_dispatcher(model, job, x, cluster)]


def _gathered_by_adapters(model: Model, job: Job, x: Layout[int]) -> list[Finding]:
    """Tell of the inputs of LoRA's A matrices, which sequence parallelism does not divide.

    bytes = layers/pp * inputs * s/cp * b * h * 2; the inputs are those of the column-parallel
    layers, QKV and the first of a dense feed-forward network. Left out: adapters in experts.

    Ref: Megatron-Bridge's guide to memory: Qwen3-8B, tp=2, 8192 tokens: 4.7 GB of 47.5.
    """
    if job.task != "lora" or not x.sp or x.tp == 1 or x.recompute & Recompute.full:
        return []
    layers, inputs = -(-model.num_layers // x.pp), 1 if model.is_moe else 2
    tokens = x.mbs * job.seq_len // x.cp
    kept = layers * inputs * tokens * model.hidden_size * 2
    rule = (
        "LoRA's A matrices of column-parallel layers keep the gathered sequence for backward:"
        f" {layers} layers x {inputs} x {tokens} tokens x {model.hidden_size} x 2 bytes ="
        f" {format_bytes(kept)} for each microbatch in flight, which sequence parallelism does not"
        " divide."
    )
    remedy = "Gather them again in backward where the adapters offer it: less memory, more time."
    return [said("lora_gathers_inputs", "sequence_parallel", True, rule, remedy, "note")]


def _read_by_every_process(launch: Launch, model: Model) -> list[Finding]:
    """Tell what loading takes of the host where every process reads the whole checkpoint.

    bytes = processes of a node * 2 * parameters, in 16 bits.
    """
    processes = launch.gpus_per_node or 0
    if not launch.words.get("use_torch_fsdp2") or processes < 2:
        return []
    once = 2 * model.num_params
    rule = (
        "A loader that reads the whole checkpoint in every process holds it once for each in the"
        f" memory of the host: {processes} x {format_bytes(once)} ="
        f" {format_bytes(processes * once)} on a node."
    )
    remedy = "Load on the meta device, on one rank, or from sharded files; or see that it fits."
    return [said("host_memory_of_loading", "model", model.name, rule, remedy, "note")]


def _dispatcher(model: Model, job: Job, x: Layout[int], cluster: Cluster) -> list[Finding]:
    """Tell what a dispatcher that sends a token once to each destination saves of the payload.

    The destinations D are the ranks of an EP group, or the NVLink domains that it spans; a token
    with k experts reaches D(1 - (1 - 1/D)^k) of them, so 1 - that/k is saved.

    Ref: Megatron-Bridge PR 3561: gpt-oss 120B, EP=64 in one domain, k=4: all-to-all 4% faster.
    """
    if x.ep == 1 or not model.topk:
        return []
    domains = -(-x.ep * x.etp // max(cluster.scale_up_domain, 1))
    places, what = (domains, "NVLink domains") if domains > 1 else (x.ep, "ranks of one domain")
    reached = places * (1 - (1 - 1 / places) ** model.topk)
    saved = 1 - reached / model.topk
    payload = x.mbs * job.seq_len // (x.tp * x.cp) * model.topk // x.ep * model.hidden_size * 2
    numbers = (
        f"a token's {model.topk} experts lie on {reached:.2f} of {places} {what}, so sending it"
        f" once to each saves {saved:.0%} of the {format_bytes(payload)} for every peer"
    )
    dispatcher = job.execution.dispatcher
    if dispatcher in ("deepep", "hybridep") and saved < SAVES_LITTLE:
        rule = f"There is little for {dispatcher} to save: {numbers}."
        remedy = "Measure alltoall beside it: with so little to save it has been the faster one."
        return [said("dispatcher_saves_little", "dispatcher", dispatcher, rule, remedy, "note")]
    if dispatcher == "alltoall" and domains > 1 and saved > SAVES_MUCH:
        rule = f"There is much to save on the network: {numbers}."
        remedy = "Measure deepep or hybridep beside it."
        return [said("dispatcher_could_save", "dispatcher", dispatcher, rule, remedy, "note")]
    return []
