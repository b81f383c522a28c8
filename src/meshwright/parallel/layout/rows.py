"""Tables of layouts: rows in, rows out. Columns are int64 and cannot be written to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import LayoutError
from meshwright.parallel.layout.fields import COLUMNS, Ints, Layout, Layouts


def table(rows: list[Layout[int]]) -> Layouts:
    """Return the rows as one table. They must share ``order`` and the other table-wide fields."""
    shared = {(r.order, r.pipeline_layout, r.hierarchical_cp) for r in rows}
    if len(shared) != 1:
        raise LayoutError(
            "layout.order",
            len(shared),
            "The rows of a table share order, pipeline_layout and hierarchical_cp.",
            "Make one table for each.",
        )
    order, pipeline_layout, hierarchical_cp = shared.pop()
    columns = {c: _column([getattr(r, c) for r in rows]) for c in COLUMNS}
    return Layout[Ints](
        **columns, order=order, pipeline_layout=pipeline_layout, hierarchical_cp=hierarchical_cp
    )


def _column(values: Any) -> Ints:
    column = np.ascontiguousarray(values, dtype=np.int64)
    column.flags.writeable = False
    return column


def num_rows(x: Layouts) -> int:
    """Return the number of layouts in a table."""
    return len(x.tp)


def take(x: Layouts, index: NDArray[Any]) -> Layouts:
    """Return the rows that ``index`` (row numbers or a mask) selects."""
    return replace(x, **{c: _column(getattr(x, c)[index]) for c in COLUMNS})


def row(x: Layouts, index: int) -> Layout[int]:
    """Return one row of a table as a layout."""
    values: dict[str, Any] = {c: int(getattr(x, c)[index]) for c in COLUMNS}
    return Layout[int](
        **values,
        order=x.order,
        pipeline_layout=x.pipeline_layout,
        hierarchical_cp=x.hierarchical_cp,
    )


def concatenate(tables: list[Layouts]) -> Layouts:
    """Return the rows of all tables, in order, as one table."""
    columns = {c: _column(np.concatenate([getattr(t, c) for t in tables])) for c in COLUMNS}
    return replace(tables[0], **columns)


def with_columns(x: Layouts, **columns: Any) -> Layouts:
    """Return the table with some columns replaced (broadcast to its length)."""
    n = num_rows(x)
    return replace(
        x, **cast("dict[str, Any]", {k: _column(np.broadcast_to(v, n)) for k, v in columns.items()})
    )
