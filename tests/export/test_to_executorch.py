"""The ExecuTorch target: one file that XNNPACK runs as PyTorch does, on photographs as on noise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import torch
from deployments import castling
from folded_networks import folded_network, images_for, logits_of, network_of
from networks import SMALL_DEIT, conditioned
from torch import nn

from castling_deploy.castle import castle
from castling_deploy.errors import ExportError, ShapeError, UsageError
from castling_deploy.export import to_executorch
from castling_deploy.export.pte_contents import pte_contents
from castling_deploy.export.to_executorch import CAST, ExecuTorchOptions, ExecuTorchTarget, check, require_delegated
from castling_deploy.fold import fold
from castling_deploy.models.deit import CastlingDeiT
from castling_deploy.probes import probes_for
from castling_deploy.target import Artifact, Network, Precision, Witness, WitnessKind

TESTS = Path(__file__).parents[1]
TARGET = ExecuTorchTarget()


@dataclass(frozen=True)
class Exported:
    network: Network
    precision: Precision
    folder: Path
    artifact: Artifact

    @property
    def path(self) -> Path:
        return self.folder / "model.pte"


BATCH = 2
CASES = [("deit", Precision.FP32), ("deit", Precision.FP16), ("levit", Precision.FP32)]
Export = Callable[[str, Precision], Exported]


def network_named(name: str) -> Network:
    """One block is enough: the time of an export goes with the number of operations."""
    if name == "levit":
        return folded_network(name, BATCH)
    deit = conditioned(CastlingDeiT(replace(SMALL_DEIT, depth=1)))
    return network_of(fold(castle(deit)), SMALL_DEIT.image_size, BATCH, name)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    @cache
    def once(name: str, precision: Precision) -> Exported:
        network, folder = network_named(name), tmp_path_factory.mktemp("executorch")
        return Exported(network, precision, folder, TARGET.export(network, precision, ExecuTorchOptions(), folder))

    return once


@pytest.fixture(params=CASES, ids="-".join)
def exported(request: pytest.FixtureRequest, export: Export) -> Exported:
    return export(*request.param)


@pytest.fixture
def deit(export: Export) -> Exported:
    return export("deit", Precision.FP32)


@pytest.fixture
def half(export: Export) -> Exported:
    return export("deit", Precision.FP16)


def test_xnnpack_computes_what_pytorch_computes(exported: Exported) -> None:
    """On photographs, flat images, ramps, a checkerboard, noise, and photographs of four times the contrast."""
    probes = probes_for(exported.network.preprocessing, None)
    tensors = probes.tensors[: len(probes.tensors) // BATCH * BATCH]
    pairs = tensors.reshape(-1, BATCH, *tensors.shape[1:])
    with TARGET.load(exported.folder) as session:
        actual = np.concatenate([session({"image": pair})["logits"] for pair in pairs])
    expected = logits_of(exported.network, tensors)
    photographs = expected[: probes.real]
    distances = np.abs(photographs[:, None] - photographs).max(-1)
    limit = 5e-4 if exported.precision is Precision.FP32 else 2e-2  # one extreme input of the random LeViT is chaotic
    assert actual.dtype == np.float32
    assert np.abs(actual - expected).max() < limit * np.median(distances[distances > 0])


class MeanOfMap(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3), keepdim=True).flatten(1)


def test_the_mean_of_a_flat_map_is_the_value_that_it_is_full_of(tmp_path: Path) -> None:
    """XNNPACK's own mean is off by 1.6e-4: a PicoDet at 416 pixels was off by 2e-3 of the spread on white images."""
    network = replace(network_of(MeanOfMap(), (104, 104)), part=True)
    artifact = TARGET.export(network, Precision.FP32, ExecuTorchOptions(), tmp_path)
    value = np.float32([0.1, 0.7, 1 / 3]).reshape(1, 3, 1, 1)
    with TARGET.load(tmp_path) as session:
        mean = session({"image": np.broadcast_to(value, (1, 3, 104, 104))})["logits"]
    assert artifact.details["outside"] == {}
    assert np.abs(mean / value.reshape(1, 3) - 1).max() < 2e-6


@pytest.mark.parametrize("name", ["deit", "levit"])
def test_float32_network_is_one_delegate_with_nothing_outside(export: Export, name: str) -> None:
    details = export(name, Precision.FP32).artifact.details
    assert (details["delegates"], details["outside"], details["delegated"]) == (1, {}, 1.0)
    assert details["delegated_ops"] > 50 and details["notes"] == []


def test_float16_network_names_what_runs_outside(half: Exported) -> None:
    details = half.artifact.details
    assert (details["delegates"], details["outside"]) == (2, {"aten::gelu": 1, CAST: 2})
    assert details["delegated"] == details["delegated_ops"] / (details["delegated_ops"] + 3)
    assert "1 gelu" in details["notes"][0] and "Armv8.2-A" in details["notes"][1]


def test_a_floor_of_what_xnnpack_takes_fails_the_export_that_is_below(half: Exported) -> None:
    details = half.artifact.details
    require_delegated(details, 100 * details["delegated"])
    with pytest.raises(ExportError, match=r"100 % were asked for; outside are .*1 gelu"):
        require_delegated(details, 100.0)
    with pytest.raises(UsageError, match="101 %"):
        ExecuTorchOptions(101.0)
    run = castling("export", "--target", "onnx", "--min-delegated", "90")
    assert run.code == 2 and "has no option --min-delegated" in run.err


def test_weights_are_stored_in_the_precision_that_was_asked_for(exported: Exported) -> None:
    contents = pte_contents(exported.path.read_bytes())
    other = Precision.FP16 if exported.precision is Precision.FP32 else Precision.FP32
    check(contents, exported.network, exported.precision)
    with pytest.raises(ExportError, match=f"{other} was asked for, and the file does not hold"):
        check(contents, exported.network, other)


