"""The Python interface: the same steps as the command, one function each."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import nn

from castling_deploy import bundled, pipeline
from castling_deploy import checkpoint as reading
from castling_deploy.artifact import read_folder
from castling_deploy.castle import castle as castled
from castling_deploy.errors import ParityError, ShapeError, TargetUnavailableError, UsageError
from castling_deploy.execution import inputs_for, run_artifact
from castling_deploy.fold import fold as folded
from castling_deploy.identify import ModelCard, identify
from castling_deploy.making import Result
from castling_deploy.models.attention import was_cast
from castling_deploy.models.dialects import in_our_names
from castling_deploy.models.family import family_of
from castling_deploy.parity import Array, Verdict
from castling_deploy.probes import Probes
from castling_deploy.quiet import toolchain
from castling_deploy.reading.card import Told
from castling_deploy.rechecking import recheck
from castling_deploy.request import Int8, Request
from castling_deploy.saving import facts_of, write_checkpoint
from castling_deploy.target import target_named

benchmark = recheck.benchmark
verify = recheck.verify


def load(
    path: str | Path | None = None,
    *,
    model: str | None = None,
    image_size: tuple[int, int] | None = None,
    init_dconv: Literal["zero"] | None = None,
    weights: str | None = None,
    aux_threshold: float | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> nn.Module:
    """The network of a checkpoint (without one: the bundled `model`) in training form, its card as `.card`.

    `weights` names a container of the file ("state_dict", where an average is preferred) or a prefix of its names;
    `aux_threshold`, `mean` and `std` are taken rather than what the file says, or than the usual ones.
    A network whose weights are changed afterwards is exported as one of no checkpoint.

    Shape: (B, C, H, W) -> logits (B, classes). Raises CheckpointError.
    """
    source = bundled.checkpoint_path(model or bundled.DEFAULT) if path is None else path
    told = Told(weights, aux_threshold, mean, std)
    checkpoint = reading.read(source, told.weights)
    network, card = identify(checkpoint, model=model, image_size=image_size, init_dconv=init_dconv, told=told)
    return _carrying(network, card)


def save(network: nn.Module, path: str | Path, *, overwrite: bool = False, **facts: Any) -> None:
    """Write a network in training form, from `load`, `castlify` or built here, as a checkpoint that `load` reads.

    The safetensors file states what the tensors do not tell (sizes, threshold, normalisation, labels); `facts` are
    stated rather than what is known of the network. Raises UsageError where there is such a file already, or the
    network was cast: its checkpoint is the one before the cast.
    """
    card = _card(network)
    if was_cast(network) or (card is not None and card.already_cast):  # one that was folded has no attention that tells
        raise UsageError("the network was cast, and is no checkpoint any more", hint="save it before castle or fold")
    known = facts_of(card or _recognised(network)[1])
    if card is None:
        known["name"] = None  # made up
    elif card.checkpoint_sha256 is None:
        known["warnings"] = None  # its weights have changed since: it was trained like this now
    write_checkpoint(Path(path), network.state_dict(), {**known, **facts}, overwrite=overwrite)


def castle(model: nn.Module) -> nn.Module:
    """A new network without auxiliary branches; `model` is not changed. See castle.py."""
    card = _card(model)
    return _carrying(castled(model), card and replace(card, already_cast=True))


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
    int8: Int8 = Int8(),  # noqa: B008  # frozen
    **options: Any,
) -> Result:
    """Export, verify and describe one artefact; `result.path` is its folder. `options` are the target's own, `int8`
    says how to calibrate.

    `model` is a network from `load` (cast and folded or not) or `castlify`, or a checkpoint's path. Raises ParityError
    when the artefact computes something else (it is kept, and marked), TargetUnavailableError when nothing could be
    exported.
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
        int8=int8,
    )
    card = _card(network)
    if card is None:
        network, card = _recognised(network)
    (result,) = pipeline.deploy_network(request, network, card).results
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


class Model:
    """An artefact that is open: call it with images, whatever its target. `close` it, or use it in a `with` block."""

    def __init__(self, path: str | Path, threads: int = 1) -> None:
        self.folder = read_folder(Path(path))
        self._stack = ExitStack()
        with toolchain(f"{self.folder.target}: the artefact does not load"):
            target = target_named(self.folder.target)
            self._session = self._stack.enter_context(target.load(self.folder.path, threads=threads))
        self.witness = self._session.witness

    def __call__(self, images: npt.NDArray[np.generic]) -> Array:
        """The network's first output, B first (a classifier's logits); see `outputs`."""
        return self.outputs(images)[self.folder.artifact.outputs[0].name]

    def outputs(self, images: npt.NDArray[np.generic]) -> dict[str, Array]:
        """Every output by name, B first. Raises ShapeError.

        `images` are (B, H, W, C) uint8 pixels at the network's size, or what the artefact itself takes: (B, C, H, W)
        float32, normalised. Any B is cut to the artefact's own batch.
        """
        (spec,) = self.folder.artifact.inputs
        inputs = images
        if images.dtype == np.uint8:
            inputs = inputs_for(spec, Probes.of(images.astype(np.uint8, copy=False), self.folder.preprocessing))
        if inputs.shape[1:] != spec.shape[1:] or inputs.dtype != spec.dtype:
            raise ShapeError(
                f"images are {images.dtype} {images.shape}, the artefact takes {spec.dtype} (B, *{spec.shape[1:]})",
                hint="pass uint8 pixels (B, H, W, C) at the network's size, and they are normalised as they have to be",
            )
        with toolchain(f"{self.folder.target}: the artefact does not run"):
            return run_artifact(self._session, self.folder.artifact, inputs)

    def close(self) -> None:
        """Free the runtime. A closed model cannot be called."""
        self._stack.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open(path: str | Path, *, threads: int = 1) -> Model:
    """The artefact of a folder, ready to be called, whatever its target. Raises UsageError, ExportError."""
    return Model(path, threads)


def _carrying(network: nn.Module, card: ModelCard | None) -> nn.Module:
    network.card, network.fingerprint = card, _fingerprint(network)  # type: ignore[assignment]  # no tensors or modules
    return network


def _card(network: nn.Module) -> ModelCard | None:
    card = getattr(network, "card", None)
    if not isinstance(card, ModelCard):
        return None
    if network.fingerprint == _fingerprint(network):
        return card
    return replace(card, checkpoint_path=None, checkpoint_sha256=None)


def _fingerprint(network: nn.Module) -> tuple[float, ...]:
    """One number per tensor: whether weights were changed since, not a hash against forgers."""
    doubles = (tensor.double() for tensor in network.state_dict().values())
    return tuple((tensor.norm() + tensor.sum()).item() for tensor in doubles)


def _recognised(network: nn.Module) -> tuple[nn.Module, ModelCard]:
    """A network that somebody built, and its card: its family is recognised like a checkpoint's.

    One from `castlify` computes what the family's own network with its tensors does: that one can be folded.
    """
    tensors = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    config = getattr(network, "config", None)
    castlified: Any = getattr(network, "castling", None)
    facts = castlified or {}
    if config:
        facts = {"image_size": list(config.image_size), "aux_threshold": config.aux_threshold}
    is_baseline = getattr(config, "attention", None) == "softmax"
    family = family_of(
        in_our_names(tensors)[0], softmax=True
    )  # all of it: what holds a network has a forward of its own
    model = family.baseline if is_baseline else None
    own, card = identify(reading.Checkpoint(Path("in-memory"), None, tensors, card=facts), model=model)
    card = replace(card, already_cast=was_cast(network))
    return (own.train(network.training) if castlified else network), card
