"""The layout: how training is split over ranks. One layout, or a table with a column per field.

``Layout[int]`` is one layout; ``Layout[Ints]`` (``Layouts``) is a table of them, every field a
column of int64. Degree arithmetic is written once and serves both. A layout knows no cost and no
model. ``fields`` and ``choices`` say what a layout is, ``make`` derives what is left out, ``rows``
holds many, ``text`` reads and writes one.
"""

from meshwright.parallel.layout.choices import (
    CHOICES,
    CP_COMM_TEXT,
    SCHEDULE_TEXT,
    CpComm,
    Pipeline,
    Recompute,
    Zero,
    recompute_from_text,
    recompute_to_text,
)
from meshwright.parallel.layout.fields import COLUMNS, DEFAULT_ORDER, Int, Ints, Layout, Layouts
from meshwright.parallel.layout.make import check_world_size, layout, minimum_world_size
from meshwright.parallel.layout.rows import concatenate, num_rows, row, table, take, with_columns
from meshwright.parallel.layout.text import (
    from_text,
    layout_fields,
    read_fields,
    to_dict,
    to_text,
)
from meshwright.parallel.layout.values import whole_number, written

__all__ = [
    "CHOICES",
    "COLUMNS",
    "CP_COMM_TEXT",
    "DEFAULT_ORDER",
    "SCHEDULE_TEXT",
    "CpComm",
    "Int",
    "Ints",
    "Layout",
    "Layouts",
    "Pipeline",
    "Recompute",
    "Zero",
    "check_world_size",
    "concatenate",
    "from_text",
    "layout",
    "layout_fields",
    "minimum_world_size",
    "num_rows",
    "read_fields",
    "recompute_from_text",
    "recompute_to_text",
    "row",
    "table",
    "take",
    "to_dict",
    "to_text",
    "whole_number",
    "with_columns",
    "written",
]
