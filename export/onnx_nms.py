"""Decoding and class-aware suppression at the end of a detector's ONNX graph, as castling_deploy.detection does them.

The raw outputs stay, `boxes`, `scores` and `labels` are added. Everything here is float32, whatever the precision of
the network before it: float16 would round coordinates over 256 pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from castling_deploy.errors import ShapeError, UsageError
from castling_deploy.target import Network, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import onnx

BOXES, SCORES, LABELS = "boxes", "scores", "labels"
SCOPE = "nms"  # before the name of every node and tensor

USAGE = """
The raw outputs are those of every target; the graph makes three more of them, as `castling_deploy.detection` does.
K = {keep}:

- `boxes` (B, K, 4) float32: x1 y1 x2 y2 in pixels of the network's input, {height} x {width}; best first;
- `scores` (B, K) float32, 0..1: only scores over {score}, at most {per_level} candidates of every level, and of boxes
  of one class that overlap by more than {iou} (intersection over union) the better one;
- `labels` (B, K) int64: indices of classes.

Where fewer are found, the rest of the K rows are boxes of 0, scores of 0, labels of -1.

```python
boxes, scores, labels = session.run(["boxes", "scores", "labels"], {{"{input}": images}})
found = scores[0] > 0    # of the first image
```
"""


def outputs(network: Network) -> tuple[TensorSpec, ...]:
    """What `with_boxes` adds to the outputs of a detector. Raises UsageError for a network that is none."""
    from castling_deploy.detection import KEEP

    cells, classes = _cells_and_classes(network)
    batch, keep = network.inputs[0].shape[0], min(KEEP, cells * classes)
    return (
        TensorSpec(BOXES, (batch, keep, 4), "float32", "NLC"),
        TensorSpec(SCORES, (batch, keep), "float32", "NL"),
        TensorSpec(LABELS, (batch, keep), "int64", "NL"),
    )


def usage(network: Network) -> str:
    """What the added outputs mean, in Markdown."""
    from castling_deploy.detection import IOU, PER_LEVEL, SCORE

    (image,), (boxes, _, _) = network.inputs, outputs(network)
    height, width = image.shape[2:]
    keep = boxes.shape[1]
    return USAGE.format(
        keep=keep, height=height, width=width, score=SCORE, per_level=PER_LEVEL, iou=IOU, input=image.name
    )


def with_boxes(model: onnx.ModelProto, network: Network) -> onnx.ModelProto:
    """A new model: `model`, a detector with float32 outputs, and after them `boxes`, `scores` and `labels`.

    B images, N cells of all levels (finer first, rows of cells), C classes, K detections at most. The batch may be
    open. Raises UsageError for a network that is no detector.
    """
    import onnx

    ending = _Ending()
    cells, classes = _cells_and_classes(network)
    boxes = _decoded(ending, network)  # (B, N, 4)
    scores = _candidates(ending, network)  # (B, N * C), 0 where there is no candidate
    kept, places = _survivors(ending, boxes, scores, cells, classes)  # (B, K) each
    _written(ending, boxes, kept, places, classes)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    result.graph.node.extend(ending.nodes)
    result.graph.initializer.extend(ending.constants)
    types = {"float32": onnx.TensorProto.FLOAT, "int64": onnx.TensorProto.INT64}
    batch = model.graph.output[0].type.tensor_type.shape.dim[0]
    for spec in outputs(network):
        shape = [batch.dim_param or batch.dim_value, *spec.shape[1:]]
        result.graph.output.append(onnx.helper.make_tensor_value_info(spec.name, types[spec.dtype], shape))
    return result


class _Ending:
    """Nodes under construction, in topological order, and their constants."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, name: str, value: npt.ArrayLike, dtype: type[np.generic]) -> str:
        """A constant's name in the graph."""
        import numpy as np
        import onnx

        self.constants.append(onnx.numpy_helper.from_array(np.asarray(value, dtype), f"{SCOPE}/{name}"))
        return self.constants[-1].name

    def add(self, operator: str, *inputs: str, into: str | None = None, also: int = 0, **attributes: Any) -> str:
        """The name of a new node's first output, `into` or one made from its number; `also` counts further outputs,
        `<name>_1` and on."""
        import onnx

        name = f"{SCOPE}/{operator}_{len(self.nodes)}"
        first = into or name
        names = [first, *(f"{first}_{index + 1}" for index in range(also))]
        self.nodes.append(onnx.helper.make_node(operator, inputs, names, name=name, **attributes))
        return first


def _decoded(ending: _Ending, network: Network) -> str:
    """Boxes of all cells inside the image, (B, N, 4) x1 y1 x2 y2: detection.decoded."""
    import numpy as np

    from castling_deploy.detection import centres

    strides, size = _strides(network), _size(network)
    points = [centres(stride, size) for stride in strides]
    middle = np.concatenate(points)[:, [0, 1, 0, 1]]  # (N, 4)
    reach = np.repeat(strides, [len(level) for level in points])[:, None] * np.array([-1, -1, 1, 1])  # (N, 4)
    bins = _spec(network, f"dis_pred_stride_{strides[0]}").shape[2] // 4
    height, width = size
    logits = ending.add("Concat", *(f"dis_pred_stride_{stride}" for stride in strides), axis=1)
    shape = ending.constant("sides", [0, len(middle), 4, bins], np.int64)
    weights = ending.add("Softmax", ending.add("Reshape", logits, shape), axis=-1)  # (B, N, 4, bins)
    steps = ending.add("Mul", weights, ending.constant("steps", np.arange(bins), np.float32))
    axis = ending.constant("last", [-1], np.int64)
    means = ending.add("ReduceSum", steps, axis, keepdims=0)  # (B, N, 4), in strides
    sides = ending.add("Mul", means, ending.constant("reach", reach, np.float32))
    boxes = ending.add("Add", sides, ending.constant("centres", middle, np.float32))
    clipped = ending.add("Max", boxes, ending.constant("least", 0, np.float32))
    return ending.add("Min", clipped, ending.constant("most", [width, height, width, height], np.float32))


