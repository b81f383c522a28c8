"""Rules of the pipeline: stages, virtual stages, placement of layers, schedule."""

from __future__ import annotations

from typing import Any

from meshwright.frameworks.megatron_lm.hybrid_pattern import hybrid_segments
from meshwright.frameworks.megatron_lm.pipeline_layout import layout_stages, split_unevenly
from meshwright.frameworks.megatron_lm.rules import (
    Settings,
    change,
    derive,
    divisors_near,
    error,
    indivisible,
    warning,
)


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
        stages = len(layout_stages(s)) // s.pp
    elif _by_layers(s):
        each = s.num_layers_per_virtual_pipeline_stage
        stages = s.counted_layers // s.pp // each if s.num_layers and each else None
    elif s.num_virtual_stages_per_pipeline_rank is not None:
        stages = s.num_virtual_stages_per_pipeline_rank
    elif s.hybrid_layer_pattern is not None and hybrid_segments(s) > s.pp:
        stages = hybrid_segments(s) // s.pp
    return {"virtual_pipeline_model_parallel_size": stages}


def _layers_over_ranks(s: Settings) -> object:
    plain = not _ways_to_interleave(s) and not s.uneven and s.hybrid_layer_pattern is None
    return (
        plain
        and s.num_layers is not None
        and s.counted_layers % s.pp
        and {
            "counted": s.counted_layers,
            "pp_choices": divisors_near(s.counted_layers, s.pp),
        }
    )


def _placed_evenly(s: Settings) -> bool:
    return (
        not s.uneven and s.pipeline_model_parallel_layout is None and s.hybrid_layer_pattern is None
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


def _chunk_layers(s: Settings) -> int | None:
    """Layers of a virtual stage, embedding and loss included; None when not placed evenly."""
    if not _placed_evenly(s) or s.counted_layers % s.pp:
        return None
    return s.counted_layers // s.pp // (s.vpp or 1)


def _no_room_for_embedding(s: Settings) -> object:
    layers = _chunk_layers(s)
    return layers is not None and layers < bool(s.account_for_embedding_in_pipeline_split)


def _no_room_for_loss(s: Settings) -> object:
    layers = _chunk_layers(s)
    shared = s.account_for_embedding_in_pipeline_split and s.pp * (s.vpp or 1) == 1
    return layers is not None and layers - bool(shared) < bool(s.account_for_loss_in_pipeline_split)


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
        "MLM-ARG-lpv_uneven",
        "validate_args:955",
        "num_layers_per_virtual_pipeline_stage",
        lambda s: _by_layers(s) and s.uneven,
        "With uneven stages the layers of a virtual stage differ.",
        "Use --num-virtual-stages-per-pipeline-rank.",
    ),
    error(
        "MLM-ARG-lpv_layers_pp",
        "validate_args:967",
        "num_layers",
        lambda s: _by_layers(s) and not s.uneven and s.num_layers is None,
        "Layers of a virtual stage are counted from --num-layers.",
        "Add --num-layers.",
    ),
    error(
        "MLM-ARG-lpv_layers_pp",
        "validate_args:968",
        "num_layers",
        lambda s: (
            _by_layers(s)
            and not s.uneven
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
        _no_room_for_embedding,
        "The first virtual stage has no room for the embedding.",
        "Use fewer stages.",
    ),
    error(
        "MLM-BLOCK-loss_room",
        "layer_placement:201",
        "account_for_loss_in_pipeline_split",
        _no_room_for_loss,
        "The last virtual stage has no room for the loss.",
        "Use fewer stages.",
    ),
    error(
        "MLM-LAYER-uneven_pp2_vpp",
        "layer_placement:900",
        "num_virtual_stages_per_pipeline_rank",
        lambda s: (
            s.pp == 2
            and split_unevenly(s)
            and s.decoder_first_pipeline_num_layers is not None
            and s.decoder_last_pipeline_num_layers is not None
            and s.vpp is not None
        ),
        "With pp = 2 and both ends given, interleaving divides by zero middle stages.",
        "Drop the virtual stages, or use a layout.",
    ),
    error(
        "MLM-SCHED-p2p_both",
        "schedule:1087",
        "overlap_p2p_comm",
        lambda s: s.vpp is not None and s.pp > 1 and s.overlap_p2p_comm and s.batch_p2p_comm,
        "Interleaved, p2p is overlapped or batched, not both.",
        "Use {write[batch_p2p_comm=false]}.",
    ),
    error(
        "MLM-SCHED-nonint_p2p",
        "schedule:1088",
        "overlap_p2p_comm",
        lambda s: s.vpp is None and s.pp > 1 and s.overlap_p2p_comm,
        "Without interleaving p2p is not overlapped.",
        "Use {write[overlap_p2p_comm=false]}, or virtual stages.",
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
        repeats=("MLM-SCHED-group_range",),
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
