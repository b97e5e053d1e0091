"""`castling bench`."""

from __future__ import annotations

from pathlib import Path

import click

from castling_deploy.commands.options import CONTEXT
from castling_deploy.commands.outcome import print_json
from castling_deploy.plain import SCHEMA


@click.command(context_settings=CONTEXT)
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def bench(paths: tuple[Path, ...], threads: int, as_json: bool) -> int:
    """Latency of artefact folders on this machine."""
    from castling_deploy.rechecking.recheck import benchmark

    rows = []
    for path in paths:
        timing = benchmark(path, threads=threads)
        rows.append(
            {
                "path": str(path),
                "median_s": timing.median_s,
                "p95_s": timing.p95_s,
                "threads": threads,
                "times_s": timing.times_s,
            }
        )
        click.echo(
            f"{path}: median {timing.median_s * 1e3:.2f} ms, p95 {timing.p95_s * 1e3:.2f} ms, {threads} thread(s), "
            f"{len(timing.times_s)} runs",
            err=True,
        )
    if as_json:
        print_json({"schema": SCHEMA, "latency": rows})
    return 0
