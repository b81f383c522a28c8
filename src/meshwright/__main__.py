"""The command ``meshwright``, also as ``python -m meshwright``."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line; bad input ends with its message and exit status 2."""
    from meshwright.cli import app
    from meshwright.errors import MeshwrightError

    try:
        app()
    except MeshwrightError as error:
        if "--json" in sys.argv:
            import json

            told = {"field": error.field, "value": error.value}
            told |= {"rule": error.rule, "remedy": error.remedy}
            print(json.dumps({"error": told}, default=str))
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # The reader (head, less) has left; say nothing and do not fail on the final flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
