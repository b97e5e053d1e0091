"""Train the two bundled checkpoints on scikit-learn's handwritten digits, auxiliary branch on.

    python benchmarks/train_digits.py levit        # castling-levit-digits: has BatchNorm
    python benchmarks/train_digits.py deit         # castling-deit-digits: has a class and a distillation token

1,797 images of 8 x 8 pixels (UCI "Optical Recognition of Handwritten Digits"), 360 of them held out, split by a fixed
seed and stratified by class. Minutes on two cores. Writes the checkpoint and the held-out images into
castling_deploy/bundled/, and one line per epoch (accuracy before and after the cast, mask density) into
benchmarks/results/.

The paper reports that the masks thin out as training proceeds, without a schedule (section 3.3). Networks this small on
8 x 8 pixels keep theirs, so the recipe adds what the paper asks of the masks in words: in a share `CAST_SHARE` of the
steps the branch is off, and the network learns to do without it.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch
from recipe import BUNDLED, CAST_SHARE, cast_columns, descend, digits, save, set_thresholds
from torch import nn
from torch.nn import functional as F

from castling_deploy.castle import castle
from castling_deploy.models.deit import CastlingDeiT
from castling_deploy.models.deit_config import DeiTConfig
from castling_deploy.models.levit import CastlingLeViT
from castling_deploy.models.levit_config import LeViTConfig
from castling_deploy.preprocessing import Preprocessing

RECIPES = {
    "levit": (
        CastlingLeViT,
        LeViTConfig(widths=(48, 64, 96), heads=(3, 4, 6), depths=(2, 2, 2), image_size=(128, 128), classes=10),
    ),
    "deit": (
        CastlingDeiT,
        DeiTConfig(width=64, heads=4, depth=6, hidden=256, distilled=True, image_size=(32, 32), patch=4, classes=10),
    ),
}


def augmented(gray: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """(B, 1, H, W) in 0..1 -> (B, 3, H, W) normalised: small shifts, turns and sizes; half of them in two colours."""
    batch = len(gray)
    angle = (torch.rand(batch) - 0.5) * 0.5
    size = 1 + (torch.rand(batch) - 0.5) * 0.3
    cos, sin = torch.cos(angle) * size, torch.sin(angle) * size
    shift = (torch.rand(batch, 2) - 0.5) * 0.3
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    gray = F.grid_sample(gray, F.affine_grid(theta, list(gray.shape), align_corners=False), align_corners=False)
    ink, paper = torch.rand(2, batch, 3, 1, 1)
    plain = (torch.rand(batch, 1, 1, 1) < 0.5) | ((ink - paper).abs().mean(1, keepdim=True) < 0.3)
    ink, paper = torch.where(plain, 1.0, ink), torch.where(plain, 0.0, paper)
    image = paper + (ink - paper) * gray + 0.02 * torch.randn(batch, 3, *gray.shape[2:])
    mean, std = torch.tensor(preprocessing.mean).view(3, 1, 1), torch.tensor(preprocessing.std).view(3, 1, 1)
    return (image.clamp(0, 1) - mean) / std


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Top-1 in percent."""
    return 100 * (model(images).argmax(1) == labels).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=RECIPES)
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)

    build, config = RECIPES[arguments.network]
    name = f"castling-{arguments.network}-digits"
    preprocessing = Preprocessing(config.image_size, resize_kernel="bilinear", crop_fraction=1.0)
    train_x, train_y, test_x, test_y = digits()
    base = torch.tensor(np.stack([preprocessing.resized(image)[..., 0] for image in train_x]))[:, None] / 255
    labels = torch.tensor(train_y)
    held_out = torch.tensor(preprocessing.normalised(np.stack([preprocessing.resized(image) for image in test_x])))
    held_out_labels = torch.tensor(test_y)

    model = build(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    steps = arguments.epochs * (len(base) // 96)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.15)
    log, started = [], time.perf_counter()
    for epoch in range(1, arguments.epochs + 1):
        model.train()
        total = 0.0
        for index in torch.randperm(len(base))[: len(base) // 96 * 96].split(96):
            set_thresholds(model, None if torch.rand(()) < CAST_SHARE else config.aux_threshold)
            logits = model(augmented(base[index], preprocessing))
            loss = sum(F.cross_entropy(head, labels[index], label_smoothing=0.05) for head in logits) / len(logits)
            descend(model, loss, optimizer, schedule)
            total += loss.item()
        model.eval()
        set_thresholds(model, config.aux_threshold)
        row = {
            "epoch": epoch,
            "loss": round(total / (len(base) // 96), 4),
            "top1_trained": round(accuracy(model, held_out, held_out_labels), 2),
            "top1_cast": round(accuracy(castle(model), held_out, held_out_labels), 2),
            **cast_columns(model, held_out),
            "seconds": round(time.perf_counter() - started, 1),
        }
        log.append(row)
        print(json.dumps(row), flush=True)

    facts = {
        "labels": [str(digit) for digit in range(10)],
        "samples": "digits",
        "aux_threshold": config.aux_threshold,
    }
    save(name, model, preprocessing, facts, log)
    np.savez_compressed(BUNDLED / "digits.npz", images=test_x, labels=test_y.astype(np.uint8))


if __name__ == "__main__":
    main()
