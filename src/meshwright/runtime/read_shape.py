"""What the decoder has to compute, read from a described model and its Hugging Face config.

Structure comes from the planner's own description (``Model.facts``); the config adds the numbers
that move no cost: epsilons, rotary positions, how routers score, what keeps experts balanced.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from meshwright.describe.facts import Attention, Decoder, LatentAttention, Layer, Mlp, Moe
from meshwright.describe.model import Model
from meshwright.errors import ModelError
from meshwright.runtime.config_values import flag, items, mapping, number, whole, word
from meshwright.runtime.families import FAMILIES, Family
from meshwright.runtime.shape import Activation, MlaShape, ModelShape, MoeShape, Rope

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_DROPOUTS = ("resid_pdrop", "residual_dropout", "hidden_dropout", "embd_pdrop")


def shape_of(model: Model, config: Mapping[str, Any] | None = None) -> ModelShape:
    """Return what the decoder computes for a described model.

    ``config`` is its Hugging Face config; keys that it leaves out take ``transformers``' defaults.
    Of a multimodal one the text decoder's part is read.

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
    config = text_part(config or {})
    values = {k: v for k, v in config.items() if v is not None}
    _refuse_unknown(facts, values)
    layers = (*facts.layers, *(depth[0] for depth in facts.mtp))
    mixer, moe = layers[0].mixer, next((x.ffn for x in layers if isinstance(x.ffn, Moe)), None)
    latent = mixer if isinstance(mixer, LatentAttention) else None
    plain = mixer if isinstance(mixer, Attention) else None
    mlp = next((x.ffn for x in layers if isinstance(x.ffn, Mlp)), None)
    qk_norm = plain.qk_norm if plain else ""
    assert qk_norm != "weightless"
    shape = ModelShape(
        model_type=model.model_type,
        hidden_size=facts.hidden_size,
        num_layers=len(facts.layers),
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        ffn_hidden_size=mlp.ffn_hidden_size if mlp else 1,
        vocab_size=facts.vocab_size,
        norm_eps=number(values, "rms_norm_eps", family.norm_eps),
        qkv_bias=plain.qkv_bias if plain else bool(latent and latent.bias),
        out_bias=plain.out_bias if plain else bool(latent and latent.bias),
        mlp_bias=bool(mlp and mlp.bias),
        activation=_activation(family, values),
        qk_norm=qk_norm,
        norms=facts.layers[0].norms,
        norm_offset=family.offset_norms,
        tie_word_embeddings=facts.tie_word_embeddings,
        sinks=bool(plain and plain.sinks),
        initializer_range=number(values, "initializer_range", 0.02),
        moe=_moe(moe, family, values) if moe else None,
        moe_layers=tuple(i for i, layer in enumerate(layers) if isinstance(layer.ffn, Moe)),
        mla=_mla(latent) if latent else None,
        mtp_layers=len(facts.mtp),
        **_positions(facts, model.head_dim, family, values, latent is not None),
        **_scales(facts, family, config),
    )
    _check_pairs(shape)
    return shape


def _check_pairs(shape: ModelShape) -> None:
    """Raise ``ModelError`` unless the features of a head that turn are pairs."""
    if shape.rotary_dim and shape.rotary_dim % 2 == 0:
        return
    rule = f"Rotary positions turn pairs of features, here {shape.rotary_dim} of a head."
    if shape.mla is not None:
        field, value = "qk_rope_head_dim", shape.mla.qk_rope_head_dim
    elif shape.rope.partial_factor != 1.0:
        part = shape.rope.partial_factor
        raise ModelError("config.partial_rotary_factor", part, rule, "Use 0.5 or 1.0.")
    else:
        field, value = "head_dim", shape.head_dim
    raise ModelError(f"config.{field}", value, rule, f"Use {value + 1}.")


