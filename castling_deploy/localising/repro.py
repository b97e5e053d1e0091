"""The folder that shows a fault to somebody else: the shortest artefact that has it, inputs, outputs, and a script.

The script needs numpy and the target's own runtime, and neither this tool nor the checkpoint.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from castling_deploy.localising.prefix import VALUE, Place
from castling_deploy.parity import Array
from castling_deploy.target import Artifact, Scripted, Target

TITLES = {
    "prefix": "the network up to and including the place that goes wrong",
    "alone": "the place that goes wrong alone, given what it is given inside the network",
}

SCRIPT = '''\
"""What the artefact computes beside what PyTorch computes in float32. Run it where this file lies: python repro.py"""

from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
CASES = {cases!r}  # folder: name of the input, shape of the artefact's input, name of the output
LIMIT = {limit!r}  # of the error, relative to how far the outputs of different inputs lie apart


{runner}

def main():
    for case, (given, shape, output) in CASES.items():
        inputs, expected = np.load(HERE / case / "input.npy"), np.load(HERE / case / "expected.npy")
        parts = []
        for start in range(0, len(inputs), shape[0]):
            batch = inputs[start : start + shape[0]]
            missing = shape[0] - len(batch)
            if missing:
                batch = np.concatenate([batch, np.repeat(batch[-1:], missing, axis=0)])
            parts.append(np.asarray(run(HERE / case, {{given: np.ascontiguousarray(batch)}})[output]))
        actual = np.concatenate(parts)[: len(inputs)].astype(np.float64)
        wide = expected.astype(np.float64)
        gaps = [np.abs(one - other).max() for index, one in enumerate(wide) for other in wide[index + 1 :]]
        spread = float(np.median(gaps)) if gaps else 1.0
        finite = np.isfinite(actual)
        error = np.abs(actual - wide)[finite].max(initial=0.0) if finite.any() else float("nan")
        wrong = not finite.all() or error > LIMIT * spread
        print(f"{{case}}: {{'WRONG' if wrong else 'right'}}")
        print(f"  expected: {{wide.min():.6g}} to {{wide.max():.6g}}, spread {{spread:.3g}}")
        print(f"  artefact: {{np.nanmin(actual):.6g}} to {{np.nanmax(actual):.6g}}")
        print(f"  not finite: {{100 * (1 - finite.mean()):.2g}} %")
        print(f"  largest error of the finite numbers: {{error / spread:.2g}} of the spread; the limit is {{LIMIT:g}}")


if __name__ == "__main__":
    main()
'''

# For a target without a script of its own: the tool that wrote the artefact runs it.
OWN_RUNNER = """\
def run(folder, inputs):
    from castling_deploy.target import target_named

    with target_named({name!r}).load(folder) as session:
        return session(inputs)

"""


@dataclass(frozen=True)
class Case:
    """An artefact in `folder`, inputs (n, ...) for it, and the outputs (n, ...) that PyTorch computes in float32."""

    name: str
    artifact: Artifact
    folder: Path
    inputs: npt.NDArray[np.generic]
    expected: Array


def write(
    folder: Path, target: Target, place: Place, evidence: str, cases: Sequence[Case], limit: float
) -> Path | None:
    """`folder` with a folder per case, repro.py and README.md; what an earlier search left there is replaced.

    None, and nothing is written, without a case: where nothing was exported there is nothing to run.
    """
    if not cases:
        return None
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for case in cases:
        shutil.copytree(case.folder, folder / case.name)
        np.save(folder / case.name / "input.npy", case.inputs)
        np.save(folder / case.name / "expected.npy", case.expected)
    runner = target.script() if isinstance(target, Scripted) else OWN_RUNNER.format(name=target.name)
    described = {case.name: (case.artifact.inputs[0].name, case.artifact.inputs[0].shape, VALUE) for case in cases}
    script = SCRIPT.format(cases=described, limit=limit, runner=runner)
    (folder / "repro.py").write_text(script, encoding="utf-8")
    (folder / "README.md").write_text(_readme(target, place, evidence, cases), encoding="utf-8")
    return folder


def _readme(target: Target, place: Place, evidence: str, cases: Sequence[Case]) -> str:
    tools = {name: version for case in cases for name, version in case.artifact.tools.items()}
    lines = [
        f"# Where the {target.name} artefact goes wrong",
        "",
        f"- module: `{place}`, a {place.kind}",
        f"- operator: `{place.operator}`",
        *([f"- source: `{place.source}`: `{place.code}`"] if place.source else []),
        f"- why, likely: {evidence}",
        f"- written by: {', '.join(f'{name} {version}' for name, version in sorted(tools.items()))}",
        "",
        "    python repro.py",
        "",
        "runs the artefacts below and prints what they compute beside what PyTorch computes in float32. It needs numpy "
        f"and the runtime of the target ({', '.join(cases[0].artifact.loads_with)}).",
        "",
        *(f"- `{case.name}/`: {TITLES[case.name]}; `input.npy` and `expected.npy` lie beside it" for case in cases),
        "",
    ]
    return "\n".join(lines)
