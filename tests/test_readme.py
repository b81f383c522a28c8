"""The Python of the README runs as it stands. Provenance: ours."""

from __future__ import annotations

import re
from pathlib import Path


def test_the_python_of_the_readme_runs() -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
