"""What reinforcement learning holds on a GPU beside the training of its policy.

Readers say in ``words``: ``rl_roles``, a list of ``critic`` and ``reference`` that train or score
on the same GPUs and are not offloaded between phases; ``rollout_memory_fraction``;
``rollout_tensor_model_parallel_size``; ``policy_keeps_logits``, that log-probabilities and entropy
are computed from whole logits; ``states_offloaded``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from meshwright.findings import Finding
from meshwright.frameworks.launch import Launch
from meshwright.frameworks.launch_findings import said
from meshwright.parallel.layout import Layout
from meshwright.units import format_bytes

if TYPE_CHECKING:
    from meshwright.cost.detail import Estimate
    from meshwright.describe.job import Job
    from meshwright.describe.model import Model

_STATES: Final = ("weights_bytes", "grads_bytes", "optimizer_bytes")
_EXPORT_COPIES: Final = 2


def judge_memory(
    launch: Launch, model: Model, job: Job, x: Layout[int], price: Estimate
) -> list[Finding]:
    """Return what does not fit beside the policy's training."""
    return [
        *_rollout(launch, price),
        *_roles(launch, model, price),
        *_logits(launch, model, job, x, price),
        *_export(launch, model, price),
    ]


def _sure_bytes(price: Estimate) -> float:
    """Return up to where the memory model is sure that a run fits."""
    from meshwright.cost.detail import BAND_FRACTION  # slow to load: only a priced launch asks

    return (1 - BAND_FRACTION) * price.capacity_bytes


def _states(price: Estimate) -> float:
    return sum(price.memory[term] for term in _STATES)


def _fraction(launch: Launch) -> float | None:
    value = launch.words.get("rollout_memory_fraction")
    return value if isinstance(value, int | float) and 0 < value <= 1 else None


def _rollout(launch: Launch, price: Estimate) -> Iterable[Finding]:
    """Tell where generation and training on the same GPUs do not fit side by side."""
    fraction = _fraction(launch)
    if fraction is None:
        return
    kept = fraction * price.capacity_bytes
    rest = price.capacity_bytes - kept
    if price.peak_bytes > rest:
        rule = (
            f"Generation keeps {format_bytes(kept)} of each GPU and leaves {format_bytes(rest)};"
            f" training peaks at {format_bytes(price.peak_bytes)}. It fits only where the engine"
            " gives its memory back, and not while weights are synchronised."
        )
        remedy = "Lower the rollout's share, or split training further (ep, tp, pp, offload)."
        name, about = "rollout_and_training_share_a_gpu", "rollout_memory_fraction"
        yield said(name, about, fraction, rule, remedy, "warning")


def _roles(launch: Launch, model: Model, price: Estimate) -> Iterable[Finding]:
    """Tell where the policy, a critic, a reference model and the engine's weights do not fit.

    A critic is taken to be as large as the policy and split alike; a reference model holds weights
    only; the engine holds 2 bytes a parameter over its tensor parallel size.
    """
    roles: list[str] = launch.words.get("rl_roles") or []
    tp = launch.words.get("rollout_tensor_model_parallel_size")
    parts = {"the policy's training": price.peak_bytes}
    if "critic" in roles:
        parts["the critic's weights, gradients and optimizer"] = _states(price)
    if "reference" in roles:
        parts["the reference model's weights"] = price.memory["weights_bytes"]
    if isinstance(tp, int) and tp > 0:
        parts["the engine's weights"] = 2.0 * model.num_params / tp
    total = sum(parts.values())
    if roles and total > _sure_bytes(price):
        listed = ", ".join(f"{format_bytes(size)} for {what}" for what, size in parts.items())
        rule = (
            f"These share each GPU: {listed}; together {format_bytes(total)} of"
            f" {format_bytes(price.capacity_bytes)}."
        )
        remedy = "Offload what is not in use, place roles on GPUs of their own, or split further."
        yield said("colocated_roles_fit", "rl_roles", "+".join(roles), rule, remedy, "warning")


def _logits(
    launch: Launch, model: Model, job: Job, x: Layout[int], price: Estimate
) -> Iterable[Finding]:
    """Tell where one more copy of the logits does not fit: mbs*s/cp * V/tp * 4 bytes.

    The price holds the logits and their gradient; log-probabilities and entropy keep another.
    """
    if launch.words.get("policy_keeps_logits") is not True:
        return
    more = x.mbs * job.seq_len / x.cp * model.vocab_size / x.tp * 4
    needed, sure = price.peak_bytes + more, _sure_bytes(price)
    if price.verdict != "does not fit" and needed > sure:
        rule = (
            "Log-probabilities and entropy keep a further copy of the logits: mbs*seq_len/cp *"
            f" vocabulary/tp * 4 bytes = {format_bytes(more)} on top of"
            f" {format_bytes(price.peak_bytes)}, of {format_bytes(price.capacity_bytes)}."
        )
        remedy = "Raise cp or tp, lower the micro batch, recompute, or use fused kernels."
        yield said("policy_logits_fit", "memory.logits_bytes", None, rule, remedy, "warning")


def _export(launch: Launch, model: Model, price: Estimate) -> Iterable[Finding]:
    """Tell where sending weights to the engine needs more than there is.

    The largest tensor is the fused gate and up projection of one layer's experts, experts * 2 * ffn
    * hidden * 2 bytes; it is gathered whole, and copied once when it is put together.
    """
    if not model.is_moe or not launch.words.get("rl_trainer"):
        return
    tensor = 4.0 * model.num_experts * model.expert_ffn_hidden_size * model.hidden_size
    states = 0.0 if launch.words.get("states_offloaded") else _states(price)
    engine = (_fraction(launch) or 0.0) * price.capacity_bytes
    needed = states + engine + _EXPORT_COPIES * tensor
    over = needed > _sure_bytes(price)
    rule = (
        "To send weights to the engine, the experts of one layer are gathered:"
        f" {format_bytes(tensor)}, twice while they are put together, beside"
        f" {format_bytes(states)} of states and {format_bytes(engine)} of the engine:"
        f" {format_bytes(needed)} of {format_bytes(price.capacity_bytes)}."
    )
    remedy = "Lower the rollout's share, offload, or place the engine on GPUs of its own."
    severity = "warning" if over else "note"
    yield said("weight_export_fits", "rollout_memory_fraction", None, rule, remedy, severity)
