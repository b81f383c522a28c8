"""Rules of Bridge on how long it trains: schedule, evaluation, profiling, checkpoints."""

from __future__ import annotations

from meshwright.frameworks.megatron_lm.rules import (
    Settings,
    derive,
    error,
    indivisible,
    multiples_near,
)


def _checkpoints(s: Settings) -> bool:
    return s.save is not None or s.checkpoint_load is not None


def _modes(s: Settings) -> int:
    given = (s.train_iters, s.train_samples, s.train_num_epochs)
    return sum(value is not None for value in given)


def _by_samples(s: Settings) -> bool:
    return s.train_samples is not None


def _mixed_schedule(s: Settings) -> bool:
    iterations = s.scheduler_lr_decay_iters is not None or s.scheduler_lr_warmup_iters != 0
    samples = s.scheduler_lr_decay_samples is not None or s.scheduler_lr_warmup_samples != 0
    return (iterations or s.scheduler_lr_wsd_decay_iters is not None) and (
        samples or s.scheduler_lr_wsd_decay_samples is not None
    )


def _profiled_steps(s: Settings) -> bool:
    start, end = s.profiling_profile_step_start, s.profiling_profile_step_end
    return start < 0 or end < start


def _eval_cp(s: Settings) -> int:
    return s.dist_eval_context_parallel_size or s.cp


def _eval_world(s: Settings) -> object:
    size = s.dist_eval_context_parallel_size
    if size is None:
        return None
    unit = s.tp * s.pp * size
    return indivisible(s.world_size, unit) and {
        "unit": unit,
        "nearest": multiples_near(s.world_size, unit) if unit > 0 else unit,
    }


def _eval_batch(s: Settings) -> object:
    eval_dp = s.world_size // (s.tp * s.pp * _eval_cp(s))
    unit = s.eval_micro_batch_size * eval_dp
    return indivisible(s.eval_global_batch_size, unit) and {
        "eval_dp": eval_dp,
        "unit": unit,
        "nearest": multiples_near(s.eval_global_batch_size, unit) if unit > 0 else unit,
    }


def _eval_defaults(s: Settings) -> dict[str, object]:
    gbs, mbs = s.eval_global_batch_size, s.eval_micro_batch_size
    return {
        "eval_global_batch_size": s.global_batch_size if gbs is None else gbs,
        "eval_micro_batch_size": s.micro_batch_size if mbs is None else mbs,
    }


