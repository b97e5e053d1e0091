"""TensorRT's parser and builder, in a process of their own: they are native code, whose crash is not to be the user's.

    python tensorrt_build.py MODULE                              can MODULE build here? {"obstacle": reason or null}
    python tensorrt_build.py MODULE model.onnx model.engine      {"built": facts} or {"refused": [error, ...]}

MODULE is `tensorrt` (10 or 11) or `tensorrt_rtx`, which have one API. The answer is the last line on stdout, in JSON.
This file imports nothing of the package, so that it runs from anywhere.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

RUNS_ON = {"tensorrt": "the GPU model that it was built on", "tensorrt_rtx": "compute capability 8.0 and later"}


def gpu_present() -> bool:
    """Whether the CUDA driver is there and finds a GPU."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return bool(driver.cuInit(0) == 0)


def obstacle(name: str) -> str | None:
    """Why the module `name` cannot build here; None when it can."""
    if name == "tensorrt" and not gpu_present():  # only TensorRT-RTX builds without
        return "tensorrt builds engines only where there is an NVIDIA GPU"
    try:
        trt = importlib.import_module(name)
    except (ImportError, OSError) as error:  # libnvinfer is not there, or not for this interpreter
        return f"{name} cannot be imported: {error}"
    if not hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        return f"{name} {trt.__version__} is too old: strongly typed networks came with version 10"
    return None


def build(trt: ModuleType, model: Path, engine: Path) -> dict[str, Any]:
    """The engine of `model`, written to `engine`: `built` with facts, `refused` with errors, or `unwritten`."""
    log = error_log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model.read_bytes()):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        return {
            "refused": [
                f"{error.node_operator()} node '{error.node_name()}' ({error.code().name}): "
                + " ".join(error.desc().split())
                for error in errors
            ]
        }
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and would compute fp32 with 10 bits of mantissa
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return {"refused": log.messages or ["the builder returned no engine"]}
    try:
        engine.write_bytes(plan)
    except OSError as error:  # no space: the disk's fault, not the model's
        return {"unwritten": [error.errno, error.strerror]}
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    products = Counter(
        layer.get_output(0).dtype
        for layer in layers
        if layer.type in (trt.LayerType.CONVOLUTION, trt.LayerType.MATRIX_MULTIPLY)
    )
    names = {trt.DataType.FLOAT: "fp32", trt.DataType.HALF: "fp16"}
    return {
        "built": {
            "builder": trt.__name__,
            "builder_version": trt.__version__,
            "layers": len(layers),
            "runs_on": RUNS_ON[trt.__name__],
            "engine_products": {names.get(dtype, str(dtype)): count for dtype, count in products.items()},
        }
    }


def error_log(trt: ModuleType) -> Any:
    """A logger that keeps the errors in `messages`."""

    class ErrorLog(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.messages.append(" ".join(message.split()))

    return ErrorLog()


if __name__ == "__main__":
    module, *paths = sys.argv[1:]
    print(
        json.dumps(
            build(importlib.import_module(module), *map(Path, paths)) if paths else {"obstacle": obstacle(module)}
        )
    )
