"""The ops that every layer is made of, and the embedding, the head and the residual stream.

What is kept for backward is what Megatron-Core with Transformer Engine keeps. A tensor that two
ops keep is listed once, at the op that makes it the input of both. For a GPT layer in 16 bit the
sum is the ``s*b*h*(34 + 5*a*s/h)`` bytes of Korthikanti et al., arXiv:2205.05198, when the
attention matrix is materialised (the cost model adds it) and the log-sum-exp is left out.
"""

from __future__ import annotations

from meshwright.describe.facts import Decoder
from meshwright.describe.model import Block, Comm, Op, OpKind, Saved
from meshwright.parallel.layout import Recompute

FULL = Recompute.full


def norm(name: str, features: int, params: int, *, keep: str = "", rerun: Recompute = FULL) -> Op:
    """Return a norm of the residual stream; ``keep`` names its kept input, if it keeps one."""
    saved = (Saved(name=keep, elements=features, where="sp"),) if keep else ()
    return Op(
        name=name,
        kind=OpKind.elementwise,
        params=params,
        moved_per_token=2 * features,
        backward_moved_per_token=3 * features,
        saved=saved,
        rerun=rerun,
    )


def column_linear(
    name: str,
    in_features: int,
    out_features: int,
    *,
    bias: bool = False,
    enter: bool = True,
    saved: tuple[Saved, ...] = (),
    rerun: Recompute = FULL,
) -> Op:
    """Return a linear layer whose output features TP divides; ``enter`` gathers its tokens."""
    return Op(
        name=name,
        kind=OpKind.matmul,
        params=(in_features + bias) * out_features,
        holder="tp",
        in_features=in_features,
        out_features=out_features,
        split="out",
        where="tp",
        saved=saved,
        comm=(Comm(kind="enter_tp", elements=in_features),) if enter else (),
        rerun=rerun,
    )


def row_linear(
    name: str,
    in_features: int,
    out_features: int,
    *,
    saved: tuple[Saved, ...] = (),
    rerun: Recompute = FULL,
) -> Op:
    """Return a linear layer whose input features TP divides; its bias, added once, is elsewhere."""
    return Op(
        name=name,
        kind=OpKind.matmul,
        params=in_features * out_features,
        holder="tp",
        in_features=in_features,
        out_features=out_features,
        split="in",
        where="tp",
        saved=saved,
        comm=(Comm(kind="exit_tp", elements=out_features),),
        rerun=rerun,
    )


def whole_linear(
    name: str,
    in_features: int,
    out_features: int,
    *,
    bias: bool = False,
    saved: tuple[Saved, ...] = (),
    in_16_bit: bool = False,
    rerun: Recompute = FULL,
) -> Op:
    """Return a linear layer that every rank holds whole and runs on its own tokens."""
    return Op(
        name=name,
        kind=OpKind.matmul,
        params=(in_features + bias) * out_features,
        in_features=in_features,
        out_features=out_features,
        saved=saved,
        trained_in_16_bit=in_16_bit,
        rerun=rerun,
    )


def elementwise(
    name: str,
    moved: float,
    *,
    backward_moved: float | None = None,
    saved: tuple[Saved, ...] = (),
    rerun: Recompute = FULL,
) -> Op:
    """Return memory-bound work inside a tensor-parallel region, without weights."""
    return Op(
        name=name,
        kind=OpKind.elementwise,
        where="tp",
        moved_per_token=moved,
        backward_moved_per_token=backward_moved,
        saved=saved,
        rerun=rerun,
    )


def residual(facts: Decoder, name: str, *, bias: bool = False) -> Op:
    """Return the add of bias, dropout and residual after a row-parallel linear layer.

    The bias of such a layer is added here, where every rank holds it whole.
    """
    h = facts.hidden_size
    mask = Saved(name=f"{name}_dropout_mask", elements=h, where="sp", dtype="byte")
    return Op(
        name=f"{name}_residual",
        kind=OpKind.elementwise,
        params=h * bias,
        moved_per_token=3 * h,
        backward_moved_per_token=2 * h,
        saved=(mask,) if facts.hidden_dropout > 0 else (),
    )


