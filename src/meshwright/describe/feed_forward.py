"""The ops of dense feed-forward networks and of mixtures of experts."""

from __future__ import annotations

from meshwright.describe.blocks import FULL, column_linear, elementwise, row_linear, whole_linear
from meshwright.describe.facts import FeedForward, Mlp, Moe
from meshwright.describe.model import Comm, Op, OpKind, Saved
from meshwright.parallel.layout import Recompute


def feed_forward_ops(ffn: FeedForward, hidden_size: int) -> list[Op]:
    """Return the ops between the norm before a feed-forward network and the residual add."""
    match ffn:
        case Mlp():
            again = Recompute.mlp | FULL
            kept = Saved(
                name="fc1_input", elements=hidden_size, where="sp", dtype="matmul", dropped=again
            )
            return _mlp("", ffn, hidden_size, kept=(kept,), again=again)
        case Moe():
            return _moe(ffn, hidden_size)


def _mlp(prefix: str, mlp: Mlp, h: int, *, kept: tuple[Saved, ...], again: Recompute) -> list[Op]:
    """Return fc1, activation, fc2. The norm before it is fused into fc1 and dropped with it."""
    ffn = mlp.ffn_hidden_size
    wide = ffn * (2 if mlp.gated else 1)
    inside = (Saved(name=f"{prefix}fc1_output", elements=wide, where="tp", dropped=again),)
    out = Saved(name=f"{prefix}fc2_input", elements=ffn, where="tp", dtype="matmul", dropped=again)
    return [
        column_linear(f"{prefix}fc1", h, wide, bias=mlp.bias, saved=kept, rerun=again),
        elementwise(
            f"{prefix}activation",
            wide + ffn,
            backward_moved=2 * wide + ffn,
            saved=inside,
            rerun=again,
        ),
        row_linear(f"{prefix}fc2", ffn, h, saved=(out,), rerun=again),
    ]


def _moe(moe: Moe, h: int) -> list[Op]:
    ops = [_router(moe, h)]
    if moe.shared_ffn_hidden_size:
        ops.extend(_shared_experts(moe, h))
    width = moe.latent_size or h
    if moe.latent_size:
        ops.append(_latent("latent_down", h, width))
    ops.extend(_experts(moe, width))
    if moe.latent_size:
        ops.append(_latent("latent_up", width, h))
    return ops


def _router(moe: Moe, h: int) -> Op:
    """Return the router. It, dispatch and shared experts keep one copy of the layer's normed input.

    It keeps scores and probabilities of every expert in fp32 and the map of the chosen ones.
    """
    again = Recompute.moe | FULL
    experts = moe.num_experts
    normed = Saved(name="moe_input", elements=h, where="sp", dropped=Recompute.layernorm | FULL)
    return Op(
        name="router",
        kind=OpKind.matmul,
        params=experts * (h + moe.router_bias + moe.correction_bias),
        in_features=h,
        out_features=experts,
        saved=(
            normed,
            Saved(
                name="router_scores", elements=2 * experts, where="sp", dtype="fp32", dropped=again
            ),
            Saved(name="routing_map", elements=experts, where="sp", dtype="byte", dropped=again),
        ),
        rerun=again,
        trained_in_16_bit=True,
    )


def _shared_experts(moe: Moe, h: int) -> list[Op]:
    again = Recompute.shared_experts | Recompute.moe | FULL
    shared = Mlp(ffn_hidden_size=moe.shared_ffn_hidden_size, gated=moe.gated, bias=moe.shared_bias)
    copied = Saved(name="shared_fc1_input", elements=h, where="sp", dtype="copy", dropped=again)
    ops = _mlp("shared_", shared, h, kept=(copied,), again=again)
    if moe.shared_gate:
        kept = Saved(name="shared_output", elements=h, where="sp", dropped=again)
        ops.append(whole_linear("shared_gate", h, 1, saved=(kept,), rerun=again))
    return ops


def _latent(name: str, in_features: int, out_features: int) -> Op:
    """Return a projection into or out of the latent space that the experts work in.

    The way in reads what the router keeps; the way out keeps its input.
    """
    again = Recompute.moe | FULL
    kept = Saved(
        name=f"{name}_input",
        elements=in_features,
        where="sp",
        dtype="copy" if name == "latent_down" else "matmul",
        dropped=again,
    )
    return whole_linear(name, in_features, out_features, saved=(kept,), rerun=again)


def _experts(moe: Moe, width: int) -> list[Op]:
    """Return dispatch, the grouped products and combine, per routed token.

    Tokens are permuted before the all-to-all and sorted by expert after it, and the same backwards.
    """
    again = Recompute.moe | FULL
    ffn = moe.ffn_hidden_size
    wide = ffn * (2 if moe.gated else 1)
    return [
        _exchange("dispatch", Comm(kind="dispatch", elements=width)),
        _grouped(moe, "experts_fc1", width, wide, dropped=again),
        Op(
            name="experts_activation",
            kind=OpKind.elementwise,
            where="expert",
            moved_per_token=wide + ffn,
            backward_moved_per_token=2 * wide + ffn,
            saved=(Saved(name="experts_fc1_output", elements=wide, where="expert", dropped=again),),
            rerun=again | Recompute.moe_act,
        ),
        _grouped(moe, "experts_fc2", ffn, width, dropped=again | Recompute.moe_act),
        _exchange("combine", Comm(kind="combine", elements=width)),
    ]


def _exchange(name: str, comm: Comm) -> Op:
    """Return dispatch or combine: a permutation on either side of the all-to-all."""
    moved = 4 * comm.elements
    return Op(
        name=name,
        kind=OpKind.elementwise,
        where="routed",
        moved_per_token=moved,
        backward_moved_per_token=moved,
        comm=(comm,),
        rerun=Recompute.moe | FULL,
    )


def _grouped(moe: Moe, name: str, in_features: int, out_features: int, *, dropped: Recompute) -> Op:
    """Return one product per expert, which keeps its input."""
    first = name == "experts_fc1"
    kept = Saved(
        name=f"{name}_input",
        elements=in_features,
        where="routed" if first else "expert",
        dtype="matmul",
        dropped=dropped,
    )
    return Op(
        name=name,
        kind=OpKind.grouped_matmul,
        params=moe.num_experts * (in_features + moe.expert_bias) * out_features,
        holder="expert",
        in_features=in_features,
        out_features=out_features,
        split="out" if first else "in",
        where="expert",
        copies=moe.num_experts,
        saved=(kept,),
        rerun=Recompute.moe | FULL,
    )
