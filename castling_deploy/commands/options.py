"""What several verbs' options are made of."""

from __future__ import annotations

import math
from typing import Any

import click

from castling_deploy.isolation import Limits

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class ImageSize(click.ParamType[tuple[int, int]]):
    """H or H,W in pixels."""

    name = "H[,W]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        parts = [part.strip() for part in str(value).replace("x", ",").split(",")]
        if len(parts) not in (1, 2) or not all(part.isascii() and part.isdecimal() and int(part) for part in parts):
            self.fail(f"'{value}' is no image size; write 224 or 224,320", param, ctx)
        sides = [int(part) for part in parts]
        return sides[0], sides[-1]


class Amount(click.FloatRange):
    """A number, zero or more. Not NaN and not infinity, which would let everything pass."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not math.isfinite(amount := super().convert(value, param, ctx)):
            self.fail(f"'{value}' is no number", param, ctx)
        return amount


def limited(command: Any) -> Any:
    """The options of a verb that runs other people's native code, in processes with limits."""
    positive = Amount(0, min_open=True)
    timeout = click.option("--timeout", type=positive, metavar="S", help="Seconds for any one step. Default: 1800.")
    memory = click.option("--memory", type=positive, metavar="GIB", help="For any one step. Default: 0.9 of all.")
    return timeout(memory(command))


class PerChannel(click.ParamType[tuple[float, ...]]):
    """One number, or one per channel."""

    name = "R,G,B"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        try:
            return tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"'{value}' is not one number per channel; write 0.5 or 0.485,0.456,0.406", param, ctx)


def about_checkpoint(command: Any) -> Any:
    """The options that say of a checkpoint what its file does not."""
    for option in (
        click.option(
            "--std", type=PerChannel(), help="What images are divided by. Default: the file's, or ImageNet's."
        ),
        click.option("--mean", type=PerChannel(), help="What is subtracted before, for pixels in 0..1."),
        click.option("--aux-threshold", type=float, metavar="T", help="Of the auxiliary branch. Default: 0.02."),
        click.option(
            "--weights", metavar="NAME", help="Which weights (state_dict, teacher). Default: an average first."
        ),
    ):
        command = option(command)
    return command


def limits_of(timeout: float | None, memory: float | None) -> Limits:
    """What --timeout and --memory ask for."""
    return Limits(Limits.seconds if timeout is None else timeout, None if memory is None else int(memory * 2**30))
