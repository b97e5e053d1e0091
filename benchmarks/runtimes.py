"""Who runs what is timed, and what a user would write to get there: a network exported as it is, without this tool."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn

from castling_deploy.quiet import toolchain

Subject = Callable[[], object]


def image(size: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)


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


def openvino_model(path: Path, size: int) -> Subject:
    import openvino

    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": "1"}
    request = openvino.Core().compile_model(path, "CPU", options).create_infer_request()
    feed = [image(size)]
    return lambda: request.infer(feed)


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


def compiled(network: nn.Module, size: int) -> Subject:
    """torch.compile on this CPU, after the minute that its first call takes."""
    tensor = torch.from_numpy(image(size))
    made = torch.compile(network)

    def run() -> object:
        with torch.inference_mode():
            return made(tensor)

    run()
    return run


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
OPENVINO = Runtime("OpenVINO", "onnx", naive_onnx, openvino_model, {})
RUNTIMES = {runtime.title: runtime for runtime in (ORT, XNNPACK, OPENVINO)}
