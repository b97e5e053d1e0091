"""What a network's outputs mean: how they are scored, and which other outputs follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from castling_deploy.errors import UsageError
from castling_deploy.suggest import did_you_mean

Outputs = Mapping[str, npt.NDArray[np.floating]]
Labels = npt.NDArray[np.int64]


class Task(Protocol):
    """One kind of network. `metric` names the score, in percent, more is better."""

    name: str
    metric: str

    def score(self, outputs: Outputs, labels: Labels | None) -> float | None:
        """The metric on the labelled images, which come first in every output; None without labels."""

    def derived(self, name: str, outputs: Outputs) -> npt.NDArray[np.floating] | None:
        """An output that an artefact may add because it follows from the network's own; None where none does."""


class Classification:
    """Logits (B, classes); an artefact may add their probabilities."""

    name = "classification"
    metric = "top-1"

    def score(self, outputs: Outputs, labels: Labels | None) -> float | None:
        if labels is None:
            return None
        return float(100 * (outputs["logits"][: len(labels)].argmax(1) == labels).mean())

    def derived(self, name: str, outputs: Outputs) -> npt.NDArray[np.floating] | None:
        if name != "probabilities":
            return None
        logits = outputs["logits"].astype(np.float64)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)


TASKS: Mapping[str, Task] = {task.name: task for task in (Classification(),)}


def task_named(name: str) -> Task:
    """The task called `name`. Raises UsageError with a suggestion."""
    if name not in TASKS:
        raise UsageError(f"unknown task '{name}'", hint=did_you_mean(name, TASKS))
    return TASKS[name]
