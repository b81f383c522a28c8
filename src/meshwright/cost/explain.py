"""Where each number comes from: the docstring of the function that computed it.

Nothing is described twice. A docstring's first line says what, the lines after it give the formula,
``Ref:`` its source and ``Left out:`` what it does not count.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from meshwright.cost import (
    blocks,
    comm,
    compute,
    data_parallel,
    exchange,
    host,
    memory,
    ops,
    step,
)
from meshwright.cost.detail import Estimate
from meshwright.cost.flops import model_flops_per_step
from meshwright.errors import MeshwrightError, did_you_mean
from meshwright.parallel import pipeline

Formula = Callable[..., Any]


@dataclass(frozen=True)
class Term:
    """A number of an estimate: what it says, and the functions that compute it."""

    what: str
    formulas: tuple[Formula, ...]


TERMS: dict[str, Term] = {
    "peak_bytes": Term(
        "Most bytes that the fullest rank holds at once; the memory terms sum to it.",
        (step.memory_of_candidates, memory.block_bytes),
    ),
    "weights_bytes": Term(
        "Weights that the rank holds for compute.", (memory.weights_bytes_per_param,)
    ),
    "grads_bytes": Term("Gradient buffers.", (memory.grads_bytes_per_param,)),
    "optimizer_bytes": Term(
        "Master weights and Adam moments.", (memory.optimizer_bytes_per_param,)
    ),
    "activations_bytes": Term(
        "What forward passes keep for backward, times the micro-batches held at once.",
        (memory.block_bytes, pipeline.held_microbatches),
    ),
    "logits_bytes": Term(
        "Logits that the loss keeps for backward, on the last stage.", (memory.saved_tensors,)
    ),
    "buffers_bytes": Term(
        "Gradients alive inside the largest block, placeholders, messages, gathered weights.",
        (memory.working_bytes, memory.placeholder_bytes, memory.workspace_bytes),
    ),
    "framework_bytes": Term(
        "Context, libraries, communicators, and what the allocator holds unused.",
        (memory.framework_bytes,),
    ),
    "step_time_s": Term(
        "First forward to the end of the update; the time terms sum to it.",
        (step.simulate_group, pipeline.simulate),
    ),
    "compute_s": Term(
        "Kernels of forward and backward on the slowest rank, and what they wait for the host.",
        (
            compute.matmul_s,
            compute.grouped_matmul_s,
            compute.attention_s,
            compute.attention_backward_s,
            compute.stream_s,
            ops.loss_s,
            ops.fullest,
            compute.power_fraction,
            host.wait_for_host,
        ),
    ),
    "recompute_s": Term(
        "Forwards run again in the backward pass, with their communication.",
        (blocks.block_seconds, host.wait_for_host),
    ),
    "tp_comm_s": Term(
        "Tensor-parallel communication that its overlap switch does not hide.",
        (
            exchange.comm_seconds,
            exchange.tensor_parallel_s,
            comm.all_gather_s,
            comm.all_reduce_s,
        ),
    ),
    "cp_comm_s": Term(
        "Exchange of keys and values that attention does not hide.",
        (exchange.context_parallel_s, comm.ring_step_s, comm.all_gather_s),
    ),
    "ep_comm_s": Term(
        "Routed tokens sent to their experts and back, less what is overlapped.",
        (exchange.comm_seconds, exchange.expert_parallel_s, comm.all_to_all_s, comm.dispatch_s),
    ),
    "pp_comm_s": Term(
        "What messages between stages add to the simulated schedule.",
        (comm.point_to_point_s, step.simulate_group, pipeline.simulate),
    ),
    "bubble_s": Term(
        "Time in which the slowest rank waits for the pipeline.",
        (step.simulate_group, pipeline.simulate),
    ),
    "dp_comm_s": Term(
        "Reduction of gradients and gathering of weights that compute does not hide.",
        (
            data_parallel.dp_comm_s,
            data_parallel.gather_and_reduce_s,
            data_parallel.across_replicas_s,
        ),
    ),
    "optimizer_s": Term("The update of the rank's share.", (data_parallel.optimizer_s,)),
    "mfu_fraction": Term(
        "Model FLOP/s per GPU over the dense peak of the precision that matmuls run in.",
        (model_flops_per_step,),
    ),
}
"""Every number of an estimate that can be explained."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """One formula behind a term: what it is, how it is computed, from where, without what."""

    what: str
    formula: str
    source: str
    left_out: str

    def to_dict(self) -> dict[str, str]:
        """Return the JSON object of the command line."""
        return {
            "what": self.what,
            "formula": self.formula,
            "source": self.source,
            "left_out": self.left_out,
        }


def explain_term(term: str) -> list[Explanation]:
    """Return the formulas behind a term.

    Raises ``MeshwrightError`` when there is no such term, with the nearest names.
    """
    if term not in TERMS:
        raise MeshwrightError("term", term, "There is no such term.", did_you_mean(term, TERMS))
    return [_read(formula) for formula in TERMS[term].formulas]


def _read(formula: Formula) -> Explanation:
    first, _, rest = (inspect.getdoc(formula) or "").partition("\n")
    what, ref, source = first.partition("Ref:")
    body, source, left_out = _split(" ".join((ref + source + " " + rest).split()))
    if source.startswith("as the module"):
        source = _of_module(formula).rstrip(".") + source.removeprefix("as the module")
    parts = (what.strip(), body, source, left_out)
    what, body, source, left_out = (_plain(part) for part in parts)
    return Explanation(what=what, formula=body, source=source, left_out=left_out)


def _plain(text: str) -> str:
    """Return docstring text without its markup."""
    return text.replace("``", "")


def _split(text: str) -> tuple[str, str, str]:
    """Return what stands before ``Ref:``, after it, and after ``Left out:``."""
    text = text.partition("Raises ``")[0]
    body, *left_out = re.split(r"Left out(?:, as there)?:", text, maxsplit=1)
    body, _, source = body.partition("Ref:")
    return body.strip(), source.strip(), " ".join(left_out).strip()


def _of_module(formula: Formula) -> str:
    module = inspect.getmodule(formula)
    return _split(" ".join((inspect.getdoc(module) or "").split()))[1]


def values(e: Estimate) -> dict[str, float]:
    """Return every number of an estimate that can be explained, by term."""
    whole = {
        "peak_bytes": e.peak_bytes,
        "step_time_s": e.step_time_s,
        "mfu_fraction": e.mfu_fraction,
    }
    return {**whole, **e.memory, **e.time}
