"""Bytes that a rank holds: weights, gradients, optimizer state, activations, buffers.

Static bytes are per parameter and shard; activation bytes are per micro-batch of a block. How many
micro-batches are held at once is the schedule's affair (``parallel.pipeline.held_microbatches``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from meshwright.cost.blocks import Pricing
from meshwright.cost.columns import Floats
from meshwright.cost.factors import Factors, most_specific
from meshwright.describe.cluster import Gpu
from meshwright.describe.job import Job
from meshwright.describe.model import Block, Op, OpKind, Saved
from meshwright.parallel.layout import Layouts, Recompute, Zero


@dataclass(frozen=True)
class BytesPerParam:
    """Bytes that one rank holds for each parameter of its slice, [N]: dense and expert weights."""

    dense: Floats
    expert: Floats


def weights_bytes_per_param(job: Job, x: Layouts) -> BytesPerParam:
    """Weights in compute precision, quantised copies included.

    ZeRO-3 keeps 1/shard of them. Ref: Rajbhandari et al., arXiv:1910.02054, section 3. Left out:
    allocator rounding; the layers gathered at one time are ``gathered_weights``.
    """
    whole = job.precision.param_bytes + job.precision.param_copy_bytes
    return _sharded(whole, x, Zero.optim_grads_params)


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
    keeps; ``working`` the largest gradients alive at once inside the block; ``placeholders`` what
    stays allocated once the block has run backward.
    """

    kept: Floats
    whole: Floats
    logits: Floats
    working: Floats
    placeholders: Floats


def block_bytes(block: Block, p: Pricing, hidden_size: int) -> BlockBytes:
    """Price the activations of a block.

    kept = sum over saved tensors of elements / divisors * bytes, less what recomputation drops;
    under full recomputation the layer's input alone. Ref: Korthikanti et al., arXiv:2205.05198,
    section 4 (TP, SP and selective recomputation). Left out: padding of routed tokens.
    """
    d = len(p.slice.tp)
    whole, logits, working, placeholders, away = (np.zeros(d) for _ in range(5))
    for op in block.ops:
        op_bytes = np.zeros(d)
        for saved in saved_tensors(op, p):
            size = p.slice.elements(saved) * element_bytes(saved, p)
            selective = int(saved.dropped & ~Recompute.full & ~Recompute.block)
            if OFFLOADED_AS.get(saved.name) in p.job.execution.offloaded_modules:
                away += size
                continue
            if p.job.execution.recompute_every_second_matmul and block.hidden_inputs:
                size = size * _KEPT_BY_OP.get(saved.name, 0.0)
            op_bytes += np.where((p.slice.recompute & selective) != 0, 0.0, size)
        whole += op_bytes
        if op.kind is OpKind.cross_entropy:
            logits += op_bytes
        working = np.maximum(working, working_bytes(op, p))
        placeholders += placeholder_bytes(op, p)
    is_full = (p.slice.recompute & int(Recompute.full)) != 0
    boundary = block.hidden_inputs * hidden_size * p.slice.sp_tokens * p.job.precision.act_bytes
    recomputable = any(op.kind is OpKind.cross_entropy for op in block.ops) is False
    kept = np.where(is_full & recomputable, boundary, whole)
    # What waits on the host is back for the layer that runs, and for the next one.
    return BlockBytes(kept, whole, logits, working + 2.0 * away, placeholders)


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

    Unfused attention keeps per head and pair of tokens the softmax (2 bytes), the dropout mask (1)
    and the dropout output (2): 5as of Korthikanti's sbh(34 + 5as/h). Latent attention is trained
    without dropout and keeps the softmax alone. A loss that is not fused keeps the logits in fp32
    as well. Ref: Korthikanti et al., arXiv:2205.05198, section 4.1. Left out: alignment.
    """
    if op.kind is OpKind.attention and not p.job.execution.flash_attention:
        pairs = op.num_heads * float(p.slice.seq_len)
        dropped = Recompute.core_attn | Recompute.full
        scores = (
            Saved(name="softmax", elements=pairs, where="tp", dropped=dropped),
            Saved(name="dropout_mask", elements=pairs, where="tp", dtype="byte", dropped=dropped),
            Saved(name="dropout_output", elements=pairs, where="tp", dropped=dropped),
        )
        kept = scores if op.qk_head_dim == op.v_head_dim else scores[:1]
        return tuple(s for s in op.saved if s.dtype != "fp32") + kept
    if op.kind is OpKind.cross_entropy and p.job.execution.cross_entropy != "vendor":
        vocab = op.saved[0].elements
        return (*op.saved, Saved(name="logits_fp32", elements=vocab, where="tp", dtype="fp32"))
    return op.saved


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
        per_token = (k + n) * p.job.precision.act_bytes
        if op.vocab:
            per_token = (
                k * p.job.precision.act_bytes + n * _LOGIT_GRADS[p.job.execution.cross_entropy]
            )
        return tokens * per_token + _weight_grad_bytes(op, k * n, p)
    if op.kind is OpKind.attention:
        dims = op.num_heads * (op.qk_head_dim + 2 * op.v_head_dim)
        return tokens * (dims + op.num_kv_heads * op.qk_head_dim) / divisor * 2.0
    return np.zeros_like(tokens)


_LOGIT_GRADS = {"vendor": 2.0, "in_place": 0.0, "compiled": 4.0, "plain": 6.0}
"""Bytes per logit beside the kept ones: Transformer Engine returns a 16-bit gradient, Megatron's
steps turn the kept fp32 logits into it (compiled, into a copy), PyTorch's make one in each type."""


