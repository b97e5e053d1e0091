"""The gate's kill rate: every defect of `defects.py`, in every bundled network, exported to every target; and every
edit of `edits.py`, of an artefact of every target.

    python benchmarks/mutations.py [--targets onnx,coreml] [--networks castling-levit-digits]

Writes results/mutations.csv and leaves with 1 where a defect survived. An hour on one core, half of it ExecuTorch's.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from argparse import ArgumentParser
from collections.abc import Iterator

from defects import DEIT, GROSS, LEVIT, ON_FOLDED, ON_LEVIT, Defect, deep, tanh_gelu
from edits import EDITS
from gate import PROBES, RESULTS, Trial, edited, told, tried, written
from torch import nn

import castling_deploy
from castling_deploy import bundled
from castling_deploy.checkpoint import read
from castling_deploy.identify import ModelCard, identify
from castling_deploy.ladder import Ladder, climb
from castling_deploy.probes import probes_for
from castling_deploy.target import TARGETS, Precision, target_named
from castling_deploy.task import task_named

# Core ML's converter and XNNPACK compute an exact GELU whatever was asked for: there the defect reaches no artefact.
GELU_AS_TOLD = ("onnx", "tensorrt", "coreai")


def climbed(name: str) -> tuple[nn.Module, ModelCard, Ladder]:
    """A bundled network as trained, and its ladder on few images."""
    network, card = identify(read(bundled.checkpoint_path(name)))
    probes = probes_for(card.preprocessing, card.samples).few(PROBES)
    return network, card, climb(network, task_named(card.task), card.outputs, probes)


def cases(name: str, targets: list[str]) -> Iterator[tuple[Defect, bool, str, Precision]]:
    """(defect, whether it is planted into the trained network, target, precision).

    The default network goes to every target, the others to the first: what a defect does to them is no format's.
    """
    for target in targets if name == bundled.DEFAULT else targets[:1]:
        precisions = target_named(target).precisions
        for defect in ON_FOLDED:
            yield defect, False, target, Precision.FP32
        if name == DEIT and target in GELU_AS_TOLD:
            yield tanh_gelu, False, target, Precision.FP32
        for defect in ON_LEVIT if name == LEVIT else ():
            yield defect, True, target, Precision.FP32
        if Precision.FP16 in precisions and name == LEVIT:
            for defect in GROSS:
                yield defect, False, target, Precision.FP16


def edits(targets: list[str]) -> Iterator[Trial]:
    """Every edit of a folder by hand, of the default network's artefact in the target's default precision."""
    with tempfile.TemporaryDirectory() as output:
        for target in targets:
            result = castling_deploy.export(castling_deploy.load(), target=target, output=output)
            assert result.path is not None
            for edit in EDITS.values():
                trial = edited(edit, result.path, bundled.DEFAULT, target, result.step.precision)
                print(f"{edit.__name__}, {target}: {trial.verdict}", flush=True)
                yield trial


def main() -> int:
    warnings.simplefilter("ignore")  # of torch.export, one for every network
    parser = ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--targets", default=",".join(name for name in TARGETS if target_named(name).missing() is None))
    parser.add_argument("--networks", default=",".join(bundled.CHECKPOINTS))
    asked = parser.parse_args()
    trials: list[Trial] = []
    for name in filter(None, asked.networks.split(",")):
        network, card, ladder = climbed(name)
        planned = list(cases(name, asked.targets.split(",")))
        for number, (defect, on_trained, target, precision) in enumerate(planned, 1):
            mutant = defect(network) if on_trained else defect(deep(ladder.folded))
            trials.append(tried(defect.__name__, name, mutant, card, ladder, target, precision))
            told(trials, number, len(planned))
            written(trials, RESULTS / "mutations.csv")
    for trial in edits(asked.targets.split(",")):
        trials.append(trial)
        written(trials, RESULTS / "mutations.csv")
    survived = [trial for trial in trials if trial.verdict not in ("fail", "refused")]
    defects = len({trial.subject for trial in trials})
    print(f"{defects} defects, {len(trials)} artefacts: {len(trials) - len(survived)} killed, {len(survived)} survived")
    for trial in survived:
        print(f"survived: {trial}")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
