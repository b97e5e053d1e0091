"""Other people's names for the same tensors, mapped to ours (timm's). No value changes (but where a single head is two
of ours), shapes lose axes of size 1.

The tables were read off facebookresearch/deit, LeViT (levit.py, levit_c.py) and mvit, huggingface/transformers
(modeling_deit.py, modeling_vit.py, modeling_levit.py of 4.x and 5.x) and timm (levit.py, mvitv2.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch

from castling_deploy.errors import CheckpointError

Tensors = Mapping[str, torch.Tensor]


def refuse_shared_queries(tensors: Tensors) -> None:
    """ShiftAddViT (GATECH-EIC/ShiftAddViT pvt_v2.py) has one binarised projection for queries and keys."""
    shared = next((name for name in tensors if "to_qk" in name.split(".")), None)
    if shared is not None:
        raise CheckpointError(
            f"tensor '{shared}' belongs to ShiftAdd attention, whose queries are its keys, binarised: "
            "that is no linear-angular attention",
            hint="export it with ShiftAddViT's own code; castling needs separate q, k and v",
        )


def renamed(tensors: Tensors, new_name: Callable[[str], str]) -> Tensors:
    """The tensors under new names. Raises CheckpointError where two would become one."""
    found: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        new = new_name(name)
        if new in found:
            raise CheckpointError(
                f"the checkpoint holds '{new}' twice, once as '{name}'", hint="save one network's state_dict() alone"
            )
        found[new] = value
    return found


def substituted(rules: Mapping[str, str]) -> Callable[[str], str]:
    """A function that applies the first pattern which matches the beginning of a name."""
    compiled = [(re.compile(pattern), new) for pattern, new in rules.items()]

    def new_name(name: str) -> str:
        for pattern, new in compiled:
            if pattern.match(name):
                return pattern.sub(new, name, count=1)
        return name

    return new_name


LAYER = r"(?:deit|vit)\.(?:encoder\.layer|layers)\.(\d+)\."
# transformers' DeiT, and its ViT, as which the plain DeiT is published. Names of 4.x (on disk) and 5.x (in memory).
TRANSFORMERS_DEIT = substituted(
    {
        r"(?:deit|vit)\.embeddings\.cls_token$": "cls_token",
        r"(?:deit|vit)\.embeddings\.distillation_token$": "dist_token",
        r"(?:deit|vit)\.embeddings\.position_embeddings$": "pos_embed",
        r"(?:deit|vit)\.embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
        rf"{LAYER}layernorm_before\.": r"blocks.\1.norm1.",
        rf"{LAYER}layernorm_after\.": r"blocks.\1.norm2.",
        rf"{LAYER}attention\.(?:output\.dense|o_proj)\.": r"blocks.\1.attn.proj.",
        rf"{LAYER}attention\.(?:attention\.)?([qkv])(?:uery|ey|alue|_proj)\.": r"blocks.\1.attn.\2.",
        rf"{LAYER}attention\.(?:attention\.)?": r"blocks.\1.attn.",
        rf"{LAYER}(?:intermediate\.dense|mlp\.fc1)\.": r"blocks.\1.mlp.fc1.",
        rf"{LAYER}(?:output\.dense|mlp\.fc2)\.": r"blocks.\1.mlp.fc2.",
        r"(?:deit|vit)\.layernorm\.": "norm.",
        r"(?:cls_)?classifier\.": "head.",
        r"distillation_classifier\.": "head_dist.",
    }
)


def reads_class_token_alone(tensors: Tensors) -> bool:
    """Whether it is transformers' DeiTForImageClassification, which has a distillation token and no head for it."""
    return {"deit.embeddings.distillation_token", "classifier.weight"} <= tensors.keys()


def with_empty_distillation_head(tensors: Tensors) -> Tensors:
    """DeiT's logits are the mean of two heads': to the bit, those of one head alone are its double's and of nothing."""
    head = {name: value for name, value in tensors.items() if name.startswith("classifier.")}
    found = {name: value for name, value in tensors.items() if name not in head}
    for name, value in head.items():
        found |= {f"cls_{name}": 2 * value, f"distillation_{name}": torch.zeros_like(value)}
    return found


TRANSFORMERS_LEVIT = substituted(
    {
        **{
            rf"levit\.patch_embeddings\.embedding_layer_{number}\.{part}\.": f"patch_embed.{2 * number - 2}.{ours}."
            for number in range(1, 5)
            for part, ours in (("convolution", "c"), ("batch_norm", "bn"))
        },
        r"classifier_distill\.batch_norm\.": "head_dist.bn.",
        r"classifier_distill\.linear\.": "head_dist.l.",
        r"classifier\.batch_norm\.": "head.bn.",
        r"classifier\.linear\.": "head.l.",
    }
)


