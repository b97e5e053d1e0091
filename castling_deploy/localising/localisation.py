"""What a search for a fault ends with: where the artefact goes wrong, why, likely, and what was tried on the way."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from castling_deploy.localising.diagnosis import Cause, Statistics
from castling_deploy.localising.prefix import Place
from castling_deploy.parity import Verdict
from castling_deploy.target import Precision


class Finding(StrEnum):
    """What a search ended with."""

    NOTHING = "nothing is wrong"
    MODULE = "a module is wrong"
    UNSUPPORTED = "an operator cannot be exported"
    FILE = "a fresh export is right"
    WHOLE = "only the whole network is wrong"
    UNKNOWN = "the place is not known"


@dataclass(frozen=True)
class Seen:
    """A value at one place, in PyTorch and in the artefact. `actual` is None where nothing ran."""

    place: Place
    verdict: Verdict
    rel: float | None
    reference: Statistics
    actual: Statistics | None


@dataclass(frozen=True)
class Trial:
    """One export that was made on the way; `refusal` is why it could not be."""

    place: str
    verdict: Verdict | None
    rel: float | None
    refusal: str | None
    seconds: float


@dataclass(frozen=True)
class Localisation:
    """Where an artefact goes wrong, and what speaks for it.

    `verdict` and `rel` are those of the whole artefact. `wrong` is the first value that is, `before` the last right one
    that it is computed from (None: the input). `origin` is where numbers first leave the range of the precision,
    which may be earlier than where it shows. `differing` are constants in which the file differs from a fresh export.
    `folder` holds what reproduces it.
    """

    target: str
    precision: Precision
    finding: Finding
    verdict: Verdict
    rel: float | None
    place: Place | None = None
    origin: Place | None = None
    cause: Cause | None = None
    evidence: str = ""
    wrong: Seen | None = None
    before: Seen | None = None
    differing: tuple[str, ...] = ()
    exports: int = 0
    seconds: float = 0.0
    trials: tuple[Trial, ...] = ()
    folder: Path | None = None
