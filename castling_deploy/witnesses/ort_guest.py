"""Runs on the emulated machine, with nothing but numpy and onnxruntime: `ort_guest.py PACKAGES MODEL`. See guest.py."""

import json
import math
import os
import sys


def main() -> None:
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the runtime prints must not stand between the tensors
    sys.path.insert(0, sys.argv[1])
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # the order of sums does not depend on the machine
    session = onnxruntime.InferenceSession(sys.argv[2], options, providers=["CPUExecutionProvider"])
    inputs = [entry.name for entry in session.get_inputs()]
    outputs = [entry.name for entry in session.get_outputs()]
    out.write(json.dumps({"inputs": inputs, "outputs": outputs}).encode() + b"\n")
    out.flush()
    while True:
        feed = {}
        for name in inputs:
            header = sys.stdin.buffer.readline().decode().split()
            if not header:
                return
            dtype, sizes = np.dtype(header[0]), tuple(map(int, header[1:]))
            data = sys.stdin.buffer.read(math.prod(sizes) * dtype.itemsize)
            feed[name] = np.frombuffer(data, dtype).reshape(sizes)
        for values in session.run(outputs, feed):
            out.write(" ".join([values.dtype.name, *map(str, values.shape)]).encode() + b"\n")
            out.write(values.tobytes())
        out.flush()


if __name__ == "__main__":
    main()
