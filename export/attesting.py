"""When files are in the precision that is claimed for them: one rule for all formats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from castling_deploy.errors import ExportError
from castling_deploy.plain import plain
from castling_deploy.target import Artifact, Attestation, Network, Precision, TensorSpec

Interface = Mapping[str, tuple[str, tuple[int, ...]]]  # by name: numpy's name of the dtype, shape with -1 where open
PRECISIONS = {"float32": Precision.FP32.value, "float16": Precision.FP16.value, "int8": Precision.INT8.value}


def attestation(
    artifact: Artifact,
    precision: Precision,
    products: Counter[str],
    operations: Counter[str],
    weight_bytes: Counter[str],
    problems: Sequence[str] = (),
    facts: Mapping[str, str] | None = None,
    *,
    inputs: Interface,
    outputs: Interface,
    details: Mapping[str, Any],
) -> Attestation:
    """What was counted, with what is wrong about it; `products` are by numpy's name of the dtype that they are in.

    fp32 is fp32 throughout. In fp16 most products are, unless islands are claimed, which the file's facts have to bear
    out: a random PicoDet keeps 77 of 92 products in float32, and computes what it should.
    `inputs`, `outputs` and `details` are what the files declare and hold, and `artifact` has to say the same.
    """
    named = Counter({PRECISIONS.get(name, name): count for name, count in products.items()})
    return Attestation(
        precision,
        dict(named),
        dict(operations),
        dict(weight_bytes),
        (
            *problems,
            *_problems(precision, named, weight_bytes, artifact.details),
            *_undeclared("inputs", artifact.inputs, inputs),
            *_undeclared("outputs", artifact.outputs, outputs),
            *_otherwise(artifact.details, details),
        ),
        dict(facts or {}),
    )


def require_8_bits(network: Network, products: Mapping[str, int], tables: Mapping[str, int]) -> None:
    """Raises ExportError unless as many products as the network has Linears in 8 bits were built with such weights, and
    where it has a palette, each with a look-up table; `tables` are counted by the bits of an index."""
    levels = network.quantisation
    asked = len(levels.ranges) if levels else 0
    if products.get("int8", 0) != asked:
        raise ExportError(f"{asked} Linears were to have int8 weights, and not all have", hint="report this network")
    palette = levels.palette if levels else None
    if tables != ({str(palette): asked} if palette else {}):
        raise ExportError(f"every weight was to have a look-up table by {palette} bits", hint="report this network")


def _problems(
    precision: Precision, products: Counter[str], weight_bytes: Counter[str], claimed: Mapping[str, Any]
) -> list[str]:
    found = []
    total, built = products.total(), products[precision.value]
    if not total:
        return ["there is no convolution and no matrix product"]
    if precision is Precision.FP32 and built < total:
        others = {name: count for name, count in products.items() if name != precision}
        found.append(f"fp32 is claimed, and of {total} products {_list(others)}")
    elif not built:
        found.append(f"{precision} is claimed, and of {total} products none is: {_list(products)}")
    elif precision is Precision.FP16 and 2 * built < total and not claimed.get("islands"):
        found.append(f"fp16 is claimed, and most of {total} products are not: {_list(products)}")
    if precision is Precision.FP32 and weight_bytes["float16"]:
        found.append(f"fp32 is claimed, and {weight_bytes['float16']} bytes of the weights are float16")
    manifest = claimed.get("products")
    if manifest is not None and manifest != dict(products):
        found.append(f"the manifest counts other products than the files hold ({_list(products)})")
    return found


def _undeclared(kind: str, claimed: Sequence[TensorSpec], declared: Interface) -> Iterator[str]:
    claims = {spec.name: (spec.dtype, spec.shape) for spec in claimed}
    if list(claims.items()) != list(declared.items()):
        yield f"the manifest's {kind} are {_signature(claims)}, and the files declare {_signature(declared)}"


def _signature(interface: Interface) -> str:
    return ", ".join(f"{name} {dtype} {list(shape)}" for name, (dtype, shape) in interface.items()) or "none"


def _otherwise(claimed: Mapping[str, Any], held: Mapping[str, Any]) -> Iterator[str]:
    """Details that the files hold otherwise; a manifest may have more notes than follow from the files."""
    for name, value in plain(held).items():
        said = plain(claimed.get(name))
        if name == "notes" and isinstance(said, list):
            said = [note for note in said if note in value]
        if said != value:
            yield f"the manifest's details have another {name} than the files"


def _list(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} in {name}" for name, count in sorted(counts.items()))
