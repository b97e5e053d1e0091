"""Two artefact folders side by side, from what their exports wrote: nothing is executed, and nothing is hashed.

The first is the one that was good enough; the second regresses where its verdict is worse, where it is slower on the
same host, larger, or scores lower, beyond what is allowed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from castling_deploy.artifact import Folder, read_folder
from castling_deploy.errors import CastlingError, ParityError, RegressionError
from castling_deploy.folder import size_bytes
from castling_deploy.parity import Verdict, worst
from castling_deploy.plain import plain
from castling_deploy.rechecking.saved import LATENCY, PARITY, SavedLatency, SavedParity, read_latency, read_parity

ORDER = (Verdict.PASS, Verdict.INCONCLUSIVE, Verdict.FAIL)  # from best to worst
PER_CENT = 100.0


@dataclass(frozen=True)
class Allowed:
    """How much worse the second artefact may be: time and size in percent, the score in percentage points."""

    slower_percent: float = 10.0
    larger_percent: float = 5.0
    drop_points: float = 0.5


@dataclass(frozen=True)
class Side:
    """One artefact as its folder tells it. `size_bytes` is None where a file of the model is missing."""

    folder: Folder
    parity: SavedParity
    latency: SavedLatency | None
    size_bytes: int | None

    @property
    def verdict(self) -> Verdict:
        """That of the manifest or of parity.json, whichever is worse."""
        return Verdict.worst([self.folder.verdict, self.parity.verdict])


@dataclass(frozen=True)
class Difference:
    """Something the two artefacts do not share, so that their numbers are not of the same thing."""

    name: str
    a: str | None
    b: str | None


@dataclass(frozen=True)
class Quantity:
    """A number of both artefacts. `change` is b against a in `change_unit`, `allowed` how much of it is no regression.

    `regressed` is None where nothing decides: there is no limit, a number is unknown, or `remark` says why.
    """

    name: str
    unit: Literal["s", "bytes", "%", ""]
    a: float | None
    b: float | None
    change: float | None
    change_unit: Literal["percent", "points"] | None = None
    allowed: float | None = None
    regressed: bool | None = None
    remark: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Everything that two folders tell of each other."""

    a: Side
    b: Side
    differences: tuple[Difference, ...]
    quantities: tuple[Quantity, ...]

    @property
    def parity_regressed(self) -> bool:
        return ORDER.index(self.b.verdict) > ORDER.index(self.a.verdict)

    @property
    def regression(self) -> CastlingError | None:
        """What makes the second artefact worse; None when nothing does. A worse verdict is graver than a number."""
        if self.parity_regressed:
            return ParityError(
                f"parity was {self.a.verdict} and is {self.b.verdict}",
                hint=f"see '{self.b.folder.path / PARITY}'; do not ship it",
            )
        worse = [quantity for quantity in self.quantities if quantity.regressed]
        if not worse:
            return None
        told = "; ".join(
            f"{quantity.name} {quantity.change:+.3g} {quantity.change_unit} (allowed: {quantity.allowed:g})"
            for quantity in worse
        )
        return RegressionError(told, hint="mend it, or allow more with --max-slower, --max-larger or --max-drop")


def diff(a: str | Path, b: str | Path, allowed: Allowed | None = None) -> Comparison:
    """The artefact folder `b` against `a`. Raises UsageError when one of them is none, or its documents are damaged."""
    allowed = allowed or Allowed()
    first, second = _side(Path(a)), _side(Path(b))
    return Comparison(first, second, tuple(_differences(first, second)), tuple(_quantities(first, second, allowed)))


def _side(path: Path) -> Side:
    folder = read_folder(path)
    whole = all((path / file).exists() for file in folder.artifact.files)
    size = size_bytes(path, folder.artifact.files) if whole else None
    return Side(folder, read_parity(path / PARITY), read_latency(path / LATENCY), size)


def _differences(a: Side, b: Side) -> Iterator[Difference]:
    facts = [_facts(side) for side in (a, b)]
    for name in dict.fromkeys([*facts[0], *facts[1]]):
        one, other = (each.get(name) for each in facts)
        if one != other:
            yield Difference(name, one, other)


