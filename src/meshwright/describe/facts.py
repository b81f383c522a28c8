"""What a decoder is made of, as facts: mixers, feed-forward networks, layers, the whole.

Every reader (Hugging Face families, published run tables, launch flags) makes these facts, and
``decoder.build_decoder`` is the only place that turns them into ops.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from meshwright.errors import ModelError, nearest_divisors

MAX_SIZE = 2**31 - 1
"""No real size comes near it; beyond it a number is a typing error."""

QkNorm = Literal["", "weightless", "head", "whole"]


def _check_sizes(facts: Any, *names: str, low: int = 1) -> None:
    for name in names:
        value = getattr(facts, name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= MAX_SIZE:
            raise ModelError(
                f"model.{name}", value, f"It is a whole number of at least {low}.", f"Use {low}."
            )


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Softmax attention with grouped queries.

    ``qk_norm``: ``head`` has one weight vector of ``head_dim`` for Q and one for K, ``whole`` spans
    all heads, ``weightless`` has none. ``output_gate`` doubles the query projection to gate what
    attention returns. ``sinks`` adds one learned logit per head. ``window`` 0 means all tokens.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: QkNorm = ""
    output_gate: bool = False
    sinks: bool = False
    window: int = 0
    rope: bool = True

    def __post_init__(self) -> None:
        _check_sizes(self, "num_heads", "num_kv_heads", "head_dim")
        _check_sizes(self, "window", low=0)
        if self.num_heads % self.num_kv_heads:
            near = nearest_divisors(self.num_heads, self.num_kv_heads)
            raise ModelError(
                "model.num_key_value_heads",
                self.num_kv_heads,
                f"It divides the {self.num_heads} attention heads.",
                f"Use {' or '.join(map(str, near))}.",
            )


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434).

    ``q_lora_rank`` 0 projects queries in one step. ``split_down`` divides the down-projections by
    TP and gathers their outputs, as Megatron's layers without Transformer Engine do; with it every
    rank holds them whole. ``norms`` are those of the compressed query and key-value. ``index_topk``
    > 0: an indexer picks so many tokens to attend to (DeepSeek-V3.2, arXiv:2512.02556).
    """

    num_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    bias: bool = False
    norms: bool = True
    split_down: bool = False
    index_heads: int = 0
    index_head_dim: int = 0
    index_topk: int = 0

    def __post_init__(self) -> None:
        _check_sizes(self, "num_heads", "kv_lora_rank", "v_head_dim")
        _check_sizes(self, "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", low=0)
        _check_sizes(self, "index_heads", "index_head_dim", "index_topk", low=0)
        if self.index_topk:
            _check_sizes(self, "index_heads", "index_head_dim")

    @property
    def qk_head_dim(self) -> int:
        """Features per head that scores are taken over."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclass(frozen=True, kw_only=True)
class CompressedAttention:
    """Attention over a window and over compressed tokens before it (DeepSeek-V4).

    One key-value head of ``head_dim`` is shared by all; the output is projected in ``o_groups``
    groups to ``o_lora_rank`` each. ``compress_ratio`` 0 attends to the window alone; with
    ``index_topk`` > 0 an indexer picks among the compressed tokens.
    """

    num_heads: int
    head_dim: int
    q_lora_rank: int
    o_lora_rank: int
    o_groups: int
    window: int
    compress_ratio: int = 0
    index_heads: int = 0
    index_head_dim: int = 0
    index_topk: int = 0

    def __post_init__(self) -> None:
        _check_sizes(self, "num_heads", "head_dim", "q_lora_rank", "o_lora_rank", "o_groups")
        _check_sizes(self, "window", "compress_ratio", "index_heads", low=0)
        _check_sizes(self, "index_head_dim", "index_topk", low=0)
        if self.index_topk:
            _check_sizes(self, "index_heads", "index_head_dim")

    @property
    def overlap(self) -> int:
        """Windows that one compressed token sums up: two where an indexer picks, else one."""
        return 2 if self.index_topk else 1


@dataclass(frozen=True, kw_only=True)
class Mamba:
    """A Mamba-2 mixer (arXiv:2405.21060); its inner size is ``num_heads * head_dim``."""

    num_heads: int
    head_dim: int
    state_size: int
    num_groups: int
    conv_kernel: int
    conv_bias: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        _check_sizes(self, "num_heads", "head_dim", "state_size", "num_groups", "conv_kernel")
        if self.num_heads % self.num_groups:
            near = nearest_divisors(self.num_heads, self.num_groups)
            raise ModelError(
                "model.mamba_num_groups",
                self.num_groups,
                f"It divides the {self.num_heads} Mamba heads.",
                f"Use {' or '.join(map(str, near))}.",
            )


@dataclass(frozen=True, kw_only=True)
class DeltaNet:
    """A gated delta net (arXiv:2412.06464), the linear attention of Qwen3-Next."""

    num_value_heads: int
    num_key_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel: int

    def __post_init__(self) -> None:
        _check_sizes(self, "num_value_heads", "num_key_heads", "key_head_dim", "value_head_dim")
        _check_sizes(self, "conv_kernel")


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """A dense feed-forward network; ``gated`` has two input projections (SwiGLU, GeGLU)."""

    ffn_hidden_size: int
    gated: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        _check_sizes(self, "ffn_hidden_size")


@dataclass(frozen=True, kw_only=True)
class Moe:
    """Routed experts, with shared experts (one MLP of their summed size) where there are any.

    ``correction_bias`` is the router's load-balancing bias, one per expert. Checkpoints store it,
    so it counts as a weight, although optimizers do not train it. ``latent_size`` > 0: experts work
    on a projection of the hidden state to that size (Nemotron 3).
    """

    num_experts: int
    topk: int
    ffn_hidden_size: int
    gated: bool = True
    shared_ffn_hidden_size: int = 0
    shared_gate: bool = False
    shared_bias: bool = False
    router_bias: bool = False
    correction_bias: bool = False
    expert_bias: bool = False
    latent_size: int = 0

    def __post_init__(self) -> None:
        _check_sizes(self, "num_experts", "topk", "ffn_hidden_size")
        _check_sizes(self, "shared_ffn_hidden_size", "latent_size", low=0)
        if self.topk > self.num_experts:
            raise ModelError(
                "model.topk",
                self.topk,
                f"A token cannot go to more experts than there are ({self.num_experts}).",
                f"Use {self.num_experts} or less.",
            )


Mixer = Attention | LatentAttention | CompressedAttention | Mamba | DeltaNet
FeedForward = Mlp | Moe


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One decoder layer: a mixer and a feed-forward network, either of which may be missing.

    ``norms``: ``pre`` before each of the two, ``post`` after each, ``sandwich`` both. ``parallel``
    feeds both from the layer's input; ``shared_norm`` then means one norm for the two.
    """

    mixer: Mixer | None = None
    ffn: FeedForward | None = None
    norms: Literal["pre", "post", "sandwich"] = "pre"
    parallel: bool = False
    shared_norm: bool = False


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A decoder-only language model.

    ``vocab_size`` 0 leaves out embedding and head. ``norm_weights`` per feature: 1 for RMSNorm, 2
    for LayerNorm with a bias, 0 without weights. ``learned_positions`` counts rows of a position
    table. ``mtp`` has the layers (several where the pattern is hybrid) of each
    multi-token-prediction depth. ``hidden_dropout`` > 0 keeps masks. ``residual_streams`` > 1:
    hyper-connections widen the residual stream so many times (arXiv:2409.19606).
    """

    model_type: str
    hidden_size: int
    vocab_size: int
    layers: tuple[Layer, ...]
    name: str = ""
    max_seq_len: int = 0
    norm_weights: int = 1
    tie_word_embeddings: bool = False
    learned_positions: int = 0
    embedding_norm: bool = False
    head_bias: bool = False
    hidden_dropout: float = 0.0
    residual_streams: int = 1
    mtp: tuple[tuple[Layer, ...], ...] = ()
    assumed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_sizes(self, "hidden_size")
        _check_sizes(self, "vocab_size", "max_seq_len", "learned_positions", low=0)
        if not self.layers:
            raise ModelError(
                "model.num_hidden_layers", 0, "A model has at least one layer.", "Use 1 or more."
            )

    def mixers(self) -> Iterator[Mixer]:
        """Yield the mixers of the layers, in order."""
        return (layer.mixer for layer in self.layers if layer.mixer is not None)

    def ffns(self) -> Iterator[FeedForward]:
        """Yield the feed-forward networks of the layers, in order."""
        return (layer.ffn for layer in self.layers if layer.ffn is not None)
