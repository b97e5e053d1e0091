"""Where an artefact leaves the limit: the first operator, and its module, whose output is wrong.

The network is cut off after one of its modules, the prefix is exported like any network, run on real probes, and held
against the same prefix in PyTorch by the project's own measure. Cuts are bisected, from blocks down to operators. What
looks guilty is tried first: numbers beyond float16's range, weights that the artefact does not hold.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn

from castling_deploy.errors import CastlingError
from castling_deploy.execution import inputs_for
from castling_deploy.localising import repro
from castling_deploy.localising.diagnosis import (
    LARGEST_HALF,
    SQUARES,
    Cause,
    Statistics,
    absent,
    batches,
    likely,
    watch,
)
from castling_deploy.localising.prefix import VALUE, Place, Traced, operator, wide
from castling_deploy.parity import TOLERANCES, Array, OutputParity, Reference, Verdict, compare
from castling_deploy.probes import Probes
from castling_deploy.progress import Advance, Progress, Silent
from castling_deploy.quiet import toolchain
from castling_deploy.runner import exacting
from castling_deploy.target import Artifact, Network, Precision, Readable, Target, images_for

REAL, WORST, STRUCTURED = 8, 4, 3  # probes that every prefix runs on
EXACT = 4  # of them in float64 too
KEPT = 4  # of them in the folder
GUESSES = 2  # operators that are tried before the bisection
WHOLE = "whole"  # the folder of the whole network, beside those of the prefixes


class Finding(StrEnum):
    """What a search ended with."""

    NOTHING = "nothing is wrong"
    MODULE = "a module is wrong"
    UNSUPPORTED = "an operator cannot be exported"
    FILE = "a fresh export is right"
    WHOLE = "only the whole network is wrong"
    UNKNOWN = "the place is not known"


@dataclass(frozen=True)
class Seen:
    """A value at one place, in PyTorch and in the artefact. `actual` is None where nothing ran."""

    place: Place
    verdict: Verdict
    rel: float | None
    reference: Statistics
    actual: Statistics | None


@dataclass(frozen=True)
class Trial:
    """One export that was made on the way; `refusal` is why it could not be."""

    place: str
    verdict: Verdict | None
    rel: float | None
    refusal: str | None
    seconds: float


@dataclass(frozen=True)
class Localisation:
    """Where an artefact goes wrong, and what speaks for it.

    `verdict` and `rel` are those of the whole artefact. `wrong` is the first value that is, `before` the last right one
    that it is computed from (None: the input). `origin` is where numbers first leave the range of the precision,
    which may be earlier than where it shows. `differing` are constants in which the file differs from a fresh export.
    `folder` holds what reproduces it.
    """

    target: str
    precision: Precision
    finding: Finding
    verdict: Verdict
    rel: float | None
    place: Place | None = None
    origin: Place | None = None
    cause: Cause | None = None
    evidence: str = ""
    wrong: Seen | None = None
    before: Seen | None = None
    differing: tuple[str, ...] = ()
    exports: int = 0
    seconds: float = 0.0
    trials: tuple[Trial, ...] = ()
    folder: Path | None = None


def localise(
    target: Target,
    network: Network,
    precision: Precision,
    options: Any,
    probes: Probes,
    progress: Progress | None = None,
    *,
    folder: Path,
    suspect: tuple[Artifact, Path] | None = None,
) -> Localisation:
    """Find where artefacts of `network` go wrong; what reproduces it is written to `folder`.

    `suspect`, an artefact and the folder it lies in, is judged first, and where a fresh export is right, the two are
    compared. Without it the fresh export is the one that is judged. Raises ExportError where the network cannot be
    traced at all.
    """
    progress = progress or Silent()
    with progress.stage("trace the network and run the reference"):
        images = images_for(target, precision)
        search = _Search(target, network, precision, options, probes if images is None else probes.few(images))
    with tempfile.TemporaryDirectory() as scratch:
        search.scratch = Path(scratch)
        with progress.stage(f"{target.name}: find the module that goes wrong") as advance:
            result = search.result(suspect, advance)
        if result.place is not None and search.end is not None:
            with progress.stage(f"{target.name}: write what reproduces it"):
                result = replace(result, folder=search.reproduction(folder, result))
    return replace(result, exports=search.exports, seconds=search.seconds, trials=tuple(search.trials))


@dataclass
class _Ran:
    """A prefix that was exported and run, or refused."""

    parity: OutputParity | None = None
    outputs: Array | None = None
    refusal: str | None = None
    artifact: Artifact | None = None
    folder: Path | None = None


@dataclass
class _Search:
    """One search; what it learns on the way is kept in it."""

    target: Target
    network: Network
    precision: Precision
    options: Any
    probes: Probes
    scratch: Path = Path()
    trials: list[Trial] = field(default_factory=list)
    exports: int = 0
    end: fx.Node | None = None

    def __post_init__(self) -> None:
        self.started = time.perf_counter()
        self.traced = Traced(self.network)
        self.tolerance = TOLERANCES[self.precision]
        self.rows = np.arange(0)
        self.ran: dict[fx.Node, _Ran] = {}
        self.right: set[fx.Node] = set()
        self.undecided: set[fx.Node] = set()
        self.refusals = False  # what is searched for: a refusal, or an error
        self.strict = True  # only what fails is wrong, not what is inconclusive

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def result(self, suspect: tuple[Artifact, Path] | None, advance: Advance) -> Localisation:
        """The whole first; then, where it is wrong, the bisection."""
        names = [spec.name for spec in self.network.outputs]
        references = self._references()
        said: dict[str, OutputParity] | None = None
        if suspect is not None:
            artifact, path = suspect
            said = self._judged(self._run(artifact, path), references)
            self._choose(said, references, self.last_outputs)
            if not self._any_wrong(said):
                return self._nothing(said)
        fresh = self.scratch / WHOLE
        began = time.perf_counter()
        try:
            artifact = self._export(self.network, self.options, fresh)
            whole = self._judged(self._run(artifact, fresh), references)
        except CastlingError as error:
            self.trials.append(Trial("the whole network", None, None, error.message, time.perf_counter() - began))
            return self._refused(error.message, advance)
        verdict, rel = _summary(whole)
        self.trials.append(Trial("the whole network", verdict, rel, None, time.perf_counter() - began))
        self._choose(whole, references, self.last_outputs)
        if not self._any_wrong(whole):
            if said is None:
                return self._nothing(whole)
            return self._file(said, suspect, fresh)
        self.strict = verdict is Verdict.FAIL
        wrong = [name for name in names if self._wrong(whole[name])]
        ends = sorted((self.traced.outputs[names.index(name)] for name in wrong), key=self.traced.order.__getitem__)
        self._audit()
        for end in ends:
            first = self._first(end, advance)
            if self.judge(first):  # the last prefix is the whole network: exported only if nothing before it is wrong
                self.end = first
                return self._module(first, whole)
        return replace(
            self._ended(Finding.WHOLE, whole),
            evidence="every prefix of a fresh export passes, its last one too, and the whole network does not: "
            "the fault is in the options or in what the target adds behind the network",
        )

    # the whole

    def _references(self) -> dict[str, Reference]:
        tensors = self.probes.tensors
        outputs = evaluated(self.network.module, tensors, self.network.inputs[0].shape[0])
        return self._with_noise([spec.name for spec in self.network.outputs], self.network.module, outputs, tensors)

    def _with_noise(
        self, names: Sequence[str], module: nn.Module, outputs: Sequence[Array], tensors: Array, real: int | None = None
    ) -> dict[str, Reference]:
        count = self.probes.real if real is None else real
        few = tensors[: min(EXACT, count)].astype(np.float64)
        exact = evaluated(wide(module), few, self.network.inputs[0].shape[0])
        found = {}
        for name, values, precise in zip(names, outputs, exact, strict=True):
            noise = Reference(values, count, noise=0.0).rel(values[: len(few)], precise)
            found[name] = Reference(values, count, noise or 0.0)
        return found

    def _judged(self, outputs: Mapping[str, Array], references: Mapping[str, Reference]) -> dict[str, OutputParity]:
        self.last_outputs = outputs
        found = {}
        for name, reference in references.items():
            cut = replace(reference, outputs=reference.outputs[: len(outputs[name])])
            found[name] = compare(name, outputs[name], cut, self.tolerance, cut.power(self.tolerance))
        return found

    def _choose(
        self, said: Mapping[str, OutputParity], references: Mapping[str, Reference], outputs: Mapping[str, Array]
    ) -> None:
        """The probes that every prefix runs on: real ones first, the worst ones, structured ones, extremes."""
        if len(self.rows):
            return
        count = min(len(values) for values in outputs.values())
        errors = np.zeros(count)
        for name, reference in references.items():
            gap = np.abs(outputs[name][:count] - reference.outputs[:count]).reshape(count, -1).max(axis=1)
            errors = np.maximum(errors, np.nan_to_num(gap / (reference.spread or 1.0), nan=np.inf, posinf=np.inf))
        self.rows = self._rows(count, np.argsort(-errors, kind="stable")[:WORST])

    def _rows(self, count: int, worst: Iterable[int]) -> npt.NDArray[np.int64]:
        real = range(min(REAL, self.probes.real))
        structured = range(self.probes.real, min(self.probes.real + STRUCTURED, count))
        extremes = range(len(self.probes.images), count)
        wanted = [*real, *(int(row) for row in worst), *structured, *extremes]
        return np.array(list(dict.fromkeys(wanted)), np.int64)

    @property
    def real(self) -> int:
        """How many of the chosen probes, the first of them, measure the spread."""
        return min(REAL, self.probes.real)

    def _any_wrong(self, said: Mapping[str, OutputParity]) -> bool:
        self.strict = any(parity.verdict is Verdict.FAIL for parity in said.values())
        return any(self._wrong(parity) for parity in said.values())

    def _wrong(self, parity: OutputParity) -> bool:
        if parity.max_abs is None or parity.verdict is Verdict.FAIL:
            return True
        return not self.strict and parity.rel is not None and parity.rel > self.tolerance.limit

    def _ended(self, finding: Finding, said: Mapping[str, OutputParity]) -> Localisation:
        return Localisation(self.target.name, self.precision, finding, *_summary(said))

    def _nothing(self, said: Mapping[str, OutputParity]) -> Localisation:
        """Nothing is wrong by this witness; where float16 does not reach as far as the network's numbers, that is said:
        a runtime that keeps them in float32 between operators, as some do on x86, sees no overflow."""
        ended = self._ended(Finding.NOTHING, said)
        if self.precision is not Precision.FP16:
            return ended
        watched = watch(self.traced, self.probes.tensors[self.rows])
        beyond = [
            node for node, peak in watched.largest.items() if peak > LARGEST_HALF and operator(node) not in SQUARES
        ]
        if not beyond:
            return ended
        origin = self.traced.place(beyond[0])
        return replace(
            ended,
            origin=origin,
            evidence=f"but numbers in {origin} reach {watched.largest[beyond[0]]:.3g}, and float16 ends at 65504: "
            "a device that stores float16 there overflows, though what ran the artefact here did not",
        )

    def _file(
        self, said: Mapping[str, OutputParity], suspect: tuple[Artifact, Path] | None, fresh: Path
    ) -> Localisation:
        """The suspect is wrong and a fresh export is not."""
        assert suspect is not None
        differing: tuple[str, ...] = ()
        evidence = "a fresh export passes, and so every prefix of it: the file differs from what this version exports"
        if isinstance(self.target, Readable):
            theirs, ours = self.target.constants(suspect[1]), self.target.constants(fresh)
            differing = tuple(
                name
                for name in dict.fromkeys((*ours, *theirs))
                if name not in ours or name not in theirs or not np.array_equal(ours[name], theirs[name])
            )
            if differing:
                evidence += f"; the first constant that differs is {differing[0]}, of {len(differing)}"
            else:
                evidence += "; all its constants are the same, so it is an operator or an attribute that differs"
        return replace(self._ended(Finding.FILE, said), cause=Cause.FILE, evidence=evidence, differing=differing)

    # prefixes

    def judge(self, node: fx.Node) -> bool | None:
        """Whether the prefix that ends with `node` is wrong; None where it cannot be told."""
        if node not in self.ran:
            began = time.perf_counter()
            ran = self.ran[node] = self._attempt(node)
            verdict, rel = (None, None) if ran.parity is None else (ran.parity.verdict, ran.parity.rel)
            place = self.traced.place(node)
            label = f"{place} ({place.operator})"
            self.trials.append(Trial(label, verdict, rel, ran.refusal, time.perf_counter() - began))
        ran = self.ran[node]
        if self.refusals:
            return ran.refusal is not None
        return None if ran.parity is None else self._wrong(ran.parity)

    def _attempt(self, node: fx.Node) -> _Ran:
        prefix = self.traced.prefix(node)
        folder = self.scratch / node.name
        try:
            artifact = self._export(prefix, plain_options(self.options), folder)
            if self.refusals:
                self._run(artifact, folder, self.rows[:1])
                return _Ran(artifact=artifact, folder=folder)
            outputs = self._run(artifact, folder, self.rows)[VALUE]
        except CastlingError as error:
            return _Ran(refusal=error.message)
        tensors = self.probes.tensors[self.rows]
        values = evaluated(prefix.module, tensors, self.network.inputs[0].shape[0])
        reference = self._with_noise([VALUE], prefix.module, values, tensors, self.real)[VALUE]
        parity = compare(VALUE, outputs, reference, self.tolerance, reference.power(self.tolerance))
        return _Ran(parity, outputs, None, artifact, folder)

    def _export(self, network: Network, options: Any, folder: Path) -> Artifact:
        folder.mkdir()
        self.exports += 1
        with toolchain(self.target.name):
            return self.target.export(network, self.precision, options, folder)

    def _run(self, artifact: Artifact, folder: Path, rows: npt.NDArray[np.int64] | None = None) -> dict[str, Array]:
        inputs = inputs_for(artifact.inputs[0], self.probes)
        chosen = inputs if rows is None else inputs[rows]
        with toolchain(f"{self.target.name}: the artefact does not run"):
            return self._ran_by(artifact, folder, chosen)

    def _ran_by(self, artifact: Artifact, folder: Path, inputs: npt.NDArray[np.generic]) -> dict[str, Array]:
        ran = exacting(self.target, self.precision).run(folder, artifact, inputs, lambda share: None)
        return {name: np.asarray(values) for name, values in ran.items()}

    # the bisection

    def _audit(self) -> None:
        """The largest magnitude of every value in float32, which says where to look first."""
        self.largest = watch(self.traced, self.probes.tensors[self.rows]).largest

    def _first(self, end: fx.Node, advance: Advance) -> fx.Node:
        """The first wrong node on the way to `end`, which is wrong: none of the values it is computed from is."""
        high = end if self.refusals else self._guessed(end)
        path = ""
        while True:
            children = self.traced.children(path)
            high = self._narrowed(high, children.values())
            own = [node for node in self.traced.inside(path) if self.traced.exportable(node)]
            within = {node for child in children for node in self.traced.inside(child)}
            high = self._narrowed(high, [node for node in own if node not in within])
            advance(len(self.trials) / (len(self.trials) + 4))
            owner = [child for child in children if high in self.traced.inside(child)]
            if not owner:
                return high
            path = owner[0]

    def _suspected(self, end: fx.Node) -> list[fx.Node]:
        """Operators on the way to `end` that are worth a try: values that float16 cannot hold, and operators with
        weights that the whole artefact does not hold as they are."""
        way = sorted(self.traced.ancestors(end) | {end}, key=self.traced.order.__getitem__)
        exportable = [node for node in way if self.traced.exportable(node)]
        if self.precision is Precision.FP16:
            beyond = [node for node in exportable if self.largest.get(node, 0.0) > LARGEST_HALF]
            if beyond:
                return beyond[:GUESSES]
        whole = self.scratch / WHOLE
        missing = self._missing_weights(exportable, whole)
        return [node for node in exportable if missing and not missing.isdisjoint(self._weights(node))][:GUESSES]

    def _guessed(self, end: fx.Node) -> fx.Node:
        """The first suspect whose prefix is wrong, or `end`; what comes before it is judged too. A suspect that is
        right is not held against the others: the target may compute it in float32, or fold one weight into another."""
        for node in self._suspected(end):
            wrong = self.judge(node)
            if wrong is False:
                self.right.add(node)
            if wrong:
                for before in self._inputs(node):
                    if before not in self.right and self.judge(before) is False:
                        self.right.add(before)
                return node
        return end

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        """The nearest values that `node` is computed from and that a prefix can end with."""
        found: dict[fx.Node, None] = {}
        waiting = list(node.all_input_nodes)
        while waiting:
            one = waiting.pop(0)
            if self.traced.exportable(one):
                found[one] = None
            else:
                waiting.extend(one.all_input_nodes)
        return list(found)

    def _narrowed(self, high: fx.Node, candidates: Iterable[fx.Node]) -> fx.Node:
        """`high`, or the first of the candidates on the way to it that is wrong. What is computed on the way to a right
        value counts as right: an error that a later norm hides is not the one that is looked for."""
        ordered = sorted(set(candidates), key=self.traced.order.__getitem__)
        while True:
            covered = set().union(*(self.traced.ancestors(node) for node in self.right)) | self.right
            way = self.traced.ancestors(high)
            left = [node for node in ordered if node in way and node not in covered and node not in self.undecided]
            if not left:
                return high
            middle = left[len(left) // 2]
            wrong = self.judge(middle)
            if wrong is None:
                self.undecided.add(middle)
            elif wrong:
                high = middle
            else:
                self.right.add(middle)

    # what was found

    def _refused(self, message: str, advance: Advance) -> Localisation:
        """The whole network cannot be exported, or does not run."""
        self.refusals = True
        self.rows = self._rows(len(self.probes.tensors), ())
        blank = Localisation(
            self.target.name, self.precision, Finding.UNKNOWN, Verdict.FAIL, None, evidence=_first_line(message)
        )
        ends = [end for end in self.traced.outputs if self.traced.exportable(end) and self.judge(end)]
        if not ends:
            return blank
        node = self._first(ends[0], advance)
        place = self.traced.place(node)
        words = self.ran[node].refusal or message
        return replace(
            blank,
            finding=Finding.UNSUPPORTED,
            place=place,
            cause=Cause.UNSUPPORTED,
            evidence=f"the network up to {place} cannot be exported, what is before '{place.operator}' can: "
            + _first_line(words),
        )

    def _module(self, node: fx.Node, whole: Mapping[str, OutputParity]) -> Localisation:
        wrong, last = self._seen(node), self._last_right(node)
        before = None if last is None else self._seen(last)
        between = (self.traced.ancestors(node) | {node}) - self.traced.ancestors(last) if last else {node}
        watched = watch(self.traced, self.probes.tensors[self.rows], [node])
        prefix = self.ran[node].folder
        missing = None if prefix is None else self._missing_weights([node], prefix)
        beyond = [one for one in between if watched.largest.get(one, 0.0) > LARGEST_HALF]
        cause, evidence = likely(
            self.precision,
            wrong.reference,
            wrong.actual,
            rel=wrong.rel,
            rel_before=before.rel if before else None,
            largest_inside=max((watched.largest.get(one, 0.0) for one in between), default=0.0),
            terms=watched.terms.get(node),
            missing_weights=None if missing is None else sorted(missing),
        )
        return replace(
            self._ended(Finding.MODULE, whole),
            place=wrong.place,
            origin=(
                self.traced.place(min(beyond, key=self.traced.order.__getitem__))
                if beyond and cause is Cause.OVERFLOW
                else None
            ),
            cause=cause,
            evidence=evidence,
            wrong=wrong,
            before=before,
        )

    def _last_right(self, node: fx.Node) -> fx.Node | None:
        right = [one for one in self.right if one in self.traced.ancestors(node)]
        return max(right, key=self.traced.order.__getitem__, default=None)

    def _seen(self, node: fx.Node) -> Seen:
        ran, tensors = self.ran[node], self.probes.tensors[self.rows]
        assert ran.parity is not None and ran.outputs is not None
        (values,) = evaluated(self.traced.prefix(node).module, tensors, self.network.inputs[0].shape[0])
        return Seen(
            self.traced.place(node),
            ran.parity.verdict,
            ran.parity.rel,
            Statistics.of(values, self.real),
            Statistics.of(ran.outputs, self.real),
        )

    def _weights(self, node: fx.Node) -> set[str]:
        """Names of the parameters and buffers that an operator takes."""
        return {str(one.target) for one in node.all_input_nodes if one.op == "get_attr"}

    def _missing_weights(self, nodes: Iterable[fx.Node], folder: Path) -> set[str] | None:
        """Weights that `nodes` take and the artefact in `folder` does not hold; None where it cannot be read."""
        if not isinstance(self.target, Readable):
            return None
        held, taken = self.traced.graph_module.state_dict(), set().union(*map(self._weights, nodes))
        parameters = {name: held[name].numpy() for name in sorted(taken) if name in held}
        return set(absent(parameters, self.target.constants(folder).values()))

    def reproduction(self, folder: Path, result: Localisation) -> Path | None:
        """`folder` with the prefix, the part alone where it is wrong too, and a script that shows it."""
        assert self.end is not None and result.place is not None
        ran = self.ran[self.end]
        rows = self._kept()
        cases = []
        if ran.artifact is not None and ran.folder is not None:
            (values,) = evaluated(
                self.traced.prefix(self.end).module, self.probes.tensors[rows], self.network.inputs[0].shape[0]
            )
            given = inputs_for(ran.artifact.inputs[0], self.probes)[rows]
            cases.append(repro.Case("prefix", ran.artifact, ran.folder, given, values))
        alone = self._alone(rows)
        if alone is not None:
            cases.append(alone)
        return repro.write(folder, self.target, result.place, result.evidence, cases, self.tolerance.limit)

    def _kept(self) -> npt.NDArray[np.int64]:
        """The worst of the chosen probes, in the order of the others."""
        assert self.end is not None
        outputs = self.ran[self.end].outputs
        if outputs is None:
            return self.rows[:KEPT]
        (values,) = evaluated(
            self.traced.prefix(self.end).module, self.probes.tensors[self.rows], self.network.inputs[0].shape[0]
        )
        errors = np.nan_to_num(np.abs(outputs - values).reshape(len(values), -1).max(axis=1), nan=np.inf)
        return self.rows[np.sort(np.argsort(-errors, kind="stable")[:KEPT])]

    def _alone(self, rows: npt.NDArray[np.int64]) -> repro.Case | None:
        """The wrong module without what comes before it, given what it is given in the network; None where it takes
        several values, cannot be exported, or is right alone."""
        assert self.end is not None
        before = self.traced.ancestors(self.end) | {self.end}
        nodes = [node for node in self.traced.inside(self.traced.place(self.end).module) if node in before]
        for index, chosen in enumerate(([self.end], nodes)):
            part = self.traced.part(chosen)
            if part is None or part.inputs == self.network.inputs:
                continue
            kept = watch(self.traced, self.probes.tensors[rows], [self.traced.given(chosen), self.end]).kept
            given, expected = kept[self.traced.given(chosen)], kept[self.end]
            folder = self.scratch / f"alone-{index}"
            try:
                artifact = self._export(part, plain_options(self.options, interface=True), folder)
                with toolchain(self.target.name):
                    outputs = self._ran_by(artifact, folder, given)[VALUE]
            except CastlingError:
                continue
            spread = Reference(expected, len(expected), noise=0.0).spread or 1.0
            error = np.abs(outputs - expected).max() / spread
            if not error <= self.tolerance.limit:  # NaN is no pass
                return repro.Case("alone", artifact, folder, given, expected)
        return None


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


@torch.no_grad()
def evaluated(module: nn.Module, tensors: Array, batch: int) -> list[Array]:
    """The module's outputs on (P, ...), in its own precision."""
    parts = []
    for chunk in batches(tensors, batch):
        outputs = module(torch.from_numpy(chunk))
        parts.append(outputs if isinstance(outputs, (tuple, list)) else (outputs,))
    return [torch.cat(list(values)).numpy()[: len(tensors)] for values in zip(*parts, strict=True)]


def _summary(said: Mapping[str, OutputParity]) -> tuple[Verdict, float | None]:
    """The worst verdict and rel; None where an output is not finite."""
    verdict = Verdict.worst([parity.verdict for parity in said.values()])
    rels = [parity.rel for parity in said.values()]
    return verdict, None if None in rels else max(rel for rel in rels if rel is not None)


def _first_line(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return " ".join(lines)[:400]
