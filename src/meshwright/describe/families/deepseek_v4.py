"""DeepSeek-V4: compressed attention, hyper-connections, small experts and a shared one."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer, Moe
from meshwright.describe.model import Model
from meshwright.describe.standard import compressed_attention, decoder

SPARSE, HEAVY, WINDOW = (
    "compressed_sparse_attention",
    "heavily_compressed_attention",
    "sliding_attention",
)
RATIOS = {SPARSE: 4, HEAVY: 128, WINDOW: 0}


def build(config: Config) -> Model:
    """Return the model of a ``deepseek_v4`` config; layers alternate where it does not say."""
    config = config.with_defaults(
        hidden_size=4096,
        num_hidden_layers=43,
        num_attention_heads=64,
        head_dim=512,
        q_lora_rank=1024,
        o_lora_rank=1024,
        o_groups=8,
        sliding_window=128,
        index_n_heads=64,
        index_head_dim=128,
        index_topk=512,
        hc_mult=4,
        n_routed_experts=256,
        num_experts_per_tok=6,
        n_shared_experts=1,
        moe_intermediate_size=2048,
        num_hash_layers=3,
        num_nextn_predict_layers=1,
        vocab_size=129280,
        max_position_embeddings=1048576,
        tie_word_embeddings=False,
    )
    num_layers = config.layers()
    words = config.choices("layer_types", (SPARSE, HEAVY, WINDOW), num_layers)
    if words is None:
        words = [HEAVY if i < 2 or i % 2 == 0 else SPARSE for i in range(num_layers)]
    routed = config.choices("mlp_layer_types", ("hash_moe", "moe"), num_layers)
    if routed is None:
        hashed = min(config.size("num_hash_layers", low=0), num_layers)
        routed = ["hash_moe"] * hashed + ["moe"] * (num_layers - hashed)
    layers = tuple(
        Layer(
            mixer=compressed_attention(config, RATIOS[word]),
            ffn=_experts(config, hashed=kind == "hash_moe"),
        )
        for word, kind in zip(words, routed, strict=True)
    )
    ahead = Layer(
        mixer=compressed_attention(config, RATIOS[WINDOW]), ffn=_experts(config, hashed=False)
    )
    return decoder(
        config,
        layers,
        residual_streams=config.size("hc_mult"),
        mtp=((ahead,),) * config.depths(),
    )


def _experts(config: Config, *, hashed: bool) -> Moe:
    """Return the experts; hashed routing looks them up by token and has no correction bias."""
    ffn = config.size("moe_intermediate_size")
    return Moe(
        num_experts=config.size("n_routed_experts"),
        topk=config.size("num_experts_per_tok"),
        ffn_hidden_size=ffn,
        shared_ffn_hidden_size=ffn * config.optional_size("n_shared_experts"),
        shared_bias=config.flag("mlp_bias", False),
        correction_bias=not hashed,
    )
