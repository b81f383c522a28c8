"""Bytes that a rank holds: weights, gradients, optimizer state, activations, buffers.

Static bytes are per parameter and shard; activation bytes are per micro-batch of a block. How many
micro-batches are held at once is the schedule's affair (``parallel.pipeline.held_microbatches``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from meshwright.cost.columns import Floats
from meshwright.cost.factors import Factors
from meshwright.cost.parameters import is_adapted
from meshwright.cost.pricing import Pricing
from meshwright.describe.cluster import Gpu
from meshwright.describe.job import CrossEntropy, Job
from meshwright.describe.model import Block, Model, Op, OpKind, Saved
from meshwright.parallel.layout import Layouts, Recompute, Zero


@dataclass(frozen=True)
class BytesPerParam:
    """Bytes that one rank holds for each parameter of its slice, [N]: dense and expert weights.

    ``table``: of the embedding and the head, where they differ from other dense weights.
    """

    dense: Floats
    expert: Floats
    table: Floats | None = None


def weights_bytes_per_param(job: Job, x: Layouts) -> BytesPerParam:
    """Weights in compute precision, quantised copies included.

    ZeRO-3 keeps 1/shard of them, or none beside their master copy. Embedding and head are held in
    16 bit under every quantised recipe. Ref: Rajbhandari et al., arXiv:1910.02054, section 3;
    Megatron-LM, ``fp8_utils`` (fp8 parameters are those of Transformer Engine's linear layers).
    Left out: allocator rounding; the layers gathered at one time are ``gathered_weights``.
    """
    whole = job.precision.param_bytes + job.precision.param_copy_bytes
    held = _sharded(whole, x, Zero.optim_grads_params)
    if job.execution.gathers_from_master:
        whole_only = (x.zero < Zero.optim_grads_params).astype(np.float64)
        return BytesPerParam(held.dense * whole_only, held.expert * whole_only)
    table = max(job.precision.param_bytes, job.precision.act_bytes)
    if table == whole:
        return held
    return replace(held, table=_sharded(table, x, Zero.optim_grads_params).dense)


def grads_bytes_per_param(job: Job, x: Layouts) -> BytesPerParam:
    """Gradients in the precision they are accumulated in.

    ZeRO-2 keeps 1/shard of them. Ref: arXiv:1910.02054, section 3; Megatron-LM's distributed
    optimizer documentation (fp32 gradients beside bf16 weights). Left out: padding of buckets.
    """
    return _sharded(job.precision.grad_bytes, x, Zero.optim_grads)


def optimizer_bytes_per_param(job: Job, x: Layouts) -> BytesPerParam:
    """Master weights and both Adam moments.

    ZeRO-1 keeps 1/shard of them; what is offloaded to the host is not held. Ref: arXiv:1910.02054,
    section 3. Left out: padding of buckets.
    """
    held = (job.precision.master_bytes + job.precision.moment_bytes) * (
        1.0 - job.execution.optimizer_offload_fraction
    )
    return _sharded(held, x, Zero.optim)


def update_bytes_per_param(job: Job, x: Layouts) -> BytesPerParam:
    """What the update copies: gradients in fp32 where they are summed in less.

    Sharded as the optimizer. Ref: Megatron-LM, ``optimizer.optimizer``
    (``_copy_model_grads_to_main_grads``). Left out: what moments in 8 bit are turned into.
    """
    precision = job.precision
    copies = precision.grad_bytes < 4.0 and precision.master_bytes > 0.0
    on_card = 1.0 - job.execution.optimizer_offload_fraction
    return _sharded(4.0 * float(copies) * on_card, x, Zero.optim)


def _sharded(whole_bytes: float, x: Layouts, from_stage: Zero) -> BytesPerParam:
    dense, expert = shards(x)
    sharded = x.zero >= from_stage
    return BytesPerParam(
        dense=np.where(sharded, whole_bytes / dense, whole_bytes),
        expert=np.where(sharded, whole_bytes / expert, whole_bytes),
    )


def shards(x: Layouts) -> tuple[Floats, Floats]:
    """Return over how many ranks dense and expert state is sharded, [N] each.

    Dense: dp*cp / dp_replicate. Experts: edp / dp_replicate, at least 1.
    """
    dense = (x.dp * x.cp // x.dp_replicate).astype(np.float64)
    expert = np.maximum(x.edp // x.dp_replicate, 1).astype(np.float64)
    return dense, expert


@dataclass(frozen=True)
class BlockBytes:
    """Bytes of one micro-batch of one block on one rank, [D] each.

    ``kept`` from forward to backward; ``whole`` what is kept without full recomputation (alive
    while a fully recomputed layer runs backward); ``logits`` the part of ``kept`` that the loss
    keeps; ``forward`` and ``working`` what is alive beside it at the peak inside the block,
    forward and backward; ``back`` what waits on the host and is back while its layer, and the next
    one, run.
    """

    kept: Floats
    whole: Floats
    logits: Floats
    forward: Floats
    working: Floats
    back: Floats


def block_bytes(block: Block, p: Pricing, hidden_size: int) -> BlockBytes:
    """Price the activations of a block.

    kept = sum over saved tensors of elements / divisors * bytes, less what recomputation drops;
    under full recomputation the layer's input alone. Ref: Korthikanti et al., arXiv:2205.05198,
    section 4 (TP, SP and selective recomputation). Left out: padding of routed tokens.
    """
    d = len(p.slice.tp)
    whole, logits, forward, working, away = (np.zeros(d) for _ in range(5))
    for op in block.ops:
        op_bytes = np.zeros(d)
        for saved in saved_tensors(op, p):
            size = p.slice.elements(saved) * element_bytes(saved, p)
            if saved.where in ("expert", "routed"):
                size = size * fullest_routing(p)
            selective = int(saved.dropped & ~Recompute.full & ~Recompute.block)
            if OFFLOADED_AS.get(saved.name) in p.job.execution.offloaded_modules:
                away += np.where((p.slice.recompute & selective) != 0, 0.0, size)
                continue
            if p.job.execution.recompute_every_second_matmul and block.hidden_inputs:
                size = size * _KEPT_BY_OP.get(saved.name, 0.0)
            op_bytes += np.where((p.slice.recompute & selective) != 0, 0.0, size)
        op_bytes += adapter_bytes(op, p)
        whole += op_bytes
        if op.kind is OpKind.cross_entropy:
            logits += op_bytes
            forward += loss_forward_bytes(op, p)
        working = np.maximum(working, working_bytes(op, p))
    is_full = (p.slice.recompute & int(Recompute.full)) != 0
    boundary = block.hidden_inputs * hidden_size * p.slice.sp_tokens * p.job.precision.act_bytes
    recomputable = any(op.kind is OpKind.cross_entropy for op in block.ops) is False
    kept = np.where(is_full & recomputable, boundary, whole)
    return BlockBytes(kept, whole, logits, forward, working + 2.0 * away, 2.0 * away)


def without_offloaded_layers(
    sizes: Sequence[BlockBytes], model: Model, job: Job
) -> list[BlockBytes]:
    """Return the blocks of a model less what waits on the host of layers offloaded whole.

    Of ``activation_offload_layers`` among all layers, kept * (1 - share) stays; two layers are back
    while they run backward, the one at work and the next. Ref: TransformerEngine, ``cpu_offload``
    (``num_offload_group``, double buffered). Left out: which layers of several kinds they are.
    """
    share = min(job.execution.activation_offload_layers / max(model.num_layers, 1), 1.0)
    out = list(sizes)
    for k, size in enumerate(sizes[: len(model.layer_kinds)]):
        back = 2.0 * size.kept * float(share > 0.0)
        out[k] = replace(
            size,
            kept=size.kept * (1.0 - share),
            whole=size.whole * (1.0 - share),
            working=size.working + back,
            back=size.back + back,
        )
    return out


def adapter_bytes(op: Op, p: Pricing) -> Floats:
    """Return what the LoRA adapter of an op keeps of a micro-batch beside the op itself, [D].

    tokens * in * bytes where sequence parallelism gathers the input of a column-parallel layer: the
    frozen layer needs it no more when it has run, the low-rank factor beside it does, whole. Ref:
    Megatron-Bridge, ``peft.utils`` (``ParallelLinearAdapter``). Left out: the low-rank outputs.
    """
    if not is_adapted(op, p.job) or op.split != "out":
        return np.zeros_like(p.slice.tp)
    is_gathered = (p.slice.sp > 0) & (p.slice.tp > 1)
    return is_gathered * p.slice.tokens * op.in_features * p.job.precision.act_bytes


PEAK_IMBALANCE = 0.5
"""How many more tokens than the mean the fullest expert-parallel rank gets in the fullest
micro-batch of a run whose router is free. Solved for in 40 measured peaks: 0.1 to 1.0, median 0.5,
whatever the number of experts (docs/accuracy.md)."""


def fullest_routing(p: Pricing) -> Floats:
    """Return the routed tokens of the fullest rank over their mean, [D].

    1 + ``PEAK_IMBALANCE`` where routing is not forced to balance, at most ep: no rank gets more
    than all. Ref: none, measured. Left out: how it falls as the router learns to balance.
    """
    if p.job.execution.forced_balance:
        return np.ones_like(p.slice.ep)
    return np.minimum(1.0 + PEAK_IMBALANCE, p.slice.ep)


_KEPT_BY_OP = {
    **{"q_k_v": 5 / 6, "attention_output": 1.0, "softmax_lse": 1.0, "fc1_output": 0.5},
    "attention_norm_input": 2.0,
}
"""What torchtitan's checkpointing by op keeps: outputs of attention and of every second product
(query, value, one of the two of a gated MLP, and its last), and the layer's input."""


OFFLOADED_AS = {
    **dict.fromkeys(("qkv_input", "kv_down_input", "q_up_input", "kv_up_input"), "qkv_linear"),
    **dict.fromkeys(("q_k_v", "softmax", "dropout_mask", "dropout_output"), "core_attn"),
    **dict.fromkeys(("experts_fc1_output", "experts_fc2_input"), "moe_act"),
    "attention_norm_input": "attn_norm",
    "mlp_norm_input": "mlp_norm",
    "attention_output": "attn_proj",
    "experts_fc1_input": "expert_fc1",
}
"""The module of Megatron's fine-grained offloading that a kept tensor belongs to."""


def saved_tensors(op: Op, p: Pricing) -> tuple[Saved, ...]:
    """Return what an op keeps; unfused attention and losses keep more than fused ones.

    Unfused attention keeps per head and pair of tokens the softmax (2 bytes; where it runs in fp32
    and is not fused with the cast, 4 more), the dropout mask (1) and the dropout output (2): 5as of
    Korthikanti's sbh(34 + 5as/h). The loss keeps its logits in 16 bit (Transformer Engine) or the
    probabilities in fp32 in their place. Ref: Korthikanti et al., arXiv:2205.05198, section 4.1;
    Megatron-LM, ``fusions.fused_softmax``. Left out: alignment.
    """
    if op.kind is OpKind.attention and not p.job.execution.flash_attention:
        pairs = op.num_heads * float(p.slice.seq_len)
        dropped = Recompute.core_attn | Recompute.full
        kept = [Saved(name="softmax", elements=pairs, where="tp", dropped=dropped)]
        if p.job.execution.softmax_in_fp32 and not p.job.execution.fused_softmax:
            kept = [replace(kept[0], name="softmax_fp32", dtype="fp32")]
        if p.job.execution.attention_dropout:
            mask = replace(kept[0], name="dropout_mask", dtype="byte")
            kept += [mask, replace(kept[0], name="dropout_output", dtype="act")]
        return tuple(s for s in op.saved if s.dtype != "fp32") + tuple(kept)
    if op.kind is OpKind.cross_entropy and p.job.execution.cross_entropy != "vendor":
        return (replace(op.saved[0], name="logits_fp32", dtype="fp32"),)
    if op.name == _EXPERTS_ACTIVATION and not p.job.execution.fused_expert_activation:
        dropped = op.saved[0].dropped | Recompute.moe_act
        return (*op.saved, replace(op.saved[0], name="experts_activation_steps", dropped=dropped))
    return op.saved


_EXPERTS_ACTIVATION = "experts_activation"


def element_bytes(saved: Saved, p: Pricing) -> float:
    """Return the bytes of one element of a kept tensor."""
    precision = p.job.precision
    quantised = precision.matmul_input_bytes < precision.act_bytes
    return {
        "act": precision.act_bytes,
        "matmul": precision.matmul_input_bytes,
        "copy": precision.matmul_input_bytes if quantised else 0.0,
        "fp32": 4.0,
        "byte": 1.0,
    }[saved.dtype]


def working_bytes(op: Op, p: Pricing) -> Floats:
    """What an op needs beside the kept tensors while it runs backward, [D].

    Gradients of its input and output (the gathered input of a tensor-parallel region whole), and
    the gradient of its weight in 16 bit, which is there until it is added to the sum of the step.
    Ref: Megatron-LM, ``tensor_parallel.layers`` (weight gradients) and
    ``tensor_parallel.cross_entropy``. Left out: workspaces of libraries.
    """
    tokens = p.slice.op_tokens(op.where)
    divisor = p.slice.etp if op.where in ("expert", "routed") else p.slice.tp
    if op.kind in (OpKind.matmul, OpKind.grouped_matmul):
        k = op.in_features / (divisor if op.split == "in" else np.ones_like(divisor))
        n = op.out_features / (divisor if op.split == "out" else np.ones_like(divisor))
        if op.vocab:
            loss = LOSSES[p.job.execution.cross_entropy]
            after = tokens * (k * p.job.precision.act_bytes + n * loss.after)
            return np.maximum(tokens * n * loss.backward, after + _weight_grad_bytes(op, k * n, p))
        per_token = (k + n) * p.job.precision.act_bytes
        return tokens * per_token + _weight_grad_bytes(op, k * n, p)
    if op.kind is OpKind.attention:
        dims = op.num_heads * (op.qk_head_dim + 2 * op.v_head_dim)
        return tokens * (dims + op.num_kv_heads * op.qk_head_dim) / divisor * 2.0
    if op.name == _EXPERTS_ACTIVATION and not p.job.execution.fused_expert_activation:
        return tokens * (op.moved_per_token - op.saved[0].elements) / divisor * _UNFUSED_ACTIVATION
    if any(c.kind == "dispatch" for c in op.comm):
        return exchanged_bytes(op, p)
    return np.zeros_like(tokens)


def exchanged_bytes(op: Op, p: Pricing) -> Floats:
    """Return what routed tokens take while the experts run forward, [D].

    copies * routed tokens * width. All-to-all: sorted by rank, received, sorted by expert. Gathered
    or sent by DeepEP: received (there once for all experts of a rank, g(1 - (1 - 1/g)^topk) / topk
    of the copies), sorted by expert. HybridEP sorts as it receives. All: what the experts return.
    Quantised products pad their input, but for HybridEP's, which comes padded: one more. Ref:
    Megatron-LM, ``transformer.moe.moe_layer`` (each step's input stays referenced by its caller).
    Left out: buffers of the libraries.
    """
    g, chosen = p.slice.ep, p.slice.routed_tokens / (p.slice.sp_tokens * p.slice.etp)
    once = np.minimum(g * (1.0 - (1.0 - 1.0 / g) ** chosen) / chosen, 1.0)
    dispatcher = p.job.execution.dispatcher
    received = {"alltoall": 2.0, "allgather": 1.0, "deepep": once, "hybridep": 0.0}[dispatcher]
    is_padded = p.job.precision.matmul_input_bytes < p.job.precision.act_bytes
    padded = float(is_padded and dispatcher != "hybridep")
    width = sum(c.elements for c in op.comm) * p.job.precision.act_bytes
    return p.slice.routed_tokens * width * (2.0 + received + padded)


_UNFUSED_ACTIVATION = 12.0
"""Bytes an element of an expert's hidden state when probabilities in fp32 are multiplied in by a
kernel of its own: gradients of the product in 16 bit and in fp32 (2 + 4), of the activation and of
the probabilities before they are summed (4 + 4), less the input of fc2, which is through (2)."""


@dataclass(frozen=True)
class Loss:
    """Bytes a logit that a loss holds beside what it keeps.

    ``forward`` while it runs, ``backward`` while its gradient is made, ``after`` while the head
    runs backward with that gradient and what was kept is gone.
    """

    forward: float
    backward: float
    after: float


LOSSES: dict[CrossEntropy, Loss] = {
    "vendor": Loss(forward=0.0, backward=2.0, after=0.0),
    "in_place": Loss(forward=2.0, backward=2.0, after=-2.0),
    "compiled": Loss(forward=6.0, backward=6.0, after=-2.0),
    "plain": Loss(forward=6.0, backward=8.0, after=-2.0),
}
"""Transformer Engine keeps 16-bit logits (2) and returns a gradient. The others keep probabilities
in fp32 (4). Megatron's steps make them of an fp32 copy in place, beside the 16-bit logits, and turn
them into the gradient; compiled, they make a second fp32 copy. PyTorch's log-softmax makes a second
one too, and its backward two more gradients in fp32."""


def loss_forward_bytes(op: Op, p: Pricing) -> Floats:
    """Return what the last step of forward holds beside what is kept, [D].

    tokens * logits * ``Loss.forward``, the gradients of the logits that wait for their product
    (``--defer-embedding-wgrad-compute``), and the mask of the data loader: mbs * s * s/cp bytes.
    Ref: Megatron-LM, ``tensor_parallel.cross_entropy``, ``fusions.fused_cross_entropy``,
    ``tensor_parallel.layers``; PyTorch, ``log_softmax``. Left out: the mask on the first stage.
    """
    execution = p.job.execution
    tokens, logits = p.slice.op_tokens(op.where), op.out_features / p.slice.tp
    held = LOSSES[execution.cross_entropy].forward
    waiting = execution.deferred_head_microbatches * p.job.precision.act_bytes
    mask = p.slice.tokens * p.slice.seq_len * float(execution.attention_mask)
    return tokens * logits * (held + waiting) + mask


def _weight_grad_bytes(op: Op, weights: Floats, p: Pricing) -> Floats:
    if p.job.task == "lora" or op.kind is OpKind.grouped_matmul:
        return np.zeros_like(weights)
    return 2.0 * weights


@dataclass(frozen=True)
class Placeholders:
    """Tensors [D, U] that stay allocated, one of each shape, and which blocks use it, [U, K]."""

    bytes: Floats
    of_block: Floats


def placeholder_bytes(blocks: Sequence[Block], p: Pricing) -> Placeholders:
    """Return what stays allocated once a block of a kind has run: one tensor for each shape.

    With fused accumulation a weight's gradient goes straight into the sum; Transformer Engine hands
    autograd an empty tensor of the weight's shape, 2 * in * out / divisor bytes, which it keeps for
    all weights of that shape. Megatron's own attention multiplies into one buffer of scores,
    2 * mbs * heads/tp * s * s/cp bytes, and its head gathers its input into one, 2 * mbs * s/cp * h
    bytes with sequence parallelism. Ref: TransformerEngine 2.x,
    ``module.base.get_dummy_wgrad``; Megatron-LM, ``GlobalMemoryBuffer``. Left out: that the two
    uses of the buffer share it.
    """
    execution = p.job.execution
    cached = execution.fused_wgrad_accumulation and execution.keeps_placeholders
    gathers = execution.megatron_head
    whole_scores = not (execution.flash_attention or execution.transformer_engine)
    sizes: dict[tuple[object, ...], Floats] = {}
    held_by: dict[tuple[object, ...], list[float]] = {}
    for k, block in enumerate(blocks):
        for op in block.ops:
            shape: tuple[object, ...] = (op.in_features, op.out_features, op.split, op.holder)
            if op.kind in (OpKind.matmul, OpKind.grouped_matmul) and not op.vocab and cached:
                sizes[shape] = 2.0 * op.in_features * op.out_features / _divisor(op, p)
            elif op.kind is OpKind.attention and whole_scores:
                shape = ("scores", op.num_heads)
                pairs = p.slice.tokens * p.slice.seq_len * op.num_heads / p.slice.tp
                sizes[shape] = pairs * p.job.precision.act_bytes
            elif op.vocab and op.kind is OpKind.matmul and gathers:
                shape = ("head input",)
                is_gathered = (p.slice.sp > 0) & (p.slice.tp > 1)
                sizes[shape] = is_gathered * p.slice.tokens * op.in_features * 2.0
            else:
                continue
            held_by.setdefault(shape, [0.0] * len(blocks))[k] = 1.0
    columns = [sizes[shape] for shape in held_by]
    return Placeholders(
        np.stack(columns, axis=1) if columns else np.zeros((len(p.slice.tp), 0)),
        np.array(list(held_by.values())).reshape(len(columns), len(blocks)),
    )


def _divisor(op: Op, p: Pricing) -> Floats:
    if op.holder == "all":
        return np.ones_like(p.slice.tp)
    return p.slice.etp if op.holder == "expert" else p.slice.tp


def framework_bytes(x: Layouts, factors: Factors) -> Floats:
    """Context, libraries and one communicator's buffers per axis larger than 1, [N].

    context + communicator * number of axes; beside it stands what the allocator holds unused
    (``spare_fraction``). Ref: none; fitted. Left out: growth of NCCL channels with the number
    of peers.
    """
    groups = np.zeros(len(x.tp))
    for degree in (x.tp, x.cp, x.pp, x.dp, x.ep):
        groups += degree > 1
    return factors.framework_bytes + factors.communicator_bytes * groups


def workspace_bytes(gpu: Gpu, job: Job, x: Layouts, *, has_experts: bool) -> Floats:
    """Return what cuBLAS and Transformer Engine allocate for themselves, [N].

    PyTorch gives cuBLAS a workspace in each thread that uses it: the one that runs forward and the
    one that runs backward. Transformer Engine has one of its own, four more for the streams of
    grouped products and two more where it overlaps tensor-parallel communication. From Hopper on
    each is 32 MiB; before, PyTorch's is 8.1 MiB (32 MiB where deterministic results are asked for)
    and Transformer Engine's 4 MiB. The buckets of a framework that copies into them count here too.
    Ref: PyTorch, ``CUDABlas.cpp``; TransformerEngine, ``module.base.get_workspace``,
    ``initialize_ub``. Left out: the workspaces of attention.
    """
    execution = job.execution
    small = gpu.architecture.lower().split()[0] in _SMALL_WORKSPACES
    pytorch = 8.125 * MIB if small and not execution.deterministic else 32.0 * MIB
    held = np.full(len(x.tp), 2.0 * pytorch + execution.bucket_bytes)
    if execution.transformer_engine:
        grouped = 4.0 * float(has_experts and execution.grouped_gemm)
        overlapped = 2.0 * ((x.tp > 1) & execution.overlap_tp_comm)
        held += (4.0 if small else 32.0) * MIB * (1.0 + grouped + overlapped)
    return held


MIB = 2.0**20
_SMALL_WORKSPACES = ("volta", "turing", "ampere", "ada")


Statistic = Literal["allocated", "reserved", "nvidia-smi"]


def statistic_bytes(
    terms: Mapping[str, float], statistic: Statistic, spare_fraction: float
) -> float:
    """Return one kind of memory from the terms of a rank.

    ``allocated``: live tensors. ``reserved``: with the blocks that the allocator holds unused.
    ``nvidia-smi``: with context, libraries and communicators, which is all that the card holds.
    """
    held = terms["peak_bytes"]
    if statistic == "nvidia-smi":
        return held
    allocated = held - terms["framework_bytes"]
    if statistic == "allocated":
        return allocated
    return allocated + spare_fraction * (terms["logits_bytes"] + terms["buffers_bytes"])


def spare_fraction(job: Job, factors: Factors) -> float:
    """Return the unused bytes the allocator holds for each byte that comes and goes.

    spare = fraction * (logits + buffers): tensors that live shorter than a micro-batch leave blocks
    of their own sizes behind, which tensors of other sizes do not fill. What is kept from step to
    step fills its blocks, and what is kept from forward to backward nearly so. Segments that can
    grow (``expandable_segments``) give most of it back. Ref: PyTorch, ``CUDACachingAllocator.cpp``
    (blocks are split but never moved; segments are 20 MiB or the request in steps of 2 MiB); both
    fractions are fitted. Left out: how the order of requests matters.
    """
    if job.execution.expandable_segments:
        return factors.expandable_fraction
    return factors.fragmentation_fraction
