"""Checks this artefact: runs the golden images and compares with what PyTorch said of them.

    python selftest.py [FOLDER]

FOLDER is the artefact's (default: the one above this file). Needs numpy and the runtime alone. Prints a line per output
and PASS or FAIL; exit code 0, 1 where it fails, 2 where it cannot run here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

# <facts>
MODEL = "model.onnx"
INPUT = "image"
IMAGE_INPUT = False
DTYPE = "float32"
BATCH = 1
MEAN, STD = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]
OUTPUTS = ["logits"]
GOLDEN: list[tuple[str, str, list[float], float]] = [("logits", "logits.npy", [1.0], 1e-4)]
# </facts>


# <runtime>
def opened(model: Path) -> Callable[[np.ndarray], list[np.ndarray]]:
    """The model, ready: one batch in, every output in the order of OUTPUTS."""
    raise NotImplementedError


# </runtime>


def prepared(images: np.ndarray) -> np.ndarray:
    """(n, H, W, C) uint8 pixels as the model takes them: themselves, or (n, C, H, W) normalised."""
    if IMAGE_INPUT:
        return images
    scaled = images.astype(np.float32) / np.float32(255)
    normalised = (scaled - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return np.ascontiguousarray(normalised.transpose(0, 3, 1, 2)).astype(DTYPE)


def run(session: Callable[[np.ndarray], list[np.ndarray]], inputs: np.ndarray) -> dict[str, np.ndarray]:
    """Every output for all inputs; a batch that is not full is filled up with its last image."""
    size = BATCH if BATCH > 0 else len(inputs)
    batches = []
    for start in range(0, len(inputs), size):
        chunk = inputs[start : start + size]
        filled = np.concatenate([chunk, np.repeat(chunk[-1:], size - len(chunk), axis=0)])
        batches.append([np.asarray(output)[: len(chunk)] for output in session(np.ascontiguousarray(filled))])
    return {name: np.concatenate(parts) for name, parts in zip(OUTPUTS, zip(*batches))}


def check(folder: Path) -> bool:
    """Prints a line per output; whether all of them are right."""
    images = np.load(folder / "golden" / "images.npy")
    found = run(opened(folder / MODEL), prepared(images))
    judged, right = 0, True
    for name, file, spreads, limit in GOLDEN:
        expected, actual = np.load(folder / "golden" / file), found[name]
        if actual.shape != expected.shape:
            print(f"{name}: shape {actual.shape}, golden {expected.shape}")
            right = False
            continue
        if min(spreads) <= 0:
            print(f"{name}: the same for every golden image, not judged")
            continue
        errors = np.abs(actual.astype(np.float64) - expected).reshape(len(expected), -1).max(axis=1)
        rel = float((errors / np.array(spreads)).max())  # NaN stays NaN, and is not <= limit
        print(f"{name}: rel {rel:.2e}, limit {limit:.0e}")
        judged, right = judged + 1, right and rel <= limit
    return right and judged > 0


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    try:
        right = check(folder)
    except ImportError as error:
        print(f"not run: {error}")
        sys.exit(2)
    except Exception as error:  # a model that the runtime refuses, a golden file that is damaged
        print(f"{type(error).__name__}: {error}")
        right = False
    print("PASS" if right else "FAIL", flush=True)
    os._exit(0 if right else 1)  # a runtime may abort while Python takes it down (Core AI 1.0.0b3): all is said already


if __name__ == "__main__":
    main()
