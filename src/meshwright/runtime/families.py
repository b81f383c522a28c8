"""The model types that the runtime computes, and what ``transformers`` assumes of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from meshwright.runtime.shape import Activation


@dataclass(frozen=True, kw_only=True)
class Family:
    """What a model type is, and what ``transformers`` assumes where its config says nothing.

    ``rope`` are the keys of rotary positions, ``window_rope`` those of layers with a window where
    they differ; ``interleaved`` pairs neighbouring features. ``unwindowed_turn`` False: where some
    layers have a window, the others do not turn. ``normalise`` is ``norm_topk_prob``, which the
    config may change unless ``fixed``. ``offset_norms`` have weights around 0 and go with
    embeddings times sqrt(h) (Gemma); ``multipliers`` are read for Granite. ``score_cap`` and
    ``logit_cap`` soften large values, ``query_scalar`` stands for d in 1/sqrt(d).
    """

    norm_eps: float = 1e-6
    theta: float = 10000.0
    rope: Mapping[str, Any] = field(default_factory=dict[str, Any])
    window_rope: Mapping[str, Any] | None = None
    interleaved: bool = False
    unwindowed_turn: bool = True
    activation: Activation = "silu"
    offset_norms: bool = False
    multipliers: bool = False
    query_scalar: float = 0.0
    score_cap: float = 0.0
    logit_cap: float = 0.0
    names: Literal["mixtral", "qwen", "deepseek", "gpt_oss"] = "qwen"
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = False
    fixed: bool = False
    routed_scaling_factor: float = 1.0
    group_score: Literal["max", "top2"] = "max"
    groups: tuple[int, int] = (1, 1)
    aux_loss_coef: float = 0.0


_DEEPSEEK_V3 = Family(
    names="deepseek",
    scoring="sigmoid",
    normalise=True,
    routed_scaling_factor=2.5,
    group_score="top2",
    groups=(8, 4),
)
_GEMMA = Family(activation="gelu_tanh", offset_norms=True)
_GLM = Family(norm_eps=1.5625e-7, rope={"partial_rotary_factor": 0.5}, interleaved=True)

FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "ministral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "olmo2": Family(norm_eps=1e-5),
    "olmo3": Family(norm_eps=1e-5, theta=5e5, window_rope={"rope_type": "default"}),
    "phi3": Family(norm_eps=1e-5),
    "seed_oss": Family(),
    "internlm3": Family(norm_eps=1e-5),
    "cwm": Family(
        norm_eps=1e-5,
        theta=1e6,
        rope={"rope_type": "llama3", "factor": 16.0, "original_max_position_embeddings": 8192},
    ),
    "smollm3": Family(theta=2e6),
    "exaone4": Family(norm_eps=1e-5, unwindowed_turn=False),
    "ernie4_5": Family(norm_eps=1e-5, theta=5e5, interleaved=True),
    "granite": Family(multipliers=True),
    "glm": _GLM,
    "glm4": _GLM,
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, query_scalar=256.0, score_cap=50.0, logit_cap=30.0),
    "gemma3_text": replace(
        _GEMMA,
        query_scalar=256.0,
        theta=1e6,
        window_rope={"rope_type": "default", "rope_theta": 1e4},
    ),
    "mixtral": Family(
        norm_eps=1e-5, theta=1e6, names="mixtral", normalise=True, fixed=True, aux_loss_coef=0.001
    ),
    "qwen2_moe": Family(aux_loss_coef=0.001),
    "qwen3_moe": Family(aux_loss_coef=0.001),
    "olmoe": Family(norm_eps=1e-5, aux_loss_coef=0.01),
    "flex_olmo": Family(theta=5e5, aux_loss_coef=0.01),
    "gpt_oss": Family(
        norm_eps=1e-5,
        theta=1.5e5,
        rope={
            "rope_type": "yarn",
            "factor": 32.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        activation="clamped_swish",
        names="gpt_oss",
        normalise=True,
        fixed=True,
        aux_loss_coef=0.001,
    ),
    "deepseek_v2": Family(names="deepseek", fixed=True),
    "deepseek_v3": _DEEPSEEK_V3,
    "kimi_k2": replace(_DEEPSEEK_V3, routed_scaling_factor=2.827, groups=(1, 1)),
    "glm4_moe_lite": replace(_DEEPSEEK_V3, norm_eps=1e-5, routed_scaling_factor=1.8, groups=(1, 1)),
    "glm4_moe": replace(
        _DEEPSEEK_V3,
        norm_eps=1e-5,
        rope={"partial_rotary_factor": 0.5},
        routed_scaling_factor=1.0,
        groups=(1, 1),
    ),
    "dots1": replace(_DEEPSEEK_V3, normalise=False, routed_scaling_factor=1.0, groups=(1, 1)),
    "minimax_m2": Family(
        theta=5e6,
        names="mixtral",
        scoring="sigmoid",
        normalise=True,
        fixed=True,
        aux_loss_coef=0.001,
    ),
}
"""By ``model_type``. Rope keys that a config gives replace those that stand here."""
