"""Train the bundled detector and segmenter on scenes composed of handwritten digits, auxiliary branch on.

    python benchmarks/train_scenes.py detector     # castling-levit-digits-detector, 128 x 128 pixels
    python benchmarks/train_scenes.py segmenter    # castling-mvitv2-digits-segmenter, 96 x 96 pixels

Every step sees new scenes of the 1,437 digits that train_digits.py trains on; scores are those of scenes of the 360
others. Minutes on two cores. Writes the checkpoint into castling_deploy/bundled/, and one line per epoch into
benchmarks/results/. As there, the branch is off in a share CAST_SHARE of the steps.

The detector's loss is PicoDet's (arXiv:2111.00902): varifocal for scores, GIoU and distribution focal for boxes; its
assignment is simpler, the cells around a box' centre on the level that fits the box.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from recipe import CAST_SHARE, cast_columns, descend, digits, save, set_thresholds
from torch import nn
from torch.nn import functional as F

from castling_deploy.castle import castle
from castling_deploy.ladder import run
from castling_deploy.models.dense import DenseConfig
from castling_deploy.models.detector import PicoDetHead, levit_detector
from castling_deploy.models.levit_config import LeViTConfig
from castling_deploy.models.mvit_config import MViTv2Config
from castling_deploy.models.pico_head import STRIDES, PicoHead
from castling_deploy.models.segmenter import SemanticFpn, mvitv2_segmenter
from castling_deploy.preprocessing import Preprocessing
from castling_deploy.probes import probes_for
from castling_deploy.scenes import Scene, scenes
from castling_deploy.task import task_named

BATCH = {"detector": 32, "segmenter": 16}
STEPS = 100  # per epoch
LARGEST = (26.0, 48.0, 80.0, math.inf)  # longer side of a box, in pixels, that a level of the detector takes
RADIUS = 1.5  # strides around a box' centre in which cells answer for it
RECIPES = {
    "detector": (
        levit_detector(),
        DenseConfig(
            LeViTConfig((80, 112), (4, 6), (2, 2), distilled=False, image_size=(128, 128), down="linear"),
            PicoDetHead(width=40, convs=1),
            classes=10,
        ),
        "castling-levit-digits-detector",
    ),
    "segmenter": (
        mvitv2_segmenter(),
        DenseConfig(
            MViTv2Config((32, 64, 96, 128), (1, 2, 3, 4), (1, 2, 2, 1), mlp_ratio=2, image_size=(96, 96)),
            SemanticFpn(32),
            classes=11,
        ),
        "castling-mvitv2-digits-segmenter",
    ),
}


def detector_loss(model: nn.Sequential, image: torch.Tensor, truth: Sequence[Scene]) -> torch.Tensor:
    """Varifocal + 2 GIoU + 0.5 distribution focal, over all levels together."""
    head = model.bbox_head
    assert isinstance(head, PicoHead) and head.integral is not None
    logits, distances = head.logits(model.neck(model.backbone(image)))
    size = image.shape[-2:]
    targets = [assigned(truth, stride, level, size) for level, stride in enumerate(STRIDES)]
    classes, boxes = (torch.cat([target[part] for target in targets], 1) for part in (0, 1))  # (B, N), (B, N, 4)
    strides = torch.cat([torch.full((x.shape[1],), float(s)) for x, s in zip(logits, STRIDES)])  # (N,)
    centres = torch.cat([cells(stride, size) for stride in STRIDES])  # (N, 2)
    scores, sides = torch.cat(logits, 1), torch.cat(distances, 1)
    positive = classes >= 0
    steps = head.integral(sides[positive])  # (P, 4)
    stride, centre = strides.expand(classes.shape)[positive][:, None], centres.expand(len(image), -1, -1)[positive]
    reach = steps * stride
    predicted = torch.cat([centre - reach[:, :2], centre + reach[:, 2:]], 1)
    wanted = boxes[positive]
    iou, giou = overlaps(predicted, wanted)
    target = torch.zeros_like(scores)
    target[positive] = F.one_hot(classes[positive], scores.shape[-1]) * iou.detach().clamp(0)[:, None]
    probability = scores.sigmoid().detach()
    weight = torch.where(target > 0, target, 0.75 * probability**2)
    norm = target.sum().clamp(1)
    varifocal = (F.binary_cross_entropy_with_logits(scores, target, reduction="none") * weight).sum() / norm
    quality = probability[positive].amax(1)
    box = ((1 - giou) * quality).sum() / quality.sum().clamp(1)
    exact = torch.cat([centre - wanted[:, :2], wanted[:, 2:] - centre], 1) / stride
    exact = exact.clamp(0, len(head.integral.project) - 1.01).flatten()
    low, bins = exact.long(), sides[positive].reshape(-1, len(head.integral.project))
    share = exact - low
    focal = (1 - share) * F.cross_entropy(bins, low, reduction="none")
    focal += share * F.cross_entropy(bins, low + 1, reduction="none")
    return varifocal + 2 * box + 0.5 * focal.mean()


def cells(stride: int, size: Sequence[int]) -> torch.Tensor:
    """Centres (N, 2), x y in pixels, of a level's cells in raster order."""
    rows, columns = (math.ceil(side / stride) for side in size)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return (torch.stack([x, y], -1).flatten(0, 1) + 0.5) * stride