RULES = (
    error(
        "MB-CFG-samples_gbs",
        "data_parallel:0",
        "global_batch_size",
        lambda s: _by_samples(s) and s.global_batch_size is None,
        "Training by samples needs the global batch.",
        "Set {write[global_batch_size]}.",
    ),
    error(
        "MB-CFG-epochs_gbs",
        "data_parallel:0",
        "global_batch_size",
        lambda s: s.train_num_epochs is not None and s.global_batch_size is None,
        "Training by epochs needs the global batch.",
        "Set {write[global_batch_size]}.",
    ),
    error(
        "MB-CFG-train_mode_given",
        "validate:1410",
        "train_iters",
        lambda s: _modes(s) == 0,
        "Training is counted in iterations, samples or epochs.",
        "Give {write[train_iters]}.",
    ),
    error(
        "MB-CFG-train_mode_one",
        "validate:1411",
        "train_iters",
        lambda s: _modes(s) > 1,
        "Training is counted in one of iterations, samples and epochs.",
        "Keep one of {write[train_iters]}, {write[train_samples]} and {write[train_num_epochs]}.",
    ),
    error(
        "MB-CFG-samples_rampup",
        "validate:1412",
        "train_rampup_batch_size",
        lambda s: (_by_samples(s) or s.train_num_epochs) and s.train_rampup_batch_size,
        "Training by samples or epochs excludes a batch that grows.",
        "Use {write[train_rampup_batch_size=null]}.",
    ),
    error(
        "MB-CFG-sched_max",
        "validate:1420",
        "scheduler_max_steps",
        lambda s: s.scheduler_max_steps is not None and s.scheduler_max_steps <= 0,
        "The steps of the schedule are positive.",
        "Use 1 or more.",
    ),
    error(
        "MB-CFG-sched_mix",
        "validate:1421",
        "scheduler_lr_decay_iters",
        _mixed_schedule,
        "The schedule counts in iterations or in samples.",
        "Use one family of fields.",
    ),
    error(
        "MB-CFG-async_save",
        "validate:1430",
        "async_save",
        lambda s: s.async_save and s.save is None,
        "Asynchronous saving needs a place.",
        "Set {write[save]}.",
    ),
    error(
        "MB-CFG-async_worker",
        "validate:1431",
        "use_persistent_ckpt_worker",
        lambda s: s.async_save and not s.use_persistent_ckpt_worker,
        "Asynchronous saving needs the persistent worker.",
        "Use {write[use_persistent_ckpt_worker=true]}.",
    ),
    error(
        "MB-CFG-profilers",
        "validate:1440",
        "profiling_use_nsys_profiler",
        lambda s: s.profiling_use_pytorch_profiler and s.profiling_use_nsys_profiler,
        "There is one profiler at a time.",
        "Keep one.",
    ),
    error(
        "MB-CFG-profile_steps",
        "validate:1441",
        "profiling_profile_step_end",
        _profiled_steps,
        "Profiling ends after it starts, from step 0 on.",
        "Give 0 <= start <= end.",
    ),
    derive("validate:1460", _eval_defaults),
    error(
        "MB-CFG-eval_cp_world",
        "validate:1467",
        "dist_eval_context_parallel_size",
        _eval_world,
        "For evaluation the world size must be a multiple of tp*pp*eval_cp = {unit}.",
        "Use {nearest} GPUs, or another {write[dist_eval_context_parallel_size]}.",
        final=True,
    ),
    error(
        "MB-CFG-eval_gbs",
        "validate:1474",
        "eval_global_batch_size",
        _eval_batch,
        "The evaluation batch, by default the global batch, must be a multiple of mbs*dp = "
        "{eval_micro_batch_size}*{eval_dp} = {unit}; {eval_global_batch_size} is not.",
        "Use {nearest}.",
    ),
    error(
        "MB-CFG-ckpt_dtensor",
        "validate:1531",
        "ckpt_format",
        lambda s: (
            _checkpoints(s)
            and s.ckpt_format == "fsdp_dtensor"
            and (not s.use_megatron_fsdp or s.use_torch_fsdp2)
        ),
        "The fsdp_dtensor format goes with Megatron-FSDP.",
        "Use {write[ckpt_format=torch_dist]}.",
    ),
    error(
        "MB-CFG-async_fmt",
        "validate:1537",
        "ckpt_format",
        lambda s: s.async_save and s.ckpt_format not in ("torch_dist", "fsdp_dtensor"),
        "Asynchronous saving writes torch_dist or fsdp_dtensor, not {ckpt_format}.",
        "Use {write[ckpt_format=torch_dist]}.",
    ),
    error(
        "MB-CFG-gloo_distopt",
        "validate:1563",
        "ckpt_format",
        lambda s: (
            not s.use_gloo_process_groups
            and s.optimizer_use_distributed_optimizer
            and s.ckpt_format not in ("torch_dist", "fsdp_dtensor")
        ),
        "Without Gloo groups the distributed optimizer is saved as torch_dist or fsdp_dtensor, "
        "not {ckpt_format}.",
        "Use {write[ckpt_format=torch_dist]}.",
    ),
    error(
        "MB-CFG-samples_sched",
        "validate:1570.1",
        "scheduler_lr_decay_iters",
        lambda s: (
            _by_samples(s)
            and (s.scheduler_lr_decay_iters is not None or s.scheduler_lr_warmup_iters != 0)
        ),
        "Training by samples is scheduled by samples.",
        "Use {write[scheduler_lr_decay_samples]}.",
    ),
    error(
        "MB-CFG-iters_sched",
        "validate:1570.2",
        "scheduler_lr_decay_samples",
        lambda s: (
            not _by_samples(s)
            and (s.scheduler_lr_decay_samples is not None or s.scheduler_lr_warmup_samples != 0)
        ),
        "Training by iterations is scheduled by iterations.",
        "Use {write[scheduler_lr_decay_iters]}.",
    ),
    error(
        "MB-CFG-max_steps",
        "validate:1570.3",
        "scheduler_max_steps",
        lambda s: (
            s.scheduler_max_steps is not None
            and s.train_iters is not None
            and 0 < s.scheduler_max_steps < s.train_iters
        ),
        "The schedule has at least as many steps as the training: {scheduler_max_steps} < "
        "{train_iters}.",
        "Use {train_iters} or more.",
    ),
)