def _facts(side: Side) -> dict[str, str | None]:
    """What has to be equal for the numbers to be of the same thing."""
    folder, latency = side.folder, side.latency
    labels = folder.manifest.get("labels")
    facts = {
        "model": folder.manifest["model"].get("name"),
        "task": folder.task,
        "target": folder.target,
        "precision": folder.precision.value,
        "checkpoint": folder.checkpoint_sha256,
        **{f"preprocessing: {name}": str(value) for name, value in plain(folder.preprocessing).items()},
        "labels": None if labels is None else ", ".join(map(str, labels)),
        "compared inputs": str(side.parity.report.probes),
    }
    if latency is not None:
        facts |= {f"latency: {name}": str(value) for name, value in sorted(latency.host.items())}
        facts |= {"latency: threads": str(latency.threads), "latency: batch": str(latency.batch)}
    return facts


def _quantities(a: Side, b: Side, allowed: Allowed) -> Iterator[Quantity]:
    power = (a.parity.report.power, b.parity.report.power)
    yield Quantity("power", "", *power, power[1] - power[0])
    errors = [_errors(side) for side in (a, b)]
    for name in dict.fromkeys([*errors[0], *errors[1]]):
        yield _ratio(f"error / spread of {name}", "", errors[0].get(name), errors[1].get(name))
    yield _score(a, b, allowed.drop_points)
    yield _ratio("size", "bytes", a.size_bytes, b.size_bytes, allowed.larger_percent)
    yield from _latency(a.latency, b.latency, allowed.slower_percent)


def _errors(side: Side) -> dict[str, float | None]:
    """The largest rel that any witness found, output by output."""
    outputs = [output for seen in side.parity.report.witnesses for output in seen.outputs]
    return {
        name: worst(output.rel for output in outputs if output.name == name)
        for name in dict.fromkeys(output.name for output in outputs)
    }


def _score(a: Side, b: Side, allowed: float) -> Quantity:
    one, other = a.parity.score, b.parity.score
    if a.parity.metric != b.parity.metric:
        name = f"{a.parity.metric} / {b.parity.metric}"
        return Quantity(name, "%", one, other, None, remark="not compared: two metrics")
    if one is None or other is None:
        return Quantity(a.parity.metric, "%", one, other, None, "points", allowed, remark=_unknown(one, other))
    change = round(other - one, 9)  # 98.3 - 97.8 is a little more than 0.5 in binary
    return Quantity(a.parity.metric, "%", one, other, change, "points", allowed, -change > allowed)


def _latency(a: SavedLatency | None, b: SavedLatency | None, allowed: float) -> Iterator[Quantity]:
    remark = None
    if a is not None and b is not None:
        circumstances = [(side.host, side.threads, side.batch) for side in (a, b)]
        if circumstances[0] != circumstances[1]:
            remark = "not compared: measured on another host, or with other threads or another batch"
    medians = (None if a is None else a.median_s, None if b is None else b.median_s)
    tails = (None if a is None else a.p95_s, None if b is None else b.p95_s)
    yield _ratio("latency, median", "s", *medians, allowed, remark)
    yield _ratio("latency, p95", "s", *tails, None, remark)


def _ratio(
    name: str,
    unit: Literal["s", "bytes", ""],
    a: float | None,
    b: float | None,
    allowed: float | None = None,
    remark: str | None = None,
) -> Quantity:
    """A quantity of which less is better, its change in percent of `a`; a remark keeps it from being judged."""
    if a is None or b is None:
        reason = remark or (None if allowed is None else _unknown(a, b))
        return Quantity(name, unit, a, b, None, "percent", allowed, remark=reason)
    if remark is not None or a <= 0:
        return Quantity(name, unit, a, b, None, "percent", allowed, remark=remark)
    change = round(PER_CENT * (b / a - 1), 9)
    return Quantity(name, unit, a, b, change, "percent", allowed, None if allowed is None else change > allowed)


def _unknown(a: float | None, b: float | None) -> str:
    missing = (
        "neither is known" if a is None and b is None else f"{'the first' if a is None else 'the second'} is not known"
    )
    return f"not compared: {missing}"
