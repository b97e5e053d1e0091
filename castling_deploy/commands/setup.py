"""`castling setup`."""

from __future__ import annotations

import click

from castling_deploy.commands.options import CONTEXT
from castling_deploy.errors import UsageError
from castling_deploy.suggest import did_you_mean


@click.command(context_settings=CONTEXT)
@click.argument("names", nargs=-1, metavar="NAME...")
def setup(names: tuple[str, ...]) -> int:
    """Fetch and build what pip cannot install for the runners NAME of `castling verify --on`, into the user's cache.

    Nothing else downloads anything. Without a NAME: what there is to set up, and what has been.
    """
    from castling_deploy.cache import cache_folder
    from castling_deploy.runner import to_set_up
    from castling_deploy.terminal import StderrProgress

    known = to_set_up()
    for name in names:
        if name not in known:
            raise UsageError(f"there is nothing to set up for '{name}'", hint=did_you_mean(name, list(known)))
    progress = StderrProgress()
    if not names:
        for name, runner in known.items():
            state = "ready" if runner.missing() is None else f"castling setup {name}"
            progress.console.print(f"{name}: {state}  ({cache_folder(name)})", soft_wrap=True)
    for name in names:
        with progress.stage(f"set up {name} in {cache_folder(name)}") as advance:
            known[name].set_up(advance)
    return 0
