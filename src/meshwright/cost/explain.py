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

from meshwright.cost import blocks, comm, compute, data_parallel, memory, step
from meshwright.cost.detail import Estimate
from meshwright.cost.flops import model_flops_per_step
from meshwright.errors import MeshwrightError, did_you_mean
from meshwright.units import format_value

Formula = Callable[..., Any]

TERMS: dict[str, tuple[Formula, ...]] = {
    "weights_bytes": (memory.weights_bytes_per_param,),
    "grads_bytes": (memory.grads_bytes_per_param,),
    "optimizer_bytes": (memory.optimizer_bytes_per_param,),
    "activations_bytes": (memory.block_bytes,),
    "logits_bytes": (memory.saved_tensors,),
    "buffers_bytes": (memory.working_bytes,),
    "framework_bytes": (memory.framework_bytes,),
    "compute_s": (
        compute.matmul_s,
        compute.grouped_matmul_s,
        compute.attention_s,
        compute.stream_s,
    ),
    "recompute_s": (blocks.block_seconds,),
    "tp_comm_s": (blocks.tensor_parallel_s, comm.all_gather_s, comm.all_reduce_s),
    "cp_comm_s": (blocks.context_parallel_s, comm.ring_step_s),
    "ep_comm_s": (blocks.expert_parallel_s, comm.all_to_all_s),
    "pp_comm_s": (comm.point_to_point_s,),
    "bubble_s": (step.simulate_group, step.pipeline_bound_s),
    "dp_comm_s": (data_parallel.dp_comm_s, data_parallel.gather_and_reduce_s),
    "optimizer_s": (data_parallel.optimizer_s,),
    "mfu_fraction": (model_flops_per_step,),
}
"""The functions that compute each term of an estimate."""


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
    return [_read(formula) for formula in TERMS[term]]


def _read(formula: Formula) -> Explanation:
    first, _, rest = (inspect.getdoc(formula) or "").partition("\n")
    what, ref, source = first.partition("Ref:")
    body, source, left_out = _split(" ".join((ref + source + " " + rest).split()))
    if source.startswith("as the module"):
        source = _of_module(formula) + source.removeprefix("as the module").rstrip(".")
    return Explanation(what=what.strip(), formula=body, source=source, left_out=left_out)


def _split(text: str) -> tuple[str, str, str]:
    """Return what stands before ``Ref:``, after it, and after ``Left out:``."""
    body, *left_out = re.split(r"Left out(?:, as there)?:", text, maxsplit=1)
    body, _, source = body.partition("Ref:")
    return body.strip(), source.strip(), " ".join(left_out).partition("Raises ")[0].strip()


def _of_module(formula: Formula) -> str:
    module = inspect.getmodule(formula)
    return _split(" ".join((inspect.getdoc(module) or "").split()))[1]


def values(e: Estimate) -> dict[str, float]:
    """Return every number of an estimate that can be explained, by term."""
    return {**e.memory, **e.time, "mfu_fraction": e.mfu_fraction}


def shown(term: str, value: float) -> str:
    """Return a value with its unit, for people."""
    return format_value(term, value)
