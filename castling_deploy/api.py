"""The Python interface: the same steps as the command, one function each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from castling_deploy import bundled, pipeline, recheck
from castling_deploy import checkpoint as reading
from castling_deploy.artifact import Folder, read_folder
from castling_deploy.castle import castle as castled
from castling_deploy.errors import ParityError, TargetUnavailableError
from castling_deploy.execution import inputs_for, run_artifact
from castling_deploy.fold import fold as folded
from castling_deploy.identify import ModelCard, identify
from castling_deploy.parity import Array, Verdict
from castling_deploy.probes import Probes
from castling_deploy.request import Request
from castling_deploy.target import Session, target_named
from castling_deploy.verification import opened

benchmark = recheck.benchmark
verify = recheck.verify


def load(
    path: str | Path | None = None, *, model: str | None = None, image_size: tuple[int, int] | None = None
) -> nn.Module:
    """The network of a checkpoint (without one: the bundled `model`) in training form, its card as `.card`.

    Shape: (B, C, H, W) -> logits (B, classes). Raises CheckpointError.
    """
    source = bundled.checkpoint_path(model or bundled.DEFAULT) if path is None else path
    network, card = identify(reading.read(source), model=model, image_size=image_size)
    return _carrying(network, card)


def castle(model: nn.Module) -> nn.Module:
    """A new network without auxiliary branches; `model` is not changed. See castle.py."""
    return _carrying(castled(model), _card(model))


def fold(model: nn.Module) -> nn.Module:
    """A new network with every exact fold applied; `model` is not changed. Raises FoldError. See fold.py."""
    return _carrying(folded(model), _card(model))


def export(
    model: nn.Module | str | Path,
    *,
    target: str,
    precision: str | None = None,
    output: str | Path = "castling-out",
    batch_size: int = 1,
    benchmark: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> pipeline.Result:
    """Export, verify and describe one artefact; `result.path` is its folder. `options` are the target's own.

    `model` is a network from `load` (cast and folded or not) or a checkpoint's path. Raises ParityError when the
    artefact computes something else (it is kept, and marked), TargetUnavailableError when nothing could be exported.
    """
    network = model if isinstance(model, nn.Module) else load(model)
    request = Request(
        targets=(target,),
        precision=precision,
        batch_size=batch_size,
        options=options,
        output=Path(output),
        benchmark=benchmark,
        overwrite=overwrite,
    )
    (result,) = pipeline.deploy_network(request, network, _card(network) or _card_from_weights(network)).results
    if result.error is not None:
        raise result.error
    if result.path is None and result.missing is not None:
        raise TargetUnavailableError(result.missing.reason, hint=result.missing.fix)
    if result.parity is not None and result.parity.verdict is Verdict.FAIL:
        raise ParityError(
            f"'{result.path}' does not compute what the network computes",
            hint="its parity.json says on which output and by how much",
        )
    return result


@dataclass(frozen=True)
class Model:
    """An artefact that is open: call it with images."""

    folder: Folder
    session: Session

    def __call__(self, images: npt.NDArray[np.uint8]) -> dict[str, Array]:
        """(B, H, W, C) uint8 images at the network's size -> outputs by name, B first. Raises ShapeError.

        The artefact's preprocessing is applied where the artefact does not do it itself, and any B is cut to the
        artefact's own batch.
        """
        probes = Probes(self.folder.preprocessing, images, real=len(images), extremes=0, labels=None)
        return run_artifact(self.session, self.folder.artifact, inputs_for(self.folder.artifact.inputs[0], probes))


@contextmanager
def open(path: str | Path, *, threads: int = 1) -> Iterator[Model]:
    """The artefact of a folder, ready to be called, whatever its target: `with open(path) as model: model(images)`."""
    folder = read_folder(Path(path))
    with opened(target_named(folder.target), folder.path, threads) as session:
        yield Model(folder, session)


def _carrying(network: nn.Module, card: ModelCard | None) -> nn.Module:
    network.card = card  # type: ignore[assignment]  # nn.Module types its attributes as tensors and modules
    return network


def _card(network: nn.Module) -> ModelCard | None:
    card = getattr(network, "card", None)
    return card if isinstance(card, ModelCard) else None


def _card_from_weights(network: nn.Module) -> ModelCard:
    """The card of a network that somebody built: its family is recognised like a checkpoint's."""
    tensors = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    return identify(reading.Checkpoint(Path("in-memory"), None, tensors))[1]
