"""What a launch does without saying so that no rule of its framework tells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from meshwright.findings import Finding, Severity
from meshwright.frameworks.launch import Launch
from meshwright.parallel.layout import Layout, Zero
from meshwright.units import format_bytes

if TYPE_CHECKING:
    from meshwright.cost.detail import Estimate
    from meshwright.describe.cluster import Cluster

JUDGES_ITSELF: Final = frozenset({"megatron-lm", "megatron-bridge"})
"""Frameworks whose own examination is complete: Megatron's rules are not asked a second time."""
_ALLOCATOR: Final = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_FRAGMENTS_FROM: Final = 0.7
"""Share of the capacity from which fragmentation has been seen to end runs that fit: a peak of 58.8
GB on a card of 80 GB failed in a third of its runs."""
_PACKAGES: Final = {"deepep": "deep_ep", "hybridep": "deep_ep (its HybridEP branch)"}


def said(
    name: str, about: str, value: object, rule: str, remedy: str, severity: Severity
) -> Finding:
    """Return a finding whose message says field, value, rule and remedy."""
    shown = "" if value is None else f" = {value}"
    return Finding(
        id=name,
        severity=severity,
        field=about,
        value=value,
        rule=rule,
        remedy=remedy,
        message=f"{about}{shown}: {rule} {remedy}",
    )


def told(launch: Launch) -> list[Finding]:
    """Return what the settings alone tell."""
    words = launch.words
    found: list[Finding] = []
    if launch.gpus is None:
        rule = "The launch does not say how many processes it starts; the smallest world is taken."
        found.append(said("gpus_unknown", "gpus", None, rule, "Give --gpus.", "note"))
    found += _vocabulary(words)
    found += _connections(launch)
    found += _dispatcher(words)
    found += _lazy_groups(words)
    found += _displayed_loss(launch)
    if _is_unbalanced(words):
        rule = (
            "Nothing balances the experts: no auxiliary loss, no router bias, no capacity. Some"
            " ranks will get far more tokens than others, and all wait for them."
        )
        remedy = "Use an auxiliary loss coefficient of 0.01, or a router bias."
        value, name = words.get("moe_aux_loss_coeff"), "moe_aux_loss_coeff"
        found.append(said("experts_are_balanced", name, value, rule, remedy, "warning"))
    return found


def _connections(launch: Launch) -> Iterable[Finding]:
    value = launch.env.get("CUDA_DEVICE_MAX_CONNECTIONS")
    sharded = launch.words.get("use_torch_fsdp2") or launch.words.get("use_megatron_fsdp")
    if sharded and value == "1" and launch.framework not in JUDGES_ITSELF:
        rule = (
            "Fully sharded training overlaps gathers with compute over several queues; with one"
            " connection the overlap is lost without a message."
        )
        name = "CUDA_DEVICE_MAX_CONNECTIONS"
        yield said("MLM-ENV-fsdp", name, value, rule, "Unset it, or use 16 or 32.", "warning")