def hyper_connection(facts: Decoder, name: str) -> list[Op]:
    """Return the mixing of n residual streams before and after a branch, if there are several.

    A projection of all streams gives n*(n+2) weights: to read one, to write n, to mix n x n.
    """
    n, h = facts.residual_streams, facts.hidden_size
    if n == 1:
        return []
    weights = n * (n + 2)
    return [
        Op(
            name=f"{name}_streams",
            kind=OpKind.elementwise,
            params=weights * n * h + weights + 3,
            moved_per_token=(3 * n + 2) * h,
            backward_moved_per_token=(5 * n + 3) * h,
            saved=(Saved(name=f"{name}_streams", elements=n * h, where="sp"),),
        )
    ]


def _joined_streams(facts: Decoder) -> list[Op]:
    """Return the weighted sum of the residual streams before the head, if there are several."""
    n, h = facts.residual_streams, facts.hidden_size
    if n == 1:
        return []
    return [
        Op(
            name="head_streams",
            kind=OpKind.elementwise,
            params=n * n * h + n + 1,
            moved_per_token=(n + 1) * h,
            saved=(Saved(name="head_streams", elements=n * h, where="sp"),),
        )
    ]


def embedding_block(facts: Decoder) -> Block:
    """Return the embedding: tokens, learned positions, its norm and dropout."""
    h = facts.hidden_size
    if not facts.vocab_size:
        return Block(name="embedding", ops=(), hidden_inputs=0)
    words = Op(
        name="word_embedding",
        kind=OpKind.embedding,
        params=facts.vocab_size * h,
        holder="tp",
        out_features=h,
        where="tp",
        moved_per_token=2 * h,
        comm=(Comm(kind="exit_tp", elements=h),),
        vocab=True,
        trained_in_16_bit=True,
    )
    ops = [words]
    if facts.learned_positions:
        ops.append(
            Op(
                name="position_embedding",
                kind=OpKind.embedding,
                params=facts.learned_positions * h,
                out_features=h,
                moved_per_token=3 * h,
                trained_in_16_bit=True,
            )
        )
    if facts.embedding_norm:
        ops.append(norm("embedding_norm", h, facts.norm_weights * h, keep="embedding_norm_input"))
    if facts.hidden_dropout > 0:
        mask = Saved(name="embedding_dropout_mask", elements=h, where="sp", dtype="byte")
        ops.append(
            Op(
                name="embedding_dropout",
                kind=OpKind.elementwise,
                moved_per_token=2 * h,
                backward_moved_per_token=2 * h,
                saved=(mask,),
            )
        )
    return Block(name="embedding", ops=tuple(ops), hidden_inputs=0)


def head_block(facts: Decoder) -> Block:
    """Return the final norm, the output layer (no weights of its own when tied) and the loss."""
    h, vocab = facts.hidden_size, facts.vocab_size
    if not vocab:
        return Block(name="head", ops=(), hidden_inputs=0)
    kept = Saved(name="head_input", elements=h, where="sp")
    output = Op(
        name="output_layer",
        kind=OpKind.matmul,
        params=(0 if facts.tie_word_embeddings else vocab * h) + vocab * facts.head_bias,
        holder="tp",
        in_features=h,
        out_features=vocab,
        split="out",
        where="tp",
        saved=(kept,),
        comm=(Comm(kind="enter_tp", elements=h),),
        vocab=True,
        trained_in_16_bit=True,
    )
    loss = Op(
        name="cross_entropy",
        kind=OpKind.cross_entropy,
        out_features=vocab,
        where="tp",
        saved=(Saved(name="logits", elements=vocab, where="tp"),),
        comm=(Comm(kind="exit_vocab", elements=3),),
        trained_in_16_bit=True,
    )
    final = norm("final_norm", h, facts.norm_weights * h, keep="final_norm_input")
    return Block(
        name="head",
        ops=(*_joined_streams(facts), final, output, loss),
        hidden_inputs=0,
    )
