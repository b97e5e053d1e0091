"""`castling diff`."""

from __future__ import annotations

from pathlib import Path

import click

from castling_deploy.commands.options import CONTEXT, Amount
from castling_deploy.commands.outcome import concluded, print_json


@click.command(context_settings=CONTEXT)
@click.argument("a", metavar="DIR_A", type=click.Path(path_type=Path))
@click.argument("b", metavar="DIR_B", type=click.Path(path_type=Path))
@click.option("--max-slower", type=Amount(0), default=10, show_default=True, help="Percent, on the same host.")
@click.option("--max-larger", type=Amount(0), default=5, show_default=True, help="Percent.")
@click.option("--max-drop", type=Amount(0), default=0.5, show_default=True, help="Percentage points of the score.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def diff(a: Path, b: Path, max_slower: float, max_larger: float, max_drop: float, as_json: bool) -> int:
    """Parity, score, size and latency of two artefact folders side by side; where DIR_B is worse, it fails.

    Read from what the exports wrote; `castling verify` tells whether the files are as they were exported.
    """
    from castling_deploy.console import print_comparison
    from castling_deploy.rechecking.comparison import Allowed
    from castling_deploy.rechecking.comparison import diff as compared
    from castling_deploy.report import comparison_document
    from castling_deploy.terminal import stderr_console

    comparison = compared(a, b, Allowed(max_slower, max_larger, max_drop))
    print_comparison(comparison, stderr_console())
    if as_json:
        print_json(comparison_document(comparison))
    return concluded(comparison.regression)
