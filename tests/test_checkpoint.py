"""Reading is safe and complete: every wrapper is peeled and reported, every bad file is a two-line error."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from networks import small
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from castling_deploy.checkpoint import read
from castling_deploy.errors import CastlingError, CheckpointError, UsageError
from castling_deploy.identify import identify

TENSORS = {"cls_token": torch.ones(1, 1, 4), "head.weight": torch.arange(8.0).view(2, 4)}


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in TENSORS.items()}


CONTAINERS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "flat": (TENSORS, ()),
    "ordered": (OrderedDict(TENSORS), ()),
    "facebook release": ({"model": TENSORS}, ("container 'model'",)),
    "facebook training": (
        {"model": TENSORS, "optimizer": {"state": {}}, "epoch": 3, "args": argparse.Namespace(lr=1.0)},
        ("container 'model'",),
    ),
    "timm prefers the average": (
        {"state_dict": {"wrong": torch.zeros(1)}, "state_dict_ema": TENSORS, "arch": "x", "metric": np.float64(3.0)},
        ("container 'state_dict_ema', preferred to 'state_dict'",),
    ),
    "slowfast": ({"model_state": TENSORS, "cfg": "yaml"}, ("container 'model_state'",)),
    "ddp": (prefixed("module."), ("prefix 'module.'",)),
    "compiled ddp": (
        {"model": prefixed("_orig_mod.module.")},
        ("container 'model'", "prefix 'module.'", "prefix '_orig_mod.'"),
    ),
    "facebook training prefers the average": (
        {"model": {"wrong": torch.zeros(1)}, "model_ema": TENSORS, "args": argparse.Namespace(output=Path("x"))},
        ("container 'model_ema', preferred to 'model'",),
    ),
    "lightning": ({"state_dict": prefixed("model."), "epoch": 1}, ("container 'state_dict'", "prefix 'model.'")),
    "lightning with a counter and a score beside the network": (
        {
            "state_dict": {
                **prefixed("model."),
                "steps": torch.tensor(7),
                "accuracy.correct": torch.zeros(10, dtype=torch.int64),
                "best": torch.tensor(float("-inf")),
            }
        },
        ("container 'state_dict'", "prefix 'model.'"),
    ),
    "lightning around ddp": (
        {
            "state_dict": prefixed("net.module."),
            "pytorch-lightning_version": "2.5",
            "callbacks": {"ModelCheckpoint": {"best_model_path": "x", "best_model_score": torch.tensor(0.7)}},
            "hyper_parameters": {"args": argparse.Namespace(lr=np.float32(1)), "seen": defaultdict(list, a=[1])},
        },
        ("container 'state_dict'", "prefix 'module.'", "prefix 'net.'"),
    ),
    "metrics as arrays": (
        {"state_dict": TENSORS, "history": np.arange(3.0)},
        ("container 'state_dict'",),
    ),
    "mmdet": (
        {"meta": {"env_info": "x", "epoch": 3}, "state_dict": TENSORS, "optimizer": {"state": {}}},
        ("container 'state_dict'",),
    ),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_and_prefixes_are_peeled_and_reported(name: str, legacy: bool, tmp_path: Path) -> None:
    content, peeled = CONTAINERS[name]
    checkpoint = read(saved(tmp_path / "c.pth", content, _use_new_zipfile_serialization=not legacy))
    assert checkpoint.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(checkpoint.tensors[key], value) for key, value in TENSORS.items())
    assert checkpoint.peeled == peeled


@pytest.fixture
def process_group() -> Iterator[None]:
    """A group of one process, which DistributedDataParallel asks for."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def with_compiled_attention(network: nn.Module) -> nn.Module:
    network.blocks[0].attn = torch.compile(network.blocks[0].attn)  # type: ignore[union-attr, index, operator]
    return network


def averaged(network: nn.Module) -> nn.Module:
    average = AveragedModel(DistributedDataParallel(network))
    average.update_parameters(DistributedDataParallel(network))
    return average


