"""The task's score of every bundled network on every target, in every precision and every int8 that the target has.

    python benchmarks/scores.py [--only NETWORK,...] [--targets TARGET,...]     (make scores: some 30 minutes)

Each artefact is exported, verified and scored on all images whose truth is known: by its export, or here (Core AI in
float16, whose interpreter takes 0.3 to 0.7 s for an image). Writes results/scores.csv, row by row.
"""

from __future__ import annotations

import csv
import json
import os
import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import castling_deploy
from castling_deploy import bundled
from castling_deploy.probes import probes_for
from castling_deploy.target import TARGETS, target_named
from castling_deploy.task import task_named

RESULTS = Path(__file__).resolve().parent / "results" / "scores.csv"
# Of int8, beside each target's usual one.
FLAVOURS: dict[str, tuple[dict[str, object], ...]] = {
    "onnx": ({"activations": "uint16"}, {"activations": "float32"}, {"weight_bits": 4}),
    "executorch": ({"weight_bits": 4},),
    "coreml": ({"palettise": 4},),
    "coreai": ({"palettise": 4},),
}
COLUMNS = ("network", "metric", "target", "precision", "flavour", "trained", "cast", "artefact", "megabytes", "verdict")


def score_of(path: Path, samples: str | None) -> float | None:
    """The metric of the artefact in `path` in percent, on every image of `samples` (a card's) whose truth is known."""
    with castling_deploy.open(path) as model:
        task = task_named(model.folder.task)
        probes = probes_for(model.folder.preprocessing, samples)
        outputs = model.outputs(probes.images[: probes.real])
        return task.score(outputs, probes.truth, model.folder.preprocessing.size)


def rows(networks: list[str], targets: list[str]) -> Iterator[dict[str, object]]:
    for name in networks:
        network = castling_deploy.load(model=name)
        for target in targets:
            usual: list[tuple[str, dict[str, object]]] = [
                (precision, {}) for precision in target_named(target).precisions
            ]
            flavours = [("int8", options) for options in FLAVOURS.get(target, ())]
            for precision, options in usual + flavours:
                with tempfile.TemporaryDirectory() as scratch:
                    made = castling_deploy.export(
                        network, target=target, precision=precision, output=scratch, **options
                    )
                    assert made.path is not None and made.parity is not None and made.artifact is not None
                    files = (made.path / file for file in made.artifact.files)
                    every = (part for file in files for part in ([file] if file.is_file() else file.rglob("*")))
                    size = sum(part.stat().st_size for part in every if part.is_file())
                    told = json.loads((made.path / "parity.json").read_text())["accuracy"]
                    yield {
                        "network": name,
                        "metric": told["metric"],
                        "target": target,
                        "precision": precision,
                        "flavour": " ".join(f"{option}={value}" for option, value in options.items()),
                        "trained": told["trained"],
                        "cast": told["reference"],
                        "artefact": score_of(made.path, network.card.samples)
                        if told["artifact"] is None
                        else told["artifact"],
                        "megabytes": size / 1e6,
                        "verdict": made.parity.verdict,
                    }


def main() -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default=",".join(bundled.CHECKPOINTS))
    parser.add_argument("--targets", default=",".join(TARGETS))
    asked = parser.parse_args()
    with RESULTS.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        for row in rows(asked.only.split(","), asked.targets.split(",")):
            table.writerow({key: f"{value:.2f}" if isinstance(value, float) else value for key, value in row.items()})
            file.flush()
            print(*row.values(), file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
