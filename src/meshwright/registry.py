"""A package is a registry: the file name of a module is the public name of what it holds.

A newcomer adds an item by adding a file. Nothing else has to be edited, and the item is tested the
moment the file exists, because the tests run over everything a registry finds.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from types import ModuleType

from meshwright.errors import MeshwrightError, did_you_mean


@cache
def names(package: str) -> tuple[str, ...]:
    """Return the public names of the modules in ``package``, sorted, without importing them."""
    path = importlib.import_module(package).__path__
    return tuple(sorted(m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_")))


def load(
    package: str, name: str, *, field: str, aliases: Mapping[str, str] | None = None
) -> ModuleType:
    """Import the module of ``package`` that is called ``name``, or what an alias of it names.

    Raises ``MeshwrightError`` on ``field`` when there is no such item, with the nearest names.
    """
    wanted = (aliases or {}).get(name, name)
    if wanted not in names(package):
        known = {*names(package), *(aliases or {})}
        raise MeshwrightError(field, name, "There is no such name.", did_you_mean(name, known))
    return importlib.import_module(f"{package}.{wanted}")
