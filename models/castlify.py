"""Castling's attention in a network of timm, to be trained there and exported here.

Only those networks of timm (huggingface/pytorch-image-models) are taken that compute, once castled, what one of our
families computes from the same tensors; everything that no tensor tells (activations, epsilons, strides, pooling) is
compared before.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from castling_deploy.errors import CheckpointError, ShapeError, UsageError
from castling_deploy.models.family import OFFICIAL_THRESHOLD, ModelFamily, Size, family_of
from castling_deploy.models.timm_kinds import BLOCK, Kind, attentions, kind_of
from castling_deploy.verbs import make_callable

# Layers without parameters that do nothing in eval mode, or (LeViT's Downsample) take every second token.
SILENT = ("Identity", "Dropout", "DropPath", "PatchDropout", "Downsample")
# What PyTorch's layers know and their tensors do not tell.
TRAITS = ("eps", "kernel_size", "stride", "padding", "dilation", "groups")


def castlify(model: nn.Module, *, aux_threshold: float = OFFICIAL_THRESHOLD, kernel: int = 9) -> nn.Module:
    """A new network: timm's, with linear-angular attention and its auxiliary branch; `model` is not changed.

    timm's VisionTransformer (ViT and DeiT, plain and distilled), Levit (downsampling keeps its softmax) and
    MultiScaleVit (MViTv2; keys and values are pooled as the queries). Every tensor is kept bit for bit. The token
    convolutions, of `kernel` taps, are new and drawn from PyTorch's generator as in the official module, so the
    network has to be trained. `aux_threshold` masks the auxiliary branch.

    castling_deploy.export takes the result, and load its saved state_dict(). Its attribute `castling` holds what the
    tensors do not tell (sizes, threshold, normalisation), in the words of a safetensors file's `castling` entry.
    Raises UsageError where the network has no such attention, or could not be exported later.
    """
    if not 0 <= aux_threshold <= 1:
        raise UsageError(f"aux_threshold is {aux_threshold}", hint="softmax weights lie between 0 and 1")
    if kernel < 1 or kernel % 2 == 0:
        raise UsageError(f"a token convolution of {kernel} taps", hint="use an odd number of taps")
    kind = kind_of(model)
    old = dict(attentions(model, kind))
    family, config = _recognised(model, old, kind.image_size(model), aux_threshold, kernel)
    _refuse_what_tensors_do_not_tell(model, family, config, kind)
    # What a deep copy takes for copied already: the attentions, and the biases that LeViT caches, which may hang on a
    # graph and cannot be copied then.
    copies: dict[int, Any] = {
        id(attention): _replaced(attention, name, config, kind) for name, attention in old.items()
    }
    caches = (getattr(module, "attention_bias_cache", None) for module in model.modules())
    copies.update({id(cache): {} for cache in caches if cache is not None})
    castled = copy.deepcopy(model, copies)
    castled.castling = _facts(castled, config)  # type: ignore[assignment]  # no tensor or module
    return castled


def _recognised(
    model: nn.Module, old: Mapping[str, Any], image_size: Size | None, aux_threshold: float, kernel: int
) -> tuple[ModelFamily, Any]:
    """Our family and configuration of the castled network. Raises UsageError where its tensors are not the family's."""
    tensors = dict(_tensors(model))
    for name, attention in old.items():
        tensors[f"{name}.dconv.weight"] = torch.empty(attention.num_heads, 1, kernel, 1, device="meta")
    try:
        family = family_of(tensors)
        config = family.config_of(tensors, image_size, aux_threshold)
        wanted = _tensors(_on_meta(family, config))
    except (CheckpointError, ShapeError) as error:
        raise UsageError(
            f"this {type(model).__name__} could not be exported: {error.message}", hint=error.hint
        ) from error
    strange = [name for name in [*tensors, *wanted] if name not in tensors or name not in wanted]
    strange += [name for name in wanted if name in tensors and tensors[name].shape != wanted[name].shape]
    if strange:
        name = strange[0]
        what = "no" if name not in tensors else "an unexpected" if name not in wanted else "an unusual"
        raise UsageError(
            f"this {type(model).__name__} could not be exported: it has {what} '{name}' for a {family.title}",
            hint="create it without options that add, drop or reshape layers (LayerScale, norms, gates, biases)",
        )
    return family, config


def _refuse_what_tensors_do_not_tell(model: nn.Module, family: ModelFamily, config: Any, kind: Kind) -> None:
    """Raises UsageError where a layer computes something else than the family's from the same tensors."""
    own = _on_meta(family, config)
    for name, module in model.named_modules():
        layer = type(module).__name__
        if _is_silent(module, kind):
            continue
        if not _has_traits(module):
            if next(module.children(), None) is None and not module._parameters:
                raise UsageError(
                    f"'{name}' is a {layer}, which {family.title} does not have there",
                    hint=f"create the network with its usual layers ({kind.activation}, no pooling of tokens)",
                )
            continue
        twin = own.get_submodule(name)
        for trait in TRAITS:
            if name.endswith((".pool_k", ".pool_v")) and trait == "stride":
                continue  # keys and values get the queries' stride
            has, needs = _pair(getattr(module, trait, None)), _pair(getattr(twin, trait, None))
            if has != needs:
                raise UsageError(
                    f"'{name}' is a {layer} of {trait} {has}, {family.title}'s has {needs}",
                    hint="create the network with timm's usual settings for it",
                )


def _is_silent(module: nn.Module, kind: Kind) -> bool:
    layer = type(module).__name__
    if layer.lower() == kind.activation.lower():  # timm has a HardSwish of its own
        return getattr(module, "approximate", "none") == "none"
    return layer in SILENT and next(module.children(), None) is None


def _has_traits(module: nn.Module) -> bool:
    return any(hasattr(module, trait) for trait in ("eps", "kernel_size"))


def _pair(value: Any) -> Any:
    """timm says [3, 3] where PyTorch also takes 3."""
    return (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, (list, tuple)) else value


def _replaced(old: nn.Module, name: str, config: Any, kind: Kind) -> nn.Module:
    """The new attention with the old one's tensors, device, type, mode, and what of it is frozen."""
    numbers = BLOCK.match(name)
    assert numbers is not None
    new = kind.attention_for(config, (int(numbers[1] or 0), int(numbers[2])), old)
    some = next(old.parameters())
    new.to(some.device, some.dtype).train(old.training)
    untouched = new.load_state_dict(old.state_dict(), strict=False)
    assert untouched.missing_keys == ["dconv.weight"] and not untouched.unexpected_keys
    for parameter_name, parameter in old.named_parameters():
        new.get_parameter(parameter_name).requires_grad_(parameter.requires_grad)
    return new


def _facts(model: nn.Module, config: Any) -> dict[str, Any]:
    """What the tensors do not tell, in the words of card.py; the normalisation is what timm's configuration says."""
    usual = getattr(model, "pretrained_cfg", None) or {}
    normalised = all(len(usual.get(key) or ()) == config.channels for key in ("mean", "std"))
    return {
        "image_size": list(config.image_size),
        "aux_threshold": config.aux_threshold,
        "mean": list(usual["mean"]) if normalised else None,
        "std": list(usual["std"]) if normalised else None,
        "crop_fraction": usual.get("crop_pct"),
        "resize_kernel": usual.get("interpolation"),
    }


def _on_meta(family: ModelFamily, config: Any) -> nn.Module:
    with torch.device("meta"):
        return family.build(config)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}


make_callable(__name__, home=__name__)
