"""What most Hugging Face configs spell alike: grouped-query attention, windows, the decoder."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from meshwright.describe.config import Config
from meshwright.describe.decoder import build_decoder
from meshwright.describe.facts import (
    Attention,
    CompressedAttention,
    Decoder,
    DeltaNet,
    FeedForward,
    LatentAttention,
    Layer,
    Mixer,
    Mlp,
    Moe,
)
from meshwright.describe.model import Model

LAYER_TYPES = {"full_attention": False, "sliding_attention": True, "chunked_attention": True}
"""The attention words of ``layer_types``, and whether such a layer has a window."""

QWEN_HYBRID = {
    "num_attention_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "full_attention_interval": 4,
}
"""What the configs of all Qwen hybrids leave out alike."""


def attention(config: Config, **facts: Any) -> Attention:
    """Return attention from the common keys; ``facts`` adds or overrides fields."""
    heads = config.size("num_attention_heads")
    if "num_kv_heads" not in facts:
        default = config.defaults.get("num_key_value_heads", heads)
        nulled = config.is_null("num_key_value_heads")
        facts["num_kv_heads"] = config.size("num_key_value_heads", heads if nulled else default)
    head_dim = config.head_dim(config.size("hidden_size"), heads)
    return Attention(num_heads=heads, head_dim=head_dim, **facts)


def mlp(config: Config, **facts: Any) -> Mlp:
    """Return the feed-forward network from ``intermediate_size``."""
    return Mlp(ffn_hidden_size=config.size("intermediate_size"), **facts)


def windows(config: Config, pattern: list[bool], key: str = "sliding_window") -> list[int]:
    """Return the window of every layer, 0 where it attends to all tokens.

    ``layer_types`` decides where it is given, else ``pattern`` (True: a window).
    """
    words = config.choices("layer_types", LAYER_TYPES, len(pattern))
    chosen = pattern if words is None else [LAYER_TYPES[word] for word in words]
    if not any(chosen):
        return [0] * len(chosen)
    window = config.nullable_size(key)
    return [window if has_window else 0 for has_window in chosen]


def decoder(config: Config, layers: tuple[Layer, ...], **facts: Any) -> Model:
    """Return the model from the common keys; ``facts`` adds or overrides fields."""
    given: dict[str, Any] = {
        "model_type": config.text("model_type", "text"),
        "hidden_size": config.size("hidden_size"),
        "vocab_size": config.size("vocab_size"),
        "max_seq_len": config.size("max_position_embeddings"),
        "tie_word_embeddings": config.flag("tie_word_embeddings"),
    }
    return build_decoder(Decoder(layers=layers, **(given | facts)))


def upper_windows(config: Config) -> list[int]:
    """Return the windows of Qwen2 and Qwen3: off, or on from layer ``max_window_layers``."""
    num_layers = config.layers()
    if not config.flag("use_sliding_window", False):
        return [0] * num_layers
    first = config.size("max_window_layers", 28, low=0)
    with_default = config.with_defaults(sliding_window=4096)
    return windows(with_default, [i >= first for i in range(num_layers)])


def sparse_layers(config: Config) -> list[bool]:
    """Return which layers of a Qwen mixture have experts."""
    num_layers = config.layers()
    dense = config.indices("mlp_only_layers", num_layers) or ()
    step = config.size("decoder_sparse_step")
    return [i not in dense and (i + 1) % step == 0 for i in range(num_layers)]


def _linear_layers(config: Config) -> list[bool]:
    """Return which layers of a Qwen hybrid have linear attention."""
    num_layers = config.layers()
    words = config.choices("layer_types", ("linear_attention", "full_attention"), num_layers)
    if words is not None:
        return [word == "linear_attention" for word in words]
    every = config.size("full_attention_interval")
    return [(i + 1) % every != 0 for i in range(num_layers)]


def qwen_hybrid(config: Config, ffns: Iterable[FeedForward]) -> Model:
    """Return a Qwen hybrid: gated delta nets and some gated attention; ``ffns`` has one a layer."""
    bias = config.flag("attention_bias")
    full = attention(config, qkv_bias=bias, out_bias=bias, qk_norm="head", output_gate=True)
    linear = delta_net(config)
    layers = tuple(
        Layer(mixer=linear if is_linear else full, ffn=ffn)
        for is_linear, ffn in zip(_linear_layers(config), ffns, strict=True)
    )
    return decoder(config, layers)


def qwen_experts(config: Config) -> Moe:
    """Return the experts of a Qwen mixture with a gated shared expert."""
    return Moe(
        num_experts=config.size("num_experts", also="num_local_experts"),
        topk=config.size("num_experts_per_tok"),
        ffn_hidden_size=config.size("moe_intermediate_size"),
        shared_ffn_hidden_size=config.size("shared_expert_intermediate_size"),
        shared_gate=True,
    )


def delta_net(config: Config) -> DeltaNet:
    """Return the gated delta net of a Qwen hybrid."""
    return DeltaNet(
        num_value_heads=config.size("linear_num_value_heads"),
        num_key_heads=config.size("linear_num_key_heads"),
        key_head_dim=config.size("linear_key_head_dim"),
        value_head_dim=config.size("linear_value_head_dim"),
        conv_kernel=config.size("linear_conv_kernel_dim"),
    )


def latent_attention(config: Config) -> LatentAttention:
    """Return the latent attention of DeepSeek; a null ``q_lora_rank`` projects in one step."""
    return LatentAttention(
        num_heads=config.size("num_attention_heads"),
        q_lora_rank=config.nullable_size("q_lora_rank"),
        kv_lora_rank=config.size("kv_lora_rank"),
        qk_nope_head_dim=config.size("qk_nope_head_dim"),
        qk_rope_head_dim=config.size("qk_rope_head_dim"),
        v_head_dim=config.size("v_head_dim"),
        bias=config.flag("attention_bias"),
        index_heads=config.optional_size("index_n_heads"),
        index_head_dim=config.optional_size("index_head_dim"),
        index_topk=config.optional_size("index_topk"),
    )


def compressed_attention(config: Config, ratio: int) -> CompressedAttention:
    """Return DeepSeek-V4's attention; an indexer picks among tokens compressed 1:4."""
    indexed = ratio == 4
    return CompressedAttention(
        num_heads=config.size("num_attention_heads"),
        head_dim=config.size("head_dim"),
        q_lora_rank=config.size("q_lora_rank"),
        o_lora_rank=config.size("o_lora_rank"),
        o_groups=config.size("o_groups"),
        window=config.size("sliding_window"),
        compress_ratio=ratio,
        index_heads=config.size("index_n_heads") if indexed else 0,
        index_head_dim=config.size("index_head_dim") if indexed else 0,
        index_topk=config.size("index_topk") if indexed else 0,
    )


