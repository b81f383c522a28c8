"""Megatron-LM: its command line and the rules it checks a launch against.

``arguments`` is its command line as data, ``rules`` the engine, and one module a topic holds the
rules themselves: a new rule is one entry in the table of its topic. Facts of the software as of
August 2026 (``rules.csv`` of the project's data names file and line of each).
"""

from meshwright.frameworks.megatron_lm.launch import check, resolve

__all__ = ["check", "resolve"]
