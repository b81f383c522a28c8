"""Training frameworks: what each makes of a launch, and how each is written.

One module or package a framework; its name, with underscores, is the public name. A framework that
knows the rules of its own launch has ``resolve(argv, gpus, env) -> Resolved``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from meshwright import registry
from meshwright.errors import LaunchError
from meshwright.findings import Finding

if TYPE_CHECKING:
    from meshwright.frameworks.launch import FRAMEWORKS
    from meshwright.frameworks.megatron_lm.launch import Resolved
    from meshwright.frameworks.write import launch_files, unsupported

__all__ = ["FRAMEWORKS", "check_launch", "launch_files", "resolve", "unsupported"]

MOST_GPUS = 2**31 - 1


def check_launch(
    argv: Sequence[str],
    gpus: int,
    framework: str = "megatron-lm",
    env: Mapping[str, object] | None = None,
) -> list[Finding]:
    """Return what is wrong with a launch, as the framework itself would say.

    ``argv`` holds Megatron-LM flags, or Megatron-Bridge overrides ``path=value``; ``gpus`` is the
    world size. ``env`` holds environment variables (one left out is unset), and what is known of
    the machine: ``site.te_version`` ("2.14.0", None: absent) and ``site.device_capability``
    ([9, 0]). Findings are errors first, in the order in which the framework asks: the first is
    what it would stop at. No error means that it starts.

    Raises ``MeshwrightError`` on an unknown framework, an impossible number of GPUs, or arguments
    that are not text. Whatever the arguments say is a finding.
    """
    return resolve(argv, gpus, framework, env).findings


def resolve(
    argv: Sequence[str],
    gpus: int,
    framework: str = "megatron-lm",
    env: Mapping[str, object] | None = None,
) -> Resolved:
    """Return what the framework makes of a launch: every value, where it comes from, findings.

    Arguments and errors as in ``check_launch``.
    """
    if isinstance(gpus, bool) or not isinstance(gpus, int) or not 1 <= gpus <= MOST_GPUS:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise LaunchError("gpus", gpus, "It is a whole number from 1.", "Give the world size.")
    if not isinstance(argv, list | tuple) or not all(isinstance(a, str) for a in argv):  # pyright: ignore[reportUnnecessaryIsInstance]
        rule = "The arguments are a list of texts."
        raise LaunchError("argv", argv, rule, 'Give ["--num-layers", "32", ...].')
    if env is not None and not isinstance(env, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise LaunchError("env", env, "It maps names to values.", 'Give {"NAME": "value"}.')
    module = registry.load(__name__, _module_name(framework), field="framework")
    if not hasattr(module, "resolve"):
        rule = "The rules of its launch are not known."
        raise LaunchError("framework", framework, rule, "Use megatron-lm or megatron-bridge.")
    return module.resolve(argv, gpus, env)


def _module_name(framework: object) -> str:
    if not isinstance(framework, str):
        raise LaunchError("framework", framework, "It is a name.", "Use megatron-lm.")
    return framework.replace("-", "_")


_HOMES = {"FRAMEWORKS": "launch", "launch_files": "write", "unsupported": "write"}
"""Where names live that most checks do not need; they are imported when first used."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