def assumed_of(model: Model, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the numbers of ``shape_of`` that a config leaves to ``transformers``' defaults."""
    shape, family = shape_of(model, config), FAMILIES[model.model_type]
    config = text_part(config)
    rope = mapping(config, "rope_parameters")
    taken: dict[str, object] = {"rms_norm_eps": shape.norm_eps}
    if "rope_theta" not in rope.get("full_attention", rope):
        taken["rope_theta"] = shape.rope.theta
    if shape.rope.partial_factor != 1.0 and "partial_rotary_factor" not in rope:
        taken["partial_rotary_factor"] = shape.rope.partial_factor
    if family.score_cap:
        caps = ("attn_logit_softcapping", "final_logit_softcapping")
        found = (shape.attention_softcap, shape.logit_softcap)
        # A null says that there is no cap.
        taken |= {k: v for k, v in zip(caps, found, strict=True) if k not in config}
    if family.query_scalar:
        taken["query_pre_attn_scalar"] = shape.attention_scale**-2
    if shape.moe is not None:
        taken["router_aux_loss_coef"] = shape.moe.aux_loss_coef
        if not family.fixed:
            taken["norm_topk_prob"] = shape.moe.normalise
        if shape.moe.names == "deepseek":
            taken["routed_scaling_factor"] = shape.moe.routed_scaling_factor
    return tuple(
        f"{key} = {value}, as the config says nothing"
        for key, value in taken.items()
        if config.get(key) is None
    )


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config that describes the text decoder."""
    return cast("Mapping[str, Any]", config.get("text_config") or config)


def _refuse_unknown(facts: Decoder, values: Mapping[str, Any]) -> None:
    wrong: list[tuple[bool, str, str]] = [
        (values.get("clip_qkv") is not None, "clip_qkv", "null"),
        (bool(values.get("attention_dropout")), "attention_dropout", "0.0"),
        (bool(values.get("router_jitter_noise")), "router_jitter_noise", "0.0"),
        (bool(values.get("use_bidirectional_attention")), "use_bidirectional_attention", "false"),
        (
            facts.model_type == "smollm3" and bool(values.get("use_sliding_window")),
            "use_sliding_window",
            "false",
        ),
    ]
    for is_wrong, key, remedy in wrong:
        if is_wrong:
            rule = "The runtime computes models without it."
            raise ModelError(f"config.{key}", values[key], rule, f"Use {remedy}.")
    if facts.hidden_dropout:
        key = next((key for key in _DROPOUTS if values.get(key)), "residual_dropout")
        rule = "The runtime computes models without dropout."
        raise ModelError(f"config.{key}", facts.hidden_dropout, rule, f"Set {key} to 0.0.")
    if any(_is_unknown(layer) for layer in facts.layers):
        raise ModelError(
            "model.layers",
            facts.model_type,
            "A layer has a part that the runtime does not compute (an indexer, an output gate).",
            "Use a model of the plain family.",
        )


def _is_unknown(layer: Layer) -> bool:
    mixer, ffn = layer.mixer, layer.ffn
    plain = isinstance(mixer, Attention) and not (
        mixer.output_gate or mixer.qk_norm == "weightless"
    )
    latent = isinstance(mixer, LatentAttention) and not mixer.index_topk and mixer.norms
    gated = isinstance(ffn, Mlp | Moe) and ffn.gated
    extra = isinstance(ffn, Moe) and bool(ffn.latent_size)
    return not (plain or latent) or not gated or extra or layer.parallel


def _activation(family: Family, values: Mapping[str, Any]) -> Activation:
    """Read what gates feed-forward networks; "gelu" in Gemma 1 has always meant the tanh form."""
    if family.activation == "clamped_swish":
        for key, known in (("swiglu_limit", 7.0), ("swiglu_alpha", 1.702)):
            if values.get(key, known) != known:
                rule = f"The runtime computes {known}."
                raise ModelError(f"config.{key}", values[key], rule, f"Use {known}.")
        return family.activation
    key = "hidden_activation" if "hidden_activation" in values else "hidden_act"
    if key not in values:
        return family.activation
    name = word(values, key, "silu")
    if family.offset_norms and key == "hidden_act" and name == "gelu":
        return family.activation
    if name not in ACTIVATIONS:
        known = " or ".join(ACTIVATIONS)
        raise ModelError(f"config.{key}", name, "The runtime computes others.", f"Use {known}.")
    return ACTIVATIONS[name]


def _scales(facts: Decoder, family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Read what multiplies or caps embeddings, branches, scores and logits; null is no cap."""

    if family.multipliers:
        return {
            "embedding_scale": number(config, "embedding_multiplier", 1.0),
            "residual_scale": number(config, "residual_multiplier", 1.0),
            "attention_scale": number(config, "attention_multiplier", 1.0),
            "logit_scale": 1.0 / number(config, "logits_scaling", 1.0, above=True),
        }

    def cap(key: str, default: float) -> float:
        return number(config, key, 0.0 if key in config else default)

    scale = 0.0
    if family.query_scalar:
        scale = number(config, "query_pre_attn_scalar", family.query_scalar, above=True) ** -0.5
    return {
        "embedding_scale": facts.hidden_size**0.5 if family.offset_norms else 1.0,
        "attention_scale": scale,
        "attention_softcap": cap("attn_logit_softcapping", family.score_cap),
        "logit_softcap": cap("final_logit_softcapping", family.logit_cap),
    }


def _moe(moe: Moe, family: Family, values: Mapping[str, Any]) -> MoeShape:
    normalise = family.normalise
    if not family.fixed:
        normalise = flag(values, "norm_topk_prob", normalise)
    grouped = family.scoring == "sigmoid" or values.get("topk_method") == "group_limited_greedy"
    groups = family.groups
    if grouped:
        groups = (
            whole(values, "n_group", groups[0]),
            whole(values, "topk_group", groups[1]),
        )
    return MoeShape(
        num_experts=moe.num_experts,
        topk=moe.topk,
        ffn_hidden_size=moe.ffn_hidden_size,
        shared_ffn_hidden_size=moe.shared_ffn_hidden_size,
        shared_gate=moe.shared_gate,
        scoring=family.scoring,
        normalise=normalise,
        routed_scaling_factor=number(values, "routed_scaling_factor", family.routed_scaling_factor),
        num_groups=groups[0],
        topk_groups=groups[1],
        group_score=family.group_score,
        correction_bias=moe.correction_bias,
        router_bias=moe.router_bias,
        expert_bias=moe.expert_bias,
        names=family.names,
        **_balancing(family, values),
    )


def _balancing(family: Family, values: Mapping[str, Any]) -> dict[str, Any]:
    """Read how load is balanced: keys of Hugging Face configs, then those of Megatron-LM.

    Raises ``ModelError`` for a value that no framework knows.
    """
    sequences = flag(values, "seq_aux", True) and "aux_loss_alpha" in values
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
        coefficient = number(values, key, coefficient)
    return {
        "capacity_factor": number(values, "moe_expert_capacity_factor", 0.0),
        "drop_policy": policy,
        "pad_to_capacity": flag(values, "moe_pad_expert_input_to_capacity", False),
        "balance": "seq_aux_loss" if word == "seq_aux_loss" or sequences else "aux_loss",
        "bias_update_rate": number(values, "moe_router_bias_update_rate", 0.0),
        "aux_loss_coef": 0.0 if word == "none" else coefficient,
        "z_loss_coef": number(values, "moe_z_loss_coeff", 0.0),
    }


def _mla(latent: LatentAttention) -> MlaShape:
    return MlaShape(
        q_lora_rank=latent.q_lora_rank,
        kv_lora_rank=latent.kv_lora_rank,
        qk_nope_head_dim=latent.qk_nope_head_dim,
        qk_rope_head_dim=latent.qk_rope_head_dim,
        v_head_dim=latent.v_head_dim,
    )


def _positions(
    facts: Decoder, head_dim: int, family: Family, values: Mapping[str, Any], latent: bool
) -> dict[str, Any]:
    """Read windows and rotary positions: which layers have them, how they turn.

    ``rope_parameters``, of each kind of layer where they differ, or ``rope_theta`` (and
    ``rope_local_base_freq``) with ``rope_scaling``.
    """
    mixers = [layer.mixer for layer in facts.layers]
    windows = [mixer.window if isinstance(mixer, Attention) else 0 for mixer in mixers]
    windowed = tuple(i for i, window in enumerate(windows) if window)
    given = mapping(values, "rope_parameters")
    own_kinds = "full_attention" in given
    full = dict(
        (mapping(given, "full_attention") if own_kinds else given)
        or mapping(values, "rope_scaling")
        or family.rope
    )
    full.setdefault("rope_theta", values.get("rope_theta", family.theta))
    if "partial_rotary_factor" not in full:
        part = family.rope.get("partial_rotary_factor", 1.0)
        if "rotary_dim" in values:
            part = whole(values, "rotary_dim", head_dim) / head_dim
        full["partial_rotary_factor"] = values.get("partial_rotary_factor", part)
    interleaved = family.interleaved or (latent and flag(values, "rope_interleave", True))
    window_rope: Rope | None = None
    if family.window_rope is not None:
        own = {"rope_theta": full["rope_theta"], **family.window_rope}
        if "rope_local_base_freq" in values:
            own["rope_theta"] = values["rope_local_base_freq"]
        own |= mapping(given, "sliding_attention")
        window_rope = _rope(facts, own, interleaved)
    turning = items(values, "no_rope_layers")
    if turning is None:
        turning = [not isinstance(mixer, Attention) or mixer.rope for mixer in mixers]
        if windowed and not family.unwindowed_turn:
            turning = windows
    return {
        "window": max(windows),
        "window_layers": windowed,
        "window_rope": window_rope,
        "unrotated_layers": tuple(i for i, turns in enumerate(turning) if not turns),
        "rope": _rope(facts, full, interleaved),
    }


def _rope(facts: Decoder, keys: Mapping[str, Any], interleaved: bool) -> Rope:
    given = {key: value for key, value in keys.items() if value is not None}
    kind = str(given.get("rope_type", given.get("type", "default")))
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise ModelError(
            "config.rope_parameters",
            kind,
            "The runtime computes rotary positions of other types.",
            "Use default, linear, llama3 or yarn.",
        )
    part = number(given, "partial_rotary_factor", 1.0, above=True)
    if part > 1.0:
        rule = "It is the part of a head that turns, at most 1."
        raise ModelError("config.partial_rotary_factor", part, rule, "Use 1.0.")
    if kind != "default" and "factor" not in given:
        rule = f"Positions of type {kind} are stretched by a factor."
        raise ModelError("config.rope_parameters", kind, rule, "Give factor.")
    tempered = "attention_factor" in given
    return Rope(
        theta=number(given, "rope_theta", 10_000.0, above=True),
        kind=kind,
        factor=number(given, "factor", 1.0, above=True),
        low_freq_factor=number(given, "low_freq_factor", 1.0, above=True),
        high_freq_factor=number(given, "high_freq_factor", 4.0, above=True),
        original_max_seq_len=whole(
            given, "original_max_position_embeddings", facts.max_seq_len or 8192
        ),
        beta_fast=number(given, "beta_fast", 32.0, above=True),
        beta_slow=number(given, "beta_slow", 1.0, above=True),
        attention_factor=number(given, "attention_factor", 1.0, above=True) if tempered else None,
        mscale=number(given, "mscale", 0.0),
        mscale_all_dim=number(given, "mscale_all_dim", 0.0),
        truncate=flag(given, "truncate", True),
        interleaved=interleaved,
        partial_factor=part,
    )
