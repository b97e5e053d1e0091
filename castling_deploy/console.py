"""What people read, on stderr: stages with their time, a progress bar while they run, a closing table."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from castling_deploy.castle import LayerCast
from castling_deploy.inspection import Inspection
from castling_deploy.localising.localised_text import print_localised
from castling_deploy.making import Result
from castling_deploy.models.family import family_named
from castling_deploy.parity import Verdict
from castling_deploy.pipeline import Deployment
from castling_deploy.rechecking.comparison import Comparison, Quantity
from castling_deploy.rechecking.rejudge import Rejudged
from castling_deploy.report import model_bytes
from castling_deploy.undecided import why_undecided

STYLES = {Verdict.PASS: "green", Verdict.FAIL: "red", Verdict.INCONCLUSIVE: "yellow"}


def marked(verdict: Verdict) -> Text:
    """The verdict in its colour; what fails is written large."""
    return Text(verdict.upper() if verdict is Verdict.FAIL else verdict, STYLES[verdict])


def number(value: float | None, form: str) -> str:
    """The number in this format, '-' where it is not known."""
    return "-" if value is None else format(value, form)


def print_deployment(deployment: Deployment, console: Console) -> None:
    """The closing table, what is doubtful, and what to do next."""
    ladder, card = deployment.ladder, deployment.card
    before, after = ladder.trained_score, ladder.reference_score
    cast = card.nothing_to_cast or f"{len(ladder.layers)} auxiliary branches cast away"
    console.print(
        f"\n{card.name}: {cast}, {len(ladder.steps)} folds (exact to {number(ladder.fold_rung.rel, '.0e')} in float64)"
    )
    if before is not None and after is not None:
        console.print(
            f"{ladder.task.metric} on {ladder.probes.real} held-out images: {before:.2f} % as trained, "
            f"{after:.2f} % after the cast"
        )
        if ladder.cast_rung.verdict is Verdict.FAIL:
            console.print("the cast harms this network: do not ship it; train longer with the branch on", style="red")
    elif ladder.already_cast:
        console.print("the network was cast before: what that cost cannot be told any more")
    elif card.nothing_to_cast is not None:
        console.print("no labelled images are known for this network, so its accuracy was not measured")
    else:
        console.print(
            f"the cast changes the outputs by {number(ladder.cast_rung.rel, '.2g')} of their spread; no "
            "labelled images are known for this network, so its accuracy after the cast was not measured"
        )
    for warning in card.warnings:
        console.print(f"! {warning}", style="yellow")
    table = Table(show_edge=False, pad_edge=False)
    metric = ladder.task.metric
    for column in ("target", "precision", "size", "parity", "error / spread", metric, "median", "time / PyTorch"):
        table.add_column(column)
    for result in deployment.results:
        table.add_row(*_row(result))
    console.print()
    console.print(table)
    for result in deployment.results:
        _print_notes(result, console)
    print_doubts(deployment.results, console)


def _row(result: Result) -> list[str | Text]:
    name, precision = result.step.target.name, result.step.precision.value
    if result.error is not None or result.parity is None or result.path is None:
        state = Text("failed", "red") if result.error else Text("unavailable", "yellow")
        return [name, precision, "-", state, *["-"] * 4]
    report = result.parity.witnesses[0]
    latency = result.latency
    return [
        name,
        precision,
        f"{(model_bytes(result) or 0) / 1e6:.2f} MB",
        marked(result.parity.verdict),
        f"{number(result.parity.rungs[-1].rel, '.1e')} of {result.parity.rungs[-1].limit:.0e}",
        number(report.score, ".2f"),
        "-" if latency is None else f"{latency.artifact.median_s * 1e3:.2f} ms",
        "-" if latency is None else f"{latency.ratio:.2f}",
    ]


def _print_notes(result: Result, console: Console) -> None:
    name = result.step.target.name
    if result.path is not None:
        console.print(f"\n{name}: {result.path}", style="bold", soft_wrap=True)
    for seen in result.parity.witnesses if result.parity is not None else ():
        console.print(
            f"  run by {seen.witness.name} ({seen.witness.kind}: {seen.witness.kind.meaning})", soft_wrap=True
        )
    if result.parity is not None and (why := why_undecided(result.parity)) is not None:
        console.print(f"  inconclusive: {why}", style="yellow", soft_wrap=True)
    if result.error is not None:
        console.print(f"\nerror: {name}: {result.error.message}", style="red", soft_wrap=True)
        if result.error.hint:
            console.print(f"  hint: {result.error.hint}", soft_wrap=True)
    if result.missing is not None:
        console.print(f"  not available here: {result.missing.reason}", style="yellow", soft_wrap=True)
        console.print(f"  to mend it: {result.missing.fix}", soft_wrap=True)
    if result.artifact is not None:
        islands = result.artifact.details.get("islands")
        if islands:
            console.print(f"  in float32: {', '.join(islands)} (why: range_audit in parity.json)", soft_wrap=True)
        for note in result.artifact.details.get("notes", ()):
            console.print(f"  note: {note}", soft_wrap=True)
    if result.latency is not None:
        console.print(
            f"  latency on {result.latency.threads} thread, batch {result.latency.batch}; p95 "
            f"{result.latency.artifact.p95_s * 1e3:.2f} ms"
        )
    if result.localisation is not None:
        print_localised(result.localisation, console)
    if result.path is not None:
        console.print(f"  check it again: castling verify {shlex.quote(str(result.path))}", soft_wrap=True)


def print_doubts(results: Sequence[Result], console: Console) -> None:
    """One line for all targets of a run: it is the same machine that makes their times doubtful."""
    doubted = {result.step.target.name: result.latency.warnings for result in results if result.latency is not None}
    doubted = {name: warnings for name, warnings in doubted.items() if warnings}
    if doubted:
        *_, last = (
            doubted.values()
        )  # the load of the machine, where it was high, stands at the end and explains the rest
        said = f"! the latency of {', '.join(doubted)} is rough: {last[-1]} (every doubt: latency.json)"
        console.print(f"\n{said}", style="yellow", soft_wrap=True)


def print_inspection(seen: Inspection, console: Console) -> None:
    """A checkpoint: what it is, what the cast removes, what the fold folds."""
    card = seen.card
    height, width = card.config.image_size
    family = family_named(card.family)
    kind = family.baseline if card.config.attention == "softmax" else family.name
    console.print(f"{card.name}  ({kind}, {card.task}; {card.reference})", style="bold")
    console.print(
        f"  input {card.config.channels} x {height} x {width}, {card.config.classes} classes; "
        f"{card.loaded} tensors loaded; taken off: {', '.join(card.peeled) or 'nothing'}; "
        f"dropped: {len(card.dropped)}"
    )
    if card.assumed:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in card.assumed)
        console.print(f"  the usual {', '.join(card.assumed)} are assumed; to tell others: {flags}")
    for warning in card.warnings:
        console.print(f"  ! {warning}", style="yellow")
    table = Table(show_edge=False, pad_edge=False)
    for column in ("", "parameters", "MACs"):
        table.add_column(column, justify="left" if not column else "right")
    for name, stage in (("as trained", seen.trained), ("cast", seen.castled), ("folded", seen.folded)):
        table.add_row(name, f"{stage.parameters:,}", f"{stage.macs / 1e6:,.1f} M")
    console.print(table)
    if card.nothing_to_cast is not None:
        console.print(f"  {card.nothing_to_cast}")
    else:
        console.print(_layers_table(seen.layers))
    if seen.dead:
        console.print(f"  dead after the cast: {', '.join(seen.dead)}")
    console.print("  what the fold folds: " + "; ".join(f"{count} x {rule}" for rule, count in seen.rules.items()))


def _layers_table(layers: Sequence[LayerCast]) -> Table:
    table = Table(show_edge=False, pad_edge=False, title="what the cast removes", title_justify="left")
    for column in ("layer", "tokens", "mask density", "peak", "contribution", "can vanish"):
        table.add_column(column)
    for layer in layers:
        evidence = layer.evidence
        table.add_row(
            layer.path,
            str(evidence.tokens),
            f"{evidence.mask_density:.4f}",
            f"{evidence.peak:.3f}",
            f"{evidence.contribution:.3f}",
            "yes" if evidence.can_vanish else "no: 1/tokens > threshold",
        )
    return table


def print_comparison(comparison: Comparison, console: Console) -> None:
    """What the two do not share, then every number side by side."""
    a, b = comparison.a, comparison.b
    console.print(f"a: {a.folder.path}\nb: {b.folder.path}", soft_wrap=True)
    for difference in comparison.differences:
        console.print(f"  ! {difference.name}: a has {difference.a}, b has {difference.b}", style="yellow")
    table = Table(show_edge=False, pad_edge=False)
    for column in ("", "a", "b", "change", "allowed"):
        table.add_column(column, justify="left" if not column else "right")
    state = Text("worse", "red") if comparison.parity_regressed else Text("")
    table.add_row("parity", marked(a.verdict), marked(b.verdict), state, "")
    for quantity in comparison.quantities:
        change = "-" if quantity.change is None else f"{quantity.change:+.2f} {quantity.change_unit or ''}".rstrip()
        table.add_row(
            quantity.name,
            _amount(quantity.a, quantity),
            _amount(quantity.b, quantity),
            Text(change, "red" if quantity.regressed else ""),
            "" if quantity.allowed is None else f"{quantity.allowed:g}",
        )
    console.print(table)
    for quantity in comparison.quantities:
        if quantity.remark is not None:
            console.print(f"  ! {quantity.name}: {quantity.remark}", style="yellow")


def _amount(value: float | None, quantity: Quantity) -> str:
    if value is None:
        return "-"
    units = {
        "s": lambda: f"{value * 1e3:.2f} ms",
        "bytes": lambda: f"{value / 1e6:.2f} MB",
        "%": lambda: f"{value:.2f}",
        "": lambda: f"{value:.3g}",
    }
    return units[quantity.unit]()


def print_rejudged(seen: Rejudged, console: Console) -> None:
    """Every saved error with the other limit, and the verdict it had."""
    console.print(f"{seen.path}: {marked(seen.verdict)} with the limit {seen.limit:g}; nothing was run", soft_wrap=True)
    for witness, was in zip(seen.report.witnesses, seen.saved.report.witnesses, strict=True):
        for output, before in zip(witness.outputs, was.outputs, strict=True):
            own = "; its limit is in its own unit" if output.widest_limit is None else ""
            console.print(
                f"  {output.name} {marked(output.verdict)} (was {marked(before.verdict)}), error / spread "
                f"{number(output.rel, '.1e')}, by {witness.witness.name} ({witness.witness.kind}){own}",
                soft_wrap=True,
            )
    for rung in seen.report.rungs:
        console.print(f"  rung {rung.name}: {marked(rung.verdict)}")
