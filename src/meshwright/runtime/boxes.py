"""Runs of a tensor laid flat, as rectangles of the tensor."""

from __future__ import annotations

from collections.abc import Iterator


def rectangles(
    shape: tuple[int, ...], begin: int, end: int
) -> Iterator[tuple[tuple[slice, ...], slice]]:
    """Yield the rectangles that elements begin..end of a tensor laid flat make up.

    Each with its own run of flat elements: at most 2*dims - 1 of them, a head, a body and a tail
    per dimension.
    """
    if begin >= end:
        return
    if len(shape) <= 1:
        yield ((slice(begin, end),) if shape else ()), slice(begin, end)
        return
    inner = 1
    for size in shape[1:]:
        inner *= size
    start = begin
    while start < end:
        row = start // inner
        if start % inner == 0 and end - start >= inner:
            rows = (end - start) // inner
            yield (
                (slice(row, row + rows), *(slice(0, n) for n in shape[1:])),
                slice(start, start + rows * inner),
            )
            start += rows * inner
            continue
        stop = min(end, (row + 1) * inner)
        for part, flat in rectangles(shape[1:], start - row * inner, stop - row * inner):
            yield (
                (slice(row, row + 1), *part),
                slice(flat.start + row * inner, flat.stop + row * inner),
            )
        start = stop
