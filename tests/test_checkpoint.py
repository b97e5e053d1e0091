"""Reading is safe and complete: every wrapper is peeled and reported, every bad file is a two-line error."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import small
from safetensors.torch import save_file

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
    "lightning": ({"state_dict": prefixed("model."), "epoch": 1}, ("container 'state_dict'", "prefix 'model.'")),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_and_prefixes_are_peeled_and_reported(name: str, legacy: bool, tmp_path: Path) -> None:
    content, peeled = CONTAINERS[name]
    checkpoint = read(saved(tmp_path / "c.pth", content, _use_new_zipfile_serialization=not legacy))
    assert checkpoint.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(checkpoint.tensors[key], value) for key, value in TENSORS.items())
    assert checkpoint.peeled == peeled


def test_a_wrapper_in_the_middle_of_a_name_is_peeled(tmp_path: Path) -> None:
    path = saved(tmp_path / "c.pth", {"blocks.0._orig_mod.attn.weight": torch.ones(1)})
    assert list(read(path).tensors) == ["blocks.0.attn.weight"]


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
            "ema_head_weight": torch.ones(1),
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
    "a NaN": (
        {**TENSORS, "head.weight": torch.tensor([float("nan"), 1])},
        "'head.weight' .* has 1 values that are NaN",
    ),
    "an infinity": ({"head.weight": torch.tensor([float("inf")])}, "NaN or infinite"),
    "integer weights": ({"head.weight": torch.ones(3, dtype=torch.int8)}, "'head.weight' .* is int8"),
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
