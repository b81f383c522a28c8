"""A plan as one page that anyone can open: memory of every stage, the step, the pipeline.

``pictures`` draws, ``page`` writes the HTML around it. Needs the extra ``report`` (matplotlib).
"""

from meshwright.report.page import page

__all__ = ["page"]
