"""`castling models`."""

from __future__ import annotations

import click

from castling_deploy.commands.options import CONTEXT
from castling_deploy.commands.outcome import print_json
from castling_deploy.plain import SCHEMA


@click.command(context_settings=CONTEXT)
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def models(names: tuple[str, ...], as_json: bool) -> int:
    """Every model that a checkpoint can be: NAMEs of models, families or tasks; all of them without."""
    from castling_deploy import bundled
    from castling_deploy.catalogue import catalogue, print_catalogue
    from castling_deploy.terminal import stderr_console

    entries = catalogue(names)
    if as_json:
        print_json({"schema": SCHEMA, "models": entries})
    else:
        console = stderr_console()
        print_catalogue(entries, console)
        console.print(f"\ntrained and bundled: {', '.join(bundled.CHECKPOINTS)}", soft_wrap=True)
    return 0
