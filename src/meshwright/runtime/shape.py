"""What the decoder needs to know of an architecture to compute it, in Hugging Face words."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions: ``theta ** (-2i / dim)``, rescaled for long contexts as ``kind`` says.

    ``kind`` is Hugging Face's ``rope_type``: ``default``, ``linear``, ``llama3`` or ``yarn``; the
    other fields are that type's own. ``interleaved`` pairs features (2i, 2i+1), as DeepSeek's
    checkpoints do, instead of (i, i + dim/2).
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
    ``names`` is the naming of checkpoints.
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
    aux_loss_coef: float = 0.0
    z_loss_coef: float = 0.0
    names: Literal["mixtral", "qwen", "deepseek"] = "qwen"


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder: sizes and choices, Hugging Face words.

    ``moe_layers`` are the layers with experts. ``qk_norm``: ``head`` normalises each head,
    ``whole`` all heads together. ``norms``: ``pre`` before each branch, ``post`` after it (OLMo 2).
    ``window`` limits how far back a token attends (0: no limit), on the layers in
    ``window_layers``. ``mtp_layers`` counts multi-token-prediction depths (DeepSeek-V3,
    arXiv:2412.19437) whose loss is weighted by ``mtp_loss_coef``.
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
    qk_norm: Literal["", "head", "whole"] = ""
    norms: Literal["pre", "post"] = "pre"
    tie_word_embeddings: bool = False
    window: int = 0
    window_layers: tuple[int, ...] = ()
    initializer_range: float = 0.02
    moe: MoeShape | None = None
    moe_layers: tuple[int, ...] = ()
    mla: MlaShape | None = None
    mtp_layers: int = 0
    mtp_loss_coef: float = 0.1

    @property
    def softmax_scale(self) -> float:
        """What scores are multiplied by: 1/sqrt(d), times yarn's mscale squared for DeepSeek."""
        dim = self.mla.qk_head_dim if self.mla else self.head_dim
        scale = dim**-0.5
        if self.mla and self.rope.kind == "yarn" and self.rope.mscale_all_dim:
            scale *= yarn_mscale(self.rope.factor, self.rope.mscale_all_dim) ** 2
        return scale


def yarn_mscale(factor: float, mscale: float) -> float:
    """Return yarn's attention temperature 0.1 m ln(s) + 1 (arXiv:2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
