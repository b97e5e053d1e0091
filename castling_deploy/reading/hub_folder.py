"""A folder as model hubs lay it out: a config.json, the weights in one file or in shards with an index, and maybe what
transformers does to images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from castling_deploy.errors import CheckpointError

# In the order in which timm and transformers look.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Folder:
    """The weight files in the order of their names; `weight_map` says which file holds which tensor, where there are
    shards; `card` is what config.json says, and what images need, in the words of card.py."""

    files: tuple[Path, ...]
    weight_map: Mapping[str, str] | None
    card: Mapping[str, Any]

    def merged(self, contents: Sequence[Any]) -> Any:
        """One content from those of `files`. Raises CheckpointError when a shard does not hold what the index says."""
        if self.weight_map is None:
            return contents[0]
        merged: dict[str, Any] = {}
        for file, content in zip(self.files, contents, strict=True):
            promised = {name for name, shard in self.weight_map.items() if shard == file.name}
            held = content.keys() if isinstance(content, Mapping) else set()
            if promised != held:
                names = sorted(promised ^ held)
                raise CheckpointError(
                    f"'{file}' and its index disagree on {len(names)} tensors ({', '.join(map(str, names[:3]))})",
                    hint="the shards are of two downloads, or one is damaged; copy the folder again",
                )
            merged.update(content)
        return merged


def listed(path: Path) -> Folder:
    """What the folder at `path` holds; no tensor is read. Raises CheckpointError."""
    config, images = (
        _json(path / name) if (path / name).exists() else {} for name in ("config.json", "preprocessor_config.json")
    )
    card = card_of(config, images)
    name = next((name for name in WEIGHTS if (path / name).exists()), None)
    if name is None:
        raise CheckpointError(
            f"the folder '{path}' holds no weights: none of {', '.join(WEIGHTS)}",
            hint="name the checkpoint file inside it, or a folder as timm and transformers save it",
        )
    if not name.endswith(".index.json"):
        return Folder((path / name,), None, card)
    weight_map = _json(path / name).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise CheckpointError(f"'{path / name}' has no 'weight_map'", hint="copy the index file again")
    for shard in weight_map.values():
        if not _is_plain_name(shard):
            raise CheckpointError(
                f"'{path / name}' names the shard {str(shard)[:80]!r}, which is no file of this folder",
                hint="a shard lies beside its index; do not use this download",
            )
        if not (path / shard).is_file():
            raise CheckpointError(f"the shard '{path / shard}' is missing", hint="copy all files of the folder")
    shards = tuple(path / shard for shard in sorted(set(weight_map.values())))
    return Folder(shards, weight_map, card)


def card_of(config: Mapping[str, Any], images: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of timm's or transformers' config.json in the words of card.py; None where it is silent.

    `images` is transformers' preprocessor_config.json, of which the normalisation is read. Raises CheckpointError for
    another activation than GELU.
    """
    activation = config.get("hidden_act", "gelu")  # transformers' ViT and DeiT; no tensor tells it
    if activation != "gelu":
        raise CheckpointError(
            f"config.json says the MLPs have '{str(activation)[:40]}' for an activation, and they are read with GELU",
            hint="no such network is known here",
        )
    pretrained = config.get("pretrained_cfg")
    pretrained = pretrained if isinstance(pretrained, Mapping) else {}
    arguments = config.get("model_args")
    arguments = arguments if isinstance(arguments, Mapping) else {}
    input_size = pretrained.get("input_size")  # timm: channels, height, width
    size = arguments.get("img_size") or (input_size[1:] if isinstance(input_size, list) else config.get("image_size"))
    normalised = images if images.get("do_normalize", True) else {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    heads = config.get("num_attention_heads")  # transformers' LeViT: one per stage, as shapes tell too
    return {
        "architecture": config.get("architecture"),
        "classes": config.get("num_classes", pretrained.get("num_classes")),
        "heads": heads if isinstance(heads, int) else None,
        "layer_norm_eps": config.get("layer_norm_eps"),
        "image_size": [size, size] if isinstance(size, int) else size,
        "mean": pretrained.get("mean") or normalised.get("image_mean"),
        "std": pretrained.get("std") or normalised.get("image_std"),
        "crop_fraction": pretrained.get("crop_pct"),
        "resize_kernel": pretrained.get("interpolation"),
        "labels": config.get("label_names") or pretrained.get("label_names") or _labels(config.get("id2label")),
    }


def _labels(id2label: Any) -> list[str] | None:
    """transformers' labels in the order of their numbers; None for the ones that it makes up (LABEL_0, ...)."""
    if not isinstance(id2label, Mapping) or sorted(id2label) != sorted(map(str, range(len(id2label)))):
        return None
    labels = [str(id2label[str(number)]) for number in range(len(id2label))]
    return None if labels == [f"LABEL_{number}" for number in range(len(labels))] else labels


def _is_plain_name(name: Any) -> bool:
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and PurePosixPath(name).name == name == PureWindowsPath(name).name
    )


def _json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"'{path}' is no JSON: {error}", hint="copy the file again") from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"'{path}' holds no object", hint="copy the file again")
    return content
