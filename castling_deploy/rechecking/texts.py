"""The texts of an artefact folder, written once more from what it says of itself: README.md and the self-tests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from castling_deploy.artifact import Folder
from castling_deploy.facts import digest
from castling_deploy.parity import ParityReport
from castling_deploy.readme import readme
from castling_deploy.selftests.facts import GoldenOutput, facts_of
from castling_deploy.selftests.texts import texts
from castling_deploy.target import Target

README = "README.md"


def altered(
    folder: Folder, target: Target, golden: Sequence[GoldenOutput], parity: ParityReport, facts: Mapping[str, str]
) -> Iterator[str]:
    """Texts that this version would have written otherwise; `facts` are those in the model's file.

    How an artefact is loaded is its exporter's own text, of which the file holds the hash.
    """
    made = texts(target.selftests, facts_of(folder.artifact, folder.preprocessing, tuple(golden)))
    for name, text in made.items():
        if _read(folder.path / "selftest" / name) != text:
            yield f"selftest/{name} is not what was generated for this artefact"
    model, warnings = folder.manifest["model"]["name"], folder.manifest["checkpoint"].get("warnings") or ()
    wanted = readme(model, warnings, target, folder.precision, folder.preprocessing, folder.artifact, parity)
    found = _read(folder.path / README) or ""
    if not (found.startswith(wanted.before) and found.endswith(wanted.after)):
        yield f"{README} is not what was generated for this artefact"
    elif digest(found[len(wanted.before) : len(found) - len(wanted.after)]) != facts.get("usage_sha256"):
        yield f"{README} loads the artefact in another way than its exporter wrote"


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
