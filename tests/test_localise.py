"""Planted faults are found where they were planted, and the folder that shows them does so by itself."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deployments import ENVIRONMENT
from detectors import detector_network
from folded_networks import folded_network, network_of
from rich.console import Console
from torch import fx, nn

from castling_deploy.errors import ExportError, UsageError
from castling_deploy.export.half_network import in_half
from castling_deploy.export.onnx_options import OnnxOptions
from castling_deploy.export.to_onnx import FILE, OnnxTarget
from castling_deploy.localising import trials
from castling_deploy.localising.diagnosis import Cause, Statistics, absent
from castling_deploy.localising.localisation import Finding, Localisation
from castling_deploy.localising.localise import localise
from castling_deploy.localising.localised_text import print_localised
from castling_deploy.localising.prefix import Traced
from castling_deploy.localising.search import Search
from castling_deploy.localising.trials import Trials, plain_options
from castling_deploy.plain import plain
from castling_deploy.probes import Probes, probes_for
from castling_deploy.runner import exacting
from castling_deploy.target import Artifact, Network, Precision, Session, Target, target_named


def probes_of(network: Network) -> Probes:
    return probes_for(network.preprocessing, None)


def found(target: Target, network: Network, precision: Precision, folder: Path, **keywords: Any) -> Localisation:
    return localise(target, network, precision, target.options(), probes_of(network), folder=folder, **keywords)


@torch.no_grad()
def scaled_between(network: Network, first: str, second: str, factor: float) -> Network:
    """`network`, changed in place: what `first` returns is `factor` times as large, what `second` does is as before."""
    modules = dict(network.module.named_modules())
    modules[first].weight.mul_(factor)  # type: ignore[operator, union-attr]
    if modules[first].bias is not None:
        modules[first].bias.mul_(factor)  # type: ignore[operator, union-attr]
    modules[second].weight.div_(factor)  # type: ignore[operator, union-attr]
    return network


def printed(localisation: Localisation) -> str:
    out = io.StringIO()
    print_localised(localisation, Console(file=out, width=200, markup=False))
    return out.getvalue()


def repeated(localisation: Localisation) -> str:
    """What the folder's own script prints, in a process of its own and from elsewhere."""
    assert localisation.folder is not None
    script = localisation.folder / "repro.py"
    run = subprocess.run([sys.executable, "-P", script], capture_output=True, text=True, env=ENVIRONMENT)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("name", ["onnx", "tensorrt", "coreml", "executorch", "coreai"])
def test_an_overflow_in_an_attention_projection_is_found_in_every_format(name: str, tmp_path: Path) -> None:
    target = target_named(name)
    if missing := target.missing():
        pytest.skip(missing.reason)
    network = folded_network("deit")
    scaled_between(network, "blocks.1.attn.value", "blocks.1.attn.dconv", 3e5)
    localisation = found(target, network, Precision.FP16, tmp_path)
    assert localisation.finding is Finding.MODULE and localisation.place is not None
    assert localisation.place.module == "blocks.1.attn.value" and localisation.place.operator == "linear"
    assert localisation.place.source.startswith("castling_deploy/models/attention.py:")
    assert localisation.cause is Cause.OVERFLOW
    assert localisation.wrong is not None and localisation.wrong.reference.max_abs > 65504
    assert localisation.wrong.actual is not None and localisation.wrong.actual.nonfinite > 0
    assert localisation.before is not None and localisation.before.reference.max_abs < 1000
    assert localisation.exports <= 6
    assert "prefix: WRONG" in repeated(localisation)


class Planting:
    """ONNX as it is written by the real target, and then spoilt by `spoil`."""

    name = "onnx"
    extra = ""
    runtime = OnnxTarget.runtime
    precisions = OnnxTarget.precisions
    options: type[Any] = OnnxOptions

    def __init__(self) -> None:
        self.real = OnnxTarget()
        self.missing, self.unfinished, self.witness = self.real.missing, self.real.unfinished, self.real.witness
        self.refuse, self.constants, self.script = self.real.refuse, self.real.constants, self.real.script

    def spoil(self, model: Any) -> None:
        raise NotImplementedError

    def export(self, network: Network, precision: Precision, options: Any, folder: Path) -> Artifact:
        import onnx

        artifact = self.real.export(network, precision, options, folder)
        model = onnx.load(folder / FILE)
        self.spoil(model)
        onnx.save(model, folder / FILE)
        return artifact

    @contextmanager
    def load(self, folder: Path, *, threads: int = 1) -> Iterator[Session]:
        with self.real.load(folder, threads=threads) as session:
            yield session


