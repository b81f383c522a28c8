"""Model FLOPs of one optimizer step, as Megatron-LM counts them: the numerator of MFU."""

from __future__ import annotations

from collections import Counter

from meshwright.describe.job import Job
from meshwright.describe.model import Block, Model, Op, OpKind

FORWARD_AND_BACKWARD = 3
"""A matmul runs once forward and twice backward (for its input and for its weights)."""

LEFT_OUT = ("router", "shared_gate")
"""Matmuls that Megatron-LM does not count."""


def model_flops_per_step(model: Model, job: Job, vocab_size: int = 0) -> float:
    """Return the model FLOPs of one step: recomputation and padding of sequences not counted.

    3 * 2 * in * out a token and matmul (``topk`` experts of a routed one), 3 * 2 * heads * (qk + v)
    * s/2 for causal attention, the heads run once more for every multi-token-prediction depth.
    ``vocab_size`` is the padded vocabulary where it is known (Megatron-LM counts the padding).

    Ref: Megatron-LM, ``num_floating_point_operations`` (2025 on; before, attention counted whole).
    Left out, as there: router, norms and activations (but for those of compressed vectors and of
    multi-token prediction), convolutions, adapters. Unlike there, weights that LoRA freezes count
    no gradient.
    """
    blocks = Counter(model.layer_pattern)
    per_token = sum(_block(model.layer_kinds[k], model, job) * n for k, n in blocks.items())
    per_token += sum(_block(block, model, job) for block in model.mtp_layers)
    head = 2.0 * model.hidden_size * (vocab_size or model.vocab_size)
    per_token += head * (1 + len(model.mtp_layers))
    # A frozen weight has no gradient; the adapters' own products are a thousandth of the model's.
    passes = FORWARD_AND_BACKWARD - (job.task == "lora")
    return passes * per_token * job.tokens_per_step


def _block(block: Block, model: Model, job: Job) -> float:
    return sum(_forward_flops_per_token(op, model, job) for op in block.ops)


def _forward_flops_per_token(op: Op, model: Model, job: Job) -> float:
    match op.kind:
        case OpKind.matmul if op.name not in LEFT_OUT:
            return 2.0 * (op.in_features * op.out_features + _normed_features(op))
        case OpKind.grouped_matmul:
            return 2.0 * op.in_features * op.out_features * model.topk
        case OpKind.attention:
            per_attended = 2.0 * op.num_heads * (op.qk_head_dim + op.v_head_dim)
            return per_attended * _attended(op, job.seq_len)
        case OpKind.scan:
            return op.scan_flops_per_token
        case _:
            return 0.0


def _normed_features(op: Op) -> float:
    """Return the features of the norms that Megatron-LM counts beside a matmul."""
    if op.name in ("q_up", "kv_up"):
        return op.in_features
    return 3 * op.out_features if op.name == "mtp_proj" else 0


def _attended(op: Op, seq_len: int) -> float:
    """Return the tokens that a token attends to on average: s/2 where attention is causal."""
    window = op.window if 0 < op.window < seq_len else seq_len
    return window - window**2 / (2 * seq_len) if op.causal else window
