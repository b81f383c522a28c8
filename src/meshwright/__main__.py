"""The command ``meshwright``, also as ``python -m meshwright``."""

from __future__ import annotations

import os
import sys
from typing import cast

CLOSED_PIPE = 141
"""Exit status of a program whose reader has left: 128 + SIGPIPE, as a shell reports it."""


def main() -> None:
    """Run the command line; bad input ends with its message and exit status 2."""
    try:
        status = _run()
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as end:
        # Typer and Rich turn a closed pipe into an exit of their own.
        if not isinstance(end, BrokenPipeError) and not isinstance(
            end.__context__, BrokenPipeError
        ):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = CLOSED_PIPE
    sys.exit(status)


def _run() -> int:
    import typer

    from meshwright.cli import app
    from meshwright.errors import MeshwrightError

    # The parent of BadParameter is click's UsageError, whose module moves with Typer's version.
    usage_error = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[1])
    try:
        status = app(standalone_mode=False)
    except MeshwrightError as error:
        _tell_json(error.field, error.value, error.rule, error.remedy)
        print(f"error: {error}", file=sys.stderr)
        return 2
    except typer.Abort:
        print("Aborted.", file=sys.stderr)
        return 1
    except usage_error as error:
        name = getattr(getattr(error, "param", None), "name", None) or "arguments"
        _tell_json(name, None, error.format_message(), "See --help.")
        error.show()
        return error.exit_code
    return status if isinstance(status, int) else 0


def _tell_json(field: str, value: object, rule: str, remedy: str) -> None:
    if "--json" in sys.argv:
        import json

        told = {"field": field, "value": value, "rule": rule, "remedy": remedy}
        print(json.dumps({"error": told}, default=str))


if __name__ == "__main__":
    main()
