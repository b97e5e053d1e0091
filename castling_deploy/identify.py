"""From a checkpoint to a network: the family is recognised, the weights are loaded strictly."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from castling_deploy.checkpoint import Checkpoint, require_finite
from castling_deploy.errors import CheckpointError, UsageError
from castling_deploy.models.family import (
    FAMILIES,
    OFFICIAL_THRESHOLD,
    ModelFamily,
    Size,
    adapted,
    families,
    family_of,
    names_baseline,
)
from castling_deploy.models.zero_dconv import with_zero_dconv
from castling_deploy.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from castling_deploy.reading.card import ASSUMED, Stated, Told, stated
from castling_deploy.reading.networks import network_in
from castling_deploy.suggest import did_you_mean


@dataclass(frozen=True)
class ModelCard:
    """What is known about a loaded network besides its weights.

    `output_values` is how many numbers the outputs hold for one image.
    `samples` names the bundled images that the network was trained for, if any. `loaded` and `dropped` count and name
    the checkpoint's tensors: every one is in the network or named here. `warnings` is what a user has to know before
    trusting the network; `assumed` names the facts that neither the file nor the user told.
    """

    name: str
    family: str
    task: str
    outputs: tuple[str, ...]
    output_values: int
    reference: str
    config: Any
    preprocessing: Preprocessing
    labels: tuple[str, ...] | None
    samples: str | None
    checkpoint_path: str | None
    checkpoint_sha256: str | None
    peeled: tuple[str, ...]
    loaded: int
    dropped: tuple[str, ...]
    init_dconv: Literal["zero"] | None = None
    told: Told = field(default_factory=Told)
    assumed: tuple[str, ...] = ()
    already_cast: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def nothing_to_cast(self) -> str | None:
        """Why the family's network has nothing that a cast could remove; None where it has."""
        reasons = {"softmax": "softmax baseline: nothing to cast", "none": "no attention: nothing to cast"}
        return reasons.get(self.config.attention)


