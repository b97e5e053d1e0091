"""What the training scripts share: the digits, the branch's switch, and how a checkpoint is written."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import castling_deploy
from castling_deploy.castle import measure_cast
from castling_deploy.preprocessing import Preprocessing

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = ROOT / "castling_deploy" / "bundled"
RESULTS = ROOT / "benchmarks" / "results"
CAST_SHARE = 0.5  # of the steps in which the auxiliary branch is off


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Train images (1437, 8, 8) uint8, train labels, test images (360, 8, 8), test labels."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)
    labels = data.target.astype(np.int64)
    train_x, test_x, train_y, test_y = train_test_split(images, labels, test_size=360, random_state=0, stratify=labels)
    return train_x, train_y, test_x, test_y


def set_thresholds(model: nn.Module, value: float | None) -> None:
    """Switch every auxiliary branch on (a threshold) or off (None), in place."""
    for module in model.modules():
        if hasattr(module, "aux_threshold"):
            module.aux_threshold = value


def descend(
    model: nn.Module,
    loss: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    """One step down the loss, gradients clipped to a norm of 1."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()


def cast_columns(model: nn.Module, images: torch.Tensor) -> dict[str, float]:
    """What the log says of the auxiliary branches on held-out images."""
    layers = [layer.evidence for layer in measure_cast(model, images)]
    return {
        "mask_density": round(sum(layer.mask_density for layer in layers) / len(layers), 4),
        "contribution_max": round(max(layer.contribution_max for layer in layers), 4),
    }


def save(
    name: str,
    model: nn.Module,
    preprocessing: Preprocessing,
    facts: Mapping[str, Any],
    log: Sequence[Mapping[str, float]],
) -> None:
    """Write the checkpoint into castling_deploy/bundled/, with what its tensors do not tell, and the log beside the
    other results."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    with open(RESULTS / f"train_{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, log[0].keys())
        writer.writeheader()
        writer.writerows(log)
    stated = {
        "name": name,
        **facts,
        "image_size": preprocessing.size,
        "resize_kernel": preprocessing.resize_kernel,
        "crop_fraction": preprocessing.crop_fraction,
        "mean": preprocessing.mean,
        "std": preprocessing.std,
    }
    BUNDLED.mkdir(exist_ok=True)
    castling_deploy.save(model, BUNDLED / f"{name}.safetensors", overwrite=True, **stated)