class WrongWeight(Planting):
    """A converter that writes one weight wrongly, wherever it stands."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = np.sort(weight.detach().numpy(), axis=None)

    def spoil(self, model: Any) -> None:
        spoil_weight(model, self.weight)


def spoil_weight(model: Any, weight: np.ndarray[Any, Any]) -> None:
    import onnx

    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if np.array_equal(np.sort(values, axis=None), weight):
            spoilt = values.copy()
            spoilt.ravel()[::7] *= 1.5
            tensor.CopyFrom(onnx.numpy_helper.from_array(spoilt, tensor.name))


class WrongResize(Planting):
    """A converter that interpolates where the network repeats."""

    def spoil(self, model: Any) -> None:
        for node in model.graph.node:
            if node.op_type == "Resize":
                for attribute in node.attribute:
                    if attribute.name == "mode":
                        attribute.s = b"linear"


@pytest.mark.parametrize(
    ("name", "module"),
    [("levit", "stem.conv2"), ("levit", "stages.1.blocks.0.mlp.ln1"), ("deit", "blocks.0.attn.output")],
)
def test_a_wrong_weight_is_found_by_its_module(name: str, module: str, tmp_path: Path) -> None:
    network = folded_network(name)
    modules = dict(network.module.named_modules())
    weight = modules[module].weight
    assert isinstance(weight, torch.Tensor)
    localisation = found(WrongWeight(weight), network, Precision.FP32, tmp_path)
    assert localisation.place is not None and localisation.place.module == module, localisation.trials
    assert localisation.cause is Cause.WEIGHTS and module in localisation.evidence
    assert localisation.before is None or localisation.before.verdict == "pass"
    assert "alone: WRONG" in repeated(localisation) or module.startswith("stem")


def test_a_wrong_operator_between_a_detectors_modules_is_found(tmp_path: Path) -> None:
    network = detector_network()
    localisation = found(WrongResize(), network, Precision.FP32, tmp_path)
    assert localisation.place is not None and "upsample" in localisation.place.operator, localisation
    assert localisation.cause is Cause.OPERATOR
    assert "prefix: WRONG" in repeated(localisation)


def test_nothing_is_found_in_a_network_that_is_right(tmp_path: Path) -> None:
    localisation = found(OnnxTarget(), folded_network("levit"), Precision.FP32, tmp_path)
    assert localisation.finding is Finding.NOTHING and localisation.exports == 1
    assert not list(tmp_path.iterdir()) and "nothing is wrong" in printed(localisation)


def test_an_edited_file_is_told_from_a_wrong_export(tmp_path: Path) -> None:
    import onnx

    network, target = folded_network("deit"), OnnxTarget()
    edited = tmp_path / "edited"
    edited.mkdir()
    artifact = target.export(network, Precision.FP32, target.options(), edited)
    model = onnx.load(edited / FILE)
    weight = network.module.get_parameter("blocks.0.mlp.fc2.weight").detach().numpy()
    spoil_weight(model, np.sort(weight, axis=None))
    onnx.save(model, edited / FILE)
    localisation = found(target, network, Precision.FP32, tmp_path, suspect=(artifact, edited))
    assert localisation.finding is Finding.FILE and localisation.cause is Cause.FILE
    assert len(localisation.differing) == 1 and localisation.differing[0] in printed(localisation)
    assert localisation.exports == 1 and localisation.folder is None


class Bessel(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)


def chain(*layers: nn.Module, last: nn.Module | None = None) -> Network:
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10), last or nn.Identity()]
    return network_of(nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), *layers, *head).eval(), (32, 32))


def test_an_operator_that_cannot_be_exported_is_named(tmp_path: Path) -> None:
    localisation = found(OnnxTarget(), chain(nn.ReLU(), Bessel(), nn.ReLU()), Precision.FP32, tmp_path)
    assert localisation.finding is Finding.UNSUPPORTED and localisation.cause is Cause.UNSUPPORTED
    assert localisation.place is not None and "bessel_j0" in localisation.place.operator
    assert localisation.place.module == "2" and localisation.place.kind == "Bessel"


class Detour(nn.Module):
    """x, by way of numbers that float16 holds to 4 units."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + 6000.0) - 6000.0