def _vocabulary(words: Mapping[str, Any]) -> Iterable[Finding]:
    """Tell a vocabulary that is not padded and does not split over TP."""
    size, tp = words.get("vocab_size"), words.get("tensor_model_parallel_size")
    if words.get("should_pad_vocab") is not False or not isinstance(size, int):
        return
    if isinstance(tp, int) and tp >= 1 and size % tp:
        rule = f"It is not padded and does not split over tp = {tp}."
        padded = -(-size // (128 * tp)) * 128 * tp
        remedy = f"Set should_pad_vocab=true, which makes it {padded}."
        yield said("vocabulary_splits_over_tp", "model.vocab_size", size, rule, remedy, "error")


def _dispatcher(words: Mapping[str, Any]) -> Iterable[Finding]:
    """Tell what the image must hold for a dispatcher that Megatron does not bring itself."""
    backend = words.get("moe_flex_dispatcher_backend") or "deepep"
    if words.get("moe_token_dispatcher_type") != "flex" or backend not in _PACKAGES:
        return
    rule = (
        f"The {backend} backend is a package of its own, {_PACKAGES[backend]}; without it in the"
        " image the model cannot be built."
    )
    name = "moe_flex_dispatcher_backend"
    remedy = "Import it once on the image, or use alltoall."
    yield said("dispatcher_is_installed", name, backend, rule, remedy, "note")


def _lazy_groups(words: Mapping[str, Any]) -> Iterable[Finding]:
    """Tell which switch to try when an interleaved pipeline hangs."""
    chunks, pp = words.get("virtual_pipeline_model_parallel_size"), "pipeline_model_parallel_size"
    if not isinstance(chunks, int) or chunks < 2 or words.get("overlap_p2p_comm") is not True:
        return
    rule = (
        f"Overlapped sends between the {words.get(pp)} stages make a communicator for each pair of"
        " ranks when first used; where ranks make them in different orders, a run hangs in the"
        " PIPELINE_MODEL_PARALLEL_GROUP now and then."
    )
    remedy = "If one does, switch the overlap off (Megatron-LM: --no-overlap-p2p-communication)."
    name = "overlap_p2p_comm"
    yield said("overlapped_p2p_makes_groups_late", name, True, rule, remedy, "note")


def _displayed_loss(launch: Launch) -> Iterable[Finding]:
    """Tell that a loss which is off by exactly cp is a matter of its display."""
    cp = launch.words.get("context_parallel_size")
    if launch.framework == "torchtitan" or not isinstance(cp, int) or cp < 2:
        return
    rule = (
        f"Some versions print the loss divided or multiplied by cp = {cp}: its sum and its number"
        " of tokens were reduced over different groups."
    )
    remedy = (
        "Before comparing curves, print the first loss with cp = 1 beside it: a ratio of exactly"
        f" {cp} is the display (or, where the gradient norm has it too, a bug of that version)."
    )
    name = "displayed_loss_is_whole"
    yield said(name, "context_parallel_size", cp, rule, remedy, "note")


def _is_unbalanced(words: Mapping[str, Any]) -> bool:
    """Say whether a launch that has experts states that nothing balances them."""
    kind, coefficient = words.get("moe_router_load_balancing_type"), words.get("moe_aux_loss_coeff")
    stated = kind == "none" or (kind is not None and not coefficient and kind != "sinkhorn")
    held = words.get("moe_router_enable_expert_bias") or words.get("moe_expert_capacity_factor")
    return bool(words.get("num_moe_experts")) and stated and not held


def idle(already: Iterable[Finding], x: Layout[int], launch: Launch) -> list[Finding]:
    """Return what is asked for and does nothing in this layout."""
    if x.zero != Zero.optim or x.dp * x.cp > 1 or any("dist_opt" in f.id for f in already):
        return []
    shared = bool(launch.words.get("num_moe_experts")) and x.edp > 1
    if shared or not launch.words.get("use_distributed_optimizer"):
        return []
    rule = "With dp*cp = 1 there is nobody to share the optimizer with: every rank holds it whole."
    remedy = "Count it whole, or use more GPUs."
    name = "use_distributed_optimizer"
    return [said("optimizer_is_not_shared", name, True, rule, remedy, "warning")]


def fragmentation(launch: Launch, price: Estimate) -> list[Finding]:
    """Return what to do first when a run that fits fails: the allocator, not the layout."""
    share = price.peak_bytes / price.capacity_bytes
    allocator = next((launch.env[name] for name in _ALLOCATOR if name in launch.env), "")
    if not _FRAGMENTS_FROM <= share <= 1 or "expandable_segments:True" in allocator:
        return []
    rule = (
        f"The peak is {share:.0%} of what the card offers, and the allocator's fragments come on"
        " top: from here on runs that fit have failed now and then."
    )
    remedy = (
        f"Export {_ALLOCATOR[0]}=expandable_segments:True before changing tp, pp, vpp or recompute."
    )
    return [said("allocator_fragments", _ALLOCATOR[0], allocator or None, rule, remedy, "note")]


def evaluation(launch: Launch, x: Layout[int], price: Estimate) -> list[Finding]:
    """Return what evaluation needs where it runs more sequences at once than training does.

    Forward only: states and the logits of one evaluation micro-batch, in 16 bits and in fp32.
    """
    size, vocab = launch.words.get("eval_micro_batch_size"), launch.words.get("vocab_size")
    seq = launch.words.get("seq_length")
    if not (isinstance(size, int) and isinstance(vocab, int) and isinstance(seq, int)):
        return []
    if size <= x.mbs:
        return []
    logits = size * seq // x.cp * vocab // x.tp * 6
    states = sum(price.memory[f"{part}_bytes"] for part in ("weights", "grads", "optimizer"))
    needed, capacity = states + logits, price.capacity_bytes
    rule = (
        f"Evaluation runs {size} sequences at once where training runs {x.mbs}: their logits take"
        f" {format_bytes(logits)} beside {format_bytes(states)} of states, {format_bytes(needed)}"
        f" of {format_bytes(capacity)}; training peaks at {format_bytes(price.peak_bytes)}."
    )
    severity: Severity = "warning" if needed > min(capacity, price.peak_bytes) else "note"
    remedy = f"Evaluate with a micro batch of {x.mbs}."
    return [said("evaluation_fits", "eval_micro_batch_size", size, rule, remedy, severity)]


def other_size(cluster: Cluster, x: Layout[int]) -> Finding:
    """Return what to say of a launch with more or fewer processes than there are GPUs."""
    rule = f"The launch starts {x.world_size} processes; the cluster has {cluster.num_gpus} GPUs."
    remedy = f"Start {cluster.num_gpus} processes, or check on {x.world_size} GPUs."
    severity: Severity = "error" if x.world_size > cluster.num_gpus else "warning"
    return said("cluster_size", "gpus", x.world_size, rule, remedy, severity)
