"""A network cut off after any of its operators: the same operators and weights up to there, and nothing behind.

The network is traced once. What leaves a module, or an operator between modules, is a node of the graph, and the graph
with that node as its only output is a network that every target exports like any other. Marking the value as one more
output of the whole network would not do: it keeps a converter from fusing the operators around it.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from castling_deploy.errors import ExportError
from castling_deploy.export.scopes import unnumbered
from castling_deploy.localising.cut import cut
from castling_deploy.localising.wide import wide_parts
from castling_deploy.target import Network, TensorSpec

VALUE = "value"  # the name of a prefix's output
GIVEN = "given"  # the name of the input of a part that stands alone; coremltools wants two names
PRODUCTS = ("addmm", "bmm", "conv1d", "conv2d", "convolution", "linear", "matmul", "mm")
FRAME = re.compile(r'File "(?P<file>.+)", line (?P<line>\d+), in \w+')


@dataclass(frozen=True)
class Place:
    """Where in a network a value is computed.

    `module` is its path ("" for the network itself), `kind` its class, `operator` that of torch. `source` is the line
    of the network's own code that asks for it, "models/layers.py:78", and `code` what stands there; both are empty
    where the tracer does not tell.
    """

    module: str
    kind: str
    operator: str
    source: str = ""
    code: str = ""

    def __str__(self) -> str:
        return self.module or "the network itself"


class Traced:
    """`network` as one graph of operators, and the modules that they belong to. Raises ExportError.

    `outputs` are the nodes of the network's outputs, in its order. The values of `hidden` nodes stay in float32 in a
    float16 export, inside an island; what is computed in `protected` ones cannot overflow.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        try:
            with torch.no_grad():
                self.graph_module = torch.export.export(network.module, network.example()).module(check_guards=False)
        except Exception as error:  # torch.export raises errors of a dozen classes, most of them private
            raise ExportError(
                f"torch.export refuses the network: {error}", hint="the message above names the line"
            ) from error
        self.nodes = [node for node in self.graph_module.graph.nodes if node.op == "call_function"]
        self.order = {node: index for index, node in enumerate(self.graph_module.graph.nodes)}
        (end,) = (node for node in self.graph_module.graph.nodes if node.op == "output")
        self.outputs: list[fx.Node] = _flat(end.args)
        self.wide = wide_parts(self.nodes, network.islands, network.reductions)
        self.hidden = frozenset(node for part in self.wide if part.island for node in part.hidden())
        self.protected = self.hidden.union(*(part.nodes for part in self.wide if not part.island))
        self._ancestors: dict[fx.Node, frozenset[fx.Node]] = {}

    def ancestors(self, node: fx.Node) -> frozenset[fx.Node]:
        """Everything that `node` is computed from, itself left out."""
        if node not in self._ancestors:
            found: set[fx.Node] = set()
            waiting = list(node.all_input_nodes)
            while waiting:
                one = waiting.pop()
                if one not in found:
                    found.add(one)
                    waiting.extend(one.all_input_nodes)
            self._ancestors[node] = frozenset(found)
        return self._ancestors[node]

    @cached_property
    def _batch(self) -> int:
        return self.network.inputs[0].shape[0]

    def exportable(self, node: fx.Node) -> bool:
        """Whether a prefix can end here: one floating-point tensor per image, computed from the input by a product or
        behind one (what comes before is layout and padding), and not inside an island: where a prefix ends, it is
        rounded to float16."""
        value = node.meta.get("val")
        if node.op != "call_function" or node in self.hidden or not isinstance(value, torch.Tensor):
            return False
        if not value.is_floating_point() or value.dim() < 2 or value.shape[0] != self._batch or value.numel() == 0:
            return False
        before = self.ancestors(node) | {node}
        return any(is_product(one) for one in before) and any(one.op == "placeholder" for one in before)

    @cached_property
    def boundaries(self) -> dict[str, fx.Node]:
        """Modules by path, each with the node of its one output; modules with several outputs, or none that a prefix
        can end at, are left out."""
        members: dict[str, list[fx.Node]] = {}
        for node in self.nodes:
            for path, _ in stack(node):
                members.setdefault(path, []).append(node)
        found = {}
        for path, nodes in members.items():
            inside = set(nodes)
            leaving = [node for node in nodes if not inside.issuperset(node.users)]
            if len(leaving) == 1 and self.exportable(leaving[0]):
                found[path] = leaving[0]
        return found

    def inside(self, path: str) -> list[fx.Node]:
        """The operators of the module at `path`, those of its own modules included."""
        return [node for node in self.nodes if not path or any(one == path for one, _ in stack(node))]

    def children(self, path: str) -> dict[str, fx.Node]:
        """The largest modules within the module at `path` that have a boundary, by path."""
        found: dict[str, fx.Node] = {}
        for node in self.inside(path):
            paths = [one for one, _ in stack(node)]
            below = paths[paths.index(path) + 1 :] if path in paths else paths
            for one in below:
                if one in self.boundaries:
                    found[one] = self.boundaries[one]
                    break
        return dict(sorted(found.items(), key=lambda item: self.order[item[1]]))

    def place(self, node: fx.Node) -> Place:
        """The innermost module around `node`; of what an island computes, the island."""
        around = stack(node) or [("", type(self.network.module).__name__)]
        islands = {part.island for part in self.wide if node in part.nodes}
        path, kind = next((one for one in around if unnumbered(one[0]) in islands), around[-1])
        source, code = _source(node)
        return Place(path, kind.rpartition(".")[2], operator(node), source, code)

    def prefix(self, node: fx.Node) -> Network:
        """The network that ends with `node`."""
        return self._network([node], self.network.inputs, {})

    def part(self, nodes: Sequence[fx.Node]) -> Network | None:
        """`nodes` alone, the last of them as the output; None where they take anything but one tensor per image."""
        inside = set(nodes)
        given: list[fx.Node] = []
        for node in nodes:
            for one in node.all_input_nodes:
                if one not in inside and one not in given and self._depends_on_input(one):
                    given.append(one)
        if len(given) != 1:
            return None
        value = given[0].meta.get("val")
        if given[0] in self.hidden:  # an input of a float16 artefact is rounded
            return None
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.shape[0] != self._batch:
            return None
        spec = TensorSpec(GIVEN, tuple(value.shape), "float32", "")
        if given[0].op == "placeholder":
            spec = self.network.inputs[0]
        return self._network([nodes[-1]], (spec,), {given[0]: spec.name})

    def given(self, nodes: Sequence[fx.Node]) -> fx.Node:
        """The one node that `part(nodes)` takes."""
        inside = set(nodes)
        return next(
            one for node in nodes for one in node.all_input_nodes if one not in inside and self._depends_on_input(one)
        )

    def _depends_on_input(self, node: fx.Node) -> bool:
        return any(one.op == "placeholder" for one in self.ancestors(node) | {node})

    def _network(self, ends: Sequence[fx.Node], inputs: tuple[TensorSpec, ...], given: dict[fx.Node, str]) -> Network:
        """The graph that computes `ends`, with a placeholder for each node of `given`, as wide as in the network."""
        needed: set[fx.Node] = set()
        waiting = list(ends)
        while waiting:
            one = waiting.pop()
            if one not in needed and one not in given:
                needed.add(one)
                waiting.extend(one.all_input_nodes)
        if not given:
            needed |= {node for node in self.order if node.op == "placeholder"}
        wide = [part for part in self.wide if not needed.isdisjoint(part.nodes)]
        outputs = tuple(
            TensorSpec(VALUE if len(ends) == 1 else f"{VALUE}{index}", tuple(node.meta["val"].shape), "float32", "")
            for index, node in enumerate(ends)
        )
        return replace(
            self.network,
            module=cut(self.graph_module, sorted(needed, key=self.order.__getitem__), ends, given, wide),
            inputs=inputs,
            outputs=outputs,
            labels=None,
            islands=tuple(part.name for part in wide if part.island),
            reductions=tuple(part.name for part in wide if not part.island),
            part=True,
        )


