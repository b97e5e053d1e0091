"""Does the export give back what Castling saves? Every question of docs/speed.md, asked in one sitting on one core.

    python benchmarks/speed.py [--only NAME,...] [--all]     (make bench: the short set, under ten minutes)

Writes results/speed.json, speed.md and speed.png. Networks have random weights where only time is asked for; accuracy
is that of the trained ones that are bundled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import onnxruntime
import torch
from sitting import Ratio, as_document, environment, one_core, peak_bytes, ratio, table, timings
from subjects import Floor, cast, handed, trained
from torch import nn

import castling_deploy
from castling_deploy import bundled
from castling_deploy.quiet import toolchain
from castling_deploy.request import Int8
from castling_deploy.target import target_named

RESULTS = Path(__file__).resolve().parent / "results"
NETWORKS = ("castling-deit-tiny", "castling-levit-128s")
SIZES = (224, 384, 512, 768, 1024)
Subject = Callable[[], object]


def image(size: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)


# ONNX Runtime


def session(path: Path, size: int) -> Subject:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = 1, 1
    options.log_severity_level = 3
    made = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {made.get_inputs()[0].name: image(size)}
    return lambda: made.run(None, feed)


def naive_onnx(network: nn.Module, size: int, path: Path) -> Path:
    """What a user would write."""
    with toolchain("onnx"), torch.no_grad():
        program = torch.onnx.export(network, (torch.zeros(1, 3, size, size),), dynamo=True, verbose=False)
    assert program is not None
    program.save(path)
    return path


def ours(name: str, size: int, target: str, precision: str, scratch: Path) -> Path:
    """The folder of an export by the public interface; int8 may cost anything: the weights are random."""
    result = castling_deploy.export(
        trained(name, size),
        target=target,
        precision=precision,
        output=scratch / f"{name}-{size}-{target}-{precision}",
        int8=Int8(max_drop=1e9) if precision == "int8" else Int8(),
    )
    assert result.path is not None
    return result.path


def unverified(name: str, size: int, scratch: Path) -> Path:
    """The exporter's part of `ours` alone: the reference, as trained, takes minutes for thousands of tokens."""
    folder = scratch / f"{name}-{size}-unverified"
    folder.mkdir()
    target = target_named("onnx")
    with toolchain("onnx"):
        target.export(handed(name, size), target.precisions[0], target.options(), folder)
    return folder


# ExecuTorch


def program(path: Path, size: int) -> Subject:
    from executorch.runtime import Runtime

    from castling_deploy.export.executorch_session import require_threads

    require_threads(1)
    method = Runtime.get().load_program(path).load_method("forward")
    tensor = torch.from_numpy(image(size))
    return lambda: method.execute([tensor])


def naive_pte(network: nn.Module, size: int, path: Path) -> Path:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    with toolchain("executorch"), torch.no_grad():
        exported = torch.export.export(network, (torch.zeros(1, 3, size, size),))
        path.write_bytes(
            to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch().buffer
        )
    return path


# both of them


@dataclass(frozen=True)
class Runtime:
    """Who runs what is compared: `must` holds what is asked for and what is aimed at, by what stands over what."""

    title: str
    target: str
    naive: Callable[[nn.Module, int, Path], Path]
    load: Callable[[Path, int], Subject]
    must: Mapping[str, tuple[float, float]]


ORT = Runtime(
    "ONNX Runtime",
    "onnx",
    naive_onnx,
    session,
    {
        "ours over naive": (0.95, 0.85),
        "ours over floor": (1.22, 1.12),
        "int8 over ours, castling-deit-tiny": (0.48, 0.40),
        "int8 over ours, castling-levit-128s": (0.60, 0.40),
    },
)
XNNPACK = Runtime(
    "ExecuTorch",
    "executorch",
    naive_pte,
    program,
    {
        "ours over naive": (0.85, 0.72),
        "ours over floor": (1.40, 1.20),
        "ours over softmax": (0.60, 0.52),
        "int8 over ours": (0.55, 0.45),
    },
)


