"""Rules of the pipeline: stages, virtual stages, layouts, uneven splits, placement, schedule."""

from __future__ import annotations

from typing import Any

from meshwright.errors import LayoutError
from meshwright.frameworks.megatron_lm.rules import (
    Rule,
    Settings,
    change,
    derive,
    divisors_near,
    error,
    indivisible,
    warning,
)
from meshwright.parallel.placement import read_pipeline_layout

_HYBRID_LAYERS = set("MG*D+-E")


def _first(s: Settings) -> int | None:
    return s.decoder_first_pipeline_num_layers


def _last(s: Settings) -> int | None:
    return s.decoder_last_pipeline_num_layers


def _uneven(s: Settings) -> bool:
    return _first(s) is not None or _last(s) is not None


def _stages(s: Settings) -> tuple[str, ...]:
    if s.pipeline_model_parallel_layout is None:
        return ()
    try:
        return read_pipeline_layout(s.pipeline_model_parallel_layout)
    except LayoutError:
        return ()


def _unreadable_layout(s: Settings) -> object:
    if s.pipeline_model_parallel_layout is None:
        return None
    try:
        read_pipeline_layout(s.pipeline_model_parallel_layout)
    except LayoutError as refused:
        return {"why": refused.rule, "how": refused.remedy}
    return None


def _layout_stages(s: Settings) -> object:
    stages = _stages(s)
    return len(stages) % s.pp and {"stages": len(stages)}


# Patterns of hybrid models: letters for layers, "|" between stages, "/" before MTP depths.


def _main_pattern(s: Settings) -> str:
    return (s.hybrid_layer_pattern or "").split("/")[0]


def _hybrid_override(s: Settings) -> object:
    return (
        s.hybrid_layer_pattern is None
        and s.hybrid_override_pattern is not None
        and {"hybrid_layer_pattern": s.hybrid_override_pattern}
    )


def _hybrid_letters(s: Settings) -> object:
    unknown = sorted(set(_main_pattern(s)) - _HYBRID_LAYERS - {"|"})
    return unknown and {"letter": unknown[0]}


def _hybrid_mixes_attention(s: Settings) -> object:
    pattern = set(_main_pattern(s))
    return "*" in pattern and pattern & {"D", "+"}


def _hybrid_layers(s: Settings) -> object:
    if s.hybrid_layer_pattern is None:
        return None
    return {"num_layers": len(_main_pattern(s).replace("|", ""))}


def _hybrid_with(setting: str, reason: str) -> Rule:
    id, line = _HYBRID_RULES[setting]
    return error(
        id,
        f"validate_args:{line}",
        setting,
        lambda s: (
            s.hybrid_layer_pattern is not None
            and getattr(s, setting) not in (None, False)
            and (reason != _BARS or "|" in _main_pattern(s))
        ),
        f"{reason} --hybrid-layer-pattern.",
        f"Drop {{write[{setting}]}}.",
    )


_BARS = "The stages are already written with '|' in"
_STAGES = "Stages and virtual stages are written with '|' in"
_HYBRID_RULES = {
    "decoder_first_pipeline_num_layers": ("MLM-ARG-hyb_first", 804),
    "decoder_last_pipeline_num_layers": ("MLM-ARG-hyb_last", 809),
    "num_layers_per_virtual_pipeline_stage": ("MLM-ARG-hyb_lpv", 814),
    "num_virtual_stages_per_pipeline_rank": ("MLM-ARG-hyb_vpp", 820),
    "pipeline_model_parallel_layout": ("MLM-ARG-hyb_layout", 825),
    "account_for_embedding_in_pipeline_split": ("MLM-ARG-hyb_emb", 829),
    "account_for_loss_in_pipeline_split": ("MLM-ARG-hyb_loss", 834),
}


def _hybrid_segments(s: Settings) -> int:
    return _main_pattern(s).count("|") + 1 if s.hybrid_layer_pattern is not None else 0


def _hybrid_segments_wrong(s: Settings) -> object:
    segments = _hybrid_segments(s)
    return segments > 1 and segments % s.pp and {"segments": segments}


