"""A folder as timm and transformers save it: its shards are one checkpoint, its config.json feeds the card."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import small
from safetensors.torch import save_file

from castling_deploy import bundled
from castling_deploy.checkpoint import read
from castling_deploy.errors import CheckpointError
from castling_deploy.identify import identify

TENSORS = {name: value.contiguous() for name, value in small("deit").state_dict().items()}
# As timm.models.push_to_hf_hub writes it, shortened.
TIMM_CONFIG: dict[str, Any] = {
    "architecture": "deit_mini_patch8_32",
    "num_classes": 10,
    "label_names": list("abcdefghij"),
    "model_args": {"img_size": [32, 32]},
    "pretrained_cfg": {
        "input_size": [3, 224, 224],
        "interpolation": "bilinear",
        "crop_pct": 0.95,
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.25, 0.3],
        "num_classes": 1000,
    },
}


def shards(folder: Path, suffix: str = ".safetensors", stem: str = "model") -> list[Path]:
    """The small DeiT in three files with an index, as transformers writes them."""
    names = list(TENSORS)
    files = [folder / f"{stem}-0000{number}-of-00003{suffix}" for number in (1, 2, 3)]
    weight_map = {}
    for number, file in enumerate(files):
        part = {name: TENSORS[name] for name in names[number::3]}
        save_file(part, file) if suffix == ".safetensors" else torch.save(part, file)
        weight_map |= dict.fromkeys(part, file.name)
    write_index(folder / f"{stem}{suffix}.index.json", weight_map)
    return files


def write_index(path: Path, weight_map: Any) -> None:
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def folder_of(folder: Path, config: Any, card: Any = None) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    save_file(TENSORS, folder / "model.safetensors", {} if card is None else {"castling": json.dumps(card)})
    return folder


def same(tensors: Any) -> bool:
    return tensors.keys() == TENSORS.keys() and all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize("config", [{}, TIMM_CONFIG])
def test_a_folder_with_one_file_is_that_file(config: Any, tmp_path: Path) -> None:
    checkpoint = read(folder_of(tmp_path, config))
    assert same(checkpoint.tensors) and checkpoint.sha256 == read(tmp_path / "model.safetensors").sha256


def test_a_torch_file_in_a_folder_is_read_with_its_containers(tmp_path: Path) -> None:
    torch.save({"state_dict": TENSORS}, tmp_path / "pytorch_model.bin")
    checkpoint = read(tmp_path)
    assert same(checkpoint.tensors) and checkpoint.peeled == ("container 'state_dict'",)


@pytest.mark.parametrize(("suffix", "stem"), [(".safetensors", "model"), (".bin", "pytorch_model")])
def test_shards_are_one_checkpoint(suffix: str, stem: str, tmp_path: Path) -> None:
    shards(tmp_path, suffix, stem)
    checkpoint = read(tmp_path)
    assert same(checkpoint.tensors)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(identify(checkpoint)[0](x), small("deit")(x))


def test_the_sha256_of_shards_is_that_of_what_sha256sum_prints(tmp_path: Path) -> None:
    files = shards(tmp_path)
    lines = "".join(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files)
    assert read(tmp_path).sha256 == hashlib.sha256(lines.encode()).hexdigest()


def test_the_sha256_changes_with_every_shard(tmp_path: Path) -> None:
    seen = {read_sha(tmp_path, None), *(read_sha(tmp_path, number) for number in range(3))}
    assert len(seen) == 4


def read_sha(folder: Path, changed: int | None) -> str | None:
    files = shards(folder)
    if changed is not None:
        part = {name: TENSORS[name] for name in list(TENSORS)[changed::3]}
        save_file({name: value + 1 for name, value in part.items()}, files[changed])
    return read(folder).sha256


def test_timms_config_feeds_the_card(tmp_path: Path) -> None:
    _, card = identify(read(folder_of(tmp_path, TIMM_CONFIG)))
    assert card.name == "deit_mini_patch8_32" and card.labels == tuple("abcdefghij")
    how = card.preprocessing
    assert (how.size, how.mean, how.std) == ((32, 32), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    assert (how.resize_kernel, how.crop_fraction) == ("bilinear", 0.95)


def test_our_own_metadata_is_preferred_to_the_config(tmp_path: Path) -> None:
    _, card = identify(read(folder_of(tmp_path, TIMM_CONFIG, {"name": "mine", "mean": [0.1, 0.1, 0.1]})))
    assert (card.name, card.preprocessing.mean) == ("mine", (0.1, 0.1, 0.1))
    assert card.preprocessing.crop_fraction == 0.95


def test_transformers_config_gives_labels_and_a_warning_for_another_eps(tmp_path: Path) -> None:
    config = {
        "model_type": "deit",
        "image_size": 32,
        "id2label": {str(number): f"class {number}" for number in range(10)},
        "num_attention_heads": 2,
        "layer_norm_eps": 1e-12,
    }
    _, card = identify(read(folder_of(tmp_path, config)))
    assert card.labels is not None and card.labels[9] == "class 9"
    assert card.warnings == ("config.json says layer_norm_eps 1e-12, this network has 1e-06",)
    made_up = {**config, "id2label": {str(number): f"LABEL_{number}" for number in range(10)}, "layer_norm_eps": 1e-6}
    _, card = identify(read(folder_of(tmp_path, made_up)))
    assert card.labels is None and card.warnings == ()


def test_transformers_preprocessor_gives_the_normalisation(tmp_path: Path) -> None:
    """As ViTImageProcessor writes it: a ViT of transformers has halves where a DeiT has ImageNet's numbers."""
    images = {"do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.25, 0.5], "resample": 2}
    folder_of(tmp_path, {"model_type": "vit"})
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    _, card = identify(read(tmp_path))
    assert (card.preprocessing.mean, card.preprocessing.std) == ((0.5, 0.5, 0.5), (0.5, 0.25, 0.5))
    assert card.assumed == ("aux_threshold",)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**images, "do_normalize": False}))
    _, card = identify(read(tmp_path))
    assert (card.preprocessing.mean, card.preprocessing.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def test_another_activation_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bundled.checkpoint_path("castling-deit-digits").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"hidden_act": "gelu_new"}))
    with pytest.raises(CheckpointError, match="'gelu_new' for an activation"):
        read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_act": "gelu"}))
    read(tmp_path)


