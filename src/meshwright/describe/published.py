"""Architectures from published run tables, in a format of their own (``models.json``).

Its words are close to Hugging Face's but not equal (``arch``, ``gated_mlp``, ``experts_per_token``,
``hybrid_pattern``), and there is no ``model_type``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from meshwright.describe.config import Config
from meshwright.describe.decoder import build_decoder
from meshwright.describe.facts import (
    Attention,
    CompressedAttention,
    Decoder,
    Layer,
    Mamba,
    Mixer,
    Mlp,
    Moe,
)
from meshwright.describe.model import Model
from meshwright.describe.standard import compressed_attention, delta_net, latent_attention
from meshwright.errors import ModelError

PATTERN = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}


def build_published(name: str, entry: Mapping[str, Any]) -> Model:
    """Return the model of an entry. Raises ``ModelError`` naming what cannot be."""
    return build_decoder(published_decoder(name, entry))


def published_decoder(name: str, entry: Mapping[str, Any]) -> Decoder:
    """Return the facts of an entry, so that settings of a run can replace some of them.

    What an entry does not say is assumed as in the framework that such models were trained with:
    GPT with learned positions as Megatron-LM had it (LayerNorm, biases, dropout 0.1), the others
    with RMSNorm (LayerNorm where the MLP is not gated), without biases and dropout.
    """
    config = Config(entry, f"models.{name}")
    if not isinstance(entry, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ModelError(f"models.{name}", entry, "It is an object of keys.", "Write {...}.")
    gpt = config.given("max_position_embeddings")
    hybrid = config.given("hybrid_pattern")
    gated = _gated(config)
    if gpt:
        config.assumed.append("biases, LayerNorm, dropout 0.1 (GPT with learned positions)")
    layers = _hybrid_layers(config, "hybrid_pattern") if hybrid else _layers(config, gpt)
    positions = config.optional_size("max_position_embeddings")
    return Decoder(
        name=name,
        model_type=config.text("arch", "dense"),
        hidden_size=config.size("hidden_size"),
        vocab_size=config.size("vocab_size", low=0),
        layers=layers,
        max_seq_len=positions,
        learned_positions=positions,
        norm_weights=1 if gated or hybrid else 2,
        hidden_dropout=0.1 if gpt else 0.0,
        tie_word_embeddings=config.flag("tie_word_embeddings", False),
        residual_streams=config.size("hc_mult", 1),
        mtp=_mtp(config, layers),
        assumed=tuple(config.assumed),
    )


def _gated(config: Config) -> bool:
    return bool(config.given("gated_mlp")) and config.flag("gated_mlp", True)


def _mtp(config: Config, layers: tuple[Layer, ...]) -> tuple[tuple[Layer, ...], ...]:
    """Return the layers ahead: the pattern given for them, or the last decoder layer again."""
    depth = config.depths("mtp_layers")
    if not depth:
        return ()
    if config.given("mtp_hybrid_pattern"):
        return (_hybrid_layers(config, "mtp_hybrid_pattern"),) * depth
    last = layers[-1]
    ratios = config.items("compress_ratios") or []
    if len(ratios) > len(layers):
        last = replace(last, mixer=_compressed_attention(config, ratios[len(layers)]))
    return ((last,),) * depth


def _layers(config: Config, gpt: bool) -> tuple[Layer, ...]:
    count = config.layers()
    mixers = _mixers(config, count, gpt)
    first = config.size("first_dense_layers", 0, low=0)
    every = config.size("moe_layer_freq", 1)
    sparse = config.given("num_experts")
    only_experts = config.text("arch", "dense") == "moe-layer-only"
    return tuple(
        Layer(
            mixer=None if only_experts else mixers[i],
            ffn=_experts(config)
            if sparse and i >= first and (i + 1) % every == 0
            else _mlp(config, gpt),
            norms="sandwich" if config.given("global_head_dim") else "pre",
        )
        for i in range(count)
    )


def _mlp(config: Config, bias: bool = False) -> Mlp:
    key = "dense_intermediate_size" if config.given("dense_intermediate_size") else ""
    return Mlp(
        ffn_hidden_size=config.size(key or "intermediate_size"), gated=_gated(config), bias=bias
    )


def _experts(config: Config) -> Moe:
    gated_shared = config.given("full_attention_interval")
    return Moe(
        num_experts=config.size("num_experts"),
        topk=config.size("experts_per_token"),
        ffn_hidden_size=config.size("moe_intermediate_size"),
        gated=_gated(config),
        shared_ffn_hidden_size=config.optional_size("shared_expert_intermediate_size"),
        shared_gate=gated_shared,
        expert_bias=config.flag("moe_bias", False),
        router_bias=config.flag("moe_bias", False),
        latent_size=config.optional_size("moe_latent_size"),
    )


def _mixers(config: Config, count: int, gpt: bool) -> list[Mixer]:
    if config.given("kv_lora_rank"):
        return [latent_attention(config.with_defaults(attention_bias=False, q_lora_rank=0))] * count
    ratios = config.items("compress_ratios")
    if ratios is not None:
        if len(ratios) < count:
            rule = f"It has one entry for each of the {count} layers."
            raise ModelError(config.name("compress_ratios"), len(ratios), rule, "Add the rest.")
        return [_compressed_attention(config, ratio) for ratio in ratios[:count]]
    full, windowed = _attention(config, gpt, window=0), _attention(config, gpt, window=1)
    if config.given("global_head_dim"):
        full = replace(
            full,
            head_dim=config.size("global_head_dim"),
            num_kv_heads=config.size("num_global_key_value_heads"),
        )
    if config.given("full_attention_interval"):
        every = config.size("full_attention_interval")
        return [delta_net(config) if (i + 1) % every else full for i in range(count)]
    if not config.given("attention_layer_types"):
        return [full] * count
    types = config.nested("attention_layer_types")
    every = max(1, count // types.size("full_attention"))
    return [windowed if (i + 1) % every else full for i in range(count)]


def _attention(config: Config, bias: bool = False, *, window: int, rope: bool = True) -> Attention:
    heads = config.size("num_attention_heads")
    has_bias = bias or config.flag("attention_bias", False)
    return Attention(
        num_heads=heads,
        num_kv_heads=config.size("num_key_value_heads", heads),
        head_dim=config.head_dim(config.size("hidden_size"), heads),
        qkv_bias=has_bias,
        out_bias=has_bias,
        qk_norm="head" if config.flag("qk_norm", False) else "",
        output_gate=config.flag("attention_output_gate", False),
        window=config.optional_size("sliding_window") if window else 0,
        rope=rope and not bias,
    )


def _compressed_attention(config: Config, ratio: Any) -> CompressedAttention:
    """Return one layer's attention; tokens compressed 1:4 are the ones that an indexer picks."""
    if ratio not in (0, 4, 128):
        rule = "A layer compresses 1:4, 1:128 or not at all (0)."
        raise ModelError(config.name("compress_ratios"), ratio, rule, "Use 0, 4 or 128.")
    return compressed_attention(config, ratio)


def _hybrid_layers(config: Config, key: str) -> tuple[Layer, ...]:
    """Return one layer per letter: M Mamba, * attention, - MLP, E experts; | ends a stage."""
    text = config.text(key).replace("|", "")
    for letter in text:
        if letter not in PATTERN:
            raise ModelError(
                config.name(key), letter, f"Its letters are {' '.join(PATTERN)}.", "Use those."
            )
    made = {letter: _hybrid_layer(config, PATTERN[letter]) for letter in dict.fromkeys(text)}
    return tuple(made[letter] for letter in text)


def _hybrid_layer(config: Config, word: str) -> Layer:
    match word:
        case "mamba":
            return Layer(
                mixer=Mamba(
                    num_heads=config.size("mamba_num_heads"),
                    head_dim=config.size("mamba_head_dim"),
                    state_size=config.size("ssm_state_size"),
                    num_groups=config.size("mamba_n_groups"),
                    conv_kernel=config.size("conv_kernel"),
                )
            )
        case "attention":
            return Layer(mixer=_attention(config, window=0, rope=False))
        case "mlp":
            return Layer(ffn=_mlp(config))
        case _:
            return Layer(ffn=_experts(config))
