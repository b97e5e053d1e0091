"""The whole tool on one screen: read -> identify -> castle -> fold -> export -> verify -> measure -> report.

Each step is a pure function of its own module; each target is one file in `export/`. No format's name occurs here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from castling_deploy import bundled, checkpoint
from castling_deploy.climbing import Climbing, Told
from castling_deploy.errors import UsageError
from castling_deploy.folder import refuse_if_taken
from castling_deploy.identify import ModelCard, identify
from castling_deploy.isolation import Workers, prepare
from castling_deploy.ladder import Ladder, climb
from castling_deploy.making import Result, folder_of, made, needs_ladder
from castling_deploy.memory import give_back
from castling_deploy.probes import Probes, probes_for
from castling_deploy.progress import Progress, Silent
from castling_deploy.request import Request, plan
from castling_deploy.side_by_side import Task, default_jobs, side_by_side
from castling_deploy.target import effort_of, refuse_for_task
from castling_deploy.task import task_named

# Bytes of weights from which on nothing is exported beside the reference: with Castling-DeiT-B, 346 MB, the two would
# hold 5 GB at once.
LARGE = 2 * 10**8


@dataclass(frozen=True)
class Deployment:
    """Everything that `deploy` found out."""

    card: ModelCard
    ladder: Ladder
    results: tuple[Result, ...]


def deploy(request: Request, progress: Progress | None = None) -> Deployment:
    """Export, verify and measure. Raises CastlingError for what concerns the network; what concerns one target is
    in its Result, so that one target's trouble costs no other target its artefact."""
    progress = progress or Silent()
    plan(request)  # refuses before anything is read
    with progress.stage("read and identify the checkpoint"):
        path = request.checkpoint or bundled.checkpoint_path(request.model or bundled.DEFAULT)
        network, card = identify(
            checkpoint.read(path, request.told.weights),
            model=request.model,
            image_size=request.image_size,
            init_dconv=request.init_dconv,
            told=request.told,
        )
    climbing = Climbing(network)
    del network  # the ladder holds the folded one, which is all that is exported
    return _made(request, card, climbing, progress)


def deploy_network(
    request: Request, network: nn.Module, card: ModelCard, progress: Progress | None = None
) -> Deployment:
    """`deploy` for a network that is loaded already, in training form and eval mode."""
    return _made(request, card, Climbing(network), progress or Silent())


def _made(request: Request, card: ModelCard, climbing: Climbing, progress: Progress) -> Deployment:
    """Everything that was asked for, made from the folded network. What needs no more than that is begun beside the
    reference, unless the network is large."""
    steps = plan(request)
    if climbing.in_training:
        raise UsageError("the network is in training mode", hint="call network.eval() before export")
    for step in steps:
        refuse_for_task(step.target, step.options, card.task)
        refuse_if_taken(folder_of(request, card, step), overwrite=request.overwrite)
    prepare()
    workers = Workers()
    tasks = [
        Task(
            partial(made, request, step, card, climbing, progress, workers.add),
            effort_of(step.target),
            early=climbing.weight_bytes <= LARGE and not needs_ladder(request, step),
        )
        for step in steps
    ]
    jobs = request.jobs or default_jobs(climbing.weight_bytes, len(steps) + 1)

    def reference(begin: Callable[[], None]) -> None:
        climbing.run(partial(_climbed, request, card, progress, begin))
        give_back()

    results = side_by_side(tasks, jobs, workers, reference, measured=request.benchmark)
    return Deployment(card, climbing.ladder, results)


def _climbed(
    request: Request, card: ModelCard, progress: Progress, begin: Callable[[], None], network: nn.Module, told: Told
) -> Ladder:
    """The rungs of the ladder that all targets share; others may `begin` once they were `told`."""

    def folded(module: nn.Module, few: Probes) -> None:
        told(module, few)
        begin()

    with progress.stage("castle, fold, and run the reference") as advance:
        probes = probes_for(card.preprocessing, card.samples, request.seed).affordable(card.output_values)
        task = task_named(card.task)
        ladder = climb(network, task, card.outputs, probes, advance, already_cast=card.already_cast, told=folded)
    if request.islands and any(step.in_half for step in plan(request)):
        with progress.stage("audit the range of float16"):
            _ = ladder.range_audit  # once, before several ask for it at the same time
    return ladder
