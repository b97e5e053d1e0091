"""Peak memory of one inference by ONNX Runtime, in a process of its own: prints bytes above what was there before.

python benchmarks/memory.py model.onnx SIZE
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import numpy as np
import onnxruntime
import psutil


def main(path: str, size: str) -> None:
    process = psutil.Process()
    image = np.random.default_rng(0).standard_normal((1, 3, int(size), int(size))).astype(np.float32)
    before = process.memory_info().rss
    peak, done = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(Path(path), options, providers=["CPUExecutionProvider"])
    for _ in range(3):
        session.run(None, {session.get_inputs()[0].name: image})
    done.set()
    watcher.join()
    print(peak - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
