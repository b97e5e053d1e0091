"""The README.md of an artefact folder, from what the manifest and the parity report say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from castling_deploy import contract
from castling_deploy.parity import ParityReport, Verdict
from castling_deploy.preprocessing import Preprocessing
from castling_deploy.target import Artifact, Precision, Target


@dataclass(frozen=True)
class Readme:
    """The text before the lines on loading the artefact, which are its target's own (`Artifact.usage`), and after."""

    before: str
    after: str

    def around(self, usage: str) -> str:
        return self.before + usage.strip() + self.after


def readme(
    model: str,
    warnings: Sequence[str],
    target: Target,
    precision: Precision,
    preprocessing: Preprocessing,
    artifact: Artifact,
    parity: ParityReport,
) -> Readme:
    """`warnings` are those of the checkpoint."""
    mark = "" if parity.verdict is Verdict.PASS else f"\n> **Parity: {parity.verdict}.** Do not ship this artefact.\n"
    notes = [f"- {note}" for note in (*warnings, *artifact.details.get("notes", ()))]
    if artifact.details.get("islands"):
        notes.append(f"- in float32: {', '.join(artifact.details['islands'])} (why: `range_audit` in parity.json)")
    before = [
        f"# {model} for {target.name}, {precision}",
        mark,
        "Witnesses:",
        "",
        "| witness | kind | output | rel | verdict |",
        "|---|---|---|---|---|",
    ]
    for seen in parity.witnesses:
        for output in seen.outputs:
            rel = "-" if output.rel is None else f"{output.rel:.1e}"
            before.append(f"| {seen.witness.name} | {seen.witness.kind} | {output.name} | {rel} | {output.verdict} |")
    before += [
        "",
        *notes,
        *([""] if notes else []),
        "## Input",
        "",
        *(
            f"- `{spec.name}`: {spec.dtype} {list(spec.shape)}, {spec.layout}, {spec.content}"
            for spec in artifact.inputs
        ),
        "- outputs: " + ", ".join(f"`{spec.name}` {list(spec.shape)}" for spec in artifact.outputs),
        "",
        "From a picture to the input, exact to the last bit:",
        "",
        *(
            f"{number}. **{each.step}**: {each.rule}."
            for number, each in enumerate(contract.steps(preprocessing, artifact.inputs[0]), 1)
        ),
        "",
        "`golden/images.npy` holds real images at the network's size (uint8, channels last: after the crop), the other "
        "files beside it what the PyTorch reference says of them.",
        "",
        "## Loading it",
        "",
    ]
    after = [""]
    if artifact.unfinished is not None:
        after += ["## What is left to do", "", artifact.unfinished.reason, "", f"    {artifact.unfinished.fix}", ""]
    after += [
        "## Checking it",
        "",
        "    castling verify .",
        "",
        "and without castling-deploy, by the programs in `selftest/` (its README says how): "
        + ", ".join(f"`{name}`" for name in target.selftests)
        + ".",
        "",
    ]
    return Readme("\n".join(before) + "\n", "\n" + "\n".join(after))
