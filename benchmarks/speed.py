"""Does the export give back what Castling saves? Every question of docs/speed.md, asked in one sitting on one core.

    python benchmarks/speed.py [--only NAME,...] [--all]     (make bench: the short set, a quarter of an hour)

Writes results/speed.json, speed.md and speed.png. Networks have random weights where only time is asked for; accuracy
is that of the trained ones that are bundled.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import psutil
import torch
from runtimes import OPENVINO, ORT, XNNPACK, Runtime, Subject, compiled
from sitting import Ratio, as_document, environment, one_core, peak_bytes, ratio, table, timings
from subjects import Floor, cast, handed, trained

import castling_deploy
from castling_deploy import bundled
from castling_deploy.quiet import toolchain
from castling_deploy.request import Int8
from castling_deploy.target import TARGETS, Precision, target_named

RESULTS = Path(__file__).resolve().parent / "results"
NETWORKS = ("castling-deit-tiny", "castling-levit-128s")
SIZES = (224, 384, 512, 768, 1024)
AT_ONCE = 256  # tokens
IN_PARTS = f"castled, {AT_ONCE} tokens at a time"


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


def unverified(name: str, size: int, target_name: str, scratch: Path, **options: int) -> Path:
    """The exporter's part of `ours` alone: the reference, as trained, takes minutes for thousands of tokens."""
    target = target_named(target_name)
    folder = scratch / "-".join([name, str(size), target.name, *options, "unverified"])
    if not folder.exists():
        folder.mkdir()
        with toolchain(target.name):
            target.export(handed(name, size), Precision.FP32, target.options(**options), folder)
    return folder / target.file


def at_224(runtime: Runtime, names: Sequence[str], scratch: Path) -> list[Ratio]:
    """Ours, the naive export, softmax and the floor at 224 pixels; int8. With --all, torch.compile too."""
    found: list[Ratio] = []
    for name in names:
        file = target_named(runtime.target).file
        written = scratch / f"{name}-{runtime.title}"
        written.mkdir()
        paths = {
            "ours": ours(name, 224, runtime.target, "fp32", written) / file,
            "int8": ours(name, 224, runtime.target, "int8", written) / file,
            "naive": runtime.naive(cast(name, 224), 224, written / f"naive-{file}"),
            "softmax": runtime.naive(trained(name, 224, "softmax"), 224, written / f"softmax-{file}"),
            "floor": runtime.naive(Floor(cast(name, 224), 224), 224, written / f"floor-{file}"),
        }
        subjects = {kind: runtime.load(path, 224) for kind, path in paths.items()}
        asked = ["ours naive", "ours floor", "naive floor", "ours softmax", "floor softmax", "int8 ours"]
        if every_network:
            subjects["torch.compile"] = compiled(cast(name, 224), 224)
            asked.append("ours torch.compile")
        times = timings(subjects)
        for one, other in map(str.split, asked):
            pair = f"{one} over {other}"
            limits = runtime.must.get(f"{pair}, {name}", runtime.must.get(pair, (None, None)))
            found.append(ratio(f"{runtime.title}, {name}, 224 px", one, other, times, *limits))
    return found


def onnx_runtime(scratch: Path) -> list[Ratio]:
    return at_224(ORT, NETWORKS, scratch)


def executorch(scratch: Path) -> list[Ratio]:
    """Castling-DeiT-T alone in the short set: lowering takes most of the time."""
    return at_224(XNNPACK, NETWORKS if every_network else NETWORKS[:1], scratch)


def openvino(scratch: Path) -> list[Ratio]:
    return at_224(OPENVINO, NETWORKS, scratch) if every_network else []


# tokens


def tokens(scratch: Path) -> list[Ratio]:
    """Castled and softmax from 224 to 1024 pixels: time, its growth, and memory."""
    curves.clear()
    found: list[Ratio] = []
    for runtime in (ORT, OPENVINO, XNNPACK) if every_network else (ORT,):
        found += growing(runtime, scratch)
    return found


def growing(runtime: Runtime, scratch: Path) -> list[Ratio]:
    """By one runtime. What has to be reached was asked of ONNX Runtime."""
    name, found, asked = NETWORKS[0], list[Ratio](), runtime is ORT
    paths = {
        size: {
            "castled": unverified(name, size, runtime.target, scratch),
            "softmax": runtime.naive(
                trained(name, size, "softmax"), size, scratch / f"{size}-softmax-{target_named(runtime.target).file}"
            ),
        }
        for size in (SIZES if every_network else (224, 512, 1024))
    }
    if runtime.target == "onnx":  # large images have a form of their own there
        paths[1024][IN_PARTS] = unverified(name, 1024, runtime.target, scratch, tokens_at_once=AT_ONCE)
    curve = curves[runtime.title] = dict[int, Any]()
    for size, kinds in paths.items():
        times = timings({kind: runtime.load(path, size) for kind, path in kinds.items()})
        peaks = {kind: peak_bytes("memory.py", runtime.title, str(path), str(size)) for kind, path in kinds.items()}
        must, limit = ((0.16, 0.13), (0.35, 0.30)) if asked and size == 1024 else ((None, None), (None, None))
        for kind in castled(kinds):
            found.append(ratio(f"{runtime.title}, {name}, {size} px", kind, "softmax", times, *must))
            question = f"peak memory of {runtime.title}, {name}, {size} px"
            found.append(proportion(question, kind, "softmax", peaks, *limit))
        curve[size] = {
            kind: {"median_s": times[kind].median_s, "min_s": times[kind].min_s, "peak_bytes": peaks[kind]}
            for kind in ("castled", "softmax")
        }
    small, large, must = paths[512]["castled"], paths[1024], (4.4, 4.1) if asked else (None, None)
    loaded = {f"{kind}, 1024 px": runtime.load(large[kind], 1024) for kind in castled(large)}
    times = timings({"512 px": runtime.load(small, 512), **loaded})
    question = f"{runtime.title}, growth with four times the tokens"
    return [*found, *(ratio(question, name, "512 px", times, *must) for name in loaded)]