def test_terms_that_cancel_are_named(tmp_path: Path) -> None:
    target = target_named("coreml")
    if missing := target.missing():
        pytest.skip(missing.reason)
    localisation = found(target, chain(last=Detour()), Precision.FP16, tmp_path)
    assert localisation.place is not None and localisation.place.kind == "Detour", localisation
    assert localisation.cause is Cause.CANCELLATION
    assert "alone: WRONG" in repeated(localisation)


def test_a_runtime_that_does_not_round_is_not_believed_about_overflow(tmp_path: Path) -> None:
    network = folded_network("levit")
    scaled_between(network, "stages.1.blocks.0.mlp.ln1", "stages.1.blocks.0.mlp.ln2", 1e6)
    localisation = found(OnnxTarget(), network, Precision.FP16, tmp_path)
    if localisation.finding is Finding.NOTHING:  # ONNX Runtime on x86 keeps float32 between these operators
        assert localisation.origin is not None and "65504" in localisation.evidence
    else:
        assert localisation.cause is Cause.OVERFLOW


def test_what_is_printed_and_written_can_be_read(tmp_path: Path) -> None:
    network = folded_network("deit")
    weight = network.module.get_parameter("head.weight")
    localisation = found(WrongWeight(weight), network, Precision.FP32, tmp_path)
    text = printed(localisation)
    assert "head (Linear), at 'linear'" in text and "models/deit.py:" in text and "what to do" in text
    document = json.loads(json.dumps(plain(localisation), allow_nan=False))
    assert document["place"]["module"] == "head" and document["cause"] == "wrong weights"
    assert "head" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("name", ["deit", "deit-distilled", "levit", "levit-linear", "mvit"])
def test_a_prefix_computes_what_its_module_computes(name: str) -> None:
    """Node by node the tracer's modules are the network's: checked with hooks on those that are called once."""
    network = folded_network(name)
    traced, seen = Traced(network), dict[str, list[torch.Tensor]]()
    for path, module in network.module.named_modules():
        module.register_forward_hook(lambda _, __, output, path=path: seen.setdefault(path, []).append(output))
    with torch.no_grad():
        network.module(*network.example())
        once = [path for path in traced.boundaries if len(seen.get(path, ())) == 1]
        assert len(once) > 10
        for path in once[::3]:
            (value,) = [traced.prefix(traced.boundaries[path]).module(*network.example())]
            assert torch.equal(value, seen[path][0]), path


def test_only_options_that_a_prefix_can_have_are_kept() -> None:
    assert plain_options(OnnxOptions(opset=22, nms=True)) == OnnxOptions(opset=22)
    assert plain_options(OnnxOptions(dynamic=True)) == OnnxOptions()


def test_a_network_that_torch_cannot_trace_is_an_error(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match=r"torch\.export refuses"):
        found(OnnxTarget(), chain(Branching()), Precision.FP32, tmp_path)


def test_statistics_and_absent_weights() -> None:
    values = np.array([[1.0, np.inf], [7e4, -2.0]], np.float32)
    statistics = Statistics.of(values, real=2)
    assert (statistics.max_abs, statistics.nonfinite, statistics.over_half) == (7e4, 0.25, 0.5)
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert absent({"w": weight}, [weight.T.astype(np.float16)]) == ()
    assert absent({"w": weight}, [weight + 1]) == ("w",)


def test_other_facts_of_a_network_stay_with_its_prefixes() -> None:
    network = replace(folded_network("deit"), metadata={"fact": "kept"})
    traced = Traced(network)
    assert traced.prefix(traced.boundaries["blocks.0"]).metadata == {"fact": "kept"}