def transformers_levit(tensors: Tensors) -> Tensors:
    """transformers' LeViT in facebook's names: layers are numbered per stage there, and through all stages here.

    A residual layer holds its content as `module`, which is no wrapper's, but may have been taken for one.
    """
    layer = re.compile(r"levit\.encoder\.stages\.(\d+)\.layers\.(\d+)\.(?:module\.)?")
    places = {name: (int(found[1]), int(found[2])) for name in tensors if (found := layer.match(name))}
    numbers = {place: number for number, place in enumerate(sorted(set(places.values())))}
    downsampling = {place for name, place in places.items() if ".keys_values." in name}
    inside = substituted(
        {
            r"queries_keys_values\.": "qkv.",
            r"projection\.": "proj.1.",
            r"keys_values\.": "kv.",
            r"queries\.": "q.1.",
            r"linear_up\.": "0.",
            r"linear_down\.": "2.",
        }
    )

    def new_name(name: str) -> str:
        if name not in places:
            return TRANSFORMERS_LEVIT(name)
        residual = "" if places[name] in downsampling else "m."
        name = f"blocks.{numbers[places[name]]}.{residual}{inside(layer.sub('', name))}"
        return name.replace(".batch_norm.", ".bn.").replace(".linear.", ".c.")

    return renamed(tensors, new_name)


def facebook_levit(tensors: Tensors) -> Tensors:
    """facebookresearch/LeViT: all residual layers are one list, (attention, Mlp) * depth, then downsampling and its
    Mlp, and so on."""
    parts = {
        "attention": {r"m\.qkv\.": "attn.qkv.", r"m\.proj\.1\.": "attn.proj.ln.", r"m\.": "attn."},
        "down": {r"kv\.": "kv.", r"q\.1\.": "q.ln.", r"proj\.1\.": "proj.ln."},
        "mlp": {r"m\.0\.": "mlp.ln1.", r"m\.2\.": "mlp.ln2."},
    }
    numbers = sorted({int(name.split(".")[1]) for name in tensors if re.match(r"blocks\.\d+\.", name)})
    places: dict[int, tuple[str, Callable[[str], str]]] = {}  # number -> where it is in our names, names inside it
    stage, block, where = 0, -1, ""
    for number in numbers:
        if any(name.startswith(f"blocks.{number}.kv.") for name in tensors):
            stage, block, kind = stage + 1, -1, "down"
            where = f"stages.{stage}.downsample."
            places[number] = f"{where}attn_downsample.", substituted(parts[kind])
            continue
        kind = "attention" if any(name.startswith(f"blocks.{number}.m.qkv.") for name in tensors) else "mlp"
        if kind == "attention":
            block += 1
            where = f"stages.{stage}.blocks.{block}."
        places[number] = where, substituted(parts[kind])

    def new_name(name: str) -> str:
        if found := re.match(r"blocks\.(\d+)\.", name):
            where, inside = places[int(found[1])]
            name = where + inside(name[found.end() :])
        name = re.sub(r"^patch_embed\.([0246])\.", lambda found: f"stem.conv{int(found[1]) // 2 + 1}.", name)
        return re.sub(r"\.(?:c|l)\.(?=\w+$)", ".linear.", name)

    return renamed(tensors, new_name)


def without_unit_axes(tensors: Tensors) -> Tensors:
    """LeViT with 1x1 convolutions (levit_c.py, timm's levit_conv_*) holds its matrices as (C_out, C_in, 1, 1)."""
    return {name: value.flatten(1) if is_pointwise(name, value) else value for name, value in tensors.items()}


def is_pointwise(name: str, value: torch.Tensor) -> bool:
    """Whether it is the matrix of a residual layer as a 1x1 convolution."""
    return name.startswith("stages.") and name.endswith(".linear.weight") and value.shape[2:] == (1, 1)


def facebook_mvit(tensors: Tensors) -> Tensors:
    """facebookresearch/mvit: blocks are numbered through all stages; a stage begins where the width grows, which is
    where a block has a projection in its shortcut. Convolutions over a single frame lose the time axis."""
    numbers = sorted({int(name.split(".")[1]) for name in tensors if re.match(r"blocks\.\d+\.", name)})
    stage, first, places = 0, 0, {}
    for number in numbers:
        if f"blocks.{number}.proj.weight" in tensors:
            stage, first = stage + 1, number
        places[number] = f"stages.{stage}.blocks.{number - first}."

    def new_name(name: str) -> str:
        if found := re.match(r"blocks\.(\d+)\.", name):
            name = places[int(found[1])] + re.sub(r"^proj\.", "shortcut_proj_attn.", name[found.end() :])
        return re.sub(r"^head\.projection\.", "head.fc.", name)

    return {
        name: value.squeeze(2) if value.ndim == 5 and value.shape[2] == 1 else value
        for name, value in renamed(tensors, new_name).items()
    }


QUERY = re.compile(r"^(.*\battn\.)(q|to_q|q_proj)\.(weight|bias)$")


def stacked(tensors: Tensors) -> Tensors:
    """Separate projections q, k and v as one, `qkv`, in this order of rows.

    Raises CheckpointError where a query has no key or value, or stands beside a qkv.
    """
    found = dict(tensors)
    for name in tensors:
        if query := QUERY.match(name):
            place, letter, kind = query.groups()
            names = [f"{place}{letter.replace('q', other)}.{kind}" for other in "qkv"]
            missing = [part for part in names if part not in tensors]
            if missing:
                raise CheckpointError(
                    f"the checkpoint has '{name}' but no '{missing[0]}'", hint="castling needs separate q, k and v"
                )
            if f"{place}qkv.{kind}" in tensors:
                raise CheckpointError(
                    f"the checkpoint has both '{name}' and '{place}qkv.{kind}'",
                    hint="save one network's state_dict() alone",
                )
            found[f"{place}qkv.{kind}"] = torch.cat([found.pop(part) for part in names])
    return found
