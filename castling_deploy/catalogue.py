"""Every published network that can be loaded: what it is for, its weights and its work before and after the cast."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from castling_deploy.errors import UsageError
from castling_deploy.suggest import did_you_mean

if TYPE_CHECKING:
    from rich.console import Console

FILE = Path(__file__).parent / "bundled" / "models.json"


@dataclass(frozen=True)
class Work:
    """Weights, and multiply-accumulates (matrix products and convolutions) for one image."""

    parameters: int
    macs: int


@dataclass(frozen=True)
class Entry:
    """A variant of a family at its published input size (height, width)."""

    name: str
    family: str
    task: str
    baseline: str | None
    attention: str
    image_size: tuple[int, int]
    classes: int
    trained: Work
    castled: Work
    reference: str


def catalogue(names: tuple[str, ...] = ()) -> tuple[Entry, ...]:
    """The variants called so, those of the families, baselines or tasks called so; all without names.

    Read from a file that travels with the package (`make models` writes it): counting takes half a minute. Raises
    UsageError for a name that is none of them.
    """
    rows = json.loads(FILE.read_text(encoding="utf-8"))
    entries = tuple(
        Entry(
            **{
                **row,
                "image_size": tuple(row["image_size"]),
                "trained": Work(**row["trained"]),
                "castled": Work(**row["castled"]),
            }
        )
        for row in rows
    )
    words = {entry: {entry.name, entry.family, entry.baseline or entry.family, entry.task} for entry in entries}
    for name in names:
        known = dict.fromkeys(word for of_entry in words.values() for word in sorted(of_entry))
        if name not in known:
            raise UsageError(f"no model, family or task is called '{name}'", hint=did_you_mean(name, known))
    return tuple(entry for entry in entries if not names or not words[entry].isdisjoint(names))


COLUMNS = ("model", "input", "params", "cast", "MACs", "cast")


def cells(entry: Entry) -> tuple[str, ...]:
    """One row of a table with these COLUMNS."""
    height, width = entry.image_size
    before, after = entry.trained, entry.castled
    return (
        entry.name,
        f"{height} x {width}",
        f"{before.parameters:,}",
        f"{after.parameters:,}" if after != before else "-",
        f"{before.macs / 1e9:.3f} G",
        f"{after.macs / 1e9:.3f} G" if after != before else "-",
    )


def by_family(entries: tuple[Entry, ...]) -> Iterator[tuple[str, tuple[Entry, ...]]]:
    """The entries of each family, under a line that says what it is."""
    for family in dict.fromkeys(entry.family for entry in entries):
        rows = tuple(entry for entry in entries if entry.family == family)
        yield f"{family}: {rows[0].task}, {rows[0].classes} classes. {rows[0].reference}", rows


def page(entries: tuple[Entry, ...]) -> str:
    """The table in Markdown: docs/models.md."""
    lines = [
        "# Models",
        "",
        "Every family and variant that is recognised in a checkpoint, at its published input size: weights and "
        "multiply-accumulates (matrix products and convolutions, one image) as trained and after the cast. Names "
        "without `castling-` are softmax baselines and PicoDet, where there is nothing to cast. Written by "
        "`make models`.",
        "",
        "How Castling wires LeViT's downsampling, MViTv2's pooling, detectors and segmenters is not published: "
        "[choices.md](choices.md) says what this project chose. In the auxiliary branch, and in the baselines, "
        "attention is quadratic in the number of tokens.",
    ]
    for title, rows in by_family(entries):
        head, _, rest = title.partition(": ")
        lines += ["", f"## {head}", "", rest, "", f"| {' | '.join(COLUMNS)} |", "|---|---|" + "---:|" * 4]
        lines += [f"| {' | '.join(cells(entry))} |" for entry in rows]
    return "\n".join(lines) + "\n"


def print_catalogue(entries: tuple[Entry, ...], console: Console) -> None:
    """One table per family."""
    from rich.table import Table

    for title, rows in by_family(entries):
        console.print(f"\n{title}", soft_wrap=True)
        table = Table(show_edge=False, pad_edge=False)
        for number, column in enumerate(COLUMNS):
            table.add_column(column, justify="right" if number > 1 else "left")
        for entry in rows:
            table.add_row(*cells(entry))
        console.print(table)
