"""Qualcomm's HTP (the NPU of its phones), simulated on this machine by its own libraries, on an ONNX artefact."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from castling_deploy.eight_bits import Activations
from castling_deploy.errors import ExportError
from castling_deploy.export.to_onnx import BATCH, FILE
from castling_deploy.quiet import toolchain
from castling_deploy.target import Artifact, Missing, Precision, Witness, WitnessKind

if TYPE_CHECKING:
    from castling_deploy.runner import Advance, Values
    from castling_deploy.target import Arrays

PROVIDER = "QNNExecutionProvider"
HTP, SOC = "75", "57"  # of Snapdragon 8 Gen 3, SM8650; without a chip's number, floats are refused (QNN 2.7)


class QnnHost:
    """Every float is computed in the HTP's float16: float32 artefacts too, there is no other float in it. int8 is in
    products of 16-bit activations and 8-bit weights, what stands between them in float16.

    The simulation rounds to float16's 11 significant bits, and keeps float32's exponents: 300 squared is 89984 inside a
    graph, where float16 ends at 65504. So it does not see an overflow (onnxruntime-qnn 2.7.0, chips v73 to v81).
    """

    name = "qnn"
    about = "Qualcomm's NPU, which computes in float16, simulated"
    targets: tuple[str, ...] = ("onnx",)
    images: int | None = 8  # one takes 0.7 s of the bundled LeViT, 13 s of DeiT-T

    def missing(self) -> Missing | None:
        if (sys.platform, platform.machine()) != ("linux", "x86_64"):
            return Missing("Qualcomm simulates its HTP on x86-64 Linux alone", "use such a machine")
        if find_spec("onnxruntime_qnn") is None:
            return Missing("onnxruntime-qnn is not installed", "pip install 'castling-deploy[qnn]'")
        return None

    def witness(self) -> Witness:
        return Witness(f"onnxruntime-qnn {version('onnxruntime-qnn')} (HTP v{HTP}, float16)", WitnessKind.SIMULATED)

    def arithmetic(self, precision: Precision) -> Precision:
        return Precision.INT8 if precision is Precision.INT8 else Precision.FP16

    def unfit(self, artifact: Artifact) -> Missing | None:
        if "weights" in artifact.details and artifact.details.get("activations") != [Activations.UINT16]:
            return Missing("the HTP multiplies weights in levels by uint16 alone", "export with --activations uint16")
        if "Scan" in artifact.details.get("nodes", ()):
            return Missing("the HTP has no Scan", "export without --tokens-at-once")
        return None

    def run(self, folder: Path, artifact: Artifact, inputs: Values, advance: Advance) -> Mapping[str, Values]:
        from castling_deploy.execution import run_artifact

        (spec,) = artifact.inputs
        if spec.shape[0] < 0:  # the HTP has no dynamic axes: one image at a time
            artifact = replace(artifact, inputs=(replace(spec, shape=(1, *spec.shape[1:])),))
        with toolchain("Qualcomm's HTP does not run the artefact"):
            return run_artifact(_HtpSession(folder / FILE, self.witness()), artifact, inputs, advance)


class _HtpSession:
    """`model`, every node of it compiled for the HTP. Raises ExportError when one is not."""

    def __init__(self, model: Path, witness: Witness) -> None:
        import onnxruntime
        import onnxruntime_qnn

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors; the exceptions carry them
        options.add_free_dimension_override_by_name(BATCH, 1)
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        options.add_provider_for_devices(
            _devices(),
            {
                "backend_path": onnxruntime_qnn.get_qnn_htp_path(),
                "htp_arch": HTP,
                "soc_model": SOC,
                "enable_htp_fp16_precision": "1",
                "offload_graph_io_quantization": "0",  # else the CPU rounds the image
            },
        )
        self._session = onnxruntime.InferenceSession(model, options)
        self._require_htp_alone()
        self._outputs = [output.name for output in self._session.get_outputs()]
        self.witness = witness

    def _require_htp_alone(self) -> None:
        parts = self._session.get_provider_graph_assignment_info()
        nodes = {node.op_type for part in parts if part.ep_name != PROVIDER for node in part.get_nodes()}
        if nodes or not parts:
            raise ExportError(
                f"the HTP does not take these operators, which the CPU would compute: {', '.join(sorted(nodes))}",
                hint="export without what adds them (a detector's boxes: --nms), and compute it after the network",
            )

    def __call__(self, inputs: Arrays) -> Arrays:
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(inputs))))


def _devices() -> list[Any]:
    """ONNX Runtime's devices of Qualcomm's provider, which is registered once in a process."""
    import onnxruntime
    import onnxruntime_qnn

    def known() -> list[Any]:
        return [device for device in onnxruntime.get_ep_devices() if device.ep_name == PROVIDER]

    if not known():
        onnxruntime.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
    return known()[:1]
