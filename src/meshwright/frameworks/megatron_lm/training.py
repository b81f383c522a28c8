"""Rules of the run: iterations, learning rate, data, checkpoints, old flags."""

from __future__ import annotations

from typing import Any

from meshwright.frameworks.megatron_lm.rules import Settings, change, derive, error, warning


def _by_iterations(s: Settings) -> bool:
    return bool(s.train_iters) and not s.skip_train


def _by_samples(s: Settings) -> bool:
    return bool(s.train_samples) and not s.skip_train


def _saves(s: Settings) -> bool:
    return s.save is not None


def _sources(s: Settings) -> int:
    split = (s.train_data_path, s.valid_data_path, s.test_data_path)
    return bool(s.mock_data) + bool(s.data_path) + any(p is not None for p in split)


def _dry_run(s: Settings) -> object:
    return s.fake_process_group and {
        "check_for_nan_in_loss_and_grad": False,
        "use_gloo_process_groups": False,
    }


def _padded(s: Settings) -> object:
    unit = s.make_vocab_size_divisible_by * s.tp
    if s.vocab_size is None or s.padded_vocab_size is not None or unit < 1:
        return None
    return {"padded_vocab_size": -(-s.vocab_size // unit) * unit}


def _dtypes(s: Settings) -> dict[str, Any]:
    names = (
        "megatron_fsdp_main_params_dtype",
        "megatron_fsdp_main_grads_dtype",
        "megatron_fsdp_grad_comm_dtype",
    )
    return {n: None for n in names if getattr(s, n) == "auto"}


RULES = (
    error(
        "MLM-ARG-convert_ends",
        "validate_args:392",
        "ckpt_convert_format",
        lambda s: (
            s.ckpt_convert_format is not None and (s.ckpt_convert_save is None or s.load is None)
        ),
        "Converting a checkpoint reads one folder and writes another.",
        "Add --load and --ckpt-convert-save.",
    ),
    error(
        "MLM-ARG-logits_top_k",
        "validate_args:1752",
        "logits_save_dir",
        lambda s: s.logits_save_dir is not None and s.logits_save_top_k is None,
        "Saved logits are the largest few of each token.",
        "Add --logits-save-top-k.",
    ),
    error(
        "MLM-ARG-replication",
        "validate_args:1816",
        "replication",
        lambda s: (
            s.replication and (s.replication_jump is None or s.non_persistent_ckpt_type != "local")
        ),
        "Replicas of local checkpoints lie on ranks at a stated distance.",
        "Add --replication-jump and --non-persistent-ckpt-type local.",
    ),
    error(
        "MLM-ARG-old_batch_size",
        "validate_args:591",
        "batch_size",
        lambda s: s.batch_size is not None,
        "--batch-size is gone.",
        "Use --micro-batch-size.",
    ),
    error(
        "MLM-ARG-old_warmup",
        "validate_args:594",
        "warmup",
        lambda s: s.warmup is not None,
        "--warmup is gone.",
        "Use --lr-warmup-fraction.",
    ),
    error(
        "MLM-ARG-old_mp",
        "validate_args:597",
        "model_parallel_size",
        lambda s: s.model_parallel_size is not None,
        "--model-parallel-size is gone.",
        "Use --tensor-model-parallel-size.",
    ),
    error(
        "MLM-ARG-old_ckpt_act",
        "validate_args:601",
        "checkpoint_activations",
        lambda s: s.checkpoint_activations,
        "--checkpoint-activations is gone: the launch ends at once, with status 0.",
        "Use --recompute-activations or --recompute-granularity.",
    ),
    change(
        "MLM-ARG-split_default",
        "validate_args:670",
        "split",
        lambda s: s.data_path is not None and s.split is None and {"split": "969, 30, 1"},
        "Left out, the split of the data is {split}.",
        "Write --split.",
        severity="note",
    ),
    error(
        "MLM-ARG-data_paths",
        "validate_args:677",
        "data_path",
        lambda s: s.data_path is not None and s.data_args_path is not None,
        "The data are given twice.",
        "Keep one of --data-path and --data-args-path.",
    ),
    derive("validate_args:1090", _dtypes),
    error(
        "MLM-ARG-iters_samples",
        "validate_args:1279",
        "train_samples",
        lambda s: _by_iterations(s) and s.train_samples is not None,
        "Training is counted in iterations or in samples.",
        "Keep one of --train-iters and --train-samples.",
    ),
    error(
        "MLM-ARG-iters_decay_samples",
        "validate_args:1281",
        "lr_decay_samples",
        lambda s: _by_iterations(s) and s.lr_decay_samples is not None,
        "Training by iterations decays by iterations.",
        "Use --lr-decay-iters.",
    ),
    error(
        "MLM-ARG-iters_warm_samples",
        "validate_args:1283",
        "lr_warmup_samples",
        lambda s: _by_iterations(s) and s.lr_warmup_samples != 0,
        "Training by iterations warms up by iterations.",
        "Use --lr-warmup-iters.",
    ),
    error(
        "MLM-ARG-iters_warm_frac",
        "validate_args:1286",
        "lr_warmup_iters",
        lambda s: _by_iterations(s) and s.lr_warmup_fraction is not None and s.lr_warmup_iters != 0,
        "The warm-up is given twice.",
        "Keep one of --lr-warmup-fraction and --lr-warmup-iters.",
    ),
    error(
        "MLM-ARG-samples_decay_iters",
        "validate_args:1295",
        "lr_decay_iters",
        lambda s: _by_samples(s) and s.lr_decay_iters is not None,
        "Training by samples decays by samples.",
        "Use --lr-decay-samples.",
    ),
    error(
        "MLM-ARG-samples_warm_iters",
        "validate_args:1297",
        "lr_warmup_iters",
        lambda s: _by_samples(s) and s.lr_warmup_iters != 0,
        "Training by samples warms up by samples.",
        "Use --lr-warmup-samples.",
    ),
    error(
        "MLM-ARG-samples_warm_frac",
        "validate_args:1300",
        "lr_warmup_samples",
        lambda s: _by_samples(s) and s.lr_warmup_fraction is not None and s.lr_warmup_samples != 0,
        "The warm-up is given twice.",
        "Keep one of --lr-warmup-fraction and --lr-warmup-samples.",
    ),
    error(
        "MLM-ARG-min_lr",
        "validate_args:1360",
        "min_lr",
        lambda s: s.lr is not None and s.min_lr > s.lr,
        "The smallest learning rate, {min_lr}, is at most the largest, {lr}.",
        "Lower --min-lr.",
    ),
    error(
        "MLM-ARG-save_interval",
        "validate_args:1362",
        "save_interval",
        lambda s: _saves(s) and s.save_interval is None,
        "Saving needs an interval.",
        "Add --save-interval.",
    ),
    error(
        "MLM-ARG-save_pos",
        "validate_args:1363",
        "save_interval",
        lambda s: _saves(s) and s.save_interval is not None and s.save_interval <= 0,
        "The interval of saving is positive.",
        "Use --save-interval 1 or more.",
    ),
    error(
        "MLM-ARG-retain_pos",
        "validate_args:1365",
        "save_retain_interval",
        lambda s: _saves(s) and s.save_retain_interval is not None and s.save_retain_interval <= 0,
        "The interval of kept checkpoints is positive.",
        "Use a multiple of --save-interval.",
    ),
    error(
        "MLM-ARG-retain_div",
        "validate_args:1366",
        "save_retain_interval",
        lambda s: (
            _saves(s)
            and s.save_retain_interval is not None
            and bool(s.save_interval)
            and s.save_retain_interval % s.save_interval
        ),
        "Kept checkpoints are among the saved ones: {save_retain_interval} is no multiple of "
        "{save_interval}.",
        "Use a multiple of {save_interval}.",
    ),
    error(
        "MLM-ARG-save_params_opg",
        "validate_args:1368",
        "save_params_interval",
        lambda s: _saves(s) and s.save_params_interval is not None and s.overlap_param_gather,
        "Parameters are not saved while their gather is overlapped.",
        "Drop --save-params-interval or --overlap-param-gather.",
    ),
    error(
        "MLM-ARG-log_mem",
        "validate_args:1370",
        "log_memory_interval",
        lambda s: (
            s.log_memory_interval is not None
            and (s.log_interval == 0 or s.log_memory_interval % s.log_interval)
        ),
        "Memory is logged with other lines: {log_memory_interval} is no multiple of "
        "{log_interval}.",
        "Use a multiple of --log-interval.",
    ),
    error(
        "MLM-ARG-wd_const_start",
        "validate_args:1394",
        "start_weight_decay",
        lambda s: s.weight_decay_incr_style == "constant" and s.start_weight_decay is not None,
        "A constant weight decay has no start.",
        "Use --weight-decay, or --weight-decay-incr-style linear.",
    ),
    error(
        "MLM-ARG-wd_const_end",
        "validate_args:1395",
        "end_weight_decay",
        lambda s: s.weight_decay_incr_style == "constant" and s.end_weight_decay is not None,
        "A constant weight decay has no end.",
        "Use --weight-decay, or --weight-decay-incr-style linear.",
    ),
    error(
        "MLM-ARG-wd_ramp_start",
        "validate_args:1399",
        "start_weight_decay",
        lambda s: (
            s.weight_decay_incr_style != "constant"
            and (s.start_weight_decay is None or s.end_weight_decay is None)
        ),
        "A weight decay that changes needs its start and its end.",
        "Add --start-weight-decay and --end-weight-decay.",
    ),
    error(
        "MLM-ARG-dcp_fsdp",
        "validate_args:1668",
        "ckpt_format",
        lambda s: s.ckpt_format == "torch_dcp" and not s.use_torch_fsdp2,
        "The torch_dcp format goes with Torch FSDP2.",
        "Use --ckpt-format torch_dist.",
    ),
    error(
        "MLM-ARG-dcp_tp",
        "validate_args:1669",
        "ckpt_format",
        lambda s: s.ckpt_format == "torch_dcp" and s.tp > 1,
        "The torch_dcp format excludes tensor parallelism (tp is {tp}).",
        "Use --ckpt-format torch_dist.",
        repeats=("MLM-ARG-dcp_fsdp",),
    ),
    error(
        "MLM-ARG-dcp_pp",
        "validate_args:1671",
        "ckpt_format",
        lambda s: s.ckpt_format == "torch_dcp" and s.pp > 1,
        "The torch_dcp format excludes pipeline parallelism (pp is {pp}).",
        "Use --ckpt-format torch_dist.",
        repeats=("MLM-ARG-dcp_fsdp",),
    ),
    error(
        "MLM-ARG-fsdp_dtensor",
        "validate_args:1676",
        "ckpt_format",
        lambda s: s.ckpt_format == "fsdp_dtensor" and not s.use_megatron_fsdp,
        "The fsdp_dtensor format goes with Megatron-FSDP.",
        "Use --ckpt-format torch_dist.",
    ),
    error(
        "MLM-ARG-one_source",
        "validate_args:1679",
        "data_path",
        lambda s: _sources(s) > 1,
        "The data come from one source.",
        "Keep one of --mock-data, --data-path and the paths by split.",
    ),
    error(
        "MLM-ARG-fim_mock",
        "validate_args:1690",
        "fim_data",
        lambda s: s.fim_data and s.mock_data,
        "Fill-in-the-middle needs real data.",
        "Drop --mock-data or --fim-data.",
    ),
    error(
        "MLM-ARG-ce_te",
        "validate_args:1697",
        "cross_entropy_fusion_impl",
        lambda s: s.cross_entropy_loss_fusion and s.cross_entropy_fusion_impl == "te",
        "Transformer Engine's fused cross entropy is switched off as unstable.",
        "Use --cross-entropy-fusion-impl native.",
    ),
    warning(
        "MLM-MPC-ce_te",
        "transformer_config:538",
        "cross_entropy_fusion_impl",
        lambda s: s.cross_entropy_loss_fusion and s.cross_entropy_fusion_impl == "te",
        "Transformer Engine's fused cross entropy is known as unstable.",
        "Use {write[cross_entropy_fusion_impl=native]}.",
    ),
    change(
        "MLM-ARG-skip_train",
        "validate_args:1870",
        "no_load_optim",
        lambda s: (
            ((s.skip_train and not s.perform_rl_step) or s.moe_use_upcycling)
            and {"no_load_optim": True}
        ),
        "Without training, or after upcycling, no optimizer state is loaded.",
        severity="note",
    ),
    change(
        "MLM-VOCAB-pad",
        "config_from_args:478",
        "padded_vocab_size",
        _padded,
        "The vocabulary is padded to a multiple of {make_vocab_size_divisible_by}*tp: "
        "{padded_vocab_size}. Embedding and logits take the padded size.",
        severity="note",
    ),
    error(
        "MLM-CFG-het_mla",
        "config_from_args:296",
        "heterogeneous_layers_config_path",
        lambda s: s.heterogeneous_layers_config_path is not None and s.multi_latent_attention,
        "Heterogeneous layers exclude latent attention.",
        "Drop one of the two.",
    ),
    change(
        "MLM-ARG-fakepg_auto",
        "validate_args:1763",
        "fake_process_group",
        _dry_run,
        "A dry run checks no NaN and makes no Gloo groups.",
        severity="note",
    ),
    error(
        "MLM-ARG-ckpt_pg_cache",
        "validate_args:1799",
        "ckpt_pg_tensors_cache_path",
        lambda s: (
            s.ckpt_pg_tensors_cache_path is not None
            and s.ckpt_fully_parallel_save_process_group != s.ckpt_fully_parallel_load_process_group
        ),
        "The cache of checkpoint groups needs the same group for saving and loading.",
        "Use the same process group for both.",
    ),
    error(
        "MLM-ARG-load_main",
        "validate_args:1812",
        "load_main_params_from_ckpt",
        lambda s: s.load_main_params_from_ckpt and not s.no_load_optim,
        "Main parameters come from the checkpoint or with the optimizer.",
        "Add --no-load-optim.",
    ),
    change(
        "MLM-ARG-async_save_off",
        "validate_args:1818",
        "async_save",
        lambda s: (
            s.ckpt_format != "torch"
            and s.async_save
            and not s.use_persistent_ckpt_worker
            and {"async_save": False}
        ),
        "Asynchronous saving is turned off: it needs the persistent worker.",
        "Add --use-persistent-ckpt-worker.",
    ),
    derive(
        "validate_args:1830",
        lambda s: not s.async_save and {"async_strategy": "mcore"},
    ),
    error(
        "MLM-ARG-override_ft",
        "validate_args:1852",
        "override_ckpt_iteration",
        lambda s: s.override_ckpt_iteration is not None and s.finetune,
        "Fine-tuning starts at iteration 0: no checkpoint iteration is overridden.",
        "Drop --finetune or --override-ckpt-iteration.",
    ),
)