class Trainer(nn.Module):
    """Holds the network as an attribute, as Lightning modules do."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.model = network


WRAPPED: dict[str, tuple[Callable[[nn.Module], nn.Module], set[str]]] = {
    "DistributedDataParallel": (DistributedDataParallel, {"prefix 'module.'"}),
    "DataParallel": (nn.DataParallel, {"prefix 'module.'"}),
    "torch.compile": (torch.compile, {"prefix '_orig_mod.'"}),
    "a compiled submodule": (with_compiled_attention, {"prefix '_orig_mod.'"}),
    "AveragedModel of DDP": (averaged, {"prefix 'module.'"}),
    "compiled DDP in a trainer": (
        lambda network: Trainer(torch.compile(DistributedDataParallel(network))),  # type: ignore[arg-type]
        {"prefix 'module.'", "prefix '_orig_mod.'", "prefix 'model.'"},
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_what_real_wrappers_save_is_the_network_inside(name: str, tmp_path: Path, process_group: None) -> None:
    wrap, peeled = WRAPPED[name]
    x = torch.randn(2, 3, 32, 32)
    expected = small("deit")(x)
    path = saved(tmp_path / "c.pth", {"state_dict": wrap(small("deit").requires_grad_(True)).state_dict()})
    loaded, card = identify(read(path))
    assert torch.equal(loaded(x), expected)
    assert set(card.peeled) == {"container 'state_dict'", *peeled}


def test_one_tensor_with_and_without_a_wrapper_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"two tensors 'head.weight'"):
        read(saved(tmp_path / "c.pth", {**TENSORS, "module.head.weight": torch.ones(1)}))


# As mmengine/logging/history_buffer.py saves itself: arrays, and methods, which pickle as getattr(HistoryBuffer, name).
HISTORY_BUFFER = """
import numpy as np

class HistoryBuffer:
    def __init__(self):
        self._log_history, self._count_history, self.max_length = np.ones(3), np.ones(3, dtype=np.int64), 10

    def mean(self):
        raise AssertionError("a method of the file's class was called")

    def __getstate__(self):
        return {**self.__dict__, "statistics_methods": {"mean": HistoryBuffer.mean}}

    def __setstate__(self, state):
        raise AssertionError("the file's class was used")