def deepseek_experts(config: Config, **facts: Any) -> Moe:
    """Return experts as DeepSeek's configs spell them; ``facts`` adds or overrides fields."""
    expert_ffn = config.size("moe_intermediate_size")
    return Moe(
        num_experts=config.size("n_routed_experts"),
        topk=config.size("num_experts_per_tok"),
        ffn_hidden_size=expert_ffn,
        shared_ffn_hidden_size=expert_ffn * config.optional_size("n_shared_experts"),
        **facts,
    )


def sparse_decoder(config: Config, mixer: Mixer) -> Model:
    """Return a decoder of DeepSeek-V3's kind: dense layers, then experts, MTP.

    ``mlp_layer_types`` (dense, sparse) overrides ``first_k_dense_replace``.
    """
    moe = Layer(mixer=mixer, ffn=deepseek_experts(config, correction_bias=True))
    dense = Layer(mixer=mixer, ffn=mlp(config))
    num_layers = config.layers()
    words = config.choices("mlp_layer_types", ("dense", "sparse"), num_layers)
    if words is None:
        num_dense = min(config.size("first_k_dense_replace", low=0), num_layers)
        words = ["dense"] * num_dense + ["sparse"] * (num_layers - num_dense)
    return decoder(
        config,
        tuple(moe if word == "sparse" else dense for word in words),
        mtp=((moe,),) * config.depths(),
    )


def gpt_layer(
    heads: int, head_dim: int, ffn_hidden_size: int, *, kv_heads: int = 0, bias: bool = True
) -> Layer:
    """Return a layer of GPT-2's kind: no rotary positions, no gate; ``kv_heads`` 0 is ``heads``."""
    return Layer(
        mixer=Attention(
            num_heads=heads,
            num_kv_heads=kv_heads or heads,
            head_dim=head_dim,
            qkv_bias=bias,
            out_bias=bias,
            rope=False,
        ),
        ffn=Mlp(ffn_hidden_size=ffn_hidden_size, gated=False, bias=bias),
    )