def test_heads_that_no_tensor_tells_are_those_of_the_config_or_it_is_refused(tmp_path: Path) -> None:
    """A softmax DeiT of 128 channels is read with two heads of 64, as all published ones; this one has four."""
    save_file(small("deit-softmax").state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 2}))
    assert identify(read(tmp_path), model="deit")[1].config.heads == 2
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    with pytest.raises(CheckpointError, match="says its attention has 4 heads, its tensors are read with 2"):
        identify(read(tmp_path), model="deit")
    assert identify(read(tmp_path), init_dconv="zero")[1].config.heads == 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "holds no object"),
        ({"num_classes": 11}, "says it has 11 classes, its tensors have 10"),
        ({"label_names": ["a"]}, "names 1 labels for 10 classes"),
        ({"pretrained_cfg": {"std": [0, 1, 1]}}, "'std'"),
        ({"pretrained_cfg": {"input_size": [3, 64, 64]}}, "says it takes images of"),
        ({"architecture": "../escape"}, "'architecture'"),
    ],
)
def test_a_config_that_cannot_be_true_is_refused(config: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        identify(read(folder_of(tmp_path, config)))
    assert caught.value.hint


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "/etc/passwd", "a/b", "..", ".", "", "..\\x", "C:x", 3, None]
)
def test_a_shard_outside_the_folder_is_refused_and_not_opened(shard: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(TENSORS, tmp_path / "outside.safetensors")
    write_index(folder / "model.safetensors.index.json", dict.fromkeys(TENSORS, shard))
    with pytest.raises(CheckpointError, match="no file of this folder"):
        read(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shards(tmp_path)[1].unlink()
    with pytest.raises(CheckpointError, match=r"shard '.*00002-of-00003.safetensors' is missing"):
        read(tmp_path)


def test_a_shard_without_a_promised_tensor_is_refused(tmp_path: Path) -> None:
    files = shards(tmp_path)
    part = {name: TENSORS[name] for name in list(TENSORS)[0::3]}
    removed = next(iter(part))
    save_file({name: value for name, value in part.items() if name != removed}, files[0])
    with pytest.raises(CheckpointError, match=f"disagree on 1 tensors \\({removed}\\)"):
        read(tmp_path)


@pytest.mark.parametrize("content", ["no json", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}', "[" * 100_000])
def test_a_damaged_index_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path)
    assert caught.value.hint


def test_a_folder_without_weights_is_told_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none of model.safetensors, .*pytorch_model.bin"):
        read(tmp_path)