"""


def test_mmengines_history_is_passed_over_without_mmengine(tmp_path: Path) -> None:
    name = "mmengine.logging.history_buffer"
    module = ModuleType(name)
    module.__dict__["__name__"] = name
    exec(HISTORY_BUFFER, module.__dict__)
    with pytest.MonkeyPatch.context() as patch:
        for parent in ("mmengine", "mmengine.logging"):
            patch.setitem(sys.modules, parent, ModuleType(parent))
        patch.setitem(sys.modules, name, module)
        content = {"state_dict": TENSORS, "message_hub": {"log_scalars": OrderedDict(loss=module.HistoryBuffer())}}
        path = saved(tmp_path / "c.pth", content)
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        assert {f"{name}.HistoryBuffer", "builtins.getattr"} <= set(found)
        assert read(path).tensors.keys() == TENSORS.keys()
    assert name not in sys.modules and read(path).tensors.keys() == TENSORS.keys()


def test_an_attribute_prefix_stays_where_not_all_names_have_it(tmp_path: Path) -> None:
    path = saved(tmp_path / "c.pth", {"model.a": torch.ones(1), "b": torch.ones(1)})
    assert sorted(read(path).tensors) == ["b", "model.a"]


def test_bookkeeping_is_dropped_and_named(tmp_path: Path) -> None:
    path = saved(
        tmp_path / "c.pth",
        {
            **TENSORS,
            "n_averaged": torch.tensor(3),
            "bn.num_batches_tracked": torch.tensor(1),
            "ema_head_weight": torch.ones(1),  # PicoDet's port
        },
    )
    checkpoint = read(path)
    assert checkpoint.tensors.keys() == TENSORS.keys()
    assert set(checkpoint.dropped) == {"n_averaged", "bn.num_batches_tracked", "ema_head_weight"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_converted_and_reported(dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint = read(saved(tmp_path / "c.pth", {name: value.to(dtype) for name, value in TENSORS.items()}))
    assert {value.dtype for value in checkpoint.tensors.values()} == {torch.float32}
    assert str(dtype).removeprefix("torch.") in checkpoint.peeled[-1]


def test_safetensors_and_torch_files_hold_the_same_tensors(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "c.safetensors")
    first, second = read(tmp_path / "c.safetensors"), read(saved(tmp_path / "c.pth", TENSORS))
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in TENSORS)
    assert first.sha256 != second.sha256


def test_lightnings_hyper_parameters_may_be_an_omegaconf_tree(tmp_path: Path) -> None:
    omegaconf = pytest.importorskip("omegaconf")
    tree = omegaconf.OmegaConf.create({"lr": 0.1, "name": "x", "steps": [1, 2], "deep": {"on": True, "none": None}})
    path = saved(tmp_path / "c.ckpt", {"state_dict": prefixed("model."), "hyper_parameters": tree})
    assert read(path).tensors.keys() == TENSORS.keys()


class Malicious:
    """Unpickling this runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("how", ["torch zip", "torch legacy", "plain pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(how: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "c.pth"
    content = {"model": {**TENSORS, "evil": Malicious(marker)}}
    if how == "plain pickle":
        path.write_bytes(pickle.dumps({"evil": Malicious(marker)}))
    else:
        saved(path, content, _use_new_zipfile_serialization=how == "torch zip")
    with pytest.raises(CheckpointError, match="wants to run code"):
        read(path)
    assert not marker.exists()


def test_the_refusal_names_what_the_pickle_would_import(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"posix\.system|nt\.system"):
        read(saved(tmp_path / "c.pth", {"evil": Malicious(tmp_path / "marker")}))


class CallsAMethod:
    """Unpickling this calls what getattr gave."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return "{}".format, ("x",)


def test_what_a_stand_in_returns_is_never_called(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="wants to run code"):
        read(saved(tmp_path / "c.pth", {**TENSORS, "evil": CallsAMethod()}))


ARRAYS = {name: value.numpy() for name, value in TENSORS.items()}
PLAIN_PICKLES: dict[str, tuple[str, Any, str, str]] = {
    "detectron2": (
        "c.pkl",
        {"model": ARRAYS, "__author__": "x", "matching_heuristics": True},
        "detectron2's plain pickle of numpy arrays",
        "torch.from_numpy",
    ),
    "Paddle": (
        "c.pdparams",
        {**ARRAYS, "StructuredToParameterName@@": {}},
        "is a Paddle file",
        "names of PicoDet are known",
    ),
    "Paddle renamed": (
        "c.pth",
        {**ARRAYS, "StructuredToParameterName@@": {}},
        "is a Paddle file",
        "names of PicoDet are known",
    ),
    "somebody's arrays": ("c.pth", ARRAYS, "a plain pickle of numpy arrays", "torch.from_numpy"),
    "a whole network": ("c.pkl", small("deit"), "wants to run code", r"state_dict\(\)"),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", PLAIN_PICKLES)
def test_plain_pickles_are_refused_with_the_reason_and_what_to_do(name: str, protocol: int, tmp_path: Path) -> None:
    file, content, message, hint = PLAIN_PICKLES[name]
    (tmp_path / file).write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path / file)
    assert caught.value.hint and re.search(hint, caught.value.hint)


@pytest.mark.parametrize("name", ["c.safetensors", "c.pth"])
@pytest.mark.parametrize("keep", [0, 1, 5, 30, 0.5, 0.9, 0.999])
def test_truncated_files_are_refused_at_every_length(name: str, keep: float, tmp_path: Path) -> None:
    path = tmp_path / name
    tensors = {name: value.contiguous() for name, value in small("deit").state_dict().items()}
    save_file(tensors, path) if name.endswith("safetensors") else saved(path, tensors)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep if keep >= 1 else keep * len(content))])
    with pytest.raises(CheckpointError) as caught:
        read(path)
    assert caught.value.hint


def edited(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    tensors: dict[str, Any] = {
        **small("deit").state_dict(),
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    return {name: value for name, value in tensors.items() if value is not None}


BAD: dict[str, tuple[Any, str]] = {
    "a list": ([1, 2], "holds a list"),
    "an empty dict": ({}, "holds a dict"),
    "no tensors": ({"epoch": 3}, "holds no tensors"),
    "a NaN": (edited(norm__weight=torch.tensor([float("nan")] + 31 * [1.0])), "'norm.weight' .* has 1 values that are"),
    "infinities": (edited(norm__weight=torch.full((32,), float("inf"))), "'norm.weight' .* has 32 values .* infinite"),
    "a NaN that is no weight": (edited(surplus=torch.full((2,), float("nan"))), r"not part of it \(surplus\)"),
    "integer weights": ({"head.weight": torch.ones(3, dtype=torch.int8)}, "'head.weight' .* is int8"),
    "a sparse weight": (edited(norm__weight=torch.ones(32).to_sparse()), "'norm.weight' .* is a torch.sparse_coo"),
    "a weight without values": (edited(norm__weight=torch.ones(32, device="meta")), "'norm.weight' .* on meta that"),
    "a missing key": (edited(norm__weight=None), r"1 tensors are missing \(norm.weight\)"),
    "an extra key": (edited(surplus=torch.ones(1)), r"1 tensors are not part of it \(surplus\)"),
    "a wrong shape": (edited(norm__weight=torch.ones(31)), r"'norm.weight' .* has shape \(31,\).*needs \(32,\)"),
    "a block too few": (
        {name: value for name, value in edited().items() if not name.startswith("blocks.0.mlp")},
        "no tensor 'blocks.0.mlp.fc1.weight'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_content_is_refused_by_name(name: str, tmp_path: Path) -> None:
    content, message = BAD[name]
    with pytest.raises(CheckpointError, match=message) as caught:
        identify(read(saved(tmp_path / "c.pth", content)))
    assert caught.value.hint and "\n" not in caught.value.message


@pytest.mark.parametrize(
    "make",
    [
        lambda path: None,
        lambda path: path.mkdir(),
        lambda path: path.write_text("hello world"),
        lambda path: path.write_bytes(b""),
    ],
)
def test_what_is_no_checkpoint_file_is_refused(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "c.pth")
    with pytest.raises(CheckpointError):
        read(tmp_path / "c.pth")


@pytest.mark.parametrize(
    "card",
    [
        "[]",
        "no json",
        '{"labels": ["a"]}',
        '{"labels": 3}',
        '{"image_size": "big"}',
        '{"mean": ["x"]}',
        '{"resize_kernel": "magic"}',
        '{"aux_threshold": []}',
        '{"name": "../escape"}',
        '{"image_size": [33, 33]}',
        '{"std": [0, 1, 1]}',
    ],
)
def test_damaged_metadata_is_a_clear_error(card: str, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_file(
        {name: value.contiguous() for name, value in small("deit").state_dict().items()}, path, {"castling": card}
    )
    with pytest.raises(CastlingError) as caught:
        identify(read(path))
    assert caught.value.exit_code == 2


def test_metadata_travels_into_the_card(tmp_path: Path) -> None:
    card = {
        "name": "my-net",
        "labels": list("abcdefghij"),
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.2, 0.2],
        "aux_threshold": 0.1,
        "resize_kernel": "bilinear",
        "crop_fraction": 1.0,
    }
    path = tmp_path / "c.safetensors"
    save_file(
        {name: value.contiguous() for name, value in small("deit").state_dict().items()},
        path,
        {"castling": json.dumps(card)},
    )
    network, found = identify(read(path))
    assert (found.name, found.labels, found.preprocessing.mean) == ("my-net", tuple("abcdefghij"), (0.5, 0.4, 0.3))
    assert network.blocks[0].attn.aux_threshold == 0.1  # type: ignore[union-attr, index]


def test_the_loaded_network_computes_what_the_saved_one_did(tmp_path: Path) -> None:
    network = small("levit")
    loaded, card = identify(read(saved(tmp_path / "x.pth", {"model": network.state_dict()})))
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(loaded(x), network(x), rtol=0, atol=0)
    assert card.name == "castling-levit-x" and card.loaded == len(network.state_dict()) - len(card.dropped)


@pytest.mark.parametrize(
    ("model", "message"),
    [("castling-deit-tiny", "not a 'castling-deit-tiny'"), ("castling-deit-tiyn", "unknown model")],
)
def test_a_model_that_the_checkpoint_is_not_is_refused(model: str, message: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pth", small("deit").state_dict())
    with pytest.raises(UsageError, match=message):
        identify(read(path), model=model)
    assert identify(read(path), model="castling-deit")[1].family == "castling-deit"
