"""What the two trials of the gate share: a network exported in this process, judged like any export, and a CSV."""

from __future__ import annotations

import csv
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from torch import nn

from castling_deploy.artifact import network_for
from castling_deploy.errors import CastlingError
from castling_deploy.identify import ModelCard
from castling_deploy.ladder import Ladder
from castling_deploy.parity import worst
from castling_deploy.rechecking.recheck import verify
from castling_deploy.target import Precision, target_named
from castling_deploy.verification import verify_artifact

PROBES = 24  # real images, beside the structured and the extreme ones
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Trial:
    """One export and what the gate said; `rel` is empty where an error kept the artefact from being made at all."""

    subject: str
    network: str
    target: str
    precision: str
    verdict: str
    rel: float | None
    limit: float | None
    seconds: float


def tried(
    subject: str, network: str, module: nn.Module, card: ModelCard, ladder: Ladder, target: str, precision: Precision
) -> Trial:
    """`module` exported to `target`, and compared with the ladder's reference. An ExportError counts as `refused`."""
    started = time.perf_counter()
    one = target_named(target)
    verdict, rel, limit = "refused", None, None
    with tempfile.TemporaryDirectory() as folder:
        try:
            artifact = one.export(network_for(card, module, 1), precision, one.options(), Path(folder))
            report = verify_artifact(one, artifact, Path(folder), ladder, precision)
            verdict, rel, limit = str(report.verdict), report.rungs[-1].rel, report.rungs[-1].limit
        except CastlingError as error:
            print(f"  {subject}, {network}, {target}: {error.message[:200]}")
    return Trial(subject, network, target, precision, verdict, rel, limit, round(time.perf_counter() - started, 2))


def edited(edit: Callable[[Path], None], exported: Path, network: str, target: str, precision: Precision) -> Trial:
    """A copy of the artefact folder `exported`, changed by `edit`, verified as a user would: without a checkpoint."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(shutil.copytree(exported, Path(scratch) / exported.name))
        edit(copy)
        rel, limit = None, None
        try:
            seen = verify(copy)
            verdict = str(seen.verdict)
            for golden in seen.golden[:1]:  # nobody runs what contradicts itself
                rel, limit = worst(output.rel for output in golden.outputs), golden.limit
        except CastlingError as error:
            verdict = "refused"
            print(f"  {edit.__name__}, {target}: {error.message[:200]}")
    return Trial(
        edit.__name__, network, target, precision, verdict, rel, limit, round(time.perf_counter() - started, 2)
    )


def written(trials: Iterable[Trial], path: Path) -> None:
    """A CSV, a row for each trial."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.DictWriter(file, [field.name for field in fields(Trial)], lineterminator="\n")
        rows.writeheader()
        rows.writerows(asdict(trial) for trial in trials)


def told(trials: Sequence[Trial], position: int, count: int) -> None:
    """One line of progress."""
    last = trials[-1]
    rel = "-" if last.rel is None else f"{last.rel:.1e}"
    print(
        f"{position}/{count} {last.subject}, {last.network}, {last.target} {last.precision}: {last.verdict} ({rel})",
        flush=True,
    )
