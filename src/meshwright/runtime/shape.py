"""What the decoder needs to know of an architecture to compute it, in Hugging Face words.

Structure comes from the planner's own description of the model (``Model.facts``); ``shape_of`` adds
the numbers that move no cost: epsilons, rotary positions, how routers score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from meshwright.describe.facts import Attention, Decoder, LatentAttention, Layer, Mlp, Moe
from meshwright.describe.model import Model
from meshwright.errors import ModelError

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
    names: Literal["mixtral", "qwen", "deepseek"] = "qwen"


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


@dataclass(frozen=True, kw_only=True)
class _Family:
    """What ``transformers`` assumes for a model type where the config says nothing."""

    norm_eps: float = 1e-6
    theta: float = 10000.0
    names: Literal["mixtral", "qwen", "deepseek"] = "qwen"
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool | None = None
    """Whether expert weights are normalised: fixed, or ``None``: ``norm_topk_prob`` decides."""
    routed_scaling_factor: float = 1.0
    group_score: Literal["max", "top2"] = "max"
    groups: tuple[int, int] = (1, 1)
    aux_loss_coef: float = 0.0


FAMILIES: Mapping[str, _Family] = {
    "llama": _Family(),
    "mistral": _Family(),
    "qwen2": _Family(),
    "qwen3": _Family(),
    "olmo2": _Family(norm_eps=1e-5),
    "mixtral": _Family(
        norm_eps=1e-5, theta=1e6, names="mixtral", normalise=True, aux_loss_coef=0.001
    ),
    "qwen2_moe": _Family(aux_loss_coef=0.001),
    "qwen3_moe": _Family(aux_loss_coef=0.001),
    "olmoe": _Family(norm_eps=1e-5, aux_loss_coef=0.01),
    "deepseek_v2": _Family(names="deepseek", normalise=False),
    "deepseek_v3": _Family(
        names="deepseek",
        scoring="sigmoid",
        normalise=True,
        routed_scaling_factor=2.5,
        group_score="top2",
        groups=(8, 4),
    ),
    "kimi_k2": _Family(
        names="deepseek",
        scoring="sigmoid",
        normalise=True,
        routed_scaling_factor=2.827,
        group_score="top2",
    ),
}
"""The model types that the runtime computes."""


def shape_of(model: Model, config: Mapping[str, Any] | None = None) -> ModelShape:
    """Return what the decoder computes for a described model.

    ``config`` is its Hugging Face config; keys that it leaves out take ``transformers``' defaults.

    Raises ``ModelError`` for what the runtime does not compute.
    """
    family = FAMILIES.get(model.model_type)
    facts = model.facts
    if family is None or facts is None:
        raise ModelError(
            "model.model_type",
            model.model_type,
            "The runtime does not compute this family.",
            f"Use one of {', '.join(FAMILIES)}.",
        )
    values = {} if config is None else {k: v for k, v in config.items() if v is not None}
    _refuse_unknown(facts, values)
    layers = (*facts.layers, *(depth[0] for depth in facts.mtp))
    mixer, moe = layers[0].mixer, next((x.ffn for x in layers if isinstance(x.ffn, Moe)), None)
    latent = mixer if isinstance(mixer, LatentAttention) else None
    plain = mixer if isinstance(mixer, Attention) else None
    mlp = next((x.ffn for x in layers if isinstance(x.ffn, Mlp)), None)
    windows = [x.mixer.window if isinstance(x.mixer, Attention) else 0 for x in facts.layers]
    qk_norm = plain.qk_norm if plain else ""
    assert qk_norm != "weightless"
    return ModelShape(
        model_type=model.model_type,
        hidden_size=facts.hidden_size,
        num_layers=len(facts.layers),
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        ffn_hidden_size=mlp.ffn_hidden_size if mlp else 1,
        vocab_size=facts.vocab_size,
        norm_eps=float(values.get("rms_norm_eps", family.norm_eps)),
        rope=_rope(facts, family, values, latent is not None),
        qkv_bias=plain.qkv_bias if plain else bool(latent and latent.bias),
        out_bias=plain.out_bias if plain else bool(latent and latent.bias),
        mlp_bias=bool(mlp and mlp.bias),
        qk_norm=qk_norm,
        norms="post" if facts.layers[0].norms == "post" else "pre",
        tie_word_embeddings=facts.tie_word_embeddings,
        window=max(windows),
        window_layers=tuple(i for i, window in enumerate(windows) if window),
        initializer_range=float(values.get("initializer_range", 0.02)),
        moe=_moe(moe, family, values) if moe else None,
        moe_layers=tuple(i for i, layer in enumerate(layers) if isinstance(layer.ffn, Moe)),
        mla=_mla(latent) if latent else None,
        mtp_layers=len(facts.mtp),
    )


def assumed_of(model: Model, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the numbers of ``shape_of`` that a config leaves to ``transformers``' defaults."""
    shape = shape_of(model, config)
    rope = cast("Mapping[str, Any]", config.get("rope_parameters") or {})
    taken: dict[str, object] = {"rms_norm_eps": shape.norm_eps}
    if "rope_theta" not in rope:
        taken["rope_theta"] = shape.rope.theta
    if shape.moe is not None:
        taken["router_aux_loss_coef"] = shape.moe.aux_loss_coef
        if FAMILIES[model.model_type].normalise is None:
            taken["norm_topk_prob"] = shape.moe.normalise
        if shape.moe.names == "deepseek":
            taken["routed_scaling_factor"] = shape.moe.routed_scaling_factor
    return tuple(
        f"{key} = {value}, as the config says nothing"
        for key, value in taken.items()
        if config.get(key) is None
    )


