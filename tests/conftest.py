"""Fixtures that several test files share."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import exported
import numpy as np
import pytest
import torch
from deployments import Run, castling
from every_artefact import EVERYTHING, SLOW, Deployed
from networks import SMALL, small
from no_skips import pytest_addoption as pytest_addoption
from no_skips import pytest_make_collect_report as pytest_make_collect_report
from no_skips import pytest_runtest_makereport as pytest_runtest_makereport
from torch import nn

from castling_deploy import bundled
from castling_deploy.isolation import IN_PROCESS

os.environ[IN_PROCESS] = "1"  # see deployments.ENVIRONMENT; the tests of isolation and of frail witnesses take it away

# The longest first, or a worker ends with one of them alone; the others follow as they are found.
LONGEST = ("test_every_network.py", "test_pipeline.py", "test_cli.py", "test_selftests.py", "test_gate.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(params=SMALL)
def network(request: pytest.FixtureRequest) -> nn.Module:
    """A small network of every family, in training form and eval mode."""
    return small(request.param)


@pytest.fixture(scope="session", autouse=True)
def shared_exports(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tells `exported` a folder that all workers of this test run have in common."""
    base = tmp_path_factory.getbasetemp()
    exported.shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "exported"
    exported.shared.mkdir(exist_ok=True)


@pytest.fixture(scope="session")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    """`castling export --json` of a bundled network in a precision to all targets, or to the slow ones, run once.

    Timed is the default network alone, in fp32.
    """
    runs: dict[tuple[str, str, bool], Run] = {}
    output = tmp_path_factory.mktemp("deployed")

    def run(network: str, precision: str, slow: bool = False) -> Run:
        if (network, precision, slow) not in runs:
            timed = (network, precision) == (bundled.DEFAULT, "fp32")
            targets = [target for name, target, other in EVERYTHING if (name, other) == (network, precision)]
            runs[network, precision, slow] = castling(
                "export",
                "--model",
                network,
                "--target",
                ",".join(target for target in targets if ((network, target, precision) in SLOW) is slow),
                "--precision",
                precision,
                "--output",
                output,
                "--json",
                *([] if timed else ["--no-benchmark"]),
            )
        return runs[network, precision, slow]

    return run


@pytest.fixture(scope="session")
def checkpoint_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A safetensors file of a small network, by name."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("checkpoints")

    def write(name: str) -> Path:
        path = folder / f"{name}.safetensors"
        if not path.exists():
            height, width = SMALL[name][1].image_size
            metadata = {"castling": f'{{"image_size": [{height}, {width}]}}'} if height != width else {}
            save_file({key: value.contiguous() for key, value in small(name).state_dict().items()}, path, metadata)
        return path

    return write


@pytest.fixture
def images() -> Callable[[nn.Module, int], torch.Tensor]:
    """(count, C, H, W) float64 noise at a network's size."""

    def make(network: nn.Module, count: int) -> torch.Tensor:
        height, width = network.config.image_size  # type: ignore[union-attr, misc]
        return torch.from_numpy(np.random.default_rng(0).normal(size=(count, 3, height, width)))

    return make


@pytest.fixture(scope="session")
def timm() -> ModuleType:
    """timm, also where torchvision is a CUDA build beside a CPU build of torch; without timm the test is skipped.

    Such a torchvision (0.28) cannot load its operators and fails on import, unless their schemas are declared.
    """
    if importlib.util.find_spec("timm") is None or importlib.util.find_spec("torchvision") is None:
        pytest.skip("timm and the torchvision it imports are not installed")
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        assert "torchvision::" in str(error)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
    return importlib.import_module("timm")
