"""What travels with the package: trained checkpoints, and real images to compare on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from castling_deploy.errors import UsageError
from castling_deploy.suggest import did_you_mean

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

FOLDER = Path(__file__).parent / "bundled"
DEFAULT = "castling-levit-digits"
CHECKPOINTS = (
    DEFAULT,
    "castling-deit-digits",
    "castling-levit-digits-detector",
    "castling-mvitv2-digits-segmenter",
)


def checkpoint_path(name: str) -> Path:
    """The file of the bundled checkpoint `name`. Raises UsageError with a suggestion."""
    if name not in CHECKPOINTS:
        raise UsageError(
            f"no trained weights named '{name}' are bundled",
            hint=f"pass a checkpoint file for it, or {did_you_mean(name, CHECKPOINTS)}",
        )
    return FOLDER / f"{name}.safetensors"


def digits() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """The 360 handwritten digits that training did not see: images (360, 8, 8), labels (360,)."""
    import numpy as np

    with np.load(FOLDER / "digits.npz") as file:
        return file["images"], file["labels"]


def photographs() -> npt.NDArray[np.uint8]:
    """Eight photographs, (8, 160, 160, 3) RGB; public domain or CC0, see NOTICE."""
    import numpy as np

    with np.load(FOLDER / "photographs.npz") as file:
        return file["images"]
