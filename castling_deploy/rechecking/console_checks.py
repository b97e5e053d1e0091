"""What `castling verify` shows people: the steps from the checkpoint to the artefact, then who ran it and what came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from castling_deploy.console import STYLES, marked, number
from castling_deploy.parity import Verdict, WitnessReport
from castling_deploy.rechecking.checks import AT_EXPORT, Check, Examined
from castling_deploy.target import WitnessKind

CLAIMS: Mapping[str, str] = {
    "cast": "the auxiliary branch was cast away; an approximation, judged by the task's score",
    "fold": "BatchNorm and constants folded; exact, judged in float64",
    "lowered": "rewritten for the target; exact, judged in float64",
    "quantised": "rounded to 8 bits; an approximation, judged by the task's score",
    "exported": "the artefact; judged by the limit of its precision",
    "compiled": "what a device made of it; judged by the limit of its precision",
}


def print_examined(seen: Examined, console: Console) -> None:
    """Every check of one folder, in two tables, and what they come to; an error is told by its caller."""
    if seen.recheck is None:
        return
    folder = seen.recheck.folder
    console.print(f"{folder.path}: {folder.target} {folder.precision}, every file as it was exported", soft_wrap=True)
    for check in seen.checks:
        if check.group == "built":
            said = "" if check.said is None else f": {check.said}"
            console.print(Text.assemble(f"built {check.name}: ", marked(check.verdict), said), soft_wrap=True)
    if seen.recheck.contradicted:
        console.print("nothing was run: the files are something else than the manifest claims", style="red")
        return
    _print_ladder(seen, console)
    how = "on the golden images" if seen.recheck.parity is None else "compared with the checkpoint"
    table = Table(title=f"who ran it now, {how}", title_justify="left", show_edge=False, pad_edge=False)
    for column in ("witness", "its word", "images", "output", "error / spread", "limit", "verdict"):
        table.add_column(column, overflow="fold")
    reports = seen.recheck.golden if seen.recheck.parity is None else seen.recheck.parity.witnesses
    for report in reports:
        for row in _rows(report):
            table.add_row(*row)
    for absent in seen.recheck.absent:
        table.add_row(absent.name, "not here", "-", "-", "-", "-", Text("not run", "yellow"))
    console.print(table)
    for kind in dict.fromkeys(report.witness.kind for report in reports):
        console.print(f"  {kind}: {kind.meaning}", style="dim", soft_wrap=True)
    for report in reports:
        if report.failure is not None:
            console.print(f"! {report.witness.name}: {report.failure.message}", style="red", soft_wrap=True)
    for absent in seen.recheck.absent:
        console.print(f"  to run {absent.name}: {absent.missing.fix}", soft_wrap=True)
    if seen.verdict is not None:
        console.print(closing(seen), style=STYLES[seen.verdict], soft_wrap=True)


def closing(seen: Examined) -> str:
    """The verdict of a folder in one line: what a pass rests on, or what kept it from one."""
    assert seen.recheck is not None and seen.verdict is not None
    path, parity = seen.recheck.folder.path, seen.recheck.parity
    if seen.verdict is not Verdict.PASS:
        return f"{seen.verdict}: {path}: {seen.reason}"
    reports = seen.recheck.golden if parity is None else parity.witnesses
    names = ", ".join(report.witness.name for report in reports if report.witness.kind is not WitnessKind.BUILDER)
    if not names:
        return f"pass: {path} is what passed at its export, and can be built; nobody ran it now"
    images = f"{max(report.images or 0 for report in reports)} {'golden ' if parity is None else ''}images"
    errors = [
        (check.rel / check.limit, check.rel, check.limit)
        for check in seen.checks
        if check.group != AT_EXPORT and not check.name.startswith("rung ") and check.rel is not None and check.limit
    ]
    _, rel, limit = max(errors)
    return f"pass: {path} computes what PyTorch computes on {images} (worst {rel:.1e} of {limit:.0e}, run by {names})"


def _print_ladder(seen: Examined, console: Console) -> None:
    assert seen.recheck is not None
    document = seen.recheck.saved.document
    groups = {check.group: None for check in seen.checks if check.name.startswith("rung ")}
    for group in groups:
        when = "as its export found them; not run again" if group == AT_EXPORT else f"run again now, on {group}"
        title = f"the steps from the checkpoint to the artefact, {when}"
        table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
        for column in ("step", "claim", "error / spread", "limit", "verdict"):
            table.add_column(column, overflow="fold")
        for check in seen.checks:
            if check.group == group and check.name.startswith("rung "):
                table.add_row(*_rung(check))
        console.print(table)
    accuracy, cast = document["accuracy"], document.get("cast")
    if accuracy["trained"] is not None:
        console.print(
            f"  {accuracy['metric']}: {accuracy['trained']:.2f} as trained, {accuracy['reference']:.2f} after the "
            f"cast, {number(accuracy['artifact'], '.2f')} by the artefact"
        )
    if cast and cast["layers"]:
        console.print(f"  {cast_evidence(cast['layers'])}", soft_wrap=True)


def cast_evidence(layers: Sequence[Mapping[str, Any]]) -> str:
    """The proof of the cast in words: how much of the auxiliary branch was left when it was removed."""
    density = max(layer["mask_density"] for layer in layers)
    most = max(layers, key=lambda layer: layer["contribution"])
    return (
        f"the branch that was cast away, on real images: its mask was open for {density:.2%} of a layer's token pairs "
        f"at most; its output was {most['contribution']:.2g} x the rest of its layer's at most ({most['path']})"
    )


def _rung(check: Check) -> tuple[str | Text, ...]:
    name = check.name.removeprefix("rung ")
    is_open = check.verdict is Verdict.INCONCLUSIVE and not check.decisive  # no labels: nothing decides
    verdict = Text("open", "yellow") if is_open else marked(check.verdict)
    limit = "-" if check.limit is None else f"{check.limit:.0e}"
    return name, CLAIMS.get(name, ""), number(check.rel, ".1e"), limit, verdict


def _rows(report: WitnessReport) -> list[tuple[str | Text, ...]]:
    name, kind, images = report.witness.name, str(report.witness.kind), str(report.images or "-")
    if report.failure is not None:
        return [(name, kind, "-", "-", "-", "-", marked(report.verdict))]
    if not report.outputs:
        return [(name, kind, "-", "-", "-", "-", Text("taken", "green"))]
    return [
        (
            name if index == 0 else "",
            kind if index == 0 else "",
            images if index == 0 else "",
            output.name,
            number(output.rel, ".1e"),
            "-" if report.limit is None else f"{report.limit:.0e}",
            marked(output.verdict),
        )
        for index, output in enumerate(report.outputs)
    ]
