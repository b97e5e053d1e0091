"""Castling backbones under a detector's and a segmenter's head: names, sizes read off tensors, folds, resizing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from networks import DENSE, conditioned, dense

from castling_deploy.castle import castle, measure_cast
from castling_deploy.errors import CheckpointError, ShapeError
from castling_deploy.fold import fold
from castling_deploy.models.dense import DenseConfig, DenseFamily
from castling_deploy.models.family import FAMILIES, adapted, family_named, family_of

FAMILIES_OF_MAPS = [name for name in FAMILIES if "detector" in name or "segmenter" in name]


def test_the_small_networks_cover_every_family() -> None:
    assert {family for family, _ in DENSE.values()} == {*FAMILIES_OF_MAPS, "picodet"}


@pytest.mark.parametrize("name", FAMILIES_OF_MAPS)
def test_published_configurations_are_read_off_their_tensors(name: str) -> None:
    family = family_named(name)
    assert isinstance(family, DenseFamily)
    first = next(iter(family.variants))
    baseline = first.removeprefix("castling-")
    for variant in (first, baseline):
        config = family.variants[variant]
        with torch.device("meta"):
            tensors = family.build(config).state_dict()
        assert family_of(tensors, softmax=True).name == name
        assert family.config_of(tensors, None, config.aux_threshold) == config
    with pytest.raises(CheckpointError, match="softmax network") as caught:
        family_of(tensors)
    assert baseline in str(caught.value.hint)


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("seed", range(2))
@torch.no_grad()
def test_cast_and_fold_are_exact_in_float64(name: str, seed: int) -> None:
    network = dense(name, seed).double()
    x = torch.randn(2, 3, *DENSE[name][1].image_size, dtype=torch.float64)
    layers = measure_cast(network, x)
    assert bool(layers) == ("picodet" not in name)
    cast = castle(network)
    for folded, expected in zip(_tuple(fold(cast)(x)), _tuple(cast(x)), strict=True):
        assert (folded - expected).abs().max() <= 1e-11 * expected.abs().max()


@pytest.mark.parametrize("name", DENSE)
@torch.no_grad()
def test_outputs_have_the_promised_shapes(name: str) -> None:
    family, config = family_named(DENSE[name][0]), DENSE[name][1]
    outputs = _tuple(dense(name)(torch.randn(2, 3, *config.image_size)))
    assert [tuple(x.shape[1:]) for x in outputs] == [output.shape for output in family.outputs(config)]


@pytest.mark.parametrize("name", DENSE)
@torch.no_grad()
def test_another_size_is_the_same_network_with_resized_tables(name: str) -> None:
    family, config = family_named(DENSE[name][0]), DENSE[name][1]
    size = (96, 128)
    tensors, resized = family.resized(dense(name).state_dict(), config, size)
    assert resized.image_size == size
    other = family.build(resized).eval()
    other.load_state_dict(dict(tensors))
    outputs = _tuple(other(torch.randn(1, 3, *size)))
    assert [tuple(x.shape[1:]) for x in outputs] == [output.shape for output in family.outputs(resized)]
    assert family.config_of(tensors, size, config.aux_threshold) == resized


@torch.no_grad()
def test_a_backbone_sees_what_its_classifier_sees() -> None:
    """The last map of a backbone is what the classifier's head is given, weights being equal."""
    for name, config, norm in (
        ("castling-levit", DENSE["levit-segmenter"][1].backbone, False),
        ("castling-mvitv2", DENSE["mvitv2-segmenter"][1].backbone, True),
    ):
        family = family_named(name)
        classifier = conditioned(family.build(replace(config, classes=7)))
        backbone = family.backbone(config).eval()  # type: ignore[attr-defined]
        backbone.load_state_dict(
            {key: value for key, value in classifier.state_dict().items() if not key.startswith(("head", "norm."))}
        )
        image = torch.randn(2, 3, *config.image_size)
        x = backbone(image)[-1].flatten(2).transpose(1, 2)
        x = classifier.norm(x).mean(1) if norm else x.mean(1)
        head = classifier.head["fc"] if norm else classifier.head
        torch.testing.assert_close(head(x), classifier(image))


def test_sizes_that_do_not_fit_the_maps_are_refused() -> None:
    detector = DENSE["levit-detector"][1]
    with pytest.raises(ShapeError, match="80 x 64"):
        replace(detector, backbone=replace(detector.backbone, image_size=(80, 64)))


def test_what_a_network_chooses_for_itself_does_not_change_its_published_name() -> None:
    family = family_named("castling-levit-detector")
    published = family.variants["castling-levit-128s-detector"]
    own: DenseConfig = replace(
        published, classes=3, backbone=replace(published.backbone, image_size=(320, 320), aux_threshold=0.1)
    )
    assert adapted(published, own) == own
    assert adapted(family.variants["castling-levit-192-detector"], own) != own


def _tuple(outputs: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