class Deeper(nn.Module):
    """Values of a part that float16 cannot hold, between values that it can."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        with torch.no_grad():
            self.up.weight.mul_(1e6)
            self.down.weight.mul_(1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raised = self.up(x)
        return self.down(raised.relu()) + raised * 1e-6


def with_island() -> Network:
    """A chain whose module "2" is an island, and whose own reductions stay in float32."""
    return replace(chain(nn.ReLU(), Deeper(), nn.ReLU()), islands=("2",), reductions=("4",))


def test_a_prefix_keeps_the_islands_of_the_network_that_it_takes() -> None:
    network = with_island()
    traced = Traced(network)
    assert {traced.place(node).module for node in traced.hidden} == {"2"}
    before, whole = (traced.prefix(traced.boundaries[path]) for path in ("1", "6"))
    assert (before.islands, before.reductions) == ((), ())
    assert len(whole.islands) == 1 and len(whole.reductions) == 1
    island = whole.module.get_submodule(whole.islands[0])
    assert len(island.state_dict()) == 4 and len(whole.module.state_dict()) == len(network.module.state_dict())
    image = network.example()
    with torch.no_grad():
        assert torch.equal(whole.module(*image), network.module(*image))


def test_no_prefix_ends_inside_an_island() -> None:
    traced = Traced(with_island())
    assert (
        "2" in traced.boundaries
        and "2.up" not in traced.boundaries
        and "2.up" in Traced(replace(with_island(), islands=())).boundaries
    )
    assert traced.place(traced.boundaries["2"]).module == "2"


def test_a_float16_prefix_computes_its_island_in_float32() -> None:
    network = with_island()
    traced = Traced(network)
    for islands, finite in ((True, True), (False, False)):
        prefix = traced.prefix(traced.boundaries["2"])
        half = in_half(prefix.module, prefix.islands if islands else ())
        with torch.no_grad():
            assert bool(half(*network.example()).isfinite().all()) is finite


@pytest.mark.parametrize("name", ["onnx", "coreml", "coreai"])
def test_every_format_keeps_the_island_of_a_prefix(name: str, tmp_path: Path) -> None:
    target = target_named(name)
    if missing := target.missing():
        pytest.skip(missing.reason)
    traced = Traced(with_island())
    artifact = target.export(traced.prefix(traced.boundaries["6"]), Precision.FP16, target.options(), tmp_path)
    assert target.attest(tmp_path, artifact, Precision.FP16).products == {"fp32": 2, "fp16": 2}


@pytest.mark.parametrize("name", ["coreml", "coreai"])
def test_a_fault_behind_an_island_is_not_blamed_on_it(name: str, tmp_path: Path) -> None:
    target = target_named(name)
    if missing := target.missing():
        pytest.skip(missing.reason)
    network = replace(chain(Deeper(), nn.ReLU(), last=Detour()), islands=("1",))
    localisation = found(target, network, Precision.FP16, tmp_path)
    assert localisation.place is not None and localisation.place.kind == "Detour", localisation
    assert localisation.cause is Cause.CANCELLATION and localisation.origin is None


def test_int8_is_refused_with_what_serves_instead(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="int8") as refused:
        found(OnnxTarget(), folded_network("deit"), Precision.INT8, tmp_path)
    assert refused.value.exit_code == 2 and "sensitivity" in (refused.value.hint or "")


def test_an_artefact_that_was_just_written_is_not_exported_again(tmp_path: Path) -> None:
    network, folder = chain(nn.ReLU()), tmp_path / "artefact"
    weight = network.module.get_parameter("4.weight")
    target = WrongWeight(weight)
    folder.mkdir()
    artifact = target.export(network, Precision.FP32, target.options(), folder)
    counts = {}
    for fresh in (False, True):
        keywords = {"suspect": (artifact, folder), "fresh": fresh}
        localisation = found(target, network, Precision.FP32, tmp_path / "shown", **keywords)
        assert localisation.place is not None and localisation.place.module == "4"
        counts[fresh] = localisation.exports
    assert counts[True] == counts[False] - 1


def test_as_many_probes_run_as_the_exacting_runner_affords(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    network, target = folded_network("levit"), OnnxTarget()
    runner = exacting(target, Precision.FP32)
    monkeypatch.setattr(runner, "images", 3)
    monkeypatch.setattr(trials, "exacting", lambda *_: runner)
    tried = Trials(target, network, Precision.FP32, target.options(), probes_of(network), tmp_path)
    assert tried.probes.real == tried.real == 3


@pytest.mark.parametrize("path", ["stem.conv2", "stages.1.blocks.0.mlp.ln1", "head"])
def test_the_bisection_asks_for_few_prefixes(path: str) -> None:
    """A judge that knows the answer: everything computed from the wrong value is wrong."""
    traced = Traced(folded_network("levit"))
    wrong, asked = traced.boundaries[path], []

    def judge(node: fx.Node) -> bool:
        asked.append(node)
        return node is wrong or wrong in traced.ancestors(node)

    search = Search(traced, judge, lambda: None)
    assert search.first(traced.outputs[0]) is wrong
    assert len(asked) <= 2 * math.log2(len(traced.nodes))
    asked.clear()
    assert Search(traced, judge, lambda: None).first(traced.outputs[0], [wrong]) is wrong
    assert len(asked) <= 2
