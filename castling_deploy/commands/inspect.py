"""`castling inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import click

from castling_deploy.commands.options import CONTEXT, ImageSize, about_checkpoint
from castling_deploy.commands.outcome import print_json
from castling_deploy.errors import UsageError
from castling_deploy.plain import SCHEMA, plain


@click.command(context_settings=CONTEXT)
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option("--model", "-m", metavar="NAME", help="A bundled network.")
@click.option("--imgsz", type=ImageSize(), metavar="H[,W]", help="Input size in pixels.")
@click.option("--init-dconv", type=click.Choice(["zero"]), help="For experiments: a softmax network with a zero dconv.")
@about_checkpoint
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def inspect(
    path: Path | None,
    model: str | None,
    imgsz: tuple[int, int] | None,
    init_dconv: Literal["zero"] | None,
    weights: str | None,
    aux_threshold: float | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    as_json: bool,
) -> int:
    """What a checkpoint or an artefact folder PATH is (without one: a bundled network)."""
    from castling_deploy import bundled, documents
    from castling_deploy.artifact import read_folder
    from castling_deploy.console import print_inspection
    from castling_deploy.folder import MANIFEST
    from castling_deploy.inspection import inspect_checkpoint
    from castling_deploy.reading.card import Told
    from castling_deploy.terminal import stderr_console

    console, told = stderr_console(), Told(weights, aux_threshold, mean, std)
    if path is not None and (path / MANIFEST).is_file():
        if model or imgsz or init_dconv or told != Told():
            raise UsageError(
                "an artefact folder has its model and its size",
                hint="leave out what says something of a checkpoint: --model, --imgsz, --init-dconv, --weights, "
                "--aux-threshold, --mean, --std",
            )
        folder = read_folder(path)
        console.print_json(json.dumps(plain(folder.manifest)))
        document: Any = folder.manifest
    else:
        source = path or bundled.checkpoint_path(model or bundled.DEFAULT)
        seen = inspect_checkpoint(source, model, imgsz, init_dconv, told)
        print_inspection(seen, console)
        document = {"schema": SCHEMA, **plain(seen), "layers": documents.layers_document(seen.layers)}
    if as_json:
        print_json(document)
    return 0
