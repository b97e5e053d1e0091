"""`castling doctor`."""

from __future__ import annotations

import click

from castling_deploy.commands.options import CONTEXT
from castling_deploy.commands.outcome import print_json
from castling_deploy.plain import SCHEMA, plain


@click.command(context_settings=CONTEXT)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def doctor(as_json: bool) -> int:
    """Which targets can be exported, run and verified here, and the exact line that mends what cannot."""
    from castling_deploy.doctor import examine, print_health
    from castling_deploy.terminal import stderr_console

    health = examine()
    print_health(health, stderr_console())
    if as_json:
        print_json({"schema": SCHEMA, **plain(health)})
    return 0
