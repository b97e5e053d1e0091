"""An ONNX file, run by ONNX Runtime's CPU provider."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from castling_deploy.errors import ExportError
from castling_deploy.target import Witness, WitnessKind

if TYPE_CHECKING:
    from castling_deploy.target import Arrays


class OnnxSession:
    """`path`, ready to run on `threads` threads. Raises ExportError when ONNX Runtime does not load it.

    On x86, ONNX Runtime 1.32 has float32 kernels alone for products, activations and sums: of a float16 graph it keeps
    the storage, computes in float32, and rounds less often than the graph says.
    """

    def __init__(self, path: Path, threads: int, kind: WitnessKind, *, remark: str = "") -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3  # errors; the exceptions below carry them
        if not path.is_file():
            raise ExportError(f"there is no {path.name} in {path.parent}", hint="export the network again")
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the classes of ONNX Runtime's errors have no public base
            raise ExportError(
                f"ONNX Runtime does not load {path.name}: {error}", hint="export the network again"
            ) from error
        self._outputs = [output.name for output in self._session.get_outputs()]
        self.witness = Witness(f"onnxruntime {onnxruntime.__version__}{remark}", kind)

    def __call__(self, inputs: Arrays) -> Arrays:
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(inputs))))
