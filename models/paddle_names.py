"""PicoDet by the names that PaddleDetection gives it (release/2.3 and later, ppdet/modeling: backbones/esnet.py,
necks/csp_pan.py, heads/pico_head.py), mapped to ours, which are those of the mmdet port. No value changes."""

from __future__ import annotations

import re

from castling_deploy.models.foreign_names import Tensors, renamed

# All are applied, in this order.
RULES = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"\._mean$", ".running_mean"),
        (r"\._variance$", ".running_var"),
        (r"^(backbone\..*\._se\.conv[12])\.", r"\1.conv."),
        (r"\._batch_norm\.", ".bn."),
        (r"\._(?=conv|se)", "."),
        (r"^neck\.conv_t\.convs\.", "neck.trans.trans."),
        (r"^(neck\..*)\.dwconv\.", r"\1.depthwise_conv.conv."),
        (r"^(neck\..*)\.bn1\.", r"\1.depthwise_conv.bn."),
        (r"^(neck\..*)\.pwconv\.", r"\1.pointwise_conv.conv."),
        (r"^(neck\..*)\.bn2\.", r"\1.pointwise_conv.bn."),
        (r"^head\.conv_feat\.cls_conv_dw(\d+)\.(\d+)\.", r"bbox_head.cls_convs.\1.\2.depthwise_conv."),
        (r"^head\.conv_feat\.cls_conv_pw(\d+)\.(\d+)\.", r"bbox_head.cls_convs.\1.\2.pointwise_conv."),
        (r"(_conv)\.norm\.", r"\1.bn."),
        (r"^head\.head_cls(\d+)\.", r"bbox_head.gfl_cls.\1."),
        (r"^head\.distribution_project\.", "bbox_head.integral."),
    )
)


def paddle_picodet(tensors: Tensors) -> Tensors:
    """Raises CheckpointError where two names would become one."""

    def new_name(name: str) -> str:
        for pattern, new in RULES:
            name = pattern.sub(new, name)
        return name

    return renamed(tensors, new_name)
