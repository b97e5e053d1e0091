"""Count the weights and multiply-accumulates of every published network, before and after the cast.

    make models

Writes castling_deploy/bundled/models.json, which `castling models` reads, and docs/models.md.
"""

from __future__ import annotations

import json

import torch
from recipe import ROOT

from castling_deploy import catalogue
from castling_deploy.castle import castle
from castling_deploy.catalogue import Entry
from castling_deploy.models.family import ModelFamily, families
from castling_deploy.plain import plain
from castling_deploy.work import work_of


def counted(family: ModelFamily, name: str) -> Entry:
    """One variant at its published size, without weights: on the meta device."""
    config = family.variants[name]
    shape = (1, config.channels, *config.image_size)
    with torch.device("meta"):
        network = family.build(config).eval()
        trained = work_of(network, shape)
        castled = work_of(castle(network), shape) if config.attention == "castling" else trained
    return Entry(
        name=name,
        family=family.name,
        task=family.task,
        baseline=family.baseline,
        attention=config.attention,
        image_size=config.image_size,
        classes=config.classes,
        trained=trained,
        castled=castled,
        reference=family.reference,
    )


def main() -> None:
    entries = []
    for family in families():
        for name in family.variants:
            entries.append(counted(family, name))
            print(" ".join(catalogue.cells(entries[-1])), flush=True)
    catalogue.FILE.write_text(json.dumps(plain(entries), indent=1) + "\n", encoding="utf-8")
    (ROOT / "docs" / "models.md").write_text(catalogue.page(tuple(entries)), encoding="utf-8")


if __name__ == "__main__":
    main()
