"""A TensorRT engine on the GPU.

No GPU has run this file yet: what is checked is that TensorRT 10.0, 10.9, 11.4 and TensorRT-RTX 1.7 have every name.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from castling_deploy.errors import ExportError
from castling_deploy.target import Witness, WitnessKind

if TYPE_CHECKING:
    from castling_deploy.target import Arrays


class EngineSession:
    """The engine at `path`, ready to run. Raises ExportError when the module `trt` cannot load it on this GPU."""

    def __init__(self, trt: ModuleType, path: Path) -> None:
        import torch

        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))  # has to outlive the engine
        self.engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        device = torch.cuda.get_device_name()
        if self.engine is None:
            raise ExportError(
                f"{trt.__name__} {trt.__version__} cannot load {path.name} on {device}",
                hint="build the engine again on this machine, with the module that runs it",
            )
        self.context = self.engine.create_execution_context()
        self.stream = torch.cuda.Stream()
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        self.outputs = [name for name in names if self.engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT]
        self.witness = Witness(f"{trt.__name__} {trt.__version__} on {device}", WitnessKind.DEVICE)

    def __call__(self, inputs: Arrays) -> Arrays:
        import torch

        with torch.cuda.stream(self.stream):
            tensors = {name: torch.from_numpy(array).cuda() for name, array in inputs.items()}
            tensors |= {
                name: torch.empty(tuple(self.engine.get_tensor_shape(name)), device="cuda") for name in self.outputs
            }
            for name, tensor in tensors.items():
                self.context.set_tensor_address(name, tensor.data_ptr())
            if not self.context.execute_async_v3(self.stream.cuda_stream):
                raise ExportError("TensorRT failed to run the engine", hint="look at its messages on stderr")
            return {name: tensors[name].cpu().numpy() for name in self.outputs}
