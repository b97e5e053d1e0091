"""Peak memory of one inference, in a process of its own: prints bytes above what was there before.

python benchmarks/memory.py RUNTIME FILE SIZE
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import psutil
from runtimes import RUNTIMES


def main(title: str, path: str, size: str) -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    peak, done = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    subject = RUNTIMES[title].load(Path(path), int(size))
    for _ in range(3):
        subject()
    done.set()
    watcher.join()
    print(peak - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