def _refuse_unknown(facts: Decoder, values: Mapping[str, Any]) -> None:
    wrong: list[tuple[bool, str, str]] = [
        (values.get("hidden_act", "silu") != "silu", "hidden_act", "silu"),
        (values.get("clip_qkv") is not None, "clip_qkv", "null"),
        (bool(values.get("attention_dropout")), "attention_dropout", "0.0"),
        (bool(values.get("router_jitter_noise")), "router_jitter_noise", "0.0"),
        (values.get("partial_rotary_factor", 1.0) != 1.0, "partial_rotary_factor", "1.0"),
    ]
    for is_wrong, key, remedy in wrong:
        if is_wrong:
            rule = "The runtime computes models without it."
            raise ModelError(f"config.{key}", values[key], rule, f"Use {remedy}.")
    if any(_is_unknown(layer) for layer in facts.layers) or facts.hidden_dropout:
        raise ModelError(
            "model.layers",
            facts.model_type,
            "A layer has a part that the runtime does not compute (an indexer, sinks, a gate).",
            "Use a model of the plain family.",
        )


def _is_unknown(layer: Layer) -> bool:
    mixer, ffn = layer.mixer, layer.ffn
    plain = isinstance(mixer, Attention) and not (
        mixer.output_gate or mixer.sinks or not mixer.rope or mixer.qk_norm == "weightless"
    )
    latent = isinstance(mixer, LatentAttention) and not mixer.index_topk and mixer.norms
    gated = isinstance(ffn, Mlp | Moe) and ffn.gated
    extra = isinstance(ffn, Moe) and (ffn.router_bias or ffn.expert_bias or ffn.latent_size)
    return not (plain or latent) or not gated or bool(extra) or layer.parallel


def _moe(moe: Moe, family: _Family, values: Mapping[str, Any]) -> MoeShape:
    normalise = family.normalise
    if normalise is None:
        normalise = bool(values.get("norm_topk_prob", False))
    grouped = family.scoring == "sigmoid" or values.get("topk_method") == "group_limited_greedy"
    groups = family.groups
    if grouped:
        groups = (
            int(values.get("n_group", groups[0])),
            int(values.get("topk_group", groups[1])),
        )
    return MoeShape(
        num_experts=moe.num_experts,
        topk=moe.topk,
        ffn_hidden_size=moe.ffn_hidden_size,
        shared_ffn_hidden_size=moe.shared_ffn_hidden_size,
        shared_gate=moe.shared_gate,
        scoring=family.scoring,
        normalise=normalise,
        routed_scaling_factor=float(
            values.get("routed_scaling_factor", family.routed_scaling_factor)
        ),
        num_groups=groups[0],
        topk_groups=groups[1],
        group_score=family.group_score,
        correction_bias=moe.correction_bias,
        expert_bias=moe.expert_bias,
        names=family.names,
        **_balancing(family, values),
    )


