"""What the trainers whose processes Ray starts have in common: placement, lengths, adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from meshwright.frameworks.by_path import Facts
from meshwright.frameworks.launch import Reading, Setting
from meshwright.frameworks.overrides import Override

_MOST: Final = 2**20


def read_world(reading: Reading, facts: Facts, nodes: str, per_node: str, title: str) -> None:
    """Count the processes of a placement: nodes times GPUs a node."""
    n, g = facts.whole(nodes), facts.whole(per_node)
    if n is None or g is None or not (0 < n <= _MOST and 0 < g <= _MOST):
        return
    reading.gpus = facts.gpus = min(n * g, _MOST)
    reading.gpus_per_node = g
    if not facts.given(per_node):
        reading.assumed.append(f"{per_node} = {g}: the default of {title}")


def made_of(
    known: Mapping[str, Override], paths: Sequence[str], value: object, title: str
) -> Setting:
    """Return a value computed from several settings, with the places of those that are given."""
    origins = [known[path].origin for path in paths if path in known]
    defaults = ", ".join(path for path in paths if path not in known)
    if defaults:
        origins.append(f"default of {title} ({defaults})")
    return Setting(value=value, origin="; ".join(origins))


def read_adapters(reading: Reading, known: Mapping[str, Override], path: str) -> None:
    """Make the task LoRA where a rank above 0 is set."""
    rank = known.get(path)
    if rank is not None and isinstance(rank.value, int) and rank.value > 0:
        reading.settings["task"] = Setting(value="lora", origin=rank.origin)
        reading.settings["lora_rank"] = Setting(value=rank.value, origin=rank.origin)


def expert_tensor_default(reading: Reading, title: str) -> None:
    """Take TP as the expert tensor parallel size of split experts where it is left out."""
    ep = reading.settings.get("expert_model_parallel_size")
    tp = reading.settings.get("tensor_model_parallel_size")
    if ep is not None and ep.value not in (None, 1):
        reading.default("expert_tensor_parallel_size", 1 if tp is None else tp.value, title)
