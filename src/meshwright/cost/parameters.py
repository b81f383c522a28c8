"""How many parameters one rank holds of each kind of block."""

from __future__ import annotations

import numpy as np

from meshwright.cost.columns import Floats
from meshwright.describe.job import Job
from meshwright.describe.model import Model, Op, OpKind
from meshwright.parallel.layout import Layouts

VOCAB_MULTIPLE = 128
"""Megatron pads the vocabulary to a multiple of this times TP."""


def block_params_per_rank(model: Model, x: Layouts) -> tuple[Floats, Floats]:
    """Return (dense, expert) parameters [N, K] that one rank holds of each kind of block.

    Held whole, or divided by TP, or by EP*ETP for experts; tables padded to the vocabulary
    multiple. K as ``Model.block_kinds``. Ref: Megatron-LM, ``tensor_parallel.layers`` and
    ``vocab_size_with_padding``. Left out: nothing.
    """
    kinds = model.block_kinds
    dense, expert = np.zeros((len(x.tp), len(kinds))), np.zeros((len(x.tp), len(kinds)))
    for k, block in enumerate(kinds):
        for op in block.ops:
            if op.holder == "expert":
                expert[:, k] += op.params / (x.ep * x.etp)
            else:
                dense[:, k] += op_params_per_rank(op, model.vocab_size, x)
    return dense, expert


def op_params_per_rank(op: Op, vocab_size: int, x: Layouts) -> Floats:
    """Return the parameters [N] of a dense op on one rank."""
    whole = np.full(len(x.tp), float(op.params))
    if op.vocab:
        whole = whole / vocab_size * padded_vocab_size(vocab_size, x)
    return whole / x.tp if op.holder == "tp" else whole


def padded_vocab_size(vocab_size: int, x: Layouts) -> Floats:
    """Return ceil(V / (multiple * tp)) * multiple * tp, [N]."""
    multiple = VOCAB_MULTIPLE * x.tp
    return (-(-vocab_size // multiple) * multiple).astype(np.float64)


def is_adapted(op: Op, job: Job) -> bool:
    """Return whether LoRA adapts an op: a linear layer of attention or MLP that is a target."""
    is_linear = op.kind is OpKind.matmul and op.holder == "tp" and not op.vocab
    is_target = not job.lora_targets or op.name in job.lora_targets
    return job.task == "lora" and is_linear and is_target


def trained_params_per_rank(model: Model, job: Job, x: Layouts) -> tuple[Floats, Floats]:
    """Return (dense, expert) parameters [N, K] that receive gradients on one rank.

    All of them, or under LoRA the two low-rank factors of every adapted matmul: r * (in + out), the
    factor beside the divided side divided by TP. Ref: Hu et al., arXiv:2106.09685. Left out:
    adapters on experts, which are frozen whole.
    """
    if job.task != "lora":
        return block_params_per_rank(model, x)
    kinds = model.block_kinds
    dense, expert = np.zeros((len(x.tp), len(kinds))), np.zeros((len(x.tp), len(kinds)))
    for k in range(len(model.layer_kinds)):
        for op in kinds[k].ops:
            if is_adapted(op, job):
                split = op.out_features if op.split == "out" else op.in_features
                whole = op.in_features + op.out_features - split
                dense[:, k] += job.lora_rank * (split / x.tp + whole)
    return dense, expert
