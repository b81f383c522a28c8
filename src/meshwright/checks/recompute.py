"""Recomputation: modules that exist, methods that fit together, work that frees memory."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from meshwright.checks import Case, Mask, check
from meshwright.describe.model import Model
from meshwright.parallel.layout import Ints, Layout, Recompute

_MODULES = Recompute.full - 1
"""The bits of all modules that can be recomputed one by one."""


def _modules(model: Model) -> int:
    """Return the bits of the modules that the model has: those that an op is run again for."""
    ops = [op for block in model.block_kinds for op in block.ops]
    kept = [saved.dropped for op in ops for saved in op.saved]
    return int(np.bitwise_or.reduce([int(bits) for bits in (*kept, *(op.rerun for op in ops))]))


def _names(bits: int) -> str:
    return "+".join(str(m.name) for m in Recompute if m & bits and m <= _MODULES)


def _module_names(case: Case, at: Layout[int]) -> Mapping[str, object]:
    del case
    return {"modules": _names(at.recompute), "layers": at.recompute_num_layers}


@check("error", field="layout.recompute", values=_module_names)
def full_excludes_modules(case: Case) -> Mask:
    """Full recomputation drops whole layers, {modules} included.

    Use recompute=full, or recompute={modules}.
    """
    full = case.x.recompute & Recompute.full != 0
    return full & (case.x.recompute & _MODULES != 0)


@check("error", field="layout.recompute", id="MLM-TC-rc_sel_num", values=_module_names)
def only_full_counts_layers(case: Case) -> Mask:
    """A method (uniform, block) and a number of layers belong to full recomputation.

    Use recompute=full:uniform:{layers}, or leave the number out.
    """
    counted = (case.x.recompute_num_layers > 0) | (case.x.recompute & Recompute.block != 0)
    return counted & (case.x.recompute & Recompute.full == 0)


@check("error", field="layout.recompute", id="MLM-TC-rc_mla")
def mla_up_proj_needs_mla(case: Case) -> Mask:
    """mla_up_proj is a module of multi-head latent attention, which {model.name} does not have.

    Leave mla_up_proj out.
    """
    if _modules(case.model) & Recompute.mla_up_proj:
        return case.nowhere
    return case.x.recompute & Recompute.mla_up_proj != 0


@check("error", field="layout.recompute", id="MLM-TC-rc_moe_act")
def moe_act_needs_grouped_gemm(case: Case) -> Mask:
    """The activation of experts is recomputed inside grouped matmuls, which are switched off.

    Switch grouped matmuls on, or leave moe_act out.
    """
    if case.job.execution.grouped_gemm:
        return case.nowhere
    return case.x.recompute & Recompute.moe_act != 0


@check("error", field="layout.recompute", id="MLM-TC-rc_shared")
def overlapped_shared_experts_stay(case: Case) -> Mask:
    """Shared experts that overlap with the exchange of tokens cannot be recomputed.

    Leave shared_experts out, or switch their overlap off.
    """
    if not case.job.execution.shared_expert_overlap:
        return case.nowhere
    return case.x.recompute & Recompute.shared_experts != 0


@check("error", field="layout.recompute", id="MLM-TC-rc_fp8_delayed")
def delayed_scaling_keeps_its_inputs(case: Case) -> Mask:
    """FP8 with delayed scaling (precision fp8) supports no recomputation of moe_act and layernorm;
    recompute = {recompute}.

    Use precision fp8-cs, fp8-blockwise or fp8-mx, or other modules.
    """
    if case.job.precision.name != "fp8":
        return case.nowhere
    return case.x.recompute & (Recompute.moe_act | Recompute.layernorm) != 0


def _absent(case: Case) -> int:
    return _MODULES & ~_modules(case.model)


def _absent_names(case: Case, at: Layout[int]) -> Mapping[str, object]:
    absent = at.recompute & _absent(case) & ~Recompute.mla_up_proj
    return {
        "absent": _names(absent),
        "rest": _names(at.recompute & ~absent & _MODULES) or "none",
    }


@check("warning", field="layout.recompute", values=_absent_names)
def recomputed_modules_exist(case: Case) -> Mask:
    """{model.name} keeps nothing that recomputing {absent} would drop: it changes nothing.

    Use recompute={rest}.
    """
    return case.x.recompute & _absent(case) & ~Recompute.mla_up_proj != 0


@check("warning", field="layout.recompute", id="MLM-TC-rc_core_warn", values=_absent_names)
def flash_attention_recomputes_already(case: Case) -> Mask:
    """Flash attention keeps no scores and recomputes them by itself: core_attn costs time and frees
    next to nothing.

    Use other modules, or recompute=none.
    """
    if not case.job.execution.flash_attention:
        return case.nowhere
    return case.x.recompute & Recompute.core_attn != 0


def _layers_per_stage(case: Case) -> Ints:
    return np.maximum(-(-case.model.num_layers // (case.x.pp * case.x.vpp)), 1)


def _stage_layers(case: Case, at: Layout[int]) -> Mapping[str, object]:
    layers = max(-(-case.model.num_layers // (at.pp * at.vpp)), 1)
    return {"layers": layers, "count": at.recompute_num_layers}


@check("warning", field="layout.recompute", id="MLM-TC-rc_full_num", values=_stage_layers)
def recomputed_layers_exist(case: Case) -> Mask:
    """{count} layers are to be recomputed, and a stage has {layers}. Megatron-LM does not say so.

    Use a number from 1 to {layers}.
    """
    full = case.x.recompute & Recompute.full != 0
    return full & (case.x.recompute_num_layers > _layers_per_stage(case))


@check("warning", field="layout.recompute", values=_stage_layers)
def uniform_recompute_frees_memory(case: Case) -> Mask:
    """Uniform recomputation over all {layers} layers of a stage at once keeps one input, then holds
    the activations of all of them again in the backward pass: it frees almost nothing.

    Use recompute=full:uniform:1.
    """
    uniform = case.x.recompute & (Recompute.full | Recompute.block) == Recompute.full
    layers = _layers_per_stage(case)
    return uniform & (case.x.recompute_num_layers == layers) & (layers > 1)
