"""What is trained, unsharded: a model is blocks, a block is ops, an op knows what divides it.

An op carries per-token quantities of the whole model and the *names* of what divides them, never a
degree. The cost model supplies the degrees. All counts of elements are per token of the sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Literal

from meshwright.describe.facts import Decoder
from meshwright.parallel.layout import Recompute


class OpKind(Enum):
    """How an op's time is priced."""

    matmul = "matmul"
    """A dense matrix product: ``2 * in_features * out_features`` FLOP per token."""
    grouped_matmul = "grouped_matmul"
    """One product per expert; tokens are what the router sends."""
    attention = "attention"
    """Scores and weighted sum: FLOP per token per attended token."""
    scan = "scan"
    """A state-space or linear-attention recurrence: ``scan_flops_per_token``, chunked kernels."""
    elementwise = "elementwise"
    """Bound by memory traffic: ``moved_per_token`` elements."""
    embedding = "embedding"
    """A table look-up; its gradient is a scatter."""
    cross_entropy = "cross_entropy"
    """The loss over the vocabulary."""


Where = Literal["tp", "sp", "expert", "routed"]
"""Where an activation lives, that is, what divides its elements besides context parallelism.

- ``tp``: inside a tensor-parallel region. Its *features* are divided by TP, tokens are whole.
- ``sp``: between regions. Its *tokens* are divided by TP when sequence parallelism is on.
- ``expert``: among the experts. Tokens are those that dispatch brings to the rank; features are
  divided by ETP.
- ``routed``: at the experts' door. Tokens are those that dispatch brings; features are whole.
- A tensor with whole features and whole tokens (the gathered input of a tensor-parallel region)
  is never kept by Megatron, so it has no word here.
"""

Holder = Literal["all", "tp", "expert"]
"""What divides a weight: nothing (``all``), TP (``tp``) or EP*ETP (``expert``)."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A tensor kept from forward to backward.

    ``elements`` per token (``where="expert"``: per routed token), before ``where`` divides them.
    ``dtype``: ``act`` is the compute precision of activations (2 bytes in bf16), ``matmul`` is the
    precision a matmul input is kept in (1 byte under FP8 recipes), ``copy`` a second copy, in that
    precision, of a tensor that is kept as ``act`` elsewhere (nothing where the two precisions are
    one), ``fp32`` and ``byte`` (a mask, an index) are fixed. ``dropped`` names the recomputations
    that do not keep it.
    """

    name: str
    elements: float
    where: Where
    dtype: Literal["act", "matmul", "copy", "fp32", "byte"] = "act"
    dropped: Recompute = Recompute.full


@dataclass(frozen=True, kw_only=True)
class Comm:
    """A communication that the split of an op forces, once per forward (and its mirror backward).

    - ``enter_tp``: tokens enter a tensor-parallel region. With SP: all-gather forward,
      reduce-scatter backward, and the input gathered again for the weight gradient. Without SP:
      nothing forward, all-reduce backward.
    - ``exit_tp``: tokens leave it. With SP: reduce-scatter forward, all-gather backward. Without:
      all-reduce forward.
    - ``cp_kv``: keys and values (``elements`` = K and V of one token, divided by TP) go round the
      CP group; ``cp_heads``: elements that all-to-all (Ulysses) exchanges per token (Q, K, V, O).
    - ``dispatch`` / ``combine``: routed tokens go to their experts and back (all-to-all over EP,
      all-gather / reduce-scatter over ETP).
    - ``exit_vocab``: the small all-reduces of a vocabulary-parallel loss.

    ``elements`` per token of the sequence; for dispatch and combine per *routed* token.
    """

    kind: Literal[
        "enter_tp", "exit_tp", "cp_kv", "cp_heads", "dispatch", "combine", "exit_vocab", "cp_state"
    ]
    elements: float