def _weight_grad_bytes(op: Op, weights: Floats, p: Pricing) -> Floats:
    if p.job.task == "lora" or op.kind is OpKind.grouped_matmul:
        return np.zeros_like(weights)
    return 2.0 * weights


def placeholder_bytes(op: Op, p: Pricing) -> Floats:
    """Return the empty 16-bit gradients that Transformer Engine caches, one for each shape, [D].

    With fused accumulation a weight's gradient goes straight into the sum; autograd is handed an
    empty tensor of the weight's shape, which is kept. Ref: TransformerEngine 2.x,
    ``module.base.get_dummy_wgrad``. Left out: that equal shapes of different layers share one.
    """
    execution = p.job.execution
    is_linear = op.kind in (OpKind.matmul, OpKind.grouped_matmul) and not op.vocab
    if not (is_linear and execution.fused_wgrad_accumulation and execution.keeps_placeholders):
        return np.zeros_like(p.slice.tp)
    if op.kind is OpKind.grouped_matmul:
        return 2.0 * op.in_features * op.out_features / p.slice.etp
    return 2.0 * op.params / (p.slice.tp if op.holder == "tp" else np.ones_like(p.slice.tp))


def framework_bytes(x: Layouts, factors: Factors) -> Floats:
    """Context, libraries and one communicator's buffers per axis larger than 1, [N].

    context + communicator * number of axes, and the share of everything else that the allocator
    holds beside live tensors. Ref: none; fitted. Left out: growth of NCCL channels with the number
    of peers.
    """
    groups = np.zeros(len(x.tp))
    for degree in (x.tp, x.cp, x.pp, x.dp, x.ep):
        groups += degree > 1
    return factors.framework_bytes + factors.communicator_bytes * groups


def workspace_bytes(gpu: Gpu, factors: Factors) -> float:
    """Return what cuBLAS and Transformer Engine allocate for themselves, by family of cards.

    Ref: NVIDIA, cuBLAS documentation, "cublasSetWorkspace" (32 MiB from Hopper on). Left out: the
    workspaces of attention.
    """
    return most_specific(factors.workspace_bytes, gpu.architecture, "", 3e7)


Statistic = Literal["allocated", "reserved", "nvidia-smi"]


def statistic_bytes(
    terms: Mapping[str, float], statistic: Statistic, fragmentation_fraction: float
) -> float:
    """Return one kind of memory from the terms of a rank.

    ``allocated``: live tensors. ``reserved``: with the blocks that the allocator holds unused.
    ``nvidia-smi``: with context, libraries and communicators, which is all that the card holds.
    """
    held = terms["peak_bytes"]
    if statistic == "nvidia-smi":
        return held
    allocated = held - terms["framework_bytes"]
    return allocated if statistic == "allocated" else allocated * (1.0 + fragmentation_fraction)
