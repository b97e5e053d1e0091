"""The audit finds what float16 cannot hold, names it, and every exporter keeps it in float32."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from deployments import castling
from folded_networks import network_of
from onnx.reference import ReferenceEvaluator
from planted import LAYER, exporters_view, planted
from torch import nn

from castling_deploy import bundled
from castling_deploy.artifact import read_folder
from castling_deploy.castle import castle
from castling_deploy.checkpoint import read
from castling_deploy.documents import audit_document
from castling_deploy.errors import ParityError
from castling_deploy.export.binary16 import LARGEST
from castling_deploy.fold import fold
from castling_deploy.half_profile import LARGE, NEAR
from castling_deploy.identify import identify
from castling_deploy.isolation import Limits
from castling_deploy.ladder import Ladder, run
from castling_deploy.localising import fault
from castling_deploy.models.attention import unit
from castling_deploy.parity import TOLERANCES, Reference, Verdict, compare
from castling_deploy.plain import plain
from castling_deploy.preprocessing import Preprocessing
from castling_deploy.probes import Probes, probes_for
from castling_deploy.progress import Silent
from castling_deploy.range_audit import Audit, Island, OpRange, audit, outermost
from castling_deploy.target import Artifact, Precision, target_named
from castling_deploy.verification import verify_artifact

WITH_FP16 = ["onnx", "coreml", "executorch", "coreai"]
SIZE = (16, 16)


def audited(module: nn.Module, probes: Probes | None = None) -> Audit:
    probes = probes or probes_for(Preprocessing(SIZE), None)
    outputs = run(module.eval(), ("logits",), probes.tensors)
    return audit(module, probes, {"logits": Reference(outputs["logits"], probes.real, 0.0)})


class Block(nn.Module):
    """Linear, something in between, Linear, on what every pixel holds: (B, N, 3) -> (B, N, 8)."""

    def __init__(self, between: nn.Module, gain: float = 1.0) -> None:
        super().__init__()
        self.first, self.between, self.last = nn.Linear(3, 8), between, nn.Linear(8, 8)
        with torch.no_grad():
            self.first.weight.mul_(gain)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.between(self.first(x)))


class Small(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.head = block, nn.Linear(8, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(image.flatten(2).transpose(1, 2)).mean(1))


class Lambda(nn.Module):
    def __init__(self, function) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)  # type: ignore[no-any-return]


# -- the planted layer, through real exporters and the gate


def test_the_planted_layer_is_named_with_its_reason() -> None:
    found = planted().range_audit
    assert [island.path for island in found.islands] == [LAYER]
    assert "linear of blocks.0.mlp.fc1 reaches" in found.islands[0].reason
    worst = found.least_headroom[0]
    assert (worst.path, worst.headroom_bits < 0) == (f"{LAYER}.fc1", True)


def test_without_the_plant_there_is_no_island() -> None:
    found = planted(1.0).range_audit
    assert (found.islands, found.reductions) == ((), ())
    assert found.least_headroom[0].headroom_bits > 1


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "executorch" else ()) for name in WITH_FP16]
)
def test_float16_passes_with_the_island_and_fails_without(name: str, tmp_path: Path) -> None:
    ladder, target = planted(), target_named(name)
    if (missing := target.missing()) is not None:
        pytest.skip(missing.reason)
    verdicts = []
    for islands in (ladder.range_audit.module_paths(), ()):
        folder = tmp_path / str(len(islands))
        folder.mkdir()
        network = exporters_view(ladder, islands, ladder.range_audit.reduction_paths())
        artifact = target.export(network, Precision.FP16, target.options(), folder)
        verdicts.append(verdict_on(name, artifact, folder, ladder))
        attested = target.attest(folder, artifact, Precision.FP16)
        assert attested.problems == ()
        assert attested.products["fp16"] > attested.products.get("fp32", 0)
        if islands:
            assert attested.products["fp32"] >= 2  # both Linears of the island
    assert verdicts == [Verdict.PASS, Verdict.FAIL]


def verdict_on(name: str, artifact: Artifact, folder: Path, ladder: Ladder) -> Verdict:
    """The gate's: of the target's witness; for ONNX of numpy, since ONNX Runtime on x86 takes the casts of a float16
    overflow out again and never sees it."""
    if name != "onnx":
        return verify_artifact(target_named(name), artifact, folder, ladder, Precision.FP16).verdict
    evaluator = ReferenceEvaluator(onnx.load(folder / "model.onnx"))
    tensors = ladder.probes.tensors
    with np.errstate(all="ignore"):
        outputs = [evaluator.run(None, {"image": tensors[index : index + 1]})[0] for index in range(len(tensors))]
    reference, tolerance = ladder.references["logits"], TOLERANCES[Precision.FP16]
    return compare("logits", np.concatenate(outputs), reference, tolerance, reference.power(tolerance)).verdict


def test_an_overflow_into_the_residual_stream_leaves_nothing_to_float16() -> None:
    found = audited(Small(nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 8))))
    assert found.module_paths() == ()
    network = Small(nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 8)))
    with torch.no_grad():
        network.block[1].weight.mul_(1e6)  # type: ignore[index, union-attr, operator]
    with pytest.raises(ParityError, match=r"float16 cannot hold this network: linear of block\.1 reaches") as caught:
        audited(network).module_paths()
    assert caught.value.exit_code == 3 and "--precision fp32" in (caught.value.hint or "")


# -- what counts as out of range


def test_the_island_is_the_smallest_module_around_producer_and_readers() -> None:
    block = Block(nn.ReLU(), gain=2.0**20)
    with torch.no_grad():
        block.last.weight.mul_(2.0**-10)
    found = audited(Small(block))
    assert [island.path for island in found.islands] == ["block"]


def test_a_norm_whose_squares_leave_float16_needs_its_reductions_alone() -> None:
    found = audited(Small(Block(Lambda(unit), gain=1e3)))
    assert found.islands == () and [island.path for island in found.reductions] == ["block.between"]
    (norm,) = (op for op in found.ops if op.kind == "linalg_vector_norm")
    assert norm.peak < LARGEST < (norm.accumulated or 0) and norm.length == 8
    assert norm.accumulated == pytest.approx(norm.peak**2, rel=1e-5)


def test_a_layer_norm_is_measured_by_the_squares_inside() -> None:
    network = Small(Block(nn.LayerNorm(8, eps=1e-5), gain=1e3))
    found = audited(network)
    probes = probes_for(Preprocessing(SIZE), None).few(8)
    with torch.no_grad():
        hidden = network.block.first(torch.from_numpy(probes.tensors).flatten(2).transpose(1, 2))  # type: ignore[operator, union-attr]
    squares = (hidden - hidden.mean(-1, keepdim=True)).square().sum(-1).max().item()
    (norm,) = (op for op in found.ops if op.kind == "layer_norm")
    assert norm.accumulated == pytest.approx(squares, rel=1e-4)
    assert [op.kind for op in found.unsafe_eps] == ["layer_norm"]


def test_an_eps_that_guards_nothing_on_these_images_is_harmless_and_one_that_does_is_not() -> None:
    near_zero = Block(nn.LayerNorm(8, eps=1e-6), gain=1e-4)
    with torch.no_grad():
        near_zero.first.bias.mul_(1e-4)
    reasons = {island.path: island.reason for island in audited(Small(near_zero)).reductions}
    assert "zero where it is flushed" in reasons["block.between"]
    assert audited(Small(Block(nn.LayerNorm(8, eps=1e-6)))).reductions == ()


def test_a_sum_that_stops_growing_needs_float32() -> None:
    images = probes_for(Preprocessing((64, 64)), None)  # 4,096 pixels
    (island,) = audited(Small(Block(nn.ReLU())), images).reductions
    assert "sums 4096 terms" in island.reason and island.path == ""
    assert audited(Small(Block(nn.ReLU()))).reductions == ()  # 256


def test_a_weight_that_float16_turns_into_zeros_is_an_island() -> None:
    block = Block(Lambda(lambda x: x * 2.0**20))
    with torch.no_grad():
        block.last.weight.mul_(2.0**-20)
    block.between = nn.Identity()
    reasons = {island.path: island.reason for island in audited(Small(block)).islands}
    assert "block.last.weight has its largest entry at" in reasons["block.last"]


def test_islands_inside_islands_are_left_out() -> None:
    paths = ["a.b", "a", "ab", "c.d", "c.d.e"]
    assert [island.path for island in outermost([Island(path, "") for path in paths])] == ["a", "ab", "c.d"]


def test_headroom_counts_powers_of_two() -> None:
    assert OpRange("n", "", "add", peak=LARGEST / 8).headroom_bits == 3
    assert OpRange("n", "", "norm", peak=1, accumulated=2 * LARGEST).headroom_bits == -1
    assert math.isinf(OpRange("n", "", "zeros", peak=0).headroom_bits)
    assert OpRange("n", "", "sum", peak=1, length=4096).expected_error == 2**-5


# -- where precision is lost


def test_the_module_that_loses_the_precision_is_found_and_no_other() -> None:
    """A difference of two large, nearly equal numbers: what float16 has left of them is far too little."""

    class Cancelling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(3, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.up(x)
            return (y + 200) - 200

    torch.manual_seed(0)
    network = Small(nn.Sequential(nn.Linear(3, 3), Cancelling(), nn.Linear(8, 8)))
    found = audited(network)
    assert found.profile.whole > NEAR
    first = max(found.profile.islands, key=lambda share: share.rel)
    assert first.path == "block.1" and first.rel > 10 * LARGE
    assert "block.1" in found.module_paths() and "block.0" not in found.module_paths()


def test_a_network_that_float16_suits_is_not_searched() -> None:
    found = planted(1.0).range_audit
    assert 1e-4 < found.profile.whole < NEAR and found.profile.shares == ()


# -- the bundled networks


def folded_bundled(name: str) -> tuple[nn.Module, Probes, dict[str, Reference]]:
    network, card = identify(read(bundled.checkpoint_path(name)))
    module = fold(castle(network))
    probes = probes_for(card.preprocessing, card.samples).few(64)
    outputs = run(module, card.outputs, probes.tensors)
    return module, probes, {key: Reference(values, probes.real, 0.0) for key, values in outputs.items()}


def test_nothing_of_the_bundled_network_leaves_float16_and_every_image_was_looked_at() -> None:
    module, probes, references = folded_bundled(bundled.DEFAULT)
    found = audit(module, probes, references)
    assert (found.islands, found.reductions) == ((), ())
    assert len(found.ops) > 200 and found.images == 8 + 11 + 2


def test_scaled_values_are_used_everywhere_and_needed_where_there_are_many_tokens() -> None:
    found = audit(*folded_bundled(bundled.DEFAULT))
    assert [scaling.needed for scaling in found.scalings] == [True, True, False, False, False, False]
    assert all(scaling.square_sum < LARGEST / 16 for scaling in found.scalings)


def test_the_detectors_stem_is_what_float16_takes_most_from() -> None:
    found = audit(*folded_bundled("castling-levit-digits-detector"))
    assert found.module_paths() and all(path.startswith("backbone.stem.") for path in found.module_paths())
    assert all(".attn" in path for path in found.reduction_paths()) and found.reduction_paths()


def test_the_summary_is_json_with_the_ten_operations_nearest_to_the_edge() -> None:
    document = plain(audit_document(planted().range_audit))
    assert [island["path"] for island in document["islands"]] == [LAYER]
    bits = [op["headroom_bits"] for op in document["least_headroom"]]
    assert len(bits) == 10 and bits == sorted(bits) and bits[0] < 0
    assert document["eps"]["safe_from"] == 2**-14 and document["value_scaling"]["used"] == 2
    assert document["rel_rounded"] < NEAR
    assert replace(planted().range_audit, islands=()).module_paths() == ()
    assert network_of(planted().folded, SIZE).islands == ()


def test_an_export_keeps_the_islands_says_why_and_is_searched_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = ["export", "--model", "castling-levit-digits-detector", "--target", "onnx"]
    assert castling(*export, "--precision", "fp16", "--output", tmp_path).code == 0
    folder = read_folder(tmp_path / "castling-levit-digits-detector-onnx-fp16")
    found = json.loads((folder.path / "parity.json").read_text())["range_audit"]
    paths = [island["path"] for island in found["islands"]]
    assert "backbone.stem.conv2" in paths and "of the 0.02 that the gate allows" in found["islands"][0]["reason"]
    assert f"- in float32: {', '.join(paths)} " in (folder.path / "README.md").read_text()
    attested = target_named("onnx").attest(folder.path, folder.artifact, Precision.FP16)
    assert attested.problems == () and attested.products["fp32"] == sum(".conv" in path for path in paths)
    searched: list[fault.Suspect] = []
    monkeypatch.setattr(fault, "isolated_fault", lambda suspect, *_: searched.append(suspect))
    fault.find_fault(folder.path, None, Silent(), Limits())
    (suspect,) = searched
    assert suspect.network.islands == tuple(paths) and not suspect.fresh
    assert suspect.network.reductions == tuple(island["path"] for island in found["wide_reductions"])