def _hybrid_mtp(s: Settings) -> object:
    depths = (s.hybrid_layer_pattern or "").split("/")[1:]
    if not depths or not any(depths):
        return None
    return {"mtp_num_layers": len(depths)}


def _ways_to_interleave(s: Settings) -> list[str]:
    names = (
        "num_layers_per_virtual_pipeline_stage",
        "num_virtual_stages_per_pipeline_rank",
        "pipeline_model_parallel_layout",
    )
    return [n for n in names if getattr(s, n) is not None]


def _by_layers(s: Settings) -> bool:
    return (
        s.pipeline_model_parallel_layout is None
        and s.num_layers_per_virtual_pipeline_stage is not None
        and s.num_virtual_stages_per_pipeline_rank is None
    )


def _chunk_layers_wrong(s: Settings) -> object:
    if not _by_layers(s) or s.num_layers is None or s.counted_layers % s.pp:
        return None
    per_rank = s.counted_layers // s.pp
    each = s.num_layers_per_virtual_pipeline_stage
    return indivisible(per_rank, each) and {
        "counted": s.counted_layers,
        "per_rank": per_rank,
        "nearest": divisors_near(per_rank, each),
    }


def _virtual_stages(s: Settings) -> dict[str, Any]:
    stages: int | None = None
    if s.pipeline_model_parallel_layout is not None:
        stages = len(_stages(s)) // s.pp
    elif _by_layers(s):
        each = s.num_layers_per_virtual_pipeline_stage
        stages = s.counted_layers // s.pp // each if s.num_layers and each else None
    elif s.num_virtual_stages_per_pipeline_rank is not None:
        stages = s.num_virtual_stages_per_pipeline_rank
    elif s.hybrid_layer_pattern is not None and _hybrid_segments(s) > s.pp:
        stages = _hybrid_segments(s) // s.pp
        stages = None if _hybrid_segments(s) == 1 else stages
    return {"virtual_pipeline_model_parallel_size": stages}


def _layers_over_ranks(s: Settings) -> object:
    plain = not _ways_to_interleave(s) and not _uneven(s) and s.hybrid_layer_pattern is None
    return (
        plain
        and s.num_layers is not None
        and s.counted_layers % s.pp
        and {
            "counted": s.counted_layers,
            "pp_choices": divisors_near(s.counted_layers, s.pp),
        }
    )


# The uneven split: some layers on the first and the last rank, the rest even in between.


def _middle(s: Settings) -> tuple[int, int]:
    first, last = _first(s), _last(s)
    layers = s.num_layers - (first or 0) - (last or 0)
    return layers, s.pp - (first is not None) - (last is not None)


def _split_unevenly(s: Settings) -> bool:
    return _uneven(s) and s.pipeline_model_parallel_layout is None


def _middle_mismatch(s: Settings) -> object:
    layers, ranks = _middle(s)
    return bool(layers) != bool(ranks) and {"layers": layers, "ranks": ranks}


def _middle_indivisible(s: Settings) -> object:
    layers, ranks = _middle(s)
    return ranks and layers % ranks and {"layers": layers, "ranks": ranks}