def stack(node: fx.Node) -> list[tuple[str, str]]:
    """The modules that a node belongs to, outermost first: path and class. The network itself is left out."""
    entries = (node.meta.get("nn_module_stack") or {}).values()
    return [(str(path), str(kind)) for path, kind in entries if path]


def is_product(node: fx.Node) -> bool:
    return node.op == "call_function" and operator(node).partition(".")[0] in PRODUCTS


def operator(node: fx.Node) -> str:
    """The operator of torch: "linear", "add"."""
    return str(node.target).removeprefix("aten.").partition(".")[0]


def wide(module: nn.Module) -> nn.Module:
    """A float64 copy: for what float32 itself rounds."""
    return copy.deepcopy(module).double()


def _flat(value: Any) -> list[fx.Node]:
    if isinstance(value, fx.Node):
        return [value]
    return [node for item in value for node in _flat(item)] if isinstance(value, (list, tuple)) else []


def _frames(node: fx.Node) -> Iterator[tuple[str, int, str]]:
    """File, line and code of every frame that the tracer saw, outermost first."""
    lines = (node.meta.get("stack_trace") or "").splitlines()
    for index, line in enumerate(lines):
        if match := FRAME.search(line):
            yield match["file"], int(match["line"]), lines[index + 1].strip() if index + 1 < len(lines) else ""


def _source(node: fx.Node) -> tuple[str, str]:
    """The last line of code that is not torch's own."""
    torch_folder = str(Path(torch.__file__).parent)
    own = [frame for frame in _frames(node) if not frame[0].startswith(torch_folder)]
    if not own:
        return "", ""
    file, line, code = own[-1]
    return f"{_importable(Path(file))}:{line}", code


def _importable(path: Path) -> Path:
    """`path` from the folder that it is imported from, which means the same on every machine."""
    roots = [Path(entry) for entry in sys.path if entry]
    inside = [path.relative_to(root) for root in roots if path.is_relative_to(root)]
    return min(inside, key=lambda one: len(one.parts), default=path)
