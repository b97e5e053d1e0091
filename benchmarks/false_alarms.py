"""Does the gate cry wolf? 200 correct exports over families, sizes, seeds, targets and precisions; none may fail.

    PYTHONPATH=tests python benchmarks/false_alarms.py [--count 200] [--part 1/2]

Random weights, conditioned so that different images give different outputs (tests/networks.py). `inconclusive` is no
alarm: a random network may multiply rounding until nothing can be told. Writes results/false_alarms.csv; of a part, its
own rows alone.
"""

from __future__ import annotations

import itertools
import sys
import warnings
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from gate import PROBES, RESULTS, Trial, told, tried, written
from networks import BASELINES, DENSE, SMALL, conditioned, dense, small
from torch import nn

from castling_deploy.checkpoint import Checkpoint
from castling_deploy.identify import identify
from castling_deploy.ladder import climb
from castling_deploy.probes import probes_for
from castling_deploy.target import TARGETS, Precision, target_named
from castling_deploy.task import task_named

BASELINE_OF = {"deit-softmax": "deit", "levit-softmax": "levit", "mvit-softmax": "mvitv2"}
SIZES = {"levit": ((64, 64), (96, 64)), "mvit": ((64, 96), (64, 64)), "deit": ((32, 32), (48, 32))}


def subjects() -> Iterator[tuple[str, nn.Module, str | None, tuple[int, int]]]:
    """Networks without end, seed by seed: what it is, in training form, the model to ask for, its input's (H, W)."""
    for seed in itertools.count():
        for name in SMALL:
            family = name.partition("-")[0]
            size = SIZES[family][seed % 2]
            build, config = SMALL[name]
            network = conditioned(build(replace(config, image_size=size)), seed)
            yield f"{name} {size[0]}x{size[1]} seed {seed}", network, None, size
        for name in BASELINES:
            yield f"{name} seed {seed}", small(name, seed), BASELINE_OF[name], BASELINES[name][1].image_size
        for name in DENSE:
            yield f"{name} seed {seed}", dense(name, seed), None, DENSE[name][1].image_size


def main() -> int:
    warnings.simplefilter("ignore")  # of torch.export, one for every network
    parser = ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--part", default="1/1", help="every Nth of them, from the Ith on: on several machines")
    asked = parser.parse_args()
    part, parts = map(int, asked.part.split("/"))
    kinds = [
        (name, precision)
        for precision in (Precision.FP32, Precision.FP16)
        for name in TARGETS
        if target_named(name).missing() is None and precision in target_named(name).precisions
    ]
    trials: list[Trial] = []
    for number, ((subject, network, model, size), (target, precision)) in enumerate(
        zip(itertools.islice(subjects(), asked.count), itertools.cycle(kinds)), 1
    ):
        if number % parts != part % parts:
            continue
        tensors = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
        own, card = identify(Checkpoint(Path("random"), None, tensors, card={"image_size": list(size)}), model=model)
        probes = probes_for(card.preprocessing, card.samples).few(PROBES)
        ladder = climb(own, task_named(card.task), card.outputs, probes)
        trials.append(tried(subject, card.name, ladder.folded, card, ladder, target, precision))
        told(trials, number, asked.count)
        written(trials, RESULTS / "false_alarms.csv")
    verdicts = Counter(trial.verdict for trial in trials)
    print(f"{len(trials)} correct exports: " + ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items()))
    return 1 if verdicts.keys() & {"fail", "refused"} else 0


if __name__ == "__main__":
    sys.exit(main())
