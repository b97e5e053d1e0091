"""What CI systems read of `castling verify`: JUnit XML, SARIF 2.1.0, and a Markdown summary."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

from castling_deploy.errors import ParityError, UsageError
from castling_deploy.parity import Verdict
from castling_deploy.rechecking.checks import Check, Examined
from castling_deploy.rechecking.saved import PARITY

SARIF_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
RULES = {
    "parity-failed": "The artefact does not compute what the network computes.",
    "parity-inconclusive": "The comparison has too little power to call the artefact right or wrong.",
    "artefact-unchecked": "The artefact could not be checked.",
}
# XML 1.0 knows no other characters, not even escaped.
NO_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def refuse_inside(reports: Sequence[Path], folders: Sequence[Path]) -> None:
    """Raises UsageError for a report within an artefact folder, where it would be a file that nobody exported, and for
    two reports in one file."""
    if len({report.resolve() for report in reports}) < len(reports):
        raise UsageError(f"'{reports[0]}' is asked to hold two reports", hint="name two files")
    for report in reports:
        for folder in folders:
            if report.resolve().is_relative_to(folder.resolve()):
                raise UsageError(
                    f"the report '{report}' would be a change of the artefact '{folder}'",
                    hint="write it beside the folder, not into it",
                )


def write_reports(examined: Sequence[Examined], junit: Path | None, sarif: Path | None, summary: Path | None) -> None:
    """Write what is asked for; the summary is appended to its file. Raises UsageError where that is not possible."""
    for path, content, mode in ((junit, junit_xml, "wb"), (sarif, sarif_json, "wb"), (summary, markdown, "ab")):
        if path is not None:
            _write(path, content, examined, mode)


def _write(path: Path, content: Callable[[Sequence[Examined]], bytes], examined: Sequence[Examined], mode: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open(mode) as file:
            file.write(content(examined))
    except OSError as error:
        raise UsageError(
            f"cannot write '{path}': {error.strerror or error}", hint="name a file that can be written"
        ) from None


def junit_xml(examined: Sequence[Examined]) -> bytes:
    """One suite per artefact, one case per check. Inconclusive is a failure; what decides nothing is skipped."""
    root = ElementTree.Element("testsuites", name="castling verify")
    for seen in examined:
        suite = ElementTree.SubElement(root, "testsuite", name=_legal(str(seen.path)))
        for check in seen.checks:
            case = _case(suite, seen.path, check.group, check.name)
            if check.verdict is Verdict.PASS:
                continue
            if check.decisive:
                ElementTree.SubElement(case, "failure", type=check.verdict.value, message=_legal(check.told))
            else:
                ElementTree.SubElement(case, "skipped", message=_legal(f"decides nothing; {check.told}"))
        if seen.error is not None:
            case = _case(suite, seen.path, "files", "could be checked")
            kind = "failure" if isinstance(seen.error, ParityError) else "error"
            problem = ElementTree.SubElement(
                case, kind, type=type(seen.error).__name__, message=_legal(seen.error.message)
            )
            problem.text = _legal(seen.error.hint or "")
    for element in (root, *root):
        for name, tag in (("tests", "testcase"), ("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            element.set(name, str(len(list(element.iter(tag)))))
    ElementTree.indent(root)
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"


def _case(suite: ElementTree.Element, path: Path, group: str, name: str) -> ElementTree.Element:
    return ElementTree.SubElement(suite, "testcase", classname=_legal(f"{path.name}: {group}"), name=_legal(name))


def _legal(text: str) -> str:
    return NO_XML.sub("?", text)


def sarif_json(examined: Sequence[Examined]) -> bytes:
    """One result for each decisive check that did not pass, and for each folder that could not be checked."""
    results = [result for seen in examined for result in _results(seen)]
    run = {
        "tool": {
            "driver": {
                "name": "castling-deploy",
                "version": metadata.version("castling-deploy"),
                "rules": [{"id": rule, "shortDescription": {"text": text}} for rule, text in RULES.items()],
            }
        },
        "invocations": [{"executionSuccessful": all(seen.error is None for seen in examined)}],
        "results": results,
    }
    document = {"$schema": SARIF_SCHEMA, "version": "2.1.0", "runs": [run]}
    return json.dumps(document, indent=2, allow_nan=False).encode() + b"\n"


def _results(seen: Examined) -> list[dict[str, Any]]:
    found = [
        ("parity-failed" if check.verdict is Verdict.FAIL else "parity-inconclusive", f"{check.name}: {check.told}")
        for check in _missed(seen)
    ]
    if seen.error is not None:
        rule = "parity-failed" if isinstance(seen.error, ParityError) else "artefact-unchecked"
        found.append((rule, str(seen.error)))
    location = {"physicalLocation": {"artifactLocation": {"uri": _uri(seen.path / PARITY)}, "region": {"startLine": 1}}}
    return [
        {
            "ruleId": rule,
            "ruleIndex": list(RULES).index(rule),
            "level": "warning" if rule == "parity-inconclusive" else "error",
            "message": {"text": f"{seen.path.name}: {text}".encode(errors="replace").decode()},
            "locations": [location],
        }
        for rule, text in found
    ]


def _uri(path: Path) -> str:
    """Relative to the working folder where the path is below it, as code scanning wants it."""
    resolved, here = path.resolve(), Path.cwd().resolve()
    return quote(os.fsencode(resolved.relative_to(here))) if resolved.is_relative_to(here) else resolved.as_uri()


def markdown(examined: Sequence[Examined]) -> bytes:
    """A table with a row for each artefact, then what did not pass."""
    lines = ["### castling verify", "", "| artefact | verdict | largest error / spread | run by |", "|---|---|---|---|"]
    for seen in examined:
        verdict = seen.verdict or "not checked"
        witnesses = [report.witness for report in seen.recheck.golden] if seen.recheck is not None else []
        rels = [check.rel for check in seen.checks if check.rel is not None and not check.name.startswith("rung ")]
        cells = (
            str(seen.path),
            str(verdict) if verdict is Verdict.PASS else f"**{verdict}**",
            f"{max(rels):.1e}" if rels else "-",
            "; ".join(f"{witness.name} ({witness.kind})" for witness in witnesses) or "-",
        )
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    missed = [
        f"- {_cell(f'{seen.path.name}: {check.group}: {check.name}: {check.told}')}"
        for seen in examined
        for check in _missed(seen)
    ]
    errors = [f"- {_cell(f'{seen.path.name}: {seen.error}')}" for seen in examined if seen.error is not None]
    return "\n".join([*lines, "", *missed, *errors, ""]).encode(errors="replace")


def _cell(text: str) -> str:
    """The text as Markdown that breaks no table."""
    return " ".join(text.split()).replace("<", "&lt;").replace("|", "\\|")


def _missed(seen: Examined) -> list[Check]:
    return [check for check in seen.checks if check.decisive and check.verdict is not Verdict.PASS]
