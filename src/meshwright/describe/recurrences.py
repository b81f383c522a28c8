"""The ops of recurrent mixers: Mamba-2 and the gated delta net, both divided by heads."""

from __future__ import annotations

from meshwright.describe.blocks import column_linear, row_linear
from meshwright.describe.facts import DeltaNet, Mamba
from meshwright.describe.model import Comm, Holder, Op, OpKind, Saved

DELTA_RULE_CHUNK = 64
"""Tokens of a chunk, within which the delta rule keeps one matrix a head."""


def mamba_ops(m: Mamba, h: int) -> list[Op]:
    """Return a Mamba-2 mixer.

    Its fused kernel keeps what ``in_proj`` returned and its own output, and computes convolution
    and chunk states again; the norm keeps a copy of the gate. FLOP of the scan as Megatron-LM
    counts them.
    """
    inner = m.num_heads * m.head_dim
    mixed = inner + 2 * m.num_groups * m.state_size
    projected = inner + mixed + m.num_heads
    return [
        column_linear("in_proj", h, projected, bias=m.bias, saved=(_projection_input(h),)),
        _convolution(mixed, m.conv_kernel, m.conv_bias, projected),
        Op(
            name="scan",
            kind=OpKind.scan,
            params=3 * m.num_heads,
            holder="tp",
            where="tp",
            num_heads=m.num_heads,
            num_kv_heads=m.num_groups,
            scan_flops_per_token=7.0 * inner * m.state_size,
            moved_per_token=3 * inner,
            saved=(Saved(name="scan_output", elements=inner, where="tp"),),
            comm=(Comm(kind="cp_state", elements=projected),),
            trained_in_16_bit=True,
        ),
        _gated_norm("scan_norm", inner, inner, "tp", gate=inner),
        row_linear("out_proj", inner, h),
    ]


def delta_net_ops(d: DeltaNet, h: int) -> list[Op]:
    """Return a gated delta net.

    Its kernels are separate: the convolution keeps a copy of its input, the delta rule Q and K
    spread over the value heads, V and a matrix per chunk, and the norm its output for the gate.
    """
    keys, values = d.num_key_heads * d.key_head_dim, d.num_value_heads * d.value_head_dim
    mixed = 2 * keys + values
    projected = mixed + values + 2 * d.num_value_heads
    spread = 2 * d.num_value_heads * d.key_head_dim + values
    chunk = DELTA_RULE_CHUNK * d.num_value_heads
    return [
        column_linear("in_proj", h, projected, saved=(_projection_input(h),)),
        _convolution(mixed, d.conv_kernel, False, projected + mixed),
        Op(
            name="delta_rule",
            kind=OpKind.scan,
            params=2 * d.num_value_heads,
            holder="tp",
            where="tp",
            num_heads=d.num_value_heads,
            num_kv_heads=d.num_key_heads,
            scan_flops_per_token=8.0 * d.num_value_heads * d.key_head_dim * d.value_head_dim,
            moved_per_token=spread + 2 * values,
            saved=(
                Saved(name="q_k_v", elements=spread, where="tp"),
                Saved(name="chunk_matrix", elements=chunk, where="tp"),
                Saved(name="delta_rule_output", elements=values, where="tp"),
            ),
            comm=(Comm(kind="cp_state", elements=projected),),
            trained_in_16_bit=True,
        ),
        _gated_norm("delta_rule_norm", values, d.value_head_dim, "all", normed=values),
        row_linear("out_proj", values, h),
    ]


def _projection_input(h: int) -> Saved:
    return Saved(name="in_proj_input", elements=h, where="sp", dtype="matmul")


def _convolution(features: int, kernel: int, bias: bool, kept: int) -> Op:
    """Return the causal depthwise convolution, with the projection that it reads."""
    return Op(
        name="conv",
        kind=OpKind.elementwise,
        params=features * (kernel + bias),
        holder="tp",
        where="tp",
        moved_per_token=2 * features,
        backward_moved_per_token=3 * features,
        saved=(Saved(name="in_proj_output", elements=kept, where="tp"),),
    )


def _gated_norm(
    name: str, features: int, params: int, holder: Holder, *, normed: int = 0, gate: int = 0
) -> Op:
    """Return the norm and the gate; ``normed`` elements between and a copy of the gate are kept."""
    sizes = {"normed_output": normed, "gate": gate}
    kept = tuple(Saved(name=k, elements=n, where="tp") for k, n in sizes.items() if n)
    out = Saved(name="out_proj_input", elements=features, where="tp", dtype="matmul")
    return Op(
        name=name,
        kind=OpKind.elementwise,
        params=params,
        holder=holder,
        where="tp",
        moved_per_token=3 * features,
        backward_moved_per_token=5 * features,
        saved=(*kept, out),
    )
