"""Granite 3 (IBM): the layers of Llama, with scaled residuals and logits."""

from meshwright.describe.families.llama import build

__all__ = ["build"]
