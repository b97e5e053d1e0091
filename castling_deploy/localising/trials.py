"""Exports, runs and judges a network and prefixes of it, and keeps count.

A prefix is exported like any network, run on real probes, and held against the same prefix in PyTorch by the project's
own measure.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import fx

from castling_deploy.errors import CastlingError
from castling_deploy.execution import inputs_for
from castling_deploy.localising.localisation import Trial
from castling_deploy.localising.prefix import VALUE, Traced
from castling_deploy.localising.references import references_of
from castling_deploy.parity import TOLERANCES, Array, OutputParity, Tolerance, Verdict, compare
from castling_deploy.probes import Probes
from castling_deploy.quiet import toolchain
from castling_deploy.runner import exacting
from castling_deploy.target import Artifact, Network, Precision, Target

REAL, WORST, STRUCTURED = 8, 4, 3  # probes that every prefix runs on
WHOLE = "whole"  # the folder of the whole network, beside those of the prefixes


@dataclass(frozen=True)
class Whole:
    """An artefact of the whole network in `folder`, judged output by output.

    Where nothing fails, what is inconclusive and beyond the limit counts as wrong.
    """

    folder: Path
    said: Mapping[str, OutputParity]
    tolerance: Tolerance

    @property
    def verdict(self) -> Verdict:
        """The worst."""
        return Verdict.worst([parity.verdict for parity in self.said.values()])

    @property
    def rel(self) -> float | None:
        """The worst; None where an output is not finite."""
        rels = [parity.rel for parity in self.said.values()]
        return None if None in rels else max(rel for rel in rels if rel is not None)

    def counts_as_wrong(self, parity: OutputParity) -> bool:
        """Whether an output is wrong, of the whole network or of a prefix."""
        if parity.max_abs is None or parity.verdict is Verdict.FAIL:
            return True
        strict = self.verdict is Verdict.FAIL
        return not strict and parity.rel is not None and parity.rel > self.tolerance.limit

    @property
    def wrong(self) -> tuple[str, ...]:
        """Names of the outputs that are."""
        return tuple(name for name, parity in self.said.items() if self.counts_as_wrong(parity))


@dataclass(frozen=True)
class Ran:
    """A prefix that was exported into `folder` and run: `outputs` beside what PyTorch has `expected`, (P, ...)."""

    artifact: Artifact
    folder: Path
    parity: OutputParity
    outputs: Array
    expected: Array


class Trials:
    """Trials of one network for one target and precision. `scratch` is a folder for artefacts.

    `rows` are the probes that prefixes run on, the first `real` of them real images, which measure the spread.
    `exports` counts, `made` are the trials in their order. Raises ExportError where the network cannot be traced.
    """

    def __init__(
        self, target: Target, network: Network, precision: Precision, options: Any, probes: Probes, scratch: Path
    ) -> None:
        self.target, self.network, self.precision = target, network, precision
        self.traced = Traced(network)
        self.tolerance = TOLERANCES[precision]
        self.exports = 0
        self.made: list[Trial] = []
        self._options, self._scratch = options, scratch
        self._runner = exacting(target, precision)
        images = self._runner.images
        self.probes = probes if images is None else probes.few(images)
        self.real = min(REAL, self.probes.real)
        self._batch = network.inputs[0].shape[0]
        names = [spec.name for spec in network.outputs]
        self._references = references_of(network.module, names, self.probes.tensors, self.probes.real, self._batch)
        self._rows: npt.NDArray[np.int64] | None = None
        self._prefixes: dict[fx.Node, Ran | None] = {}
        self._refusals: dict[fx.Node, str | None] = {}

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        return chosen(self.probes, len(self.probes.tensors), ()) if self._rows is None else self._rows

    @property
    def tensors(self) -> Array:
        """What prefixes run on, (P, C, H, W)."""
        return self.probes.tensors[self.rows]

    def whole(self) -> Whole:
        """A fresh export of the whole network. Raises ExportError where it is refused, or does not run."""
        with self._noted("the whole network") as note:
            folder = self._scratch / WHOLE
            whole = self.judged(self._export(self.network, self._options, folder), folder)
            note(whole.verdict, whole.rel)
        return whole

    def judged(self, artifact: Artifact, folder: Path) -> Whole:
        """An artefact of the whole network on all probes; the first one says which of them prefixes run on."""
        outputs = self.run(artifact, folder, inputs_for(artifact.inputs[0], self.probes))
        said = {}
        for name, reference in self._references.items():
            seen = replace(reference, outputs=reference.outputs[: len(outputs[name])])
            said[name] = compare(name, outputs[name], seen, self.tolerance, seen.power(self.tolerance))
        if self._rows is None:
            errors = self._errors(outputs)
            self._rows = chosen(self.probes, len(errors), np.argsort(-errors, kind="stable")[:WORST])
        return Whole(folder, said, self.tolerance)

    def _errors(self, outputs: Mapping[str, Array]) -> Array:
        """(P,), of the worst output, against its spread; infinite where it is not finite."""
        count = min(len(values) for values in outputs.values())
        errors = np.zeros(count)
        for name, reference in self._references.items():
            gap = np.abs(outputs[name][:count] - reference.outputs[:count]).reshape(count, -1).max(axis=1)
            errors = np.maximum(errors, np.nan_to_num(gap / (reference.spread or 1.0), nan=np.inf, posinf=np.inf))
        return errors

    def prefix(self, node: fx.Node) -> Ran | None:
        """The prefix that ends with `node`, exported and run, once; None where that is refused."""
        if node not in self._prefixes:
            self._prefixes[node] = None
            with suppress(CastlingError), self._noted(self._label(node)) as note:
                self._prefixes[node] = ran = self._ran(node)
                note(ran.parity.verdict, ran.parity.rel)
        return self._prefixes[node]

    def _ran(self, node: fx.Node) -> Ran:
        prefix, folder = self.traced.prefix(node), self._scratch / node.name
        artifact = self._export(prefix, plain_options(self._options), folder)
        outputs = self.run(artifact, folder, inputs_for(artifact.inputs[0], self.probes)[self.rows])[VALUE]
        reference = references_of(prefix.module, [VALUE], self.tensors, self.real, self._batch)[VALUE]
        parity = compare(VALUE, outputs, reference, self.tolerance, reference.power(self.tolerance))
        return Ran(artifact, folder, parity, outputs, reference.outputs)

    def refusal(self, node: fx.Node) -> str | None:
        """Why the prefix that ends with `node` cannot be exported, or does not run on one probe; None where it does."""
        if node not in self._refusals:
            try:
                with self._noted(self._label(node)):
                    folder = self._scratch / node.name
                    artifact = self._export(self.traced.prefix(node), plain_options(self._options), folder)
                    self.run(artifact, folder, inputs_for(artifact.inputs[0], self.probes)[self.rows[:1]])
                self._refusals[node] = None
            except CastlingError as error:
                self._refusals[node] = error.message
        return self._refusals[node]

    def part(self, network: Network, given: Array, folder: str) -> tuple[Artifact, Path, Array]:
        """A part that stands alone, exported and run on `given`: the artefact, where it lies, its output. Raises
        ExportError."""
        path = self._scratch / folder
        artifact = self._export(network, plain_options(self._options, interface=True), path)
        return artifact, path, self.run(artifact, path, given)[VALUE]

    def run(self, artifact: Artifact, folder: Path, inputs: npt.NDArray[np.generic]) -> dict[str, Array]:
        """Every output by name, P first. Raises ExportError."""
        with toolchain(f"{self.target.name}: the artefact does not run"):
            ran = self._runner.run(folder, artifact, inputs, lambda share: None)
        return {name: np.asarray(values) for name, values in ran.items()}

    def _export(self, network: Network, options: Any, folder: Path) -> Artifact:
        folder.mkdir()
        self.exports += 1
        with toolchain(self.target.name):
            return self.target.export(network, self.precision, options, folder)

    def _label(self, node: fx.Node) -> str:
        place = self.traced.place(node)
        return f"{place} ({place.operator})"

    @contextmanager
    def _noted(self, place: str) -> Iterator[Callable[[Verdict, float | None], None]]:
        """A block that is a trial: what it notes of it, or the error that it ends with, is kept with the time."""
        began, said = time.perf_counter(), list[tuple[Verdict, float | None]]()
        refusal = None
        try:
            yield lambda verdict, rel: said.append((verdict, rel))
        except CastlingError as error:
            refusal = error.message
            raise
        finally:
            verdict, rel = said[0] if said else (None, None)
            self.made.append(Trial(place, verdict, rel, refusal, time.perf_counter() - began))


def chosen(probes: Probes, count: int, worst: Iterable[int]) -> npt.NDArray[np.int64]:
    """Which of the first `count` probes prefixes run on: real ones first, the worst ones, structured ones, extremes."""
    real = range(min(REAL, probes.real))
    structured = range(probes.real, min(probes.real + STRUCTURED, count))
    extremes = range(len(probes.images), count)
    wanted = [*real, *(int(row) for row in worst), *structured, *extremes]
    return np.array(list(dict.fromkeys(wanted)), np.int64)


def plain_options(options: Any, *, interface: bool = False) -> Any:
    """`options` without those that only a whole network can have; with `interface`, without any that change its input.

    Fields of a target's options say so in their metadata: "task", and "whole": "network" or "interface".
    """
    reset = {
        item.name: item.default
        for item in dataclasses.fields(options)
        if "task" in item.metadata
        or item.metadata.get("whole") == "network"
        or (interface and item.metadata.get("whole") == "interface")
    }
    return replace(options, **reset)
