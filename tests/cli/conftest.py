"""The command line in this process, and two small models for it."""

from __future__ import annotations

import json
import sys

import pytest

from command_line import CONFIG, MOE_CONFIG, Answer, Run
from meshwright.__main__ import main


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process."""
    monkeypatch.setenv("COLUMNS", "200")

    def command(*words: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["meshwright", *words])
        status = 0
        try:
            main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        printed = capsys.readouterr()
        return Answer(status, printed.out, printed.err)

    return command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return str(folder)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("moe")
    (folder / "config.json").write_text(json.dumps(MOE_CONFIG))
    return str(folder / "config.json")
