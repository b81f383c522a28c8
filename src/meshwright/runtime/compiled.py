"""Layers through ``torch.compile``: one graph a layer, the same for all layers of a kind."""

# torch annotates some functions only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterable
from typing import Any, cast

import torch

from meshwright.errors import JobError, LayoutError
from meshwright.parallel.layout import Layout
from meshwright.runtime.decoder import Chunk, Layer
from meshwright.runtime.expert_parallel import Moe


def check_compilable(x: Layout[int], backend: str) -> None:
    """Raise a ``MeshwrightError`` where layers cannot be compiled.

    Tensor and context parallelism talk inside of a layer, between every two products: there a
    graph would end at each of them. Data and pipeline parallelism, and experts, are outside.
    """
    for name, degree in (("tp", x.tp), ("cp", x.cp)):
        if degree > 1:
            rule = "Layers that communicate inside are not compiled."
            raise LayoutError(f"layout.{name}", degree, rule, f"Use {name}=1, or do not compile.")
    on_cpu = backend == "inductor" and not torch.cuda.is_available()
    if on_cpu and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        rule = "Compiling for a CPU needs a C++ compiler."
        raise JobError("train.compile", backend, rule, "Install g++, or do not compile.")


def compile_layers(chunks: Iterable[Chunk], backend: str) -> None:
    """Compile the layers of ``chunks``; experts, whose sizes depend on the data, run as they are.

    ``backend`` is PyTorch's name of a compiler: ``inductor``, or ``aot_eager`` for tests.
    """
    layers = [layer for chunk in chunks for layer in _layers(chunk)]
    config = cast("Any", torch)._dynamo.config
    # The tracer looks at the gradient of every input, also of those that are no parameters.
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
    config.recompile_limit = max(config.recompile_limit, 2 * len(layers))
    for layer in layers:
        # Made before tracing: torch 2.11 cannot trace how a frozen dataclass is made.
        _ = layer.context.attention, layer.context.region
        if isinstance(layer.mlp, Moe):
            experts = cast("Any", layer.mlp)
            experts.forward = torch.compiler.disable(experts.forward)
        layer.compile(backend=backend, dynamic=False)


def _layers(chunk: Chunk) -> list[Layer]:
    found = [*chunk.layers.values(), *(layer.layer for layer in cast("Any", chunk.mtp))]
    return cast("list[Layer]", found)
