"""What a checkpoint is: family, size, work, what the cast removes and what the fold folds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from castling_deploy.castle import LayerCast, castle, measure_cast
from castling_deploy.catalogue import Work
from castling_deploy.checkpoint import read
from castling_deploy.fold import FoldStep, fold
from castling_deploy.identify import ModelCard, identify
from castling_deploy.ladder import BATCH, within_work
from castling_deploy.probes import probes_for
from castling_deploy.reading.card import Told
from castling_deploy.work import work_of


@dataclass(frozen=True)
class Inspection:
    """A checkpoint's network as trained, cast and folded. `dead` names the tensors that only the branch used."""

    card: ModelCard
    trained: Work
    castled: Work
    folded: Work
    layers: tuple[LayerCast, ...]
    dead: tuple[str, ...]
    rules: Mapping[str, int]


def inspect_checkpoint(
    path: Path,
    model: str | None = None,
    image_size: tuple[int, int] | None = None,
    init_dconv: Literal["zero"] | None = None,
    told: Told = Told(),  # noqa: B008  # frozen
) -> Inspection:
    """Read, cast and fold the checkpoint without exporting it. Raises CheckpointError."""
    checkpoint = read(path, told.weights)
    network, card = identify(checkpoint, model=model, image_size=image_size, init_dconv=init_dconv, told=told)
    castled = castle(network)
    steps: list[FoldStep] = []
    folded = fold(castled, steps.append)
    probes = within_work(network, probes_for(card.preprocessing, card.samples))
    layers = measure_cast(network, torch.from_numpy(probes.tensors[: min(BATCH, probes.real)]))
    dead = sorted({name for name, _ in network.named_parameters()} - {name for name, _ in castled.named_parameters()})
    shape = (1, card.config.channels, *card.config.image_size)
    return Inspection(
        card,
        work_of(network, shape),
        work_of(castled, shape),
        work_of(folded, shape),
        layers,
        tuple(dead),
        dict(Counter(step.rule for step in steps)),
    )