def at_224(runtime: Runtime, names: Sequence[str], scratch: Path) -> list[Ratio]:
    """Ours, the naive export, softmax and the floor at 224 pixels; int8."""
    found: list[Ratio] = []
    for name in names:
        file = target_named(runtime.target).file
        written = scratch / f"{name}-{runtime.target}"
        written.mkdir()
        paths = {
            "ours": ours(name, 224, runtime.target, "fp32", scratch) / file,
            "int8": ours(name, 224, runtime.target, "int8", scratch) / file,
            "naive": runtime.naive(cast(name, 224), 224, written / f"naive-{file}"),
            "softmax": runtime.naive(trained(name, 224, "softmax"), 224, written / f"softmax-{file}"),
            "floor": runtime.naive(Floor(cast(name, 224), 224), 224, written / f"floor-{file}"),
        }
        times = timings({kind: runtime.load(path, 224) for kind, path in paths.items()})
        for one, other in (
            ("ours", "naive"),
            ("ours", "floor"),
            ("naive", "floor"),
            ("ours", "softmax"),
            ("floor", "softmax"),
            ("int8", "ours"),
        ):
            asked = f"{one} over {other}"
            limits = runtime.must.get(f"{asked}, {name}", runtime.must.get(asked, (None, None)))
            found.append(ratio(f"{runtime.title}, {name}, 224 px", one, other, times, *limits))
    return found


def onnx_runtime(scratch: Path) -> list[Ratio]:
    return at_224(ORT, NETWORKS, scratch)


def executorch(scratch: Path) -> list[Ratio]:
    """Castling-DeiT-T alone in the short set: lowering takes most of the time."""
    return at_224(XNNPACK, NETWORKS if every_network else NETWORKS[:1], scratch)


# tokens


def scaled(scratch: Path) -> Mapping[int, dict[str, Path]]:
    name = NETWORKS[0]
    sizes = SIZES if every_network else (224, 512, 1024)
    return {
        size: {
            "castled": unverified(name, size, scratch) / "model.onnx",
            "softmax": naive_onnx(trained(name, size, "softmax"), size, scratch / f"{size}-softmax.onnx"),
        }
        for size in sizes
    }


def tokens(scratch: Path) -> list[Ratio]:
    """Castled and softmax from 224 to 1024 pixels: time, its growth, and memory."""
    found: list[Ratio] = []
    paths = scaled(scratch)
    curves.clear()
    for size, both in paths.items():
        times = timings({kind: session(path, size) for kind, path in both.items()})
        must = (0.16, 0.13) if size == 1024 else (None, None)
        found.append(ratio(f"ONNX Runtime, castling-deit-tiny, {size} px", "castled", "softmax", times, *must))
        peaks = {kind: peak_bytes("memory.py", str(path), str(size)) for kind, path in both.items()}
        limit = (0.35, 0.30) if size == 1024 else (None, None)
        found.append(proportion(f"peak memory, castling-deit-tiny, {size} px", "castled", "softmax", peaks, *limit))
        curves[size] = {
            kind: {"median_s": times[kind].median_s, "min_s": times[kind].min_s, "peak_bytes": peaks[kind]}
            for kind in both
        }
    grown = timings({f"{size} px": session(paths[size]["castled"], size) for size in (512, 1024)})
    found.append(ratio("growth with four times the tokens, castled", "1024 px", "512 px", grown, 4.4, 4.1))
    return found


def proportion(
    question: str, name: str, against: str, sizes: Mapping[str, float], must: float | None, aim: float | None
) -> Ratio:
    """Of two numbers that are no times."""
    share = sizes[name] / sizes[against]
    is_time = against == "1 s"
    return Ratio(question, name, against, share, share, share, sizes[name], sizes[against], 1, must, aim, is_time)


# the trained networks


def trained_networks(scratch: Path) -> list[Ratio]:
    """fp32, fp16 and int8 of what is bundled: accuracy, size and time in ONNX Runtime."""
    found: list[Ratio] = []
    accuracies.clear()
    for model in bundled.CHECKPOINTS:
        network = castling_deploy.load(model=model)
        subjects: dict[str, Subject] = {}
        for precision in ("fp32", "fp16", "int8"):
            result = castling_deploy.export(
                network, target="onnx", precision=precision, output=scratch / "trained", overwrite=True
            )
            assert result.path is not None and result.parity is not None
            size = result.artifact.inputs[0].shape[-1] if result.artifact else 0
            subjects[precision] = session(result.path / "model.onnx", size)
            accuracies.append(
                {
                    "network": model,
                    "precision": precision,
                    "score": result.parity.witnesses[0].score,
                    "bytes": (result.path / "model.onnx").stat().st_size,
                    "verdict": result.parity.verdict.value,
                }
            )
        times = timings(subjects)
        for row in accuracies[-3:]:
            row["median_s"] = times[row["precision"]].median_s
        found.append(ratio(f"ONNX Runtime, {model}", "int8", "fp32", times))
    return found


# the tool itself