def assigned(truth: Sequence[Scene], stride: int, level: int, size: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The class (B, N), -1 where there is none, and the box (B, N, 4) that each cell of a level answers for."""
    centre = cells(stride, size)
    classes = torch.full((len(truth), len(centre)), -1)
    boxes = torch.zeros(len(truth), len(centre), 4)
    smallest = LARGEST[level - 1] if level else 0
    for image, scene in enumerate(truth):
        for label, box in zip(scene.labels.tolist(), torch.from_numpy(scene.boxes)):
            if not smallest < (box[2:] - box[:2]).max() <= LARGEST[level]:
                continue
            near = ((centre - (box[:2] + box[2:]) / 2).abs() < RADIUS * stride).all(1)
            inside = (centre > box[:2]).all(1) & (centre < box[2:]).all(1)
            if not (near & inside).any():  # a thin box between two cells
                inside = near
            classes[image, near & inside] = label
            boxes[image, near & inside] = box
    return classes, boxes


def overlaps(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """IoU and GIoU (arXiv:1902.09630) of boxes (P, 4) pairwise, each (P,)."""

    def area(corner: torch.Tensor, opposite: torch.Tensor) -> torch.Tensor:
        return (opposite - corner).clamp(0).prod(1)

    shared = area(torch.maximum(one[:, :2], other[:, :2]), torch.minimum(one[:, 2:], other[:, 2:]))
    union = area(one[:, :2], one[:, 2:]) + area(other[:, :2], other[:, 2:]) - shared
    hull = area(torch.minimum(one[:, :2], other[:, :2]), torch.maximum(one[:, 2:], other[:, 2:]))
    iou = shared / union.clamp(1e-6)
    return iou, iou - (hull - union) / hull.clamp(1e-6)


def segmenter_loss(model: nn.Sequential, image: torch.Tensor, truth: Sequence[Scene]) -> torch.Tensor:
    """Cross entropy of all pixels, and Dice of the classes that are there (arXiv:1606.04797)."""
    logits = model(image)
    mask = torch.from_numpy(np.stack([scene.mask for scene in truth]))
    probability, wanted = logits.softmax(1), F.one_hot(mask, logits.shape[1]).permute(0, 3, 1, 2)
    shared, total = (probability * wanted).sum((0, 2, 3)), (probability + wanted).sum((0, 2, 3))
    there = wanted.sum((0, 2, 3)) > 0
    return F.cross_entropy(logits, mask) + (1 - 2 * shared[there] / total[there]).mean()


LOSSES: dict[str, Callable[[nn.Sequential, torch.Tensor, Sequence[Scene]], torch.Tensor]] = {
    "detector": detector_loss,
    "segmenter": segmenter_loss,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=RECIPES)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(1)  # 0.3 s a step; two threads on a machine that does something else: 10 s

    family, config, name = RECIPES[arguments.network]
    loss_of, task = LOSSES[arguments.network], task_named(family.task)
    preprocessing = Preprocessing(config.image_size, **family.preprocessing)
    train_x, train_y, _, _ = digits()
    held_out = probes_for(preprocessing, "scenes")
    names = [output.name for output in family.outputs(config)]
    tensors = held_out.tensors[: held_out.real]

    model = family.build(config)
    assert isinstance(model, nn.Sequential)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=2e-3, total_steps=arguments.epochs * STEPS, pct_start=0.1
    )
    log, started = [], time.perf_counter()
    for epoch in range(1, arguments.epochs + 1):
        model.train()
        total = 0.0
        for step in range(STEPS):
            seed = [arguments.seed + 1, epoch, step]  # the held-out scenes have the seed 0
            truth = scenes(train_x, train_y, config.image_size, BATCH[arguments.network], seed)
            image = torch.from_numpy(preprocessing.normalised(np.stack([scene.image for scene in truth])))
            set_thresholds(model, None if torch.rand(()) < CAST_SHARE else config.aux_threshold)
            loss = loss_of(model, image, truth)
            descend(model, loss, optimizer, schedule)
            total += loss.item()
        model.eval()
        set_thresholds(model, config.aux_threshold)
        row = {
            "epoch": epoch,
            "loss": round(total / STEPS, 4),
            "score_trained": round(task.score(run(model, names, tensors), held_out.truth, config.image_size) or 0, 2),
            "score_cast": round(
                task.score(run(castle(model), names, tensors), held_out.truth, config.image_size) or 0, 2
            ),
            **cast_columns(model, torch.from_numpy(tensors)),
            "seconds": round(time.perf_counter() - started, 1),
        }
        log.append(row)
        print(json.dumps(row), flush=True)
    labels = [str(digit) for digit in range(10)]
    if task.name == "segmentation":
        labels = ["paper", *labels]
    save(
        name,
        model.requires_grad_(False),
        preprocessing,
        {"labels": labels, "samples": "scenes", "aux_threshold": config.aux_threshold},
        log,
    )


if __name__ == "__main__":
    main()
