"""Which ways of naming and laying out a network's tensors are known, and in which order they are translated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from castling_deploy.models.foreign_names import (
    QUERY,
    TRANSFORMERS_DEIT,
    Tensors,
    facebook_levit,
    facebook_mvit,
    is_pointwise,
    reads_class_token_alone,
    refuse_shared_queries,
    renamed,
    stacked,
    transformers_levit,
    with_empty_distillation_head,
    without_unit_axes,
)
from castling_deploy.models.fused_levit import is_fused, with_neutral_norms
from castling_deploy.models.paddle_names import paddle_picodet


@dataclass(frozen=True)
class Dialect:
    """One way of naming: `spoken` says whether tensors have such names, `ours` translates all of them."""

    title: str
    spoken: Callable[[Tensors], bool]
    ours: Callable[[Tensors], Tensors]


def in_our_names(tensors: Tensors) -> tuple[Tensors, tuple[str, ...]]:
    """The tensors under our names, and what was translated (nothing where the names are ours already).

    Raises CheckpointError where the names tell that the network computes something else, or where two names would
    become one.
    """
    refuse_shared_queries(tensors)
    applied = []
    for dialect in DIALECTS:
        if dialect.spoken(tensors):
            tensors = dialect.ours(tensors)
            applied.append(dialect.title)
    return tensors, tuple(applied)


# In this order: what one leaves, the next may translate.
DIALECTS = (
    Dialect("its only head doubled, beside one of zeros", reads_class_token_alone, with_empty_distillation_head),
    Dialect(
        "names of transformers DeiT",
        lambda tensors: "deit.embeddings.cls_token" in tensors,
        lambda tensors: renamed(tensors, TRANSFORMERS_DEIT),
    ),
    Dialect(
        "names of transformers ViT",
        lambda tensors: "vit.embeddings.cls_token" in tensors,
        lambda tensors: renamed(tensors, TRANSFORMERS_DEIT),
    ),
    Dialect(
        "names of transformers LeViT",
        lambda tensors: "levit.patch_embeddings.embedding_layer_1.convolution.weight" in tensors,
        lambda tensors: facebook_levit(transformers_levit(tensors)),
    ),
    Dialect("BatchNorms, folded already, as ones that do nothing", is_fused, with_neutral_norms),
    Dialect("names of facebook LeViT", lambda tensors: "patch_embed.0.c.weight" in tensors, facebook_levit),
    Dialect("names of facebook MViT", lambda tensors: "blocks.0.attn.pool_q.weight" in tensors, facebook_mvit),
    Dialect(
        "1x1 convolutions of LeViT as matrices",
        lambda tensors: any(is_pointwise(name, value) for name, value in tensors.items()),
        without_unit_axes,
    ),
    Dialect("q, k and v stacked into qkv", lambda tensors: any(map(QUERY.match, tensors)), stacked),
    Dialect("names of Paddle's PicoDet", lambda tensors: "backbone._conv1._conv.weight" in tensors, paddle_picodet),
)