def test_file_that_xnnpack_runs_nothing_of_is_refused(deit: Exported) -> None:
    contents = pte_contents(deit.path.read_bytes())
    with pytest.raises(ExportError, match="XNNPACK takes no operation"):
        check(replace(contents, delegates=0), deit.network, deit.precision)


def test_facts_travel_inside_and_nothing_of_this_machine_does(exported: Exported) -> None:
    from executorch.runtime import Runtime

    (text,) = Runtime.get().load_program(exported.path).load_method("metadata").execute([])
    wanted = {**exported.network.metadata, "inputs": ["image"], "outputs": ["logits"]}
    assert wanted == {name: json.loads(text)[name] for name in wanted}
    data = exported.path.read_bytes()
    for trace in (".py", "site-packages", str(Path.home()), str(Path.cwd())):
        assert trace.encode() not in data


@pytest.mark.slow
def test_same_network_gives_the_same_bytes_in_another_process(half: Exported, tmp_path: Path) -> None:
    code = f"""
import sys; from pathlib import Path; sys.path[:0] = {[str(TESTS), str(TESTS / "export")]!r}
from test_to_executorch import TARGET, ExecuTorchOptions, Precision, network_named
TARGET.export(network_named("deit"), Precision.FP16, ExecuTorchOptions(), Path({str(tmp_path)!r}))
"""
    subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": "7"}
    )
    assert (tmp_path / "model.pte").read_bytes() == half.path.read_bytes()


def test_usage_holds_the_shape(exported: Exported) -> None:
    height, width = exported.network.preprocessing.size
    assert f"longArrayOf(2, 3, {height}, {width})" in exported.artifact.usage
    assert f"shape: [2, 3, {height}, {width}]" in exported.artifact.usage


def test_strides_of_the_input_do_not_matter(deit: Exported) -> None:
    images = images_for(deit.network, BATCH)
    with TARGET.load(deit.folder) as session:
        transposed = np.ascontiguousarray(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
        assert not transposed.flags.c_contiguous
        np.testing.assert_array_equal(session({"image": transposed})["logits"], session({"image": images})["logits"])


def test_output_survives_the_next_call(deit: Exported) -> None:
    first, second = np.split(images_for(deit.network, 2 * BATCH), 2)
    with TARGET.load(deit.folder) as session:
        logits = session({"image": first})["logits"]
        kept = logits.copy()
        assert np.abs(session({"image": second})["logits"] - kept).max() > 0.1
    np.testing.assert_array_equal(logits, kept)


def test_closed_session_lets_go_of_the_file(deit: Exported) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("mapped files can be listed on Linux only")
    with TARGET.load(deit.folder) as session:
        assert str(deit.path) in maps.read_text()
    assert str(deit.path) not in maps.read_text()
    with pytest.raises(ExportError, match="closed"):
        session({"image": images_for(deit.network, BATCH)})


def test_threads_are_honoured_or_refused(deit: Exported) -> None:
    from executorch.extension.pybindings.portable_lib import _threadpool_get_thread_count

    images, folder = images_for(deit.network, BATCH), deit.folder
    with TARGET.load(folder, threads=2) as session:
        assert _threadpool_get_thread_count() == 2
        expected = session({"image": images})["logits"]
        with pytest.raises(ExportError, match="runs on 2 threads"), TARGET.load(folder, threads=1):
            pass
        with TARGET.load(folder, threads=2) as other:
            np.testing.assert_array_equal(other({"image": images})["logits"], expected)
    with TARGET.load(folder, threads=1):
        assert _threadpool_get_thread_count() == 1


def test_wrong_input_is_an_error(deit: Exported) -> None:
    with TARGET.load(deit.folder) as session:
        with pytest.raises(RuntimeError):
            session({"image": images_for(deit.network, BATCH + 1)})
        with pytest.raises(RuntimeError):
            session({"image": images_for(deit.network, BATCH).astype(np.float64)})


@pytest.mark.parametrize("damage", ["absent", "cut short", "no .pte file"])
def test_file_that_cannot_be_loaded_is_an_export_error(deit: Exported, tmp_path: Path, damage: str) -> None:
    data = deit.path.read_bytes()
    if damage != "absent":
        (tmp_path / "model.pte").write_bytes(data[: len(data) // 2] if damage == "cut short" else bytes(5000))
    with pytest.raises(ExportError, match=r"model\.pte"), TARGET.load(tmp_path):
        pass


def test_open_axis_is_refused() -> None:
    network = network_named("deit")
    (image,) = network.inputs
    with pytest.raises(ShapeError, match="fixed shapes"):
        to_executorch.traced(replace(network, inputs=(replace(image, shape=(-1, 3, 32, 32)),)), Precision.FP32)


def test_witness_is_the_runtime() -> None:
    assert TARGET.missing() is None and TARGET.unfinished() is None
    assert TARGET.witness() == Witness(f"executorch {to_executorch.installed_version()} XNNPACK", WitnessKind.RUNTIME)


def test_other_lines_of_executorch_and_none_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(package: str) -> str:
        raise PackageNotFoundError(package)

    for version, reason in ((lambda package: "1.4.1", "1.4.1 is installed"), (absent, "not installed")):
        monkeypatch.setattr(to_executorch, "version", version)
        missing = TARGET.missing()
        assert missing is not None and reason in missing.reason
        assert missing.fix == "pip install 'castling-deploy[executorch]'"
        assert TARGET.witness().name == f"executorch {'1.4.1' if version is not absent else '1.5.x'} XNNPACK"
