"""Every error a user can meet: one sentence of what is wrong, one of what mends it, and an exit code."""

from __future__ import annotations

from typing import Any, ClassVar


class CastlingError(Exception):
    """An error with a fix. `castling` prints it as two lines and leaves with `exit_code`."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message} (hint: {self.hint})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors come back from workers: pickled by what they are, not by the arguments of their constructor."""
        return _restored, (type(self), self.args, self.__dict__)


class UsageError(CastlingError):
    """What was asked for cannot be done: an unknown name, an option that a target cannot honour."""

    exit_code = 2


class CheckpointError(CastlingError):
    """The file is no checkpoint, or not one of a network this tool knows."""

    exit_code = 2


class ShapeError(CastlingError):
    """A tensor or an image has a shape that the network cannot take."""

    exit_code = 2


class FoldError(CastlingError):
    """An exact fold is not possible, or a BatchNorm would be left standing."""


class ExportError(CastlingError):
    """A toolchain refused the network, or wrote something other than what was asked."""


class ParityError(CastlingError):
    """An artefact does not compute what the reference computes, or none in the precision asked for could."""

    exit_code = 3


class TargetUnavailableError(CastlingError):
    """The toolchain of a target is not installed, or cannot run on this machine."""

    exit_code = 4


class InconclusiveError(CastlingError):
    """The comparison has too little power to call the artefact right or wrong."""

    exit_code = 5


class RegressionError(CastlingError):
    """An artefact is slower, larger or less accurate than the one it is compared with."""

    exit_code = 6


class SetupError(TargetUnavailableError):
    """What a runner needs could not be fetched or built; nothing half-done was left behind."""


class CrashError(ExportError):
    """Somebody else's code did not survive: `how` is "crash", "timeout", "memory" or "error"."""

    def __init__(self, message: str, *, hint: str | None = None, how: str = "crash") -> None:
        super().__init__(message, hint=hint)
        self.how = how
        if how in ("timeout", "memory"):  # the user's own limits: not done here, and nobody's fault
            self.exit_code = TargetUnavailableError.exit_code  # type: ignore[misc]


def _restored(kind: type[CastlingError], arguments: tuple[Any, ...], members: dict[str, Any]) -> CastlingError:
    error = kind.__new__(kind, *arguments)
    error.__dict__.update(members)
    return error