def tool(scratch: Path) -> list[Ratio]:
    """Wall time of the command."""
    castling = str(Path(sys.executable).with_name("castling"))
    subjects = {
        "--help": [castling, "--help"],
        "bundled to all targets": [castling, "export", "--target", "all", "--no-benchmark", "-o", str(scratch / "a")],
    }
    limits = {"--help": (0.5, 0.3), "bundled to all targets": (40.0, 25.0)}
    if every_network:
        checkpoint = scratch / "deit-base.safetensors"
        write_checkpoint("castling-deit-base", checkpoint)
        for target in ("onnx", "executorch"):
            name = f"DeiT-B to {target}"
            subjects[name] = [
                castling, "export", str(checkpoint), "--target", target, "--no-benchmark", "-o", str(scratch / "b")
            ]  # fmt: skip
            limits[name] = (60.0, 40.0)
    found = []
    os.sched_setaffinity(0, range(os.cpu_count() or 1))  # of a user's machine, not of one core
    for name, command in subjects.items():
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        seconds = time.perf_counter() - started
        if done.returncode not in (0, 5):  # random weights may be inconclusive
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
        found.append(
            proportion(
                f"wall time in s, {name}", "the command", "1 s", {"the command": seconds, "1 s": 1.0}, *limits[name]
            )
        )
    one_core()
    return found


def write_checkpoint(name: str, path: Path) -> None:
    from safetensors.torch import save_file

    state = {key: value.contiguous() for key, value in trained(name, 224).state_dict().items()}
    save_file({key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}, path)


def plot(path: Path) -> None:
    """Time and memory over tokens, on logarithmic axes: the slope is the growth exponent."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, key, factor, label in zip(
        axes, ("median_s", "peak_bytes"), (1e3, 1e-6), ("median of one image, ms", "peak memory, MB"), strict=True
    ):
        for kind in ("softmax", "castled"):
            counts = [(size // 16) ** 2 + 1 for size in curves]
            values = [float(curves[size][kind][key]) * factor for size in curves]
            slope = np.polyfit(np.log(counts[-2:]), np.log(values[-2:]), 1)[0]
            axis.loglog(counts, values, "o-", label=f"{kind}: grows with N^{slope:.2f} at the end")
        axis.set_xlabel("tokens N")
        axis.set_ylabel(label)
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("DeiT-T in ONNX Runtime, one core: castled by this tool, and with its softmax exported naively")
    figure.savefig(path, dpi=120)


QUESTIONS: dict[str, Callable[[Path], list[Ratio]]] = {
    "onnx": onnx_runtime,
    "executorch": executorch,
    "tokens": tokens,
    "trained": trained_networks,
    "tool": tool,
}
curves: dict[int, dict[str, Any]] = {}
accuracies: list[dict[str, Any]] = []
every_network = False


def main() -> int:
    global every_network
    parser = ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default=",".join(QUESTIONS))
    parser.add_argument("--all", action="store_true", help="more networks and sizes: about half an hour")
    asked = parser.parse_args()
    every_network = asked.all
    torch.set_num_threads(1)
    core, ratios = one_core(), []
    started = environment(core)
    with tempfile.TemporaryDirectory() as scratch:
        for name in asked.only.split(","):
            print(f"{name} ...", file=sys.stderr, flush=True)
            found = QUESTIONS[name](Path(scratch))
            ratios += found
            print(table(found), flush=True)
    if set(asked.only.split(",")) == QUESTIONS.keys():
        document = {
            "environment": started,
            "ratios": as_document(ratios),
            "curves": curves,
            "trained": accuracies,
        }
        (RESULTS / "speed.json").write_text(json.dumps(document, indent=1) + "\n")
        (RESULTS / "speed.md").write_text(report(started, ratios))
        plot(RESULTS / "speed.png")
    return 0


def report(machine: Mapping[str, object], ratios: list[Ratio]) -> str:
    lines = ["# Speed", "", "Written by `make bench`; see docs/speed.md for what is asked.", ""]
    lines += [f"- {name}: {value}" for name, value in machine.items()]
    lines += [
        "",
        table(ratios),
        "",
        "| network | precision | score | size | median | parity |",
        "|---|---|---|---|---|---|",
    ]
    for row in accuracies:
        score = "-" if row["score"] is None else f"{row['score']:.2f}"
        lines.append(
            f"| {row['network']} | {row['precision']} | {score} | {row['bytes'] / 1e6:.2f} MB "
            f"| {row['median_s'] * 1e3:.2f} ms | {row['verdict']} |"
        )
    lines += ["", "![time and memory over tokens](speed.png)", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