@dataclass(frozen=True, kw_only=True)
class Op:
    """One operation of a block, unsharded.

    ``params`` counts its weights (all experts together), held by ``holder``. ``in_features`` x
    ``out_features`` is one matmul; ``split`` says which of the two TP (or ETP) divides. ``where``
    says which tokens it runs on. ``copies`` is the number of experts. ``moved_per_token`` counts
    elements read and written by memory-bound work, forward, and ``backward_moved_per_token`` the
    same backward (default: twice the forward). ``rerun`` names the recomputations that run its
    forward again. ``vocab`` marks the two ops whose table is padded to the vocabulary multiple.
    """

    name: str
    kind: OpKind
    params: int = 0
    holder: Holder = "all"
    in_features: int = 0
    out_features: int = 0
    split: Literal["in", "out", ""] = ""
    where: Where = "sp"
    copies: int = 1
    num_heads: int = 0
    num_kv_heads: int = 0
    qk_head_dim: int = 0
    v_head_dim: int = 0
    window: int = 0
    """Tokens that attention looks back on; 0 means all."""
    causal: bool = True
    scan_flops_per_token: float = 0.0
    moved_per_token: float = 0.0
    backward_moved_per_token: float | None = None
    saved: tuple[Saved, ...] = ()
    comm: tuple[Comm, ...] = ()
    rerun: Recompute = Recompute.full
    vocab: bool = False
    trained_in_16_bit: bool = False
    """Stays out of FP8/FP4 recipes (router, embedding, head, attention scores)."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Ops that run one after the other: a decoder layer of one kind, the embedding, the head.

    ``hidden_inputs`` counts the hidden-size tensors that full recomputation keeps per layer (the
    layer's input).
    """

    name: str
    ops: tuple[Op, ...]
    is_moe: bool = False
    hidden_inputs: int = 1

    @cached_property
    def num_params(self) -> int:
        """Weights of the block."""
        return sum(op.params for op in self.ops)


@dataclass(frozen=True, kw_only=True, repr=False)
class Model:
    """A network, unsharded: kinds of decoder layers and their order, embedding, head, MTP.

    ``layer_pattern[i]`` is the index into ``layer_kinds`` of decoder layer ``i``. ``mtp_layers``
    has one block per multi-token-prediction depth (its norms, projection and decoder layer); each
    runs the head once more. ``num_heads`` and the like are the facts that rules quote.
    """

    name: str
    model_type: str
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    max_seq_len: int = 0
    num_experts: int = 0
    topk: int = 0
    expert_ffn_hidden_size: int = 0
    shared_expert_ffn_hidden_size: int = 0
    layer_kinds: tuple[Block, ...]
    layer_pattern: tuple[int, ...]
    embedding: Block
    head: Block
    mtp_layers: tuple[Block, ...] = ()
    tie_word_embeddings: bool = False
    is_mla: bool = False
    mamba_num_heads: int = 0
    mamba_num_groups: int = 0
    facts: Decoder | None = field(default=None, repr=False, compare=False)
    """What the model was built from, for those who write it down in a framework's words."""
    assumed: tuple[str, ...] = field(default=(), compare=False)

    def __repr__(self) -> str:
        return f"Model({self.name!r}, {self.num_params:,} parameters)"

    @property
    def num_layers(self) -> int:
        """Decoder layers, multi-token prediction not counted."""
        return len(self.layer_pattern)

    @property
    def is_moe(self) -> bool:
        """Whether any layer has experts."""
        return self.num_experts > 0

    @cached_property
    def block_kinds(self) -> tuple[Block, ...]:
        """Every kind of block once: layer kinds, embedding, head, then each MTP layer.

        The order of the last axis [K] of every cost that is per kind of block.
        """
        return (*self.layer_kinds, self.embedding, self.head, *self.mtp_layers)

    def blocks(self) -> Iterator[Block]:
        """Yield every block in order: embedding, layers, head, MTP."""
        yield from self._main_blocks()
        yield from self.mtp_layers

    @cached_property
    def num_params(self) -> int:
        """Weights of the main model, vocabulary unpadded, tied tables counted once.

        Multi-token prediction is left out (``num_mtp_params``), as in published sizes.
        """
        return sum(b.num_params for b in self._main_blocks())

    @cached_property
    def num_mtp_params(self) -> int:
        """Weights of the multi-token-prediction layers."""
        return sum(b.num_params for b in self.mtp_layers)

    @cached_property
    def num_expert_params(self) -> int:
        """Weights of the routed experts of the main model."""
        ops = (op for block in self._main_blocks() for op in block.ops)
        return sum(op.params for op in ops if op.kind is OpKind.grouped_matmul)

    @cached_property
    def num_active_params(self) -> int:
        """Weights that one token meets: of the experts only ``topk`` of ``num_experts``."""
        idle = self.num_experts - self.topk
        return self.num_params - self.num_expert_params * idle // max(self.num_experts, 1)

    def _main_blocks(self) -> Iterator[Block]:
        yield self.embedding
        for kind in self.layer_pattern:
            yield self.layer_kinds[kind]
        yield self.head
