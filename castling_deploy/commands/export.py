"""`castling export`, and `castling-export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from castling_deploy.commands.options import CONTEXT, ImageSize, about_checkpoint, limited, limits_of
from castling_deploy.commands.outcome import gravest, print_json
from castling_deploy.errors import UsageError
from castling_deploy.plain import SCHEMA, plain
from castling_deploy.target import ALIASES, TARGETS, target_named

ALL = "all"


@click.command(context_settings=CONTEXT)
@click.argument("checkpoint", required=False, type=click.Path(path_type=Path))
@click.option(
    "--target",
    "--format",
    "targets",
    multiple=True,
    required=True,
    metavar="NAME",
    help=f"Repeatable, or comma separated: {', '.join(TARGETS)}, or all that work here.",
)
@click.option("--model", "-m", metavar="NAME", help="A bundled network, or what the checkpoint is expected to be.")
@click.option("--init-dconv", type=click.Choice(["zero"]), help="For experiments: a softmax network with a zero dconv.")
@about_checkpoint
@click.option("--precision", metavar="P", help="fp32, fp16 or int8. Default: the target's own.")
@click.option("--imgsz", type=ImageSize(), metavar="H[,W]", help="Input size in pixels. Default: the checkpoint's.")
@click.option("--batch-size", "-b", type=click.IntRange(1), default=1, show_default=True, help="Images at once.")
@click.option("--dynamic", is_flag=True, help="A batch of any size, where the target can.")
@click.option("--opset", type=int, help="ONNX opset.")
@click.option("--nms", is_flag=True, help="A detector's boxes in the graph, after its raw outputs; ONNX only.")
@click.option("--input", "content", metavar="KIND", help="tensor (normalised) or image (pixels), where the target can.")
@click.option(
    "--min-delegated", type=float, metavar="PERCENT", help="Of the operations, inside XNNPACK; ExecuTorch only."
)
@click.option("--tokens-at-once", type=int, metavar="N", help="Of a large image, for a core's cache: 256; ONNX only.")
@click.option("--activations", metavar="KIND", help="In int8: uint8, uint16 for Qualcomm's NPU, or float32; ONNX only.")
@click.option("--weight-bits", type=int, metavar="BITS", help="In int8: 8, or 4 for Linears; ONNX and ExecuTorch.")
@click.option("--palettise", type=int, metavar="BITS", help="Weights in look-up tables, in int8; Core ML and Core AI.")
@click.option("--layout", metavar="ORDER", help="Of tokens: channels-last, or channels-first; Core ML and Core AI.")
@click.option("--calib-data", type=click.Path(path_type=Path), help="Folder or .npz of images to calibrate int8 on.")
@click.option("--calib-samples", type=click.IntRange(1), help="How many of them. Default: 64.")
@click.option("--max-drop", type=click.FloatRange(0), help="Points of the score that int8 may cost. Default: 0.5.")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    default=Path("castling-out"),
    show_default=True,
    help="Folder for the artefact folders.",
)
@click.option("--overwrite", is_flag=True, help="Replace an artefact folder of the same name.")
@click.option("--benchmark/--no-benchmark", default=True, show_default=True, help="Measure latency.")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the noise among the compared inputs."
)
@click.option(
    "--islands/--no-islands", default=True, show_default=True, help="In fp16: keep what it cannot hold in float32."
)
@click.option(
    "--localise/--no-localise", default=True, show_default=True, help="Where parity fails, name the first wrong module."
)
@click.option("--jobs", "-j", type=click.IntRange(1), help="Artefacts at once. Default: by cores and memory.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and stop.")
@limited
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def export(
    checkpoint: Path | None,
    targets: tuple[str, ...],
    model: str | None,
    init_dconv: Literal["zero"] | None,
    weights: str | None,
    aux_threshold: float | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    precision: str | None,
    imgsz: tuple[int, int] | None,
    batch_size: int,
    dynamic: bool,
    opset: int | None,
    nms: bool,
    content: str | None,
    min_delegated: float | None,
    tokens_at_once: int | None,
    activations: str | None,
    weight_bits: int | None,
    palettise: int | None,
    layout: str | None,
    calib_data: Path | None,
    calib_samples: int | None,
    max_drop: float | None,
    output: Path,
    overwrite: bool,
    benchmark: bool,
    seed: int,
    islands: bool,
    localise: bool,
    jobs: int | None,
    dry_run: bool,
    timeout: float | None,
    memory: float | None,
    as_json: bool,
) -> int:
    """Export CHECKPOINT (without one: a bundled trained network), verify it, and measure it."""
    from castling_deploy.reading.card import Told
    from castling_deploy.request import Int8, Request, plan

    asked = {
        "dynamic": dynamic or None,
        "opset": opset,
        "nms": nms or None,
        "input": content,
        "min_delegated": min_delegated,
        "tokens_at_once": tokens_at_once,
        "activations": activations,
        "weight_bits": weight_bits,
        "palettise": palettise,
        "layout": layout,
    }
    request = Request(
        targets=_names(targets),
        checkpoint=checkpoint,
        model=model,
        init_dconv=init_dconv,
        told=Told(weights, aux_threshold, mean, std),
        precision=precision,
        image_size=imgsz,
        batch_size=batch_size,
        options={name: value for name, value in asked.items() if value is not None},
        output=output,
        benchmark=benchmark,
        overwrite=overwrite,
        seed=seed,
        islands=islands,
        localise=localise,
        jobs=jobs,
        int8=Int8(calib_data, calib_samples, Int8.max_drop if max_drop is None else max_drop),
        limits=limits_of(timeout, memory),
    )
    steps = plan(request)
    if dry_run:
        return _dry_run(request, steps, as_json)
    from castling_deploy.isolation import prepare

    prepare()  # before torch is loaded here: 2 s
    from castling_deploy.console import print_deployment
    from castling_deploy.pipeline import deploy
    from castling_deploy.terminal import StderrProgress

    progress = StderrProgress()
    progress.console.print(
        f"castling export {checkpoint or 'the bundled ' + (model or 'network')} "
        f"to {', '.join(step.target.name for step in steps)}"
    )
    deployment = deploy(request, progress)
    print_deployment(deployment, progress.console)
    if as_json:
        from castling_deploy.report import deployment_document

        print_json(deployment_document(deployment))
    from castling_deploy.report import exit_code

    return gravest(exit_code(result) for result in deployment.results)


def _dry_run(request: Any, steps: tuple[Any, ...], as_json: bool) -> int:
    if request.checkpoint is not None and not request.checkpoint.exists():
        raise UsageError(f"there is no file '{request.checkpoint}'", hint="check the path of the checkpoint")
    rows = [
        {
            "target": step.target.name,
            "precision": step.precision.value,
            "options": plain(step.options),
            "available": step.target.missing() is None,
        }
        for step in steps
    ]
    if as_json:
        print_json({"schema": SCHEMA, "dry_run": rows, "output": str(request.output)})
    for row in rows:
        state = "" if row["available"] else "  (not available here, see castling doctor)"
        click.echo(
            f"would export {row['target']} {row['precision']} {row['options'] or ''} into {request.output}{state}",
            err=True,
        )
    return 0


def _names(targets: tuple[str, ...]) -> tuple[str, ...]:
    """The targets asked for; `all` is every one that is available here."""
    names = [name.strip().lower() for item in targets for name in item.split(",") if name.strip()]
    if not names:
        raise UsageError("no target is named", hint=f"--target takes: {', '.join([*TARGETS, *ALIASES, ALL])}")
    asked = [target_named(name).name for name in names if name != ALL]
    available = [name for name in TARGETS if target_named(name).missing() is None] if ALL in names else []
    return tuple(dict.fromkeys([*asked, *available]))
