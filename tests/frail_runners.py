"""Runners that go wrong, for `castling verify --on`: one that crashes, one that hangs, one that lies, one not here."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from castling_deploy.target import Artifact, Missing, Witness, WitnessKind, target_named

if TYPE_CHECKING:
    from castling_deploy.runner import Advance, Values


class Frail:
    about = "a runner that goes wrong"
    targets = ("onnx",)
    images: int | None = None

    def __init__(self, name: str) -> None:
        self.name = name

    def missing(self) -> Missing | None:
        return Missing("its runtime is not installed", "install it") if self.name == "missing" else None

    def witness(self) -> Witness:
        return Witness(f"the {self.name} one", WitnessKind.RUNTIME)

    def run(self, folder: Path, artifact: Artifact, inputs: Values, advance: Advance) -> Mapping[str, Values]:
        from castling_deploy.execution import run_artifact

        if self.name == "crashing":
            ctypes.string_at(0)
        if self.name == "hanging":
            time.sleep(600)
        with target_named("onnx").load(folder) as session:
            outputs = run_artifact(session, artifact, inputs, advance)
        return {name: values + 1 for name, values in outputs.items()}


def crashing() -> Frail:
    return Frail("crashing")


def hanging() -> Frail:
    return Frail("hanging")


def lying() -> Frail:
    return Frail("lying")


def missing() -> Frail:
    return Frail("missing")
