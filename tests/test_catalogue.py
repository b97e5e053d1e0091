"""`castling models`: what the file says is what the networks are."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from deployments import castling

from castling_deploy.catalogue import catalogue, page
from castling_deploy.errors import UsageError
from castling_deploy.models.family import families

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))
from count_models import counted  # noqa: E402

SMALLEST = {family.name: next(iter(family.variants)) for family in families()}


def test_every_variant_of_every_family_is_in_the_file() -> None:
    assert [entry.name for entry in catalogue()] == [name for family in families() for name in family.variants]


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_the_file_holds_what_is_counted(family) -> None:  # type: ignore[no-untyped-def]
    name = SMALLEST[family.name]
    assert catalogue((name,)) == (counted(family, name),)


def test_the_page_is_the_file() -> None:
    assert (ROOT / "docs" / "models.md").read_text() == page(catalogue())


def test_families_baselines_and_tasks_can_be_named() -> None:
    assert {entry.family for entry in catalogue(("segmentation",))} == {
        f"castling-{name}-segmenter" for name in ("deit", "levit", "mvitv2")
    }
    assert catalogue(("levit",)) == catalogue(("castling-levit",))
    with pytest.raises(UsageError) as caught:
        catalogue(("picodet-x",))
    assert "picodet-" in str(caught.value.hint)


def test_the_command_prints_tables_for_people_and_one_document_for_machines() -> None:
    people = castling("models", "picodet")
    assert people.code == 0 and not people.out and "992,715" in people.err
    machines = castling("models", "picodet", "--json").document
    assert machines["schema"] == 1
    assert [model["trained"]["parameters"] for model in machines["models"]] == [992_715, 2_152_554, 3_305_009]
    assert castling("models", "nothing").code == 2
