"""A small PicoDet whose images hold many things, or few, and what an exporter is handed of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from networks import conditioned
from safetensors.torch import save_file
from torch import nn

from castling_deploy.castle import castle
from castling_deploy.fold import fold
from castling_deploy.models.dense import DenseConfig
from castling_deploy.models.detector import PicoDetHead, picodet
from castling_deploy.models.esnet import ESNetConfig
from castling_deploy.models.pico_head import PicoHead
from castling_deploy.preprocessing import Preprocessing
from castling_deploy.probes import probes_for
from castling_deploy.target import Network, TensorSpec

# The finest level has 12 x 16 cells of 8 classes: more than the 1,000 candidates that a level may give.
SMALL_DETECTOR = DenseConfig(
    ESNetConfig(stem=8, widths=(16, 24, 32), middles=((16, 8), (16, 24, 24), (32,)), image_size=(96, 128)),
    PicoDetHead(width=16, convs=1),
    classes=8,
)
SEED = 6  # of the best conditioned of a dozen: float32 rounds its outputs to 3e-5 of their spread
MANY, FEW = -2.0, -6.0  # added to the class logits: over 100 detections in every image, or under 100


def detector(shift: float = MANY, seed: int = SEED, config: DenseConfig = SMALL_DETECTOR) -> nn.Module:
    """In training form and eval mode; its statistics are those of `images`, so that these give different outputs."""
    network = conditioned(picodet().build(config), seed)
    head = network.bbox_head
    assert isinstance(head, PicoHead)
    for conv in head.gfl_cls:
        assert isinstance(conv, nn.Conv2d) and conv.bias is not None
        conv.bias[: config.classes] += shift
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(images(16, config))
    return network.eval()


def detector_network(
    shift: float = MANY, batch: int = 1, seed: int = SEED, config: DenseConfig = SMALL_DETECTOR
) -> Network:
    return network_around(fold(castle(detector(shift, seed, config))), batch, config)


def network_around(module: nn.Module, batch: int = 1, config: DenseConfig = SMALL_DETECTOR) -> Network:
    return Network(
        "picodet",
        module,
        (TensorSpec("image", (batch, 3, *config.image_size), "float32", "NCHW"),),
        raw_specs(batch, config),
        Preprocessing(config.image_size),
        None,
        description="a small picodet",
        metadata={},
    )


def detector_checkpoint(path: Path, shift: float = MANY) -> Path:
    """`path`, now a checkpoint of a small PicoDet."""
    tensors = {name: value.contiguous() for name, value in detector(shift).state_dict().items()}
    save_file(tensors, path, {"castling": json.dumps({"image_size": SMALL_DETECTOR.image_size})})
    return path


def raw_specs(batch: int, config: DenseConfig = SMALL_DETECTOR) -> tuple[TensorSpec, ...]:
    outputs = picodet().outputs(config)
    return tuple(TensorSpec(output.name, (batch, *output.shape), "float32", "N" + output.layout) for output in outputs)


def of_size(height: int, width: int, classes: int) -> DenseConfig:
    backbone = replace(SMALL_DETECTOR.backbone, image_size=(height, width))
    return replace(SMALL_DETECTOR, backbone=backbone, classes=classes)


def images(count: int, config: DenseConfig = SMALL_DETECTOR) -> torch.Tensor:
    """(count, 3, H, W), normalised: the bundled photographs, then the same ones mirrored."""
    probes = probes_for(Preprocessing(config.image_size, keep_ratio=False), None)
    photographs = torch.from_numpy(probes.tensors[: probes.real])
    return torch.cat([photographs, photographs.flip(3)])[:count]
