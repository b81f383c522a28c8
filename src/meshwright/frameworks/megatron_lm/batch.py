"""Rules of the batch: micro and global batch, its schedule, microbatches, evaluation."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from meshwright.frameworks.megatron_lm.rules import (
    Settings,
    change,
    derive,
    error,
    indivisible,
    multiples_near,
    warning,
)

_SUFFIXES = {"T": 10**12, "B": 10**9, "M": 10**6, "K": 10**3}


def _number(text: str) -> int:
    text = text.strip().upper()
    scale = _SUFFIXES.get(text[-1:], 1)
    return int(float(text[:-1] if scale > 1 else text) * scale)


def batch_steps(schedule: str, seq_length: int | None) -> list[tuple[int, int]]:
    """Read ``"0:768 250B:1536"`` into (samples, batch size) steps, sorted by samples.

    Thresholds are tokens (K, M, B, T: powers of 1000), turned into samples by the sequence length.

    Raises ``ValueError`` when an entry is not ``THRESHOLD:BATCH``.
    """
    steps: list[tuple[int, int]] = []
    for entry in schedule.strip().replace(",", " ").split():
        threshold, colon, batch = entry.partition(":")
        if not colon:
            raise ValueError(entry)
        try:
            samples, size = _number(threshold), _number(batch)
        except (ValueError, OverflowError):
            raise ValueError(entry) from None
        steps.append((samples // seq_length if seq_length else samples, size))
    return sorted(steps, key=lambda step: step[0])


def _steps(s: Settings) -> list[tuple[int, int]] | None:
    if s.step_batch_size_schedule is None or s.decrease_batch_size_if_needed:
        return None
    try:
        return batch_steps(s.step_batch_size_schedule, s.seq_length)
    except ValueError:
        return None


def _unreadable_schedule(s: Settings) -> object:
    if s.step_batch_size_schedule is None:
        return None
    try:
        batch_steps(s.step_batch_size_schedule, s.seq_length)
    except ValueError as error:
        return {"entry": f"{error}"}
    return None


def _not_from_zero(s: Settings) -> object:
    steps = _steps(s)
    return steps is not None and (not steps or steps[0][0] != 0)


def _not_increasing(s: Settings) -> object:
    steps = _steps(s) or []
    return any(b[0] <= a[0] for a, b in pairwise(steps))


def _batch_not_positive(s: Settings) -> object:
    return any(size <= 0 for _, size in _steps(s) or [])


def _eval_not_divisible(s: Settings) -> object:
    unit = s.eval_micro_batch_size * s.dp * s.gtp
    return indivisible(s.eval_global_batch_size, unit) and {
        "unit": unit,
        "nearest": multiples_near(s.eval_global_batch_size, unit) if unit > 0 else unit,
    }


def _train_unit(s: Settings) -> int:
    return s.micro_batch_size * s.dp * s.gtp


def _not_divisible(s: Settings) -> object:
    unit = _train_unit(s)
    return (
        s.step_batch_size_schedule is None
        and not s.decrease_batch_size_if_needed
        and s.global_batch_size % unit
        and {"unit": unit, "nearest": multiples_near(s.global_batch_size, unit)}
    )


def _no_microbatch(s: Settings) -> object:
    unit = _train_unit(s)
    return s.step_batch_size_schedule is None and s.global_batch_size // unit < 1 and {"unit": unit}


def _rounded_down(s: Settings) -> object:
    unit = _train_unit(s)
    running = s.global_batch_size // unit * unit
    return (
        s.step_batch_size_schedule is None
        and s.decrease_batch_size_if_needed
        and running != s.global_batch_size
        and {"running_global_batch_size": running}
    )


def _step_not_divisible(s: Settings) -> object:
    unit = _train_unit(s)
    return next(({"size": z, "unit": unit} for _, z in _steps(s) or [] if z % unit), None)


def _num_microbatches(s: Settings) -> dict[str, Any]:
    steps = _steps(s)
    gbs = steps[0][1] if steps else s.global_batch_size
    return {"num_microbatches": gbs // _train_unit(s)}


def _rollout_not_divisible(s: Settings) -> object:
    samples = s.grpo_prompts_per_step * s.grpo_group_size * s.grpo_iterations
    return s.perform_rl_step and samples % s.global_batch_size and {"samples": samples}


RULES = (
    error(
        "MLM-ARG-rl_packing_mbs",
        "validate_args:564",
        "micro_batch_size",
        lambda s: s.perform_rl_step and s.rl_use_sequence_packing and s.micro_batch_size != 1,
        "Sequence packing in reinforcement learning takes a micro batch of 1.",
        "Use --micro-batch-size 1 and a longer sequence.",
    ),
    error(
        "MLM-ARG-mbs_given",
        "validate_args:693",
        "micro_batch_size",
        lambda s: s.micro_batch_size is None,
        "The micro batch size is mandatory.",
        "Add --micro-batch-size 1.",
        final=True,
    ),
    error(
        "MLM-ARG-mbs_pos",
        "validate_args:694",
        "micro_batch_size",
        lambda s: s.micro_batch_size <= 0,
        "The micro batch size is positive.",
        "Use --micro-batch-size 1 or more.",
        final=True,
    ),
    error(
        "MLM-ARG-step_vs_gbs",
        "validate_args:699",
        "step_batch_size_schedule",
        lambda s: s.step_batch_size_schedule is not None and s.global_batch_size is not None,
        "A schedule of batch sizes excludes a fixed global batch.",
        "Drop --global-batch-size or --step-batch-size-schedule.",
    ),
    change(
        "MLM-ARG-gbs_default",
        "validate_args:703",
        "global_batch_size",
        lambda s: s.global_batch_size is None and {"global_batch_size": s.micro_batch_size * s.dp},
        "Left out, the global batch is mbs*dp = {micro_batch_size}*{dp}: one microbatch a step.",
        "Write --global-batch-size; pipelines want several times pp microbatches.",
    ),
    error(
        "MLM-ARG-gbs_pos",
        "validate_args:705",
        "global_batch_size",
        lambda s: s.global_batch_size <= 0,
        "The global batch size is positive.",
        "Use a multiple of mbs*dp = {micro_batch_size}*{dp}.",
        final=True,
    ),
    derive(
        "validate_args:710",
        lambda s: {
            "eval_global_batch_size": s.global_batch_size
            if s.eval_global_batch_size is None
            else s.eval_global_batch_size,
            "eval_micro_batch_size": s.micro_batch_size
            if s.eval_micro_batch_size is None
            else s.eval_micro_batch_size,
        },
    ),
    error(
        "MLM-ARG-eval_gbs_div",
        "validate_args:715",
        "eval_global_batch_size",
        _eval_not_divisible,
        "The evaluation batch, by default the global batch, must be a multiple of mbs*dp*gtp = "
        "{eval_micro_batch_size}*{dp}*{gtp} = {unit}; {eval_global_batch_size} is not.",
        "Use {nearest}.",
    ),
    error(
        "MLM-ARG-rl_gbs",
        "validate_args:727",
        "global_batch_size",
        _rollout_not_divisible,
        "The {samples} samples of a rollout must be a multiple of the global batch "
        "{global_batch_size}.",
        "Choose a global batch that divides {samples}.",
    ),
    error(
        "MLM-NMB-step_decrease",
        "num_microbatches:266",
        "step_batch_size_schedule",
        lambda s: s.step_batch_size_schedule is not None and s.decrease_batch_size_if_needed,
        "A schedule of batch sizes is never decreased to fit.",
        "Drop --decrease-batch-size-if-needed.",
    ),
    change(
        "MLM-NMB-decrease",
        "num_microbatches:369",
        "global_batch_size",
        _rounded_down,
        "The global batch {global_batch_size} is lowered to {running_global_batch_size}, a "
        "multiple of mbs*dp.",
        "Write a multiple yourself.",
    ),
    error(
        "MLM-NMB-gbs_div",
        "num_microbatches:381",
        "global_batch_size",
        _not_divisible,
        "The global batch {global_batch_size} must be a multiple of mbs*dp*gtp = "
        "{micro_batch_size}*{dp}*{gtp} = {unit}.",
        "Use {nearest}.",
        repeats=("MLM-ARG-eval_gbs_div",),
    ),
    error(
        "MLM-NMB-at_least_one",
        "num_microbatches:389",
        "global_batch_size",
        _no_microbatch,
        "The global batch {global_batch_size} is less than one microbatch a rank: mbs*dp*gtp = "
        "{unit}.",
        "Use {unit} or a multiple of it.",
        repeats=("MLM-ARG-eval_gbs_div", "MLM-NMB-gbs_div"),
    ),
    warning(
        "MLM-NMB-step_div",
        "num_microbatches:581",
        "step_batch_size_schedule",
        _step_not_divisible,
        "The batch {size} of the schedule is no multiple of mbs*dp*gtp = {unit}; resuming in that "
        "step would fail.",
        "Use multiples of {unit}.",
    ),
    error(
        "MLM-NMB-step_fmt",
        "num_microbatches:517",
        "step_batch_size_schedule",
        _unreadable_schedule,
        "The schedule is written THRESHOLD:BATCH, and {entry!r} is not.",
        'Write, for example, "0:256 100B:512".',
    ),
    error(
        "MLM-NMB-step_first0",
        "num_microbatches:539",
        "step_batch_size_schedule",
        _not_from_zero,
        "The first threshold of the schedule is 0.",
        "Begin with 0:BATCH.",
    ),
    error(
        "MLM-NMB-step_incr",
        "num_microbatches:545",
        "step_batch_size_schedule",
        _not_increasing,
        "The thresholds increase strictly (counted in samples: tokens over the sequence length).",
        "Put them further apart.",
    ),
    error(
        "MLM-NMB-step_pos",
        "num_microbatches:556",
        "step_batch_size_schedule",
        _batch_not_positive,
        "Every batch size of the schedule is positive.",
        "Use multiples of mbs*dp = {micro_batch_size}*{dp}.",
    ),
    derive("num_microbatches:600", _num_microbatches),
)