def _balancing(family: _Family, values: Mapping[str, Any]) -> dict[str, Any]:
    """Read how load is balanced: keys of Hugging Face configs, then those of Megatron-LM.

    Raises ``ModelError`` for a value that no framework knows.
    """
    sequences = values.get("seq_aux", True) and "aux_loss_alpha" in values
    word = values.get("moe_router_load_balancing_type", "")
    policy = values.get("moe_token_drop_policy", "probs")
    for key, value, known in (
        ("moe_router_load_balancing_type", word, ("", "none", "aux_loss", "seq_aux_loss")),
        ("moe_token_drop_policy", policy, ("probs", "position")),
    ):
        if value not in known:
            remedy = f"Use {' or '.join(filter(None, known))}."
            raise ModelError(f"config.{key}", value, "The runtime computes others.", remedy)
    coefficient = family.aux_loss_coef
    for key in ("aux_loss_alpha", "router_aux_loss_coef", "moe_aux_loss_coeff"):
        coefficient = float(values.get(key, coefficient))
    return {
        "capacity_factor": float(values.get("moe_expert_capacity_factor", 0.0)),
        "drop_policy": policy,
        "pad_to_capacity": bool(values.get("moe_pad_expert_input_to_capacity", False)),
        "balance": "seq_aux_loss" if word == "seq_aux_loss" or sequences else "aux_loss",
        "bias_update_rate": float(values.get("moe_router_bias_update_rate", 0.0)),
        "aux_loss_coef": 0.0 if word == "none" else coefficient,
        "z_loss_coef": float(values.get("moe_z_loss_coeff", 0.0)),
    }


def _mla(latent: LatentAttention) -> MlaShape:
    return MlaShape(
        q_lora_rank=latent.q_lora_rank,
        kv_lora_rank=latent.kv_lora_rank,
        qk_nope_head_dim=latent.qk_nope_head_dim,
        qk_rope_head_dim=latent.qk_rope_head_dim,
        v_head_dim=latent.v_head_dim,
    )


def _rope(facts: Decoder, family: _Family, values: Mapping[str, Any], latent: bool) -> Rope:
    """Read rotary positions: ``rope_parameters``, or ``rope_theta`` and ``rope_scaling``."""
    given = cast(
        "dict[str, Any]", values.get("rope_parameters") or values.get("rope_scaling") or {}
    )
    given = {k: v for k, v in given.items() if v is not None}
    kind = str(given.get("rope_type", given.get("type", "default")))
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise ModelError(
            "config.rope_parameters",
            kind,
            "The runtime computes rotary positions of other types.",
            "Use default, linear, llama3 or yarn.",
        )
    factor = given.get("attention_factor")
    return Rope(
        theta=float(given.get("rope_theta", values.get("rope_theta", family.theta))),
        kind=kind,
        factor=float(given.get("factor", 1.0)),
        low_freq_factor=float(given.get("low_freq_factor", 1.0)),
        high_freq_factor=float(given.get("high_freq_factor", 4.0)),
        original_max_seq_len=int(
            given.get("original_max_position_embeddings", facts.max_seq_len or 8192)
        ),
        beta_fast=float(given.get("beta_fast", 32.0)),
        beta_slow=float(given.get("beta_slow", 1.0)),
        attention_factor=None if factor is None else float(factor),
        mscale=float(given.get("mscale", 0.0)),
        mscale_all_dim=float(given.get("mscale_all_dim", 0.0)),
        truncate=bool(given.get("truncate", True)),
        interleaved=latent and bool(values.get("rope_interleave", True)),
    )