def castled(kinds: Iterable[str]) -> list[str]:
    return [kind for kind in kinds if kind != "softmax"]


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
            subjects[precision] = ORT.load(result.path / "model.onnx", size)
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
    """Wall time of the command, and the memory of all its processes together."""
    castling = str(Path(sys.executable).with_name("castling"))
    export = [castling, "export", "--no-benchmark", "--overwrite", "-o", str(scratch / "tool")]
    commands = {"--help": [castling, "--help"], "bundled to all targets": [*export, "--target", "all"]}
    limits = {"--help": (0.5, 0.3), "bundled to all targets": (40.0, 25.0)}
    for size in ("tiny", "small", "base") if every_network else ():
        checkpoint = scratch / f"deit-{size}.safetensors"
        write_checkpoint(f"castling-deit-{size}", checkpoint)
        for target in TARGETS:
            name = f"DeiT-{size} to {target}, fp32"
            commands[name] = [*export, str(checkpoint), "--target", target, "--precision", "fp32"]
            if size == "base":
                limits[name] = (60.0, 40.0)
    found = []
    os.sched_setaffinity(0, range(os.cpu_count() or 1))  # of a user's machine, not of one core
    for name, command in commands.items():
        seconds, peak = watched(command)
        wall, memory = {"the command": seconds, "1 s": 1.0}, {"the command": peak, "1 GB": 1e9}
        found.append(proportion(f"wall time, {name}", "the command", "1 s", wall, *limits.get(name, (None, None))))
        found.append(proportion(f"peak memory, {name}", "the command", "1 GB", memory, None, None))
    one_core()
    return found


def watched(command: list[str]) -> tuple[float, float]:
    """Seconds, and the most bytes that the command and its children held together (shared pages counted once)."""
    started, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as told:
        users = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=told, env=users)
        while process.poll() is None:
            peak = max(peak, held(process))
            time.sleep(0.05)
        seconds = time.perf_counter() - started
        told.seek(0)
        if process.returncode not in (0, 5):  # random weights may be inconclusive
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{told.read()}")
    return seconds, peak


def held(process: psutil.Process) -> int:
    """Bytes of a process and its children; one that ends meanwhile counts no more."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            total += each.memory_full_info().pss
    return total


def write_checkpoint(name: str, path: Path) -> None:
    castling_deploy.save(trained(name, 224), path)


def plot(path: Path) -> None:
    """Time and memory over tokens, on logarithmic axes: the slope is the growth exponent."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shape = len(curves), 2
    figure, axes = pyplot.subplots(*shape, figsize=(10, 4 * shape[0]), layout="constrained", squeeze=False)
    for row, (title, curve) in zip(axes, curves.items(), strict=True):
        for axis, key, factor, label in zip(
            row, ("median_s", "peak_bytes"), (1e3, 1e-6), ("median of one image, ms", "peak memory, MB"), strict=True
        ):
            for kind in ("softmax", "castled"):
                counts = [(size // 16) ** 2 + 1 for size in curve]
                values = [float(curve[size][kind][key]) * factor for size in curve]
                slope = np.polyfit(np.log(counts[-2:]), np.log(values[-2:]), 1)[0]
                axis.loglog(counts, values, "o-", label=f"{kind}: grows with N^{slope:.2f} at the end")
            axis.set(xlabel="tokens N", ylabel=label, title=title)
            axis.set_xticks(counts, [str(count) for count in counts])
            axis.set_xticks([], minor=True)
            axis.legend(frameon=False)
            axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("DeiT-T on one core: castled by this tool, and with its softmax exported naively")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


QUESTIONS: dict[str, Callable[[Path], list[Ratio]]] = {
    "onnx": onnx_runtime,
    "executorch": executorch,
    "openvino": openvino,
    "tokens": tokens,
    "trained": trained_networks,
    "tool": tool,
}
curves: dict[str, dict[int, Any]] = {}
accuracies: list[dict[str, Any]] = []
every_network = False


def main() -> int:
    global every_network
    parser = ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default=",".join(QUESTIONS))
    parser.add_argument("--all", action="store_true", help="more networks and sizes: about an hour")
    asked = parser.parse_args()
    every_network = asked.all
    torch.set_num_threads(1)
    core, ratios = one_core(), list[Ratio]()
    started = environment(core)
    whole = set(asked.only.split(",")) == QUESTIONS.keys()
    with tempfile.TemporaryDirectory() as scratch:
        for name in asked.only.split(","):
            print(f"{name} ...", file=sys.stderr, flush=True)
            found = QUESTIONS[name](Path(scratch))
            ratios += found
            print(table(found), flush=True)
            if whole:
                write(started, ratios)  # what the next question loses, it does not lose with it
    return 0


def write(machine: Mapping[str, object], ratios: list[Ratio]) -> None:
    """What is known so far, as results/speed.*."""
    document = {
        "environment": machine,
        "ratios": as_document(ratios),
        "curves": curves,
        "trained": accuracies,
    }
    (RESULTS / "speed.json").write_text(json.dumps(document, indent=1) + "\n")
    (RESULTS / "speed.md").write_text(report(machine, ratios))
    if curves:
        plot(RESULTS / "speed.png")


def report(machine: Mapping[str, object], ratios: list[Ratio]) -> str:
    by = "`benchmarks/speed.py --all`" if every_network else "`make bench`"
    lines = ["# Speed", "", f"Written by {by}; see docs/speed.md for what is asked.", ""]
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
