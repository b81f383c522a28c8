"""How answers look on a terminal: short tables, plain sentences, no colour when piped."""

from meshwright.cli.show.explained import show_explanation, show_why_not
from meshwright.cli.show.lists import show_groups, show_rows
from meshwright.cli.show.plans import show_plan, show_plans
from meshwright.cli.show.proofs import show_account, show_verified
from meshwright.cli.show.terminal import progress_bar

__all__ = [
    "progress_bar",
    "show_account",
    "show_explanation",
    "show_groups",
    "show_plan",
    "show_plans",
    "show_rows",
    "show_verified",
    "show_why_not",
]
