"""meshwright: choose, prove, run and learn parallel layouts for training large models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meshwright.describe.model import Model
    from meshwright.describe.models import load_model, parameters
    from meshwright.errors import MeshwrightError
    from meshwright.findings import Finding
    from meshwright.frameworks import check_launch
    from meshwright.parallel.actions import schedule_order
    from meshwright.parallel.mesh import rank_groups
    from meshwright.parallel.placement import place_layers

__version__ = "0.1.0"

_HOMES: dict[str, str] = {
    "Finding": "meshwright.findings",
    "MeshwrightError": "meshwright.errors",
    "Model": "meshwright.describe.model",
    "check_launch": "meshwright.frameworks",
    "load_model": "meshwright.describe.models",
    "parameters": "meshwright.describe.models",
    "place_layers": "meshwright.parallel.placement",
    "rank_groups": "meshwright.parallel.mesh",
    "schedule_order": "meshwright.parallel.actions",
}
"""Where each public name lives. Names are imported when first used, so that a command pays only
for what it needs (``meshwright --help`` imports neither numpy nor torch)."""

__all__ = [
    "Finding",
    "MeshwrightError",
    "Model",
    "__version__",
    "check_launch",
    "load_model",
    "parameters",
    "place_layers",
    "rank_groups",
    "schedule_order",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'meshwright' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
