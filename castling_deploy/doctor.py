"""Which targets can be exported and run here, and the exact line that mends what cannot."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata

from rich.console import Console
from rich.table import Table
from rich.text import Text

from castling_deploy.runner import OwnWitness, precisions_of, runners
from castling_deploy.target import TARGETS, Missing, Precision, Witness, target_named

TOOLS = (
    "torch",
    "numpy",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-qnn",
    "openvino",
    "coremltools",
    "coreai-core",
    "coreai-torch",
    "executorch",
    "tensorrt",
    "tensorrt-rtx",
    "safetensors",
)


@dataclass(frozen=True)
class TargetHealth:
    """One target on this machine."""

    target: str
    precisions: tuple[str, ...]
    missing: Missing | None
    unfinished: Missing | None
    witness: Witness


@dataclass(frozen=True)
class RunnerHealth:
    """One runner of `castling verify --on` on this machine."""

    name: str
    about: str
    targets: tuple[str, ...]
    precisions: tuple[Precision, ...]
    missing: Missing | None
    witness: Witness | None


@dataclass(frozen=True)
class Health:
    """The machine, its tools (None: not installed), and what each target and each runner can do here."""

    system: str
    python: str
    tools: dict[str, str | None]
    targets: tuple[TargetHealth, ...]
    runners: tuple[RunnerHealth, ...]


def examine() -> Health:
    """Look, import nothing heavy, install nothing."""
    targets = [target_named(name) for name in TARGETS]
    return Health(
        platform.platform(terse=True),
        platform.python_version(),
        {tool: _version(tool) for tool in TOOLS},
        tuple(
            TargetHealth(target.name, tuple(target.precisions), target.missing(), target.unfinished(), target.witness())
            for target in targets
        ),
        tuple(
            RunnerHealth(
                runner.name,
                runner.about,
                runner.targets,
                precisions_of(runner),
                missing,
                None if missing else runner.witness(),
            )
            for runner in (*map(OwnWitness, targets), *runners())
            for missing in (runner.missing(),)
        ),
    )


def _version(tool: str) -> str | None:
    try:
        return metadata.version(tool)
    except metadata.PackageNotFoundError:
        return None


def print_health(health: Health, console: Console) -> None:
    """The machine, what it can export, and who can run that; what is missing comes with its mend."""
    console.print(f"{health.system}, Python {health.python}")
    console.print("  " + ", ".join(f"{tool} {version or 'not installed'}" for tool, version in health.tools.items()))
    table = _table("targets: what castling export writes here", "target", "export", "complete", "verified by")
    for target in health.targets:
        can = target.missing is None
        exported = Text(f"yes ({', '.join(target.precisions)})", "green") if can else Text("no", "yellow")
        seen = f"{target.witness.name} ({target.witness.kind})" if can else "-"
        table.add_row(target.target, exported, _here(can and target.unfinished is None), seen)
    console.print()
    console.print(table)
    lacking = [(target.target, each) for target in health.targets for each in (target.missing, target.unfinished)]
    _print_missing(lacking, console)
    title = "witnesses: who can run what was written here (castling verify DIR --on NAME,NAME, or --on all)"
    table = _table(title, "NAME", "runs", "here", "what it is", "its word")
    for runners_alike in _alike(health.runners):
        first = runners_alike[0]
        words = dict.fromkeys(each.witness.kind for each in runners_alike if each.witness is not None)
        own = "" if len(first.precisions) == len(Precision) else f" ({', '.join(first.precisions)})"
        runs = ", ".join(target for each in runners_alike for target in each.targets) + own
        table.add_row(first.name, runs, _here(first.missing is None), first.about, ", ".join(words) or "-")
    console.print()
    console.print(table)
    for kind in dict.fromkeys(each.witness.kind for each in health.runners if each.witness is not None):
        console.print(f"  {kind}: {kind.meaning}", style="dim", soft_wrap=True)
    _print_missing([(runner.name, runner.missing) for runner in health.runners], console)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column)
    return table


def _here(yes: bool) -> Text:
    return Text("yes", "green") if yes else Text("no", "yellow")


def _alike(runners: tuple[RunnerHealth, ...]) -> Iterable[list[RunnerHealth]]:
    """Runners of several targets that share their name, and are both here or both not: one row for people."""
    rows: dict[tuple[str, str, bool], list[RunnerHealth]] = {}
    for runner in runners:
        rows.setdefault((runner.name, runner.about, runner.missing is None), []).append(runner)
    return rows.values()


def _print_missing(found: list[tuple[str, Missing | None]], console: Console) -> None:
    """Every lack once, with the line that mends it."""
    for name, missing in dict.fromkeys(found):
        if missing is not None:
            console.print(f"  {name}: {missing.reason}\n    {missing.fix}", soft_wrap=True)
