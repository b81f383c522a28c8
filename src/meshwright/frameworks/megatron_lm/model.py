"""Rules of the model as a whole: layers, widths, biases, activation and normalisation."""

from __future__ import annotations

from meshwright.frameworks.megatron_lm.rules import (
    Settings,
    change,
    derive,
    error,
)

_REQUIRED = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")


def _missing(s: Settings) -> object:
    return next(({"field": n} for n in _REQUIRED if getattr(s, n) is None), None)


def _not_positive(s: Settings) -> object:
    given = ((n, getattr(s, n)) for n in (*_REQUIRED, "seq_length"))
    return next(({"field": n} for n, v in given if v is not None and v < 1), None)


def _ffn_default(s: Settings) -> object:
    if s.ffn_hidden_size is not None:
        return None
    if s.swiglu:
        return {"ffn_hidden_size": 8 * s.hidden_size // 192 * 64}
    return {"ffn_hidden_size": 4 * s.hidden_size}


RULES = (
    error(
        "MLM-ARG-layers_encoder",
        "validate_args:1305",
        "encoder_num_layers",
        lambda s: s.num_layers is not None and s.encoder_num_layers is not None,
        "The number of layers is given twice.",
        "Drop --encoder-num-layers.",
    ),
    error(
        "MLM-ARG-layers_given",
        "validate_args:1309",
        "num_layers",
        lambda s: s.num_layers is None and s.encoder_num_layers is None,
        "The number of layers is mandatory.",
        "Add --num-layers.",
        final=True,
    ),
    derive(
        "validate_args:1310",
        lambda s: s.num_layers is None and {"num_layers": s.encoder_num_layers},
    ),
    error(
        "MLM-ARG-required",
        "validate_args:1312",
        "hidden_size",
        _missing,
        "It is mandatory, as are layers, hidden size, heads and position embeddings.",
        "Give it.",
        final=True,
    ),
    error(
        "MLM-TC-model_positive",
        "transformer_config:9000",
        "hidden_size",
        _not_positive,
        "It is at least 1.",
        "Use 1 or more.",
    ),
    change(
        "MLM-ARG-ffn_default",
        "validate_args:1327",
        "ffn_hidden_size",
        _ffn_default,
        "Left out, the width of the MLP is {ffn_hidden_size}: 4*hidden, or 8/3*hidden rounded "
        "down to a multiple of 64 with SwiGLU.",
        "Write --ffn-hidden-size.",
        severity="note",
    ),
    change(
        "MLM-ARG-bias_gelu_off",
        "validate_args:1600",
        "bias_gelu_fusion",
        lambda s: not s.add_bias_linear and {"bias_gelu_fusion": False},
        "Without biases their fusion with GELU is off.",
        severity="note",
    ),
    change(
        "MLM-ARG-qkv_bias",
        "validate_args:1604",
        "add_qkv_bias",
        lambda s: s.add_bias_linear and {"add_qkv_bias": True},
        "Biases of linear layers, on by default, include those of query, key and value.",
        "Add --disable-bias-linear for a model without biases.",
        severity="note",
    ),
    error(
        "MLM-CFG-sq_relu",
        "config_from_args:321",
        "squared_relu",
        lambda s: (s.squared_relu or s.quick_geglu) and s.swiglu,
        "SwiGLU excludes other activations.",
        "Keep one of them.",
    ),
    error(
        "MLM-TC-mtp_hsm",
        "transformer_config:1417",
        "mtp_hsm",
        lambda s: s.mtp_hsm and (s.mtp_num_layers or 0) < 2,
        "Hidden state mixing needs two MTP layers.",
        "Use {write[mtp_num_layers=2]}.",
    ),
    error(
        "MLM-TC-bias_act",
        "transformer_config:2425",
        "squared_relu",
        lambda s: s.squared_relu and not s.swiglu and s.bias_gelu_fusion,
        "Only GELU and its gated kin are fused with their bias, which is on by default.",
        "Add --no-bias-gelu-fusion, or --disable-bias-linear.",
    ),
    error(
        "MLM-TC-te_act",
        "transformer_config:2447",
        "use_te_activation_func",
        lambda s: (
            s.use_te_activation_func and (s.bias_swiglu_fusion if s.swiglu else s.bias_gelu_fusion)
        ),
        "Transformer Engine's activation excludes the fusion of bias and activation, on by "
        "default.",
        "Turn the fusion off (--no-bias-swiglu-fusion or --no-bias-gelu-fusion).",
    ),
    error(
        "MLM-TC-res_rms",
        "transformer_config:2455",
        "normalization",
        lambda s: s.fused_residual_rmsnorm and s.normalization != "RMSNorm",
        "The fused residual norm is an RMSNorm, not {normalization}.",
        "Use {write[normalization=RMSNorm]}.",
    ),
)
