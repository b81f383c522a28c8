"""What a launch knows of the machine that it starts on, beyond the number of its GPUs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from meshwright.errors import LaunchError


@dataclass(frozen=True, kw_only=True)
class Site:
    """What is known of the machine: environment variables, Transformer Engine, GPU generation."""

    env: Mapping[str, str]
    te_version: tuple[int, ...]
    """Of Transformer Engine; empty when it is absent."""
    device_capability: tuple[int, ...]

    @property
    def before_blackwell(self) -> bool:
        """Whether the GPU is older than Blackwell."""
        return self.device_capability[0] < 10

    def te_at_least(self, *version: int) -> bool:
        """Say whether Transformer Engine is installed and not older than ``version``."""
        return self.te_version >= version


def site_of(env: Mapping[str, object] | None) -> Site:
    """Return the site that ``env`` describes.

    Keys are environment variables, and ``site.te_version`` ("2.14.0", None: absent) and
    ``site.device_capability`` ([9, 0]); not given: 2.14.0 on a Hopper GPU.

    Raises ``LaunchError`` when one of the two is unreadable.
    """
    given = dict(env or {})
    te = given.pop("site.te_version", "2.14.0")
    device = given.pop("site.device_capability", (9, 0))
    version: tuple[int, ...] = ()
    if te is not None:
        numbers = re.match(r"\d{1,6}(\.\d{1,6})*", te) if isinstance(te, str) else None
        if numbers is None:
            raise LaunchError("site.te_version", te, "It is a version, or None.", 'Write "2.14.0".')
        version = tuple(map(int, numbers.group().split(".")))
    capability = _whole_numbers(device)
    if not capability:
        rule = "It is the major and the minor number of the compute capability."
        raise LaunchError("site.device_capability", device, rule, "Write [9, 0].")
    known = {str(k): str(v) for k, v in given.items() if v is not None}
    return Site(env=known, te_version=version, device_capability=capability)


def _whole_numbers(value: object) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        return ()
    return tuple(i for i in cast("list[object]", value) if isinstance(i, int))