def identify(
    checkpoint: Checkpoint,
    *,
    model: str | None = None,
    image_size: Size | None = None,
    init_dconv: Literal["zero"] | None = None,
    told: Told = Told(),  # noqa: B008  # frozen
) -> tuple[nn.Module, ModelCard]:
    """The network in training form and eval mode, with the checkpoint's weights, and its card.

    `model` is what the caller believes the network to be (a family, a variant or a bundled name); `image_size`
    overrides the checkpoint's (height, width); `init_dconv` takes a softmax network as one whose token convolutions
    are zero, with a warning; `told` is what the user says of the file. Raises CheckpointError when a tensor is missing,
    left over, of the wrong shape, or not finite.
    """
    facts = _with_told(stated(checkpoint.card), told)
    softmax = model is not None and names_baseline(model)
    found = network_in(checkpoint.tensors, softmax or init_dconv is not None, checkpoint.prefix)
    own = {name: value for name, value in checkpoint.tensors.items() if name not in found.left_out}
    checkpoint = replace(
        checkpoint,
        tensors=found.tensors,
        peeled=(*checkpoint.peeled, *found.peeled),
        dropped=(*checkpoint.dropped, *found.left_out),
    )
    warnings = facts.warnings
    if init_dconv is not None:
        checkpoint, warning = _with_zero_dconv(checkpoint, facts)
        warnings += (warning,)
    family = family_of(checkpoint.tensors, softmax)
    config = _config(family, checkpoint, facts, image_size)
    if told.aux_threshold is not None and config.attention != "castling":
        raise UsageError(f"'{checkpoint.path}' has no auxiliary branch", hint="leave --aux-threshold out")
    if facts.image_size not in (None, config.image_size):
        raise CheckpointError(
            f"'{checkpoint.path}' says it takes images of {facts.image_size} pixels, its tensors are "
            f"for {config.image_size}",
            hint="mend 'image_size' in the file's metadata",
        )
    tensors: Mapping[str, torch.Tensor] = checkpoint.tensors
    if image_size is not None and image_size != config.image_size:
        native = config.image_size
        _load(family, config, tensors, checkpoint)  # before resizing: an error names the checkpoint's shapes
        tensors, config = family.resized(tensors, config, image_size)
        warnings += (
            f"trained at {_pixels(native)} pixels and resized to {_pixels(image_size)}: not trained like this",
        )
    published = _published_name(family, config)
    name = facts.name or published or facts.architecture or _name_from(checkpoint, family, config)
    if model is not None and model not in (name, published, family.name, family.baseline):
        _refuse(model, name)
    network = _load(family, config, tensors, checkpoint)
    require_finite(own, checkpoint.path)  # in the file's names, once they are known to be the network's
    if facts.classes not in (None, config.classes):
        raise CheckpointError(
            f"'{checkpoint.path}' says it has {facts.classes} classes, its tensors have {config.classes}",
            hint="mend the number of classes in the file's metadata or config.json",
        )
    heads = getattr(
        config, "heads", None
    )  # one number for all blocks in DeiT alone, where no tensor of softmax tells it
    if isinstance(heads, int) and facts.heads not in (None, heads):
        raise CheckpointError(
            f"'{checkpoint.path}' says its attention has {facts.heads} heads, its tensors are read with {heads}",
            hint="mend the number in config.json; softmax with heads of another width than the published is not read",
        )
    if facts.labels is not None and len(facts.labels) != config.classes:
        raise CheckpointError(
            f"'{checkpoint.path}' names {len(facts.labels)} labels for {config.classes} classes",
            hint="mend the labels in the file's metadata",
        )
    return network, ModelCard(
        name=name,
        family=family.name,
        task=family.task,
        outputs=tuple(output.name for output in family.outputs(config)),
        output_values=sum(math.prod(output.shape) for output in family.outputs(config)),
        reference=family.reference,
        config=config,
        preprocessing=_preprocessing(facts, config, family),
        labels=facts.labels,
        samples=facts.samples,
        checkpoint_path=checkpoint.path.name,
        checkpoint_sha256=checkpoint.sha256,
        peeled=checkpoint.peeled,
        loaded=len(own),
        dropped=checkpoint.dropped,
        init_dconv=init_dconv,
        told=told,
        assumed=_assumed(facts, config),
        warnings=(*warnings, *_other_eps(network, facts)),
    )


def _with_told(facts: Stated, told: Told) -> Stated:
    said = {name: getattr(told, name) for name in ASSUMED}
    return replace(facts, **{name: value for name, value in said.items() if value is not None})


def _assumed(facts: Stated, config: Any) -> tuple[str, ...]:
    matters = [name for name in ASSUMED if name != "aux_threshold" or config.attention == "castling"]
    return tuple(name for name in matters if getattr(facts, name) is None)


def _config(family: ModelFamily, checkpoint: Checkpoint, facts: Stated, image_size: Size | None) -> Any:
    """The hyper-parameters. A size that was only asked for is taken for the checkpoint's own where nothing else tells
    it; where shapes do tell one, the network is resized from there."""
    threshold = OFFICIAL_THRESHOLD if facts.aux_threshold is None else facts.aux_threshold
    try:
        try:
            config = family.config_of(checkpoint.tensors, facts.image_size, threshold)
        except CheckpointError:
            if image_size is None or facts.image_size is not None:
                raise
            config = family.config_of(checkpoint.tensors, image_size, threshold)
    except (ArithmeticError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"'{checkpoint.path}' has tensors of impossible shapes for {family.title}: {error}",
            hint="the file is damaged, or of another network with the same names",
        ) from None
    if config.classes < 1:
        raise CheckpointError(f"'{checkpoint.path}' has a classifier of no classes", hint="pass a trained classifier")
    return config


def _pixels(size: Size) -> str:
    return f"{size[0]} x {size[1]}"


