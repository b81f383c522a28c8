"""Pointwise pieces compute what PyTorch computes and keep less. Provenance: oracle."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meshwright.runtime.pointwise import gated_product, rms_norm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_norm_equals_that_of_torch_and_keeps_its_input_and_a_number_a_row(
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((5, 2, 16), generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(16, generator=generator, dtype=torch.float64).to(dtype)
    grad = torch.randn((5, 2, 16), generator=generator, dtype=torch.float64).to(dtype)
    found: list[list[Tensor]] = []
    for function in (partial(rms_norm, eps=1e-5), _norm_of_torch):
        own, own_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = function(own, own_weight)
        found.append([out, *torch.autograd.grad(out, (own, own_weight), grad)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    if dtype == torch.float64:
        leaf = x.clone().requires_grad_()
        assert _kept_elements(lambda: rms_norm(leaf, weight, 1e-5)) == x.numel() + 10 + 16


def _norm_of_torch(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-5)


def _kept_elements(function: Callable[[], Tensor]) -> int:
    """Return the elements of the storages that a function keeps for backward."""
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function()
    return sum(x.numel() for x in kept.values())


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_a_gated_product_equals_that_of_autograd_and_keeps_its_two_inputs(activation: str) -> None:
    generator = torch.Generator().manual_seed(3)
    gate, up = (
        torch.randn((4, 3, 8), generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(2)
    )
    of_torch = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    expected = of_torch * up
    function = partial(gated_product, gate, up, activation)
    torch.testing.assert_close(function(), expected)
    ours, theirs = (
        torch.autograd.grad(out.square().sum(), (gate, up)) for out in (function(), expected)
    )
    torch.testing.assert_close(ours, theirs)
    assert _kept_elements(function) == gate.numel() + up.numel()