def _middle_not_interleaved(s: Settings) -> object:
    layers, ranks = _middle(s)
    if not ranks or layers % ranks or s.vpp is None:
        return None
    return indivisible(layers // ranks, s.vpp) and {"each": layers // ranks}


def _accounted(s: Settings) -> bool:
    counted = s.account_for_embedding_in_pipeline_split or s.account_for_loss_in_pipeline_split
    return bool(counted) and not _uneven(s) and s.pipeline_model_parallel_layout is None


def _accounted_indivisible(s: Settings) -> object:
    return (
        _accounted(s)
        and s.counted_layers % s.pp
        and {"counted": s.counted_layers, "pp_choices": divisors_near(s.counted_layers, s.pp)}
    )


def _accounted_not_interleaved(s: Settings) -> object:
    if not _accounted(s) or s.vpp is None or s.counted_layers % s.pp:
        return None
    each = s.counted_layers // s.pp
    return indivisible(each, s.vpp) and {
        "counted": s.counted_layers,
        "each": each,
        "vpp_choices": divisors_near(each, s.vpp),
    }


# The layout string, stage by stage.


def _letters(s: Settings) -> str:
    return "".join(_stages(s))


def _layers_in_layout(s: Settings) -> object:
    count = _letters(s).count("t")
    return bool(_stages(s)) and count != s.num_layers and {"count": count}


def _mtp_in_layout(s: Settings) -> object:
    count = _letters(s).count("m")
    return bool(_stages(s)) and count != (s.mtp_num_layers or 0) and {"count": count}


def _mtp_stages(s: Settings) -> list[int]:
    return [i for i, stage in enumerate(_stages(s)) if "m" in stage]


def _mtp_before_last_chunk(s: Settings) -> bool:
    return any(i < len(_stages(s)) - s.pp for i in _mtp_stages(s))


def _detected_chunks(s: Settings) -> object:
    chunks = len(_stages(s)) // s.pp
    return bool(_stages(s)) and s.vpp is not None and s.vpp != chunks and {"chunks": chunks}


# Placement at model build, and the schedule at the first step.


def _placed_evenly(s: Settings) -> bool:
    return (
        not _uneven(s)
        and s.pipeline_model_parallel_layout is None
        and s.hybrid_layer_pattern is None
    )


def _not_even(s: Settings) -> object:
    return (
        _placed_evenly(s)
        and s.counted_layers % s.pp
        and {"counted": s.counted_layers, "pp_choices": divisors_near(s.counted_layers, s.pp)}
    )


def _chunks_not_even(s: Settings) -> object:
    if not _placed_evenly(s) or s.vpp is None or s.pp <= 1 or s.counted_layers % s.pp:
        return None
    each = s.counted_layers // s.pp
    return indivisible(each, s.vpp) and {
        "each": each,
        "vpp_choices": divisors_near(each, s.vpp),
    }


def _no_room(s: Settings) -> object:
    if not _placed_evenly(s) or s.counted_layers % s.pp:
        return False
    chunk = s.counted_layers // s.pp // (s.vpp or 1)
    both_here = (s.vpp or 1) * s.pp == 1
    embedding = bool(s.account_for_embedding_in_pipeline_split)
    loss = bool(s.account_for_loss_in_pipeline_split)
    return chunk < (embedding + loss if both_here else max(embedding, loss))


def _group(s: Settings) -> int:
    return s.microbatch_group_size_per_vp_stage


def _group_remainder(s: Settings) -> object:
    if s.vpp is None or _group(s) <= 0:
        return None
    rest = s.num_microbatches % _group(s)
    return 0 < rest < s.pp and {"rest": rest}


def _few_microbatches(s: Settings) -> object:
    return s.vpp is None and s.num_microbatches < s.pp


RULES = (
    error(
        "MLM-ARG-hyb_override",
        "validate_args:746",
        "hybrid_override_pattern",
        lambda s: s.hybrid_override_pattern is not None and s.hybrid_layer_pattern is not None,
        "--hybrid-override-pattern is the old name of --hybrid-layer-pattern.",
        "Drop it.",
    ),
    derive("validate_args:747", _hybrid_override),
    error(
        "MLM-ARG-hyb_letters",
        "validate_args:795",
        "hybrid_layer_pattern",
        _hybrid_letters,
        "{letter!r} is no layer: M Mamba, G gated delta net, * attention, D sparse attention, "
        "+ latent attention, - MLP, E experts.",
        "Use these letters, and '|' between stages.",
        final=True,
    ),
    error(
        "MLM-ARG-hyb_attention",
        "validate_args:796",
        "hybrid_layer_pattern",
        _hybrid_mixes_attention,
        "Attention (*) excludes latent (+) and sparse (D) attention in one model.",
        "Use one kind.",
    ),
    change(
        "MLM-ARG-hyb_layers",
        "validate_args:797",
        "num_layers",
        _hybrid_layers,
        "The number of layers comes from the pattern: {num_layers}.",
        "Drop --num-layers, or make the pattern as long.",
    ),
    _hybrid_with("decoder_first_pipeline_num_layers", _BARS),
    _hybrid_with("decoder_last_pipeline_num_layers", _BARS),
    _hybrid_with("num_layers_per_virtual_pipeline_stage", _STAGES),
    _hybrid_with("num_virtual_stages_per_pipeline_rank", _STAGES),
    _hybrid_with("pipeline_model_parallel_layout", _STAGES),
    _hybrid_with("account_for_embedding_in_pipeline_split", _STAGES),
    _hybrid_with("account_for_loss_in_pipeline_split", _STAGES),
    error(
        "MLM-ARG-hyb_segments",
        "validate_args:849",
        "hybrid_layer_pattern",
        _hybrid_segments_wrong,
        "The pattern has {segments} stages; they must be a multiple of pp = {pp}.",
        "Write pp, or a multiple of it, stages separated by '|'.",
        final=True,
    ),
    derive("validate_args:870", _hybrid_mtp),
    error(
        "MLM-ARG-mtp_pos",
        "validate_args:883",
        "position_embedding_type",
        lambda s: s.mtp_num_layers and s.position_embedding_type not in ("rope", "none"),
        "Multi-token prediction works with rotary or no position embedding, not "
        "{position_embedding_type}.",
        "Use --position-embedding-type rope.",
    ),
    change(
        "MLM-ARG-mtp_hsm_off",
        "validate_args:894",
        "mtp_hsm",
        lambda s: s.mtp_hsm and (s.mtp_num_layers or 0) < 2 and {"mtp_hsm": False},
        "Hidden state mixing needs two MTP layers and is turned off.",
        "Drop --mtp-hsm, or use --mtp-num-layers 2.",
    ),
    error(
        "MLM-ARG-vpp_exclusive",
        "validate_args:928",
        "num_virtual_stages_per_pipeline_rank",
        lambda s: len(_ways_to_interleave(s)) > 1,
        "Virtual stages are given once: by layers a virtual stage, by stages a rank, or by a "
        "layout.",
        "Keep one of --num-layers-per-virtual-pipeline-stage, "
        "--num-virtual-stages-per-pipeline-rank and --pipeline-model-parallel-layout.",
        final=True,
    ),
    error(
        "MLM-LAYOUT-chars",
        "validate_args:940",
        "pipeline_model_parallel_layout",
        _unreadable_layout,
        "{why}",
        "{how}",
        final=True,
    ),
    error(
        "MLM-ARG-layout_stages",
        "validate_args:945",
        "pipeline_model_parallel_layout",
        _layout_stages,
        "The layout has {stages} stages; they must be a multiple of pp = {pp}.",
        "Write pp*vpp stages.",
        final=True,
    ),
    error(
        "MLM-ARG-lpv_uneven",
        "validate_args:955",
        "num_layers_per_virtual_pipeline_stage",
        lambda s: _by_layers(s) and _uneven(s),
        "With uneven stages the layers of a virtual stage differ.",
        "Use --num-virtual-stages-per-pipeline-rank.",
    ),
    error(
        "MLM-ARG-lpv_layers_pp",
        "validate_args:968",
        "num_layers",
        lambda s: (
            _by_layers(s)
            and not _uneven(s)
            and s.num_layers is not None
            and s.counted_layers % s.pp
            and {
                "counted": s.counted_layers,
                "pp_choices": divisors_near(s.counted_layers, s.pp),
            }
        ),
        "{counted} layers, embedding and loss included where they count, do not split over "
        "pp = {pp}.",
        "Use pp = {pp_choices}, or a layout.",
    ),
    error(
        "MLM-ARG-lpv_div",
        "validate_args:972",
        "num_layers_per_virtual_pipeline_stage",
        _chunk_layers_wrong,
        "The {per_rank} layers of a rank ({counted} over {pp}) must be a multiple of "
        "{num_layers_per_virtual_pipeline_stage}.",
        "Choose from {nearest}.",
    ),
    derive("validate_args:976", _virtual_stages),
    change(
        "MLM-ARG-vpp_one_none",
        "validate_args:978",
        "virtual_pipeline_model_parallel_size",
        lambda s: s.vpp == 1 and {"virtual_pipeline_model_parallel_size": None},
        "One virtual stage a rank is the plain 1F1B schedule: interleaving is off.",
        "Use two virtual stages or more, or drop the flag.",
        severity="note",
    ),
    error(
        "MLM-ARG-layers_pp",
        "validate_args:997",
        "num_layers",
        _layers_over_ranks,
        "{counted} layers, embedding and loss included where they count, do not split over "
        "pp = {pp}.",
        "Use pp = {pp_choices}, --decoder-first-pipeline-num-layers and "
        "--decoder-last-pipeline-num-layers, or --pipeline-model-parallel-layout.",
    ),
    error(
        "MLM-ARG-vpp_pp1",
        "validate_args:1002",
        "num_virtual_stages_per_pipeline_rank",
        lambda s: s.vpp is not None and s.overlap_p2p_comm and s.pp <= 1,
        "Interleaving ({virtual_pipeline_model_parallel_size} virtual stages) needs pp of at "
        "least 2.",
        "Use --pipeline-model-parallel-size 2 or more, or drop the virtual stages.",
    ),
    error(
        "MLM-ARG-vpp_pp2_nooverlap",
        "validate_args:1006",
        "overlap_p2p_comm",
        lambda s: s.vpp is not None and not s.overlap_p2p_comm and s.pp <= 2,
        "Interleaving without overlapped p2p needs pp > 2 (pp is {pp}).",
        "Drop --no-overlap-p2p-communication.",
    ),
    change(
        "MLM-ARG-p2p_off",
        "validate_args:1012",
        "overlap_p2p_comm",
        lambda s: s.vpp is None and {"overlap_p2p_comm": False, "align_param_gather": False},
        "Without interleaving, overlapped p2p and aligned parameter gather are off.",
        severity="note",
    ),
    error(
        "MLM-ARG-infthr_pp",
        "validate_args:1856",
        "inference_batch_times_seqlen_threshold",
        lambda s: s.inference_batch_times_seqlen_threshold > -1 and s.pp <= 1,
        "The inference threshold splits batches for the pipeline; pp is {pp}.",
        "Drop --inference-batch-times-seqlen-threshold.",
    ),
    error(
        "MLM-ARG-infthr_graph",
        "validate_args:1858",
        "inference_batch_times_seqlen_threshold",
        lambda s: s.inference_batch_times_seqlen_threshold > -1 and s.cuda_graph_impl != "none",
        "Microbatched inference excludes CUDA graphs.",
        "Use --cuda-graph-impl none.",
    ),
    derive(
        "config_from_args:330",
        lambda s: {
            "pipeline_dtype": "float16" if s.fp16 else "bfloat16" if s.bf16 else "float32",
            "batch_p2p_comm": not s.overlap_p2p_comm,
        },
    ),
    error(
        "MLM-MPC-defer_pp",
        "transformer_config:546",
        "defer_embedding_wgrad_compute",
        lambda s: s.defer_embedding_wgrad_compute and s.pp == 1,
        "Deferring the embedding gradient fills pipeline bubbles: it needs pp > 1.",
        "Drop {write[defer_embedding_wgrad_compute]}.",
    ),
    error(
        "MLM-MPC-defer_gaf",
        "transformer_config:551",
        "defer_embedding_wgrad_compute",
        lambda s: s.defer_embedding_wgrad_compute and not s.gradient_accumulation_fusion,
        "Deferring the embedding gradient needs gradient accumulation fusion.",
        "Keep {write[gradient_accumulation_fusion=true]}.",
    ),
    error(
        "MLM-MPC-defer_lim",
        "transformer_config:556",
        "wgrad_deferral_limit",
        lambda s: s.defer_embedding_wgrad_compute and s.wgrad_deferral_limit < 0,
        "The limit of deferred microbatches is 0 (all) or more, not {wgrad_deferral_limit}.",
        "Use {write[wgrad_deferral_limit=0]}.",
    ),
    change(
        "MLM-MPC-group_default",
        "transformer_config:568",
        "microbatch_group_size_per_vp_stage",
        lambda s: (
            s.microbatch_group_size_per_vp_stage is None
            and {"microbatch_group_size_per_vp_stage": s.pp}
        ),
        "Left out, {pp} (pp) microbatches in a row run on one virtual stage.",
        severity="note",
    ),
    error(
        "MLM-MPC-warm_flush",
        "transformer_config:572",
        "overlap_p2p_comm_warmup_flush",
        lambda s: s.overlap_p2p_comm_warmup_flush and (not s.overlap_p2p_comm or s.batch_p2p_comm),
        "Overlapping warm-up and flush needs overlapped, not batched, p2p, hence interleaving.",
        "Add virtual stages, or drop {write[overlap_p2p_comm_warmup_flush]}.",
    ),
    change(
        "MLM-TC-pipe_fp32",
        "transformer_config:1430",
        "pipeline_dtype",
        lambda s: s.fp32_residual_connection and {"pipeline_dtype": "float32"},
        "An fp32 residual stream makes the messages between stages fp32: twice the bytes.",
        "Count it, or drop {write[fp32_residual_connection]}.",
    ),
    error(
        "MLM-TC-uneven_acc",
        "transformer_config:2235",
        "decoder_first_pipeline_num_layers",
        lambda s: (
            _uneven(s)
            and (s.account_for_embedding_in_pipeline_split or s.account_for_loss_in_pipeline_split)
        ),
        "Uneven stages exclude counting the embedding or the loss as a layer.",
        "Use one of the two, or a layout.",
    ),
    error(
        "MLM-TC-layout_conflict",
        "transformer_config:2252",
        "pipeline_model_parallel_layout",
        lambda s: (
            s.pipeline_model_parallel_layout is not None
            and (
                _uneven(s)
                or s.account_for_embedding_in_pipeline_split
                or s.account_for_loss_in_pipeline_split
            )
        ),
        "A layout says where everything sits: it excludes uneven stages and counting the "
        "embedding or the loss.",
        "Keep the layout alone.",
    ),
    error(
        "MLM-TC-layout_vpp",
        "transformer_config:2280",
        "virtual_pipeline_model_parallel_size",
        _detected_chunks,
        "The layout has {chunks} virtual stages a rank, not "
        "{virtual_pipeline_model_parallel_size}.",
        "Leave the virtual stages out.",
    ),
    error(
        "MLM-LAYOUT-first_embedding",
        "transformer_config:2290",
        "pipeline_model_parallel_layout",
        lambda s: bool(_stages(s)) and not _letters(s).startswith("E"),
        "The first letter of a layout is E, the embedding.",
        "Start with E.",
    ),
    error(
        "MLM-LAYOUT-last_loss",
        "transformer_config:2291",
        "pipeline_model_parallel_layout",
        lambda s: bool(_stages(s)) and not _letters(s).endswith("L"),
        "The last letter of a layout is L, the loss.",
        "End with L.",
    ),
    error(
        "MLM-LAYOUT-one_embedding",
        "transformer_config:2292",
        "pipeline_model_parallel_layout",
        lambda s: _letters(s).count("E") > 1,
        "A layout has one E.",
        "Write E once, first.",
    ),
    error(
        "MLM-LAYOUT-one_loss",
        "transformer_config:2293",
        "pipeline_model_parallel_layout",
        lambda s: _letters(s).count("L") > 1,
        "A layout has one L.",
        "Write L once, last.",
    ),
    error(
        "MLM-LAYOUT-layers",
        "transformer_config:2294",
        "pipeline_model_parallel_layout",
        _layers_in_layout,
        "The layout has {count} layers (t), the model {num_layers}.",
        "Write t {num_layers} times.",
    ),
    error(
        "MLM-LAYOUT-mtp_count",
        "transformer_config:2295",
        "pipeline_model_parallel_layout",
        _mtp_in_layout,
        "The layout has {count} MTP layers (m), the model {mtp_num_layers}.",
        "Write m as often as {write[mtp_num_layers]} says.",
    ),
    error(
        "MLM-LAYOUT-mtp_order",
        "transformer_config:2296",
        "pipeline_model_parallel_layout",
        lambda s: "t" in _letters(s).partition("m")[2],
        "MTP layers (m) follow all other layers.",
        "Write every m after the last t.",
    ),
    error(
        "MLM-LAYOUT-mtp_last_vpp",
        "transformer_config:2297",
        "pipeline_model_parallel_layout",
        _mtp_before_last_chunk,
        "MTP layers sit in the last virtual stage of their rank.",
        "Write m in one of the last {pp} stages.",
    ),
    error(
        "MLM-LAYOUT-mtp_together",
        "transformer_config:2298",
        "pipeline_model_parallel_layout",
        lambda s: len(_mtp_stages(s)) > 1,
        "All MTP layers sit in one stage.",
        "Write every m in the same stage.",
    ),
    error(
        "MLM-TC-first_pos",
        "transformer_config:2304",
        "decoder_first_pipeline_num_layers",
        lambda s: _split_unevenly(s) and _first(s) is not None and (_first(s) or 0) <= 0,
        "The first stage holds at least one layer.",
        "Use 1 or more.",
    ),
    error(
        "MLM-TC-first_vpp",
        "transformer_config:2312",
        "decoder_first_pipeline_num_layers",
        lambda s: (
            _split_unevenly(s)
            and _first(s) is not None
            and s.vpp is not None
            and indivisible(_first(s) or 0, s.vpp)
        ),
        "The layers of the first stage, {decoder_first_pipeline_num_layers}, must be a multiple "
        "of vpp = {virtual_pipeline_model_parallel_size}.",
        "Use a multiple of it.",
    ),
    error(
        "MLM-TC-last_pos",
        "transformer_config:2323",
        "decoder_last_pipeline_num_layers",
        lambda s: _split_unevenly(s) and _last(s) is not None and (_last(s) or 0) <= 0,
        "The last stage holds at least one layer.",
        "Use 1 or more.",
    ),
    error(
        "MLM-TC-last_vpp",
        "transformer_config:2331",
        "decoder_last_pipeline_num_layers",
        lambda s: (
            _split_unevenly(s)
            and _last(s) is not None
            and s.vpp is not None
            and indivisible(_last(s) or 0, s.vpp)
        ),
        "The layers of the last stage, {decoder_last_pipeline_num_layers}, must be a multiple of "
        "vpp = {virtual_pipeline_model_parallel_size}.",
        "Use a multiple of it.",
    ),
    error(
        "MLM-TC-uneven_middle",
        "transformer_config:2342",
        "decoder_first_pipeline_num_layers",
        lambda s: _split_unevenly(s) and _middle_mismatch(s),
        "{layers} layers are left for {ranks} middle stages; either both are 0 or neither.",
        "Choose first and last so that they add up (with pp = 2 and both given, to {num_layers}).",
    ),
    error(
        "MLM-TC-uneven_div",
        "transformer_config:2350",
        "decoder_first_pipeline_num_layers",
        lambda s: _split_unevenly(s) and _middle_indivisible(s),
        "The remaining {layers} layers must split over {ranks} middle stages.",
        "Change the first or the last stage by the remainder.",
    ),
    error(
        "MLM-TC-uneven_vpp",
        "transformer_config:2364",
        "num_virtual_stages_per_pipeline_rank",
        lambda s: _split_unevenly(s) and _middle_not_interleaved(s),
        "The {each} layers of a middle stage must be a multiple of vpp = "
        "{virtual_pipeline_model_parallel_size}.",
        "Choose first, last and vpp so that they are.",
    ),
    error(
        "MLM-TC-acc_pp",
        "transformer_config:2383",
        "num_layers",
        lambda s: s.vpp is None and _accounted_indivisible(s),
        "{counted} layers, embedding and loss included, do not split over pp = {pp}.",
        "Use pp = {pp_choices}, or a layout.",
        repeats=("MLM-ARG-layers_pp", "MLM-ARG-lpv_layers_pp"),
    ),
    error(
        "MLM-TC-acc_pp_vpp",
        "transformer_config:2396",
        "num_layers",
        lambda s: s.vpp is not None and _accounted_indivisible(s),
        "{counted} layers, embedding and loss included, do not split over pp = {pp}.",
        "Use pp = {pp_choices}, or a layout.",
        repeats=("MLM-ARG-layers_pp", "MLM-ARG-lpv_layers_pp"),
    ),
    error(
        "MLM-TC-acc_vpp",
        "transformer_config:2409",
        "num_virtual_stages_per_pipeline_rank",
        _accounted_not_interleaved,
        "The {each} layers of a rank ({counted} over {pp}, embedding and loss included) must be "
        "a multiple of vpp = {virtual_pipeline_model_parallel_size}.",
        "Use vpp = {vpp_choices}.",
    ),
    error(
        "MLM-BLOCK-even",
        "layer_placement:156",
        "num_layers",
        _not_even,
        "{counted} layers must split over pp = {pp}.",
        "Use pp = {pp_choices}, uneven stages or a layout.",
        repeats=(
            "MLM-ARG-layers_pp",
            "MLM-ARG-lpv_layers_pp",
            "MLM-TC-acc_pp",
            "MLM-TC-acc_pp_vpp",
        ),
    ),
    error(
        "MLM-BLOCK-vpp",
        "layer_placement:175",
        "num_virtual_stages_per_pipeline_rank",
        _chunks_not_even,
        "The {each} layers of a rank must be a multiple of vpp = "
        "{virtual_pipeline_model_parallel_size}.",
        "Use vpp = {vpp_choices}.",
        repeats=("MLM-ARG-lpv_div", "MLM-TC-acc_vpp"),
    ),
    error(
        "MLM-BLOCK-emb_room",
        "layer_placement:194",
        "account_for_embedding_in_pipeline_split",
        _no_room,
        "The first or the last virtual stage has no room for the embedding or the loss.",
        "Use fewer stages.",
    ),
    error(
        "MLM-LAYER-uneven_pp2_vpp",
        "layer_placement:900",
        "num_virtual_stages_per_pipeline_rank",
        lambda s: (
            s.pp == 2
            and _split_unevenly(s)
            and _first(s) is not None
            and _last(s) is not None
            and s.vpp is not None
        ),
        "With pp = 2 and both ends given, interleaving divides by zero middle stages.",
        "Drop the virtual stages, or use a layout.",
    ),
    error(
        "MLM-SCHED-group_range",
        "schedule:1165",
        "microbatch_group_size_per_vp_stage",
        lambda s: s.vpp is not None and not s.pp <= _group(s) <= s.num_microbatches,
        "Interleaved, pp <= group <= microbatches must hold: {pp} <= "
        "{microbatch_group_size_per_vp_stage} <= {num_microbatches} does not.",
        "Use at least pp = {pp} microbatches a step: a larger global batch or a smaller micro "
        "batch.",
    ),
    error(
        "MLM-SCHED-group_rem",
        "schedule:1174",
        "microbatch_group_size_per_vp_stage",
        _group_remainder,
        "Interleaved, {num_microbatches} microbatches in groups of "
        "{microbatch_group_size_per_vp_stage} leave {rest}, fewer than pp = {pp}.",
        "Make the microbatches a multiple of the group size.",
    ),
    warning(
        "MLM-SCHED-few_mb",
        "schedule:2278",
        "global_batch_size",
        _few_microbatches,
        "{num_microbatches} microbatches do not fill {pp} pipeline stages: ranks wait.",
        "Use several times pp microbatches.",
    ),
)