def _candidates(ending: _Ending, network: Network) -> str:
    """Scores of all (cell, class) pairs, (B, N * C), those that are no candidates 0: detection.candidates."""
    import numpy as np

    from castling_deploy.detection import PER_LEVEL, SCORE

    flat = ending.constant("flat", [0, -1], np.int64)
    count = ending.constant("per_level", [PER_LEVEL], np.int64)
    levels = []
    for stride in _strides(network):
        spec = _spec(network, f"cls_pred_stride_{stride}")
        scores = ending.add("Reshape", spec.name, flat)
        if spec.shape[1] * spec.shape[2] > PER_LEVEL:
            best = ending.add("TopK", scores, count, axis=1, also=1)  # of equal ones the first, says ONNX
            scores = ending.add("ScatterElements", _zeros(ending, scores), f"{best}_1", best, axis=1)
        levels.append(scores)
    # x where x > alpha, else 0. Opset 20 lets NonMaxSuppression's own threshold be strict or not.
    return ending.add("ThresholdedRelu", ending.add("Concat", *levels, axis=1), alpha=SCORE)


def _survivors(ending: _Ending, boxes: str, scores: str, cells: int, classes: int) -> tuple[str, str]:
    """The best K scores that suppression leaves, best first, and their places among the N * C pairs; (B, K) each.

    Of equal ones the first pair: finer level, earlier cell, lower class, as in detection.detections.
    """
    import numpy as np

    from castling_deploy.detection import IOU, KEEP

    pairs = ending.constant("pairs", [0, cells, classes], np.int64)
    by_cell = ending.add("Reshape", scores, pairs)  # (B, N, C)
    by_class = ending.add("Transpose", by_cell, perm=[0, 2, 1])
    kept = ending.add(  # (n, 3): image, class, cell. It wants y before x; overlaps are the same either way.
        "NonMaxSuppression",
        boxes,
        by_class,
        ending.constant("keep_of_class", KEEP, np.int64),
        ending.constant("iou", IOU, np.float32),
        ending.constant("above", 0, np.float32),
    )
    order = ending.constant("image_cell_class", [0, 2, 1], np.int64)
    places = ending.add("Gather", kept, order, axis=1)
    values = ending.add("GatherND", by_cell, places)  # (n,)
    left = ending.add("ScatterND", _zeros(ending, by_cell), places, values)  # (B, N, C)
    keep = ending.constant("keep", [min(KEEP, cells * classes)], np.int64)
    flat = ending.add("Reshape", left, ending.constant("one_row", [0, cells * classes], np.int64))
    best = ending.add("TopK", flat, keep, axis=1, also=1, into=SCORES)
    return best, f"{best}_1"


def _written(ending: _Ending, boxes: str, scores: str, places: str, classes: int) -> None:
    """The outputs `boxes` and `labels` of the kept pairs."""
    import numpy as np

    width = ending.constant("classes", classes, np.int64)
    last = ending.constant("coordinates", [-1], np.int64)
    found = ending.add("Greater", scores, ending.constant("nothing", 0, np.float32))  # (B, K)
    ending.add("Where", found, ending.add("Mod", places, width), ending.constant("no_label", -1, np.int64), into=LABELS)
    cell = ending.add("Unsqueeze", ending.add("Div", places, width), last)  # (B, K, 1)
    seen = ending.add("GatherND", boxes, cell, batch_dims=1)  # (B, K, 4)
    there = ending.add("Unsqueeze", found, last)
    ending.add("Where", there, seen, ending.constant("no_box", 0, np.float32), into=BOXES)


def _zeros(ending: _Ending, like: str) -> str:
    """float32 zeros of the shape of `like`."""
    return ending.add("ConstantOfShape", ending.add("Shape", like))


def _strides(network: Network) -> list[int]:
    from castling_deploy.detection import strides_of

    try:
        return strides_of({spec.name: spec for spec in network.outputs})
    except ShapeError as error:
        raise UsageError(f"{network.name} is no detector: {error.message}", hint="leave out --nms") from None


def _size(network: Network) -> tuple[int, int]:
    """Height and width of the input in pixels."""
    _, _, height, width = network.inputs[0].shape
    return height, width


def _spec(network: Network, name: str) -> TensorSpec:
    return next(spec for spec in network.outputs if spec.name == name)


def _cells_and_classes(network: Network) -> tuple[int, int]:
    scores = [_spec(network, f"cls_pred_stride_{stride}") for stride in _strides(network)]
    return sum(spec.shape[1] for spec in scores), scores[0].shape[2]
