"""What the decoder needs to know of an architecture to compute it, in Hugging Face words.

``read_shape`` makes it of a described model and its config.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

Activation = Literal["silu", "gelu_tanh", "clamped_swish"]
"""What gates a feed-forward network; ``layers.gated`` has the formulas."""


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions: ``theta ** (-2i / dim)``, rescaled for long contexts as ``kind`` says.

    ``kind`` is Hugging Face's ``rope_type``: ``default``, ``linear``, ``llama3`` or ``yarn``; the
    other fields are that type's own. ``interleaved`` pairs features (2i, 2i+1), as DeepSeek's
    checkpoints do, instead of (i, i + dim/2). ``partial_factor`` is the part of a head's features
    that turns, the first of them.
    Refs: arXiv:2104.09864; yarn: arXiv:2309.00071.
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    interleaved: bool = False
    partial_factor: float = 1.0


@dataclass(frozen=True)
class Scores:
    """How scores come from products of Q and K: times ``scale``, then ``cap tanh(s / cap)``.

    ``cap`` 0: not capped. Ref: Gemma 2, arXiv:2408.00118, section 2.
    """

    scale: float
    cap: float = 0.0


@dataclass(frozen=True, kw_only=True)
class MlaShape:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434). ``q_lora_rank`` 0: no Q rank."""

    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def qk_head_dim(self) -> int:
        """Features per head that scores are taken over."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclass(frozen=True, kw_only=True)
class MoeShape:
    """Routed experts and how a token chooses among them.

    ``scoring`` turns router logits into scores; with ``num_groups`` > 1 only experts of the best
    ``topk_groups`` groups can be chosen, a group's score being its best expert (``max``) or the sum
    of its two best (``top2``). ``correction_bias`` shifts the choice but not the weights.
    ``router_bias`` and ``expert_bias`` are those of the router's logits and of the experts'
    products. ``names`` is the naming of checkpoints.

    With ``capacity_factor`` > 0 an expert takes no more than its capacity (``capacity``), dropping
    the choices of least weight (``probs``) or the last ones (``position``); ``pad_to_capacity``
    sends so many rows to each whatever was chosen. ``balance`` says over which tokens the
    auxiliary loss is taken: a microbatch, or each sequence alone. ``bias_update_rate`` > 0 moves
    the correction bias after every step.
    """

    num_experts: int
    topk: int
    ffn_hidden_size: int
    shared_ffn_hidden_size: int = 0
    shared_gate: bool = False
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = True
    routed_scaling_factor: float = 1.0
    num_groups: int = 1
    topk_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    correction_bias: bool = False
    router_bias: bool = False
    expert_bias: bool = False
    capacity_factor: float = 0.0
    drop_policy: Literal["probs", "position"] = "probs"
    pad_to_capacity: bool = False
    balance: Literal["aux_loss", "seq_aux_loss"] = "aux_loss"
    bias_update_rate: float = 0.0
    aux_loss_coef: float = 0.0
    z_loss_coef: float = 0.0
    names: Literal["mixtral", "qwen", "deepseek", "gpt_oss"] = "qwen"


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder: sizes and choices, Hugging Face words.

    ``moe_layers`` are the layers with experts. ``qk_norm``: ``head`` normalises each head,
    ``whole`` all heads together. ``norms``: ``pre`` before each branch, ``post`` after it (OLMo
    2), ``sandwich`` both (Gemma 2); ``norm_offset`` keeps norm weights as what they are beyond 1.
    ``activation`` gates the feed-forward networks. ``window`` limits how far back a token attends
    (0: no limit), on the layers in ``window_layers``, which turn by ``window_rope`` if they have
    their own; ``unrotated_layers`` do not turn at all. ``sinks`` adds a learned logit per head.
    Scores are products times ``attention_scale`` (0: 1/sqrt(d)), capped by ``attention_softcap``;
    logits are times ``logit_scale``, capped by ``logit_softcap``; embeddings and what branches add
    are times ``embedding_scale`` and ``residual_scale``. ``mtp_layers`` counts
    multi-token-prediction depths (DeepSeek-V3, arXiv:2412.19437) whose loss is weighted by
    ``mtp_loss_coef``. With ``lora_rank`` > 0 all weights are frozen and every linear layer but
    experts, router and head learns a low-rank change ``lora_alpha / lora_rank * B A``
    (arXiv:2106.09685).
    """

    model_type: str = "llama"
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    norm_eps: float = 1e-6
    rope: Rope = field(default_factory=Rope)
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    activation: Activation = "silu"
    qk_norm: Literal["", "head", "whole"] = ""
    norms: Literal["pre", "post", "sandwich"] = "pre"
    norm_offset: bool = False
    tie_word_embeddings: bool = False
    window: int = 0
    window_layers: tuple[int, ...] = ()
    window_rope: Rope | None = None
    unrotated_layers: tuple[int, ...] = ()
    sinks: bool = False
    attention_scale: float = 0.0
    attention_softcap: float = 0.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    initializer_range: float = 0.02
    moe: MoeShape | None = None
    moe_layers: tuple[int, ...] = ()
    mla: MlaShape | None = None
    mtp_layers: int = 0
    mtp_loss_coef: float = 0.1
    lora_rank: int = 0
    lora_alpha: float = 16.0

    @property
    def rotary_dim(self) -> int:
        """Features of a head that turn with the position."""
        if self.mla:
            return self.mla.qk_rope_head_dim
        return int(self.head_dim * self.rope.partial_factor)

    @property
    def scores(self) -> Scores:
        """How attention scores come from products; DeepSeek's yarn multiplies by mscale squared."""
        dim = self.mla.qk_head_dim if self.mla else self.head_dim
        scale = self.attention_scale or dim**-0.5
        if self.mla and self.rope.kind == "yarn" and self.rope.mscale_all_dim:
            scale *= yarn_mscale(self.rope.factor, self.rope.mscale_all_dim) ** 2
        return Scores(scale, self.attention_softcap)


def yarn_mscale(factor: float, mscale: float) -> float:
    """Return yarn's attention temperature 0.1 m ln(s) + 1 (arXiv:2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
