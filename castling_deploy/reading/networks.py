"""A network among the tensors of a training module: under a prefix, beside a criterion's or a teacher's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from castling_deploy.errors import CheckpointError
from castling_deploy.models.dialects import in_our_names
from castling_deploy.models.family import attention_of, closest_family, recognised

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Found:
    """A network's tensors under our names, what was taken off or translated, and the names that are not its own."""

    tensors: Tensors
    peeled: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def network_in(tensors: Tensors, softmax: bool, asked: str | None = None) -> Found:
    """The network that all the tensors are, or else the only one that those of one prefix are: the one asked for.

    Of several, those with softmax attention do not count unless `softmax` allows them. Where no prefix makes a
    network, the one that comes closest is taken off, so that what is wrong is said in the family's own names. Raises
    CheckpointError where two networks fit.
    """
    if asked is not None:
        part = _under(asked, tensors)
        if isinstance(part, CheckpointError):
            raise part
        return part
    whole = _under("", tensors)
    if isinstance(whole, Found) and recognised(whole.tensors):
        return whole
    parts = {prefix: part for prefix in _prefixes(tensors) if isinstance(part := _under(prefix, tensors), Found)}
    networks = _outermost({prefix: part for prefix, part in parts.items() if recognised(part.tensors)})
    allowed = {prefix: part for prefix, part in networks.items() if softmax or attention_of(part.tensors) == "castling"}
    fitting = allowed or networks
    if len(fitting) > 1:
        raise CheckpointError(
            f"the checkpoint holds {len(fitting)} networks, under {' and '.join(map(repr, fitting))}",
            hint=f"name the one to export: --weights {next(iter(fitting)).rstrip('.')}",
        )
    if fitting:
        return next(iter(fitting.values()))
    if isinstance(whole, CheckpointError):
        raise whole
    return max((whole, *parts.values()), key=_closeness)


def _under(prefix: str, tensors: Tensors) -> Found | CheckpointError:
    """The tensors whose names begin with the prefix, without it and under our names; or why they are no network's,
    which need not matter: the names may be a teacher's."""
    own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    left_out = tuple(name for name in tensors if not name.startswith(prefix))
    try:
        ours, translated = in_our_names(own)
    except CheckpointError as error:
        return error
    if not prefix:
        return Found(ours, translated)
    others = f", without {len(left_out)} other tensors ({', '.join(left_out[:3])}{', ...' if left_out[3:] else ''})"
    return Found(ours, (f"prefix '{prefix}'{others if left_out else ''}", *translated), left_out)


def _prefixes(tensors: Tensors) -> list[str]:
    """Every beginning of a name that ends with a dot, in the order in which they come."""
    found: dict[str, None] = {}
    for name in tensors:
        parts = name.split(".")
        found |= dict.fromkeys(".".join(parts[:end]) + "." for end in range(1, len(parts)))
    return list(found)


def _outermost(parts: Mapping[str, Found]) -> dict[str, Found]:
    """Without the networks inside another: a detector's backbone is a classifier's too."""
    return {
        prefix: part
        for prefix, part in parts.items()
        if not any(prefix != outer and prefix.startswith(outer) for outer in parts)
    }


def _closeness(part: Found) -> float:
    closest = closest_family(part.tensors)
    return 0.0 if closest is None else closest.share
