"""Find the best layouts: enumerate, keep the legal, price all, simulate best first.

Exact: a row is simulated unless its lower bound is already worse than the k-th best simulated one.
``space`` says what may be chosen, ``pipelines`` and ``candidates`` enumerate it, ``best_first``
ranks it.
"""

from meshwright.search.best_first import Found, Progress, Ranked, Refuses, search
from meshwright.search.candidates import candidate_tables
from meshwright.search.space import LIMITED, Space, read_space

__all__ = [
    "LIMITED",
    "Found",
    "Progress",
    "Ranked",
    "Refuses",
    "Space",
    "candidate_tables",
    "read_space",
    "search",
]
