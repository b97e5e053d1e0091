"""Reading a torch file without running code: what a trainer saved beside the tensors becomes inert."""

from __future__ import annotations

import pickletools
import re
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from castling_deploy.errors import CheckpointError


class Ignored:
    """Takes the place of an object that is no tensor: accepts whatever a pickle gives it, keeps and does nothing."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class IgnoredMapping:
    """The same for mappings: an empty dict, which torch lets a pickle fill."""

    def __new__(cls, *arguments: Any) -> dict[Any, Any]:  # type: ignore[misc]
        return {}


# Classes and functions that trainers save beside tensors. None of them is imported or called: the stand-in is. All
# others are refused by torch itself (weights_only).
TRAINER_OBJECTS = (
    "argparse.Namespace",  # `args` of facebook's and timm's trainers
    *(f"pathlib.{local}{kind}Path" for local in ("", "_local.") for kind in ("Posix", "Windows", "PurePosix")),
    *(
        f"numpy.{core}.multiarray.{what}" for core in ("core", "_core") for what in ("scalar", "_reconstruct")
    ),  # metrics
    "numpy.ndarray",
    "numpy.dtype",
    "mmengine.logging.history_buffer.HistoryBuffer",  # mmengine's message_hub; its methods are saved by getattr
    "builtins.getattr",
    # Lightning's hyper-parameters, where they are an omegaconf tree.
    *(f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig")),
    *(f"omegaconf.base.{name}" for name in ("Metadata", "ContainerMetadata")),
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "String", "Integer", "Float", "Boolean", "Path")),
    "typing.Any",
    *(f"builtins.{name}" for name in ("dict", "list", "int", "float", "str", "bool")),
)
TRAINER_MAPPINGS = (
    "collections.defaultdict",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "mmengine.config.config.ConfigDict",
)
HARMLESS: list[Any] = [
    *((Ignored, name) for name in TRAINER_OBJECTS),
    *((IgnoredMapping, name) for name in TRAINER_MAPPINGS),
]

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first object of a torch file that is no zip archive (before torch 1.6)
ARRAY_PICKLE = ("numpy.", "_codecs.encode", "collections.OrderedDict")  # what a pickle of numpy arrays imports


def read_torch_file(path: Path) -> Any:
    """What torch.save wrote to `path`, with inert stand-ins for what is no tensor. Raises CheckpointError."""
    with open(path, "rb") as file:
        head = file.read(2)
    if head not in (b"PK", b"\x80\x02") and head[:1] != b"\x80":
        raise CheckpointError(
            f"'{path}' is no checkpoint: neither safetensors nor a torch file",
            hint="pass the file that the trainer saved (.safetensors, .pth, .pt, .ckpt)",
        )
    if head != b"PK" and _is_plain_pickle(path):
        raise _plain_pickle(path)
    try:
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises RuntimeError, EOFError, UnpicklingError, KeyError, ... on damaged files
        offenders = _offenders(path, error)
        if offenders:
            raise _wants_to_run_code(path, offenders) from None
        raise CheckpointError(
            f"'{path}' is no complete torch file: {str(error).splitlines()[0][:160]}",
            hint="the file is damaged or cut short; copy it again",
        ) from None


def _offenders(path: Path, error: Exception) -> list[str]:
    """Names that the pickle would import, found without running it; empty where it would import none."""
    if "unrecognized function" in str(error):  # the result of a stand-in is called
        return ["a method of one of its objects"]
    named = re.findall(r"(?i)unsupported (?:global|class|operand)[: ]*([\w.]+)", str(error))
    try:
        with torch.serialization.safe_globals(HARMLESS):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)) or named
    except Exception:  # no zip archive, or one that is cut short: torch's first error has to do
        return named


def _is_plain_pickle(path: Path) -> bool:
    with open(path, "rb") as file:
        try:
            first = [argument for _, argument, _ in islice(pickletools.genops(file), 2)]
        except ValueError:  # cut short
            return False
    return first[1:] != [LEGACY_MAGIC]


def _imports_and_strings(path: Path) -> tuple[set[str], set[str]]:
    """What a pickle would import and the strings it holds, told from its opcodes: nothing of it is run."""
    imports: set[str] = set()
    strings: list[str] = []  # as they come onto the stack
    memo: list[str] = []  # "" for what is no string
    fresh = ""
    with open(path, "rb") as file:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "MEMOIZE":
                memo.append(fresh)
            fresh = ""
            if opcode.name == "GLOBAL":
                imports.add(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":  # takes the two strings on top
                imports.add(".".join(strings[-2:]))
            elif "UNICODE" in opcode.name:
                strings.append(fresh := str(argument))
            elif opcode.name in ("BINGET", "LONG_BINGET") and memo and memo[int(argument or 0)]:
                strings.append(memo[int(argument or 0)])
    return imports, set(strings)


def _plain_pickle(path: Path) -> CheckpointError:
    """Why a file of pickle.dump is not read."""
    try:
        imports, strings = _imports_and_strings(path)
    except (ValueError, IndexError) as error:
        return CheckpointError(
            f"'{path}' is no complete pickle: {error}", hint="the file is damaged or cut short; copy it again"
        )
    if not all(name.startswith(ARRAY_PICKLE) for name in imports):
        return _wants_to_run_code(path, sorted(imports))
    if path.suffix == ".pdparams" or "StructuredToParameterName@@" in strings:
        return CheckpointError(
            f"'{path}' is a Paddle file: a plain pickle, which is not read",
            hint="where you trust its maker, pickle.load it and save {name: torch.from_numpy(array)} of its arrays as "
            "safetensors: Paddle's names of PicoDet are known; convert others with their PyTorch port",
        )
    maker = "detectron2's" if {"matching_heuristics", "__author__"} & strings else "a"
    return CheckpointError(
        f"'{path}' is {maker} plain pickle of numpy arrays, which is not read",
        hint="where you trust its maker, pickle.load it and save {name: torch.from_numpy(array)} as safetensors",
    )


def _wants_to_run_code(path: Path, names: list[str]) -> CheckpointError:
    return CheckpointError(
        f"'{path}' wants to run code when it is read, and was not: {', '.join(names)}",
        hint="where you trust its maker, load it there and save model.state_dict() as safetensors",
    )
