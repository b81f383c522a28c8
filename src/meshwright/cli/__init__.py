"""The command line: Typer over the functions of ``api``.

The modules here import nothing heavy at the top, so that help is instant; a command imports what it
runs. Each module has ``register(app)``, which adds its commands.
"""

from __future__ import annotations

from importlib import import_module

import typer

app = typer.Typer(
    name="meshwright",
    help="Choose, prove, run and learn: parallel layouts for training large models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help starts twice as fast
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

MODULES = ("planning", "launches", "running", "training", "accuracy", "calibrating")
"""Modules with commands, in the order that help lists them."""


def _version(wanted: bool) -> None:
    if wanted:
        from meshwright import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", help="Print the version.", callback=_version, is_eager=True
    ),
) -> None:
    """Choose, prove, run and learn: parallel layouts for training large models."""
    del version


for _module in MODULES:
    import_module(f"meshwright.cli.{_module}").register(app)
