"""Rules of Bridge's data sets: lengths, packing, fine-tuning."""

from __future__ import annotations

import math

from meshwright.frameworks.megatron_lm.rules import (
    Settings,
    change,
    error,
    warning,
)


def _sft(s: Settings) -> bool:
    return s.dataset_kind == "sft"


def _packed(s: Settings) -> bool:
    return bool(s.dataset_enable_offline_packing)


def _training_graph(s: Settings) -> bool:
    return s.cuda_graph_impl in ("full_iteration", "transformer_engine")


def _eval_cp(s: Settings) -> int:
    return s.dist_eval_context_parallel_size or s.cp


def _not_collated(s: Settings) -> object:
    if not _sft(s) or not s.dataset_seq_length:
        return None
    sizes = {s.cp, _eval_cp(s)}
    units = [2 * size for size in sizes if size > 1]
    units += [size * s.tp for size in sizes if s.sequence_parallel and s.tp > 1]
    unit = math.lcm(*units) or 1
    return s.dataset_seq_length % unit and {"unit": unit}


def _variable_lengths(s: Settings) -> object:
    packs = s.dataset_enable_in_batch_packing and s.pp > 1
    return packs and {"variable_seq_lengths": True}


def _energon_packs(s: Settings) -> bool:
    """Say whether samples are packed in Energon's buffer: no other data set has one."""
    return s.dataset_packing_buffer_size is not None


def _no_expert_overlap(s: Settings) -> object:
    return _energon_packs(s) and {
        "overlap_moe_expert_parallel_comm": False,
        "delay_wgrad_compute": False,
    }


RULES = (
    error(
        "MB-CFG-packing_excl",
        "dataset:1277",
        "dataset_enable_in_batch_packing",
        lambda s: _packed(s) and s.dataset_enable_in_batch_packing,
        "Sequences are packed ahead or in the batch, not both.",
        "Keep one of the two.",
    ),
    error(
        "MB-CFG-packing_specs",
        "dataset:1279",
        "dataset_offline_packing_specs",
        lambda s: (
            _packed(s)
            and s.dataset_offline_packing_specs is None
            and "dataset_offline_packing_specs" in s.given
        ),
        "Packing ahead needs its specification.",
        "Set {write[dataset_offline_packing_specs]}.",
    ),
    error(
        "MB-CFG-packing_graph",
        "dataset:1300",
        "dataset_pad_to_max_length",
        lambda s: _packed(s) and _training_graph(s) and not s.dataset_pad_to_max_length,
        "CUDA graphs need packed sequences of a fixed length.",
        "Use {write[dataset_pad_to_max_length=true]}.",
    ),
    change(
        "MB-CFG-pad_fixed",
        "dataset:1352",
        "dataset_pad_to_max_length",
        lambda s: _sft(s) and (s.pp > 1 or s.ep > 1) and {"dataset_pad_to_max_length": True},
        "With pipeline or expert parallelism every sample is padded to the full length.",
        "Plan memory and time for full sequences.",
        severity="note",
    ),
    warning(
        "MB-CFG-sft_multiple",
        "dataset:1369",
        "dataset_seq_length",
        _not_collated,
        "Fine-tuning data are padded to multiples of {unit}: 2*cp, and cp*tp under sequence "
        "parallelism; {dataset_seq_length} is none.",
        "Use a multiple of {unit} in {write[seq_length]} and {write[dataset_seq_length]}.",
    ),
    change(
        "MB-TC-varlen",
        "transformer_config:9000",
        "variable_seq_lengths",
        _variable_lengths,
        "Sequences packed in the batch vary in length, so stages exchange lengths too.",
        severity="note",
    ),
    error(
        "MB-CFG-sft_cp_token",
        "validate:1591",
        "calculate_per_token_loss",
        lambda s: _sft(s) and s.cp > 1 and not s.calculate_per_token_loss,
        "Fine-tuning with context parallelism (cp = {cp}) needs the loss per token.",
        "Use {write[calculate_per_token_loss=true]}.",
    ),
    error(
        "MB-CFG-sft_cp_avg",
        "validate:1594",
        "ddp_average_in_collective",
        lambda s: _sft(s) and s.cp > 1 and s.ddp_average_in_collective,
        "Fine-tuning with context parallelism (cp = {cp}) excludes averaging in the collective.",
        "Use {write[ddp_average_in_collective=false]}.",
    ),
    error(
        "MB-CFG-pack_mbs1",
        "validate:1606",
        "micro_batch_size",
        lambda s: _packed(s) and s.micro_batch_size > 1,
        "A packed sequence is a batch of its own: the micro batch is 1, not {micro_batch_size}.",
        "Use {write[micro_batch_size=1]} and a packed length {micro_batch_size} times as long.",
    ),
    error(
        "MB-CFG-pack_mbs2",
        "validate:1620",
        "micro_batch_size",
        lambda s: s.dataset_enable_in_batch_packing and s.micro_batch_size == 1,
        "Packing in the batch needs a micro batch of 2 or more.",
        "Use {write[micro_batch_size=2]}.",
    ),
    error(
        "MB-CFG-seq_match",
        "validate:1644",
        "seq_length",
        lambda s: s.dataset_seq_length is not None and s.seq_length != s.dataset_seq_length,
        "The model's sequence, {seq_length}, and the data's, {dataset_seq_length}, are equal.",
        "Set {write[seq_length]} and {write[dataset_seq_length]} alike.",
    ),
    change(
        "MB-CFG-energon_overlap",
        "dataset:1245",
        "overlap_moe_expert_parallel_comm",
        _no_expert_overlap,
        "Packed Energon data turn the overlap of expert communication off.",
        "Use {write[overlap_moe_expert_parallel_comm=false]}.",
    ),
    error(
        "MB-CFG-energon_mbs",
        "dataset:1322",
        "dataset_micro_batch_size",
        lambda s: (
            s.dataset_micro_batch_size is not None
            and s.dataset_micro_batch_size != s.micro_batch_size
        ),
        "Energon's micro batch, {dataset_micro_batch_size}, is that of the training, "
        "{micro_batch_size}.",
        "Use {write[dataset_micro_batch_size]} and {write[micro_batch_size]} alike.",
    ),
    error(
        "MB-CFG-energon_pack_mbs",
        "dataset:1329",
        "micro_batch_size",
        lambda s: _energon_packs(s) and s.micro_batch_size != 1,
        "A packed Energon sample is a micro batch of its own, not {micro_batch_size}.",
        "Use {write[micro_batch_size=1]}.",
    ),
    error(
        "MB-CFG-energon_pack_pp",
        "dataset:1344",
        "pipeline_model_parallel_size",
        lambda s: _energon_packs(s) and s.pp > 1,
        "Packed Energon data exclude pipeline parallelism (pp = {pp}).",
        "Use {write[pipeline_model_parallel_size=1]}, or do not pack.",
    ),
)