def _with_zero_dconv(checkpoint: Checkpoint, facts: Stated) -> tuple[Checkpoint, str]:
    tensors = with_zero_dconv(checkpoint.tensors, facts.heads)
    added = len(tensors) - len(checkpoint.tensors)
    if added == 0:
        raise UsageError(
            f"'{checkpoint.path}' has no attention without a token convolution", hint="leave --init-dconv out"
        )
    warning = f"{added} token convolutions (dconv) were filled with zeros: a softmax network, never trained like this"
    return replace(checkpoint, tensors=tensors), warning


def _other_eps(network: nn.Module, facts: Stated) -> tuple[str, ...]:
    """transformers' default is 1e-12, facebook's and timm's DeiT have 1e-6: no tensor tells."""
    eps = {module.eps for module in network.modules() if isinstance(module, nn.LayerNorm)}
    if facts.layer_norm_eps is None or eps <= {facts.layer_norm_eps}:
        return ()
    return (f"config.json says layer_norm_eps {facts.layer_norm_eps:g}, this network has {max(eps):g}",)


def _load(family: ModelFamily, config: Any, tensors: Mapping[str, torch.Tensor], checkpoint: Checkpoint) -> nn.Module:
    with torch.device("meta"):
        wanted = {
            name: value.shape
            for name, value in family.build(config).state_dict().items()
            if not name.endswith("num_batches_tracked")
        }
    missing = [name for name in wanted if name not in tensors]
    extra = [name for name in tensors if name not in wanted]
    if missing or extra:
        parts = [
            f"{len(names)} tensors are {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for names, what in ((missing, "missing"), (extra, "not part of it"))
            if names
        ]
        raise CheckpointError(
            f"'{checkpoint.path}' is no complete {family.title}: {' and '.join(parts)}",
            hint="every tensor has to be used and none may be missing; is this the right checkpoint?",
        )
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"tensor '{name}' in '{checkpoint.path}' has shape {tuple(tensors[name].shape)}, "
                f"the network needs {tuple(shape)}",
                hint="the file mixes two networks",
            )
    network = family.build(config)
    network.load_state_dict(dict(tensors), strict=False)  # complete by the check above, but for BatchNorm counters
    return network.eval().requires_grad_(False)


def _published_name(family: ModelFamily, config: Any) -> str | None:
    matches = (name for name, variant in family.variants.items() if adapted(variant, config) == config)
    return next(matches, None)


def _name_from(checkpoint: Checkpoint, family: ModelFamily, config: Any) -> str:
    if config.attention == "softmax" and family.baseline is not None:
        return family.baseline
    path = checkpoint.path.with_suffix("") if checkpoint.path.suffix == ".tar" else checkpoint.path  # timm: .pth.tar
    stem = re.sub(r"[^a-z0-9]+", "-", path.stem.lower()).strip("-")
    return stem if stem.startswith("castling") else f"{family.name}-{stem or 'custom'}"


def _refuse(model: str, name: str) -> None:
    known = [*FAMILIES, *(variant for family in families() for variant in family.variants), name]
    if model in known:
        raise UsageError(f"the checkpoint is a '{name}', not a '{model}'", hint="leave --model out")
    raise UsageError(f"unknown model '{model}'", hint=did_you_mean(model, known))


def _preprocessing(facts: Stated, config: Any, family: ModelFamily) -> Preprocessing:
    gray = config.channels == 1
    mean = facts.mean or ((0.5,) if gray else IMAGENET_MEAN)
    std = facts.std or ((0.5,) if gray else IMAGENET_STD)
    if not len(mean) == len(std) == config.channels or config.channels not in (1, 3):
        raise CheckpointError(
            f"a network of {config.channels} input channels cannot be fed images normalised by "
            f"{len(mean)} means and {len(std)} standard deviations",
            hint="name one number per channel, 1 or 3, with --mean and --std or in the file's metadata",
        )
    usual = Preprocessing(
        size=config.image_size, mean=mean, std=std, channel_order="L" if gray else "RGB", **family.preprocessing
    )
    stated_facts: dict[str, Any] = {"resize_kernel": facts.resize_kernel, "crop_fraction": facts.crop_fraction}
    return replace(usual, **{name: value for name, value in stated_facts.items() if value is not None})
