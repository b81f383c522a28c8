"""meshwright: choose, prove, run and learn parallel layouts for training large models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meshwright.api import estimate, explain, job, plan, why_not
    from meshwright.describe.cluster import Cluster, load_cluster
    from meshwright.describe.job import Job
    from meshwright.describe.model import Model
    from meshwright.describe.models import load_model, parameters
    from meshwright.errors import MeshwrightError
    from meshwright.findings import Finding
    from meshwright.frameworks import check_launch
    from meshwright.parallel.actions import schedule_order
    from meshwright.parallel.layout import Layout, layout
    from meshwright.parallel.mesh import rank_groups
    from meshwright.parallel.placement import place_layers

__version__ = "0.1.0"

_HOMES: dict[str, str] = {
    "Cluster": "meshwright.describe.cluster",
    "Finding": "meshwright.findings",
    "Job": "meshwright.describe.job",
    "Layout": "meshwright.parallel.layout",
    "MeshwrightError": "meshwright.errors",
    "Model": "meshwright.describe.model",
    "check_launch": "meshwright.frameworks",
    "estimate": "meshwright.api",
    "explain": "meshwright.api",
    "job": "meshwright.api",
    "layout": "meshwright.parallel.layout",
    "load_cluster": "meshwright.describe.cluster",
    "load_model": "meshwright.describe.models",
    "parameters": "meshwright.describe.models",
    "place_layers": "meshwright.parallel.placement",
    "plan": "meshwright.api",
    "rank_groups": "meshwright.parallel.mesh",
    "schedule_order": "meshwright.parallel.actions",
    "why_not": "meshwright.api",
}
"""Where each public name lives. Names are imported when first used, so that a command pays only
for what it needs (``meshwright --help`` imports neither numpy nor torch)."""

__all__ = [
    "Cluster",
    "Finding",
    "Job",
    "Layout",
    "MeshwrightError",
    "Model",
    "__version__",
    "check_launch",
    "estimate",
    "explain",
    "job",
    "layout",
    "load_cluster",
    "load_model",
    "parameters",
    "place_layers",
    "plan",
    "rank_groups",
    "schedule_order",
    "why_not",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'meshwright' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
