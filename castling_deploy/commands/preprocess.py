"""`castling preprocess`."""

from __future__ import annotations

from pathlib import Path

import click

from castling_deploy.commands.options import CONTEXT
from castling_deploy.commands.outcome import print_json
from castling_deploy.plain import SCHEMA, plain


@click.command(context_settings=CONTEXT)
@click.argument("path", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--image", required=True, type=click.Path(path_type=Path), help="A photo of any size.")
@click.option("--mine", type=click.Path(path_type=Path), help="An .npy: what your own code made of it.")
@click.option("--save", type=click.Path(path_type=Path), help="Write what the artefact takes of it into this .npy.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def preprocess(path: Path, image: Path, mine: Path | None, save: Path | None, as_json: bool) -> int:
    """Your own preprocessing of a photo against the artefact's: which mistake it has, and whether it matters.

    Exit code 3 where the model is wrong or the preprocessing is.
    """
    from castling_deploy.attribution.own_preprocessing import preprocess as compared
    from castling_deploy.attribution.own_preprocessing import print_attribution
    from castling_deploy.attribution.resize_check import Cause
    from castling_deploy.errors import ParityError
    from castling_deploy.terminal import stderr_console

    found = compared(path, image, mine, save)
    console = stderr_console()
    if save is not None:
        console.print(f"written: {save}, what the artefact takes of '{image}'", soft_wrap=True)
    if found is not None:
        print_attribution(found, console)
    if as_json:
        print_json({"schema": SCHEMA, "saved": save, "attribution": None if found is None else plain(found)})
    return 0 if found is None or found.cause is Cause.NEITHER else ParityError.exit_code
