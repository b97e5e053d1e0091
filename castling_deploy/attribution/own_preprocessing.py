"""`castling preprocess`: our preprocessing of a photo, written for a diff, and an attribution of somebody else's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console

from castling_deploy.attribution.resize_check import MATTERS, Attribution, Cause, attribute, prepared
from castling_deploy.errors import UsageError

MEANING = {
    Cause.MODEL: "the model: its golden outputs are wrong here, whatever the preprocessing",
    Cause.PREPROCESSING: "the preprocessing: the artefact is right, and says something else of these pixels",
    Cause.NEITHER: "neither: the artefact is right, and these pixels say the same to it",
}


def preprocess(
    path: str | Path, image: str | Path, mine: str | Path | None, save: str | Path | None
) -> Attribution | None:
    """Write what the artefact takes of `image` to `save`, and attribute `mine`, an .npy file; None without one.

    Raises UsageError where a file cannot be read or written, where `save` exists, or where there is nothing to do.
    """
    if mine is None and save is None:
        raise UsageError("there is nothing to do", hint="name your own array with --mine, or a file to --save ours to")
    if save is not None:
        _save(Path(save), prepared(path, image))
    if mine is None:
        return None
    try:
        theirs = np.load(mine, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"'{mine}' cannot be read: {error}", hint="write it with numpy.save") from None
    if not isinstance(theirs, np.ndarray):
        raise UsageError(f"'{mine}' holds several arrays", hint="write one array with numpy.save")
    return attribute(path, image, theirs)


def print_attribution(found: Attribution, console: Console) -> None:
    """What was found, the conclusion last."""
    console.print(
        f"your pixels are {found.mean_levels:.2f} levels of 255 from ours on average, "
        f"{found.largest_levels:.0f} at most",
        soft_wrap=True,
    )
    if not found.explained:
        console.print("no known mistake explains it", style="yellow")
    for mistake in found.explanation.mistakes:
        console.print(f"  explained by: {mistake}", style="yellow", soft_wrap=True)
    if found.explanation.mistakes:
        console.print(f"  that leaves {found.explanation.levels:.2f} levels")
    for effect in found.effects:
        rel = "-" if effect.rel is None else f"{effect.rel:.1e}"
        says = "" if effect.ours is None else f"; first class of ours {effect.ours}, of yours {effect.theirs}"
        console.print(f"  {effect.name}: {rel} of its spread apart (matters from {MATTERS:g}){says}", soft_wrap=True)
    if not found.effects:
        console.print("  the artefact takes pixels, and yours are a tensor: it was not run on them")
    for output in found.golden.outputs:
        rel = "-" if output.rel is None else f"{output.rel:.1e}"
        console.print(f"  golden images, {output.name}: rel {rel}, {output.verdict}")
    style = "green" if found.cause is Cause.NEITHER else "red"
    console.print(f"cause: {MEANING[found.cause]}", style=style, soft_wrap=True)


def _save(path: Path, array: npt.NDArray[np.generic]) -> None:
    try:
        with open(path, "xb") as file:
            np.save(file, array)
    except OSError as error:
        raise UsageError(
            f"cannot write '{path}': {error.strerror or error}", hint="name a new file in a folder that exists"
        ) from None
