"""Megatron-Bridge: its overrides and the rules it checks a launch against.

Bridge runs Megatron Core, so Megatron Core's own rules come from the Megatron-LM package; this one
adds what Bridge changes and checks around them. Facts of the software as of August 2026.
"""

from meshwright.frameworks.megatron_bridge.launch import check, resolve

__all__ = ["check", "resolve"]
