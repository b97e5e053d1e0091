"""Artefact folders changed by a hand that also mends the hashes, so that nothing but the content can tell."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from castling_deploy.artifact import read_folder, sealed
from castling_deploy.export.pte_contents import pte_contents
from castling_deploy.folder import MANIFEST, files_in, sha256
from castling_deploy.target import Readable, target_named

Weights = npt.NDArray[np.floating]


def reseal(folder: Path, **changes: Any) -> None:
    """`changes` into the manifest of `folder`, in place, with the hashes of all files and its own as they are now."""
    manifest = {**json.loads((folder / MANIFEST).read_text()), **changes}
    manifest["files"] = {path.as_posix(): sha256(folder / path) for path in files_in(folder) if path.name != MANIFEST}
    (folder / MANIFEST).write_text(json.dumps(sealed(manifest)))


def manifest_of(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return manifest


def weights_of(folder: Path) -> Iterator[Weights]:
    """Weights with two axes or more of the artefact in `folder`, the largest first."""
    seen = read_folder(folder)
    target = target_named(seen.target)
    dtype = np.dtype("<f2" if seen.precision == "fp16" else "<f4")
    if isinstance(target, Readable):
        found = [np.asarray(values) for values in target.constants(folder).values()]
    else:  # rows of 8: what the bytes are the weights of is not told
        blobs = pte_contents((folder / seen.artifact.files[0]).read_bytes()).constants
        found = [np.frombuffer(blob, dtype).reshape(8, -1) for blob in blobs if len(blob) % (8 * dtype.itemsize) == 0]
    yield from sorted(
        (values for values in found if values.ndim >= 2 and values.dtype == dtype), key=lambda values: -values.size
    )


def with_another_weight(folder: Path, change: Callable[[Weights], Weights]) -> None:
    """One weight of the model's files rewritten in place: the largest that stands in them exactly once."""
    files = [folder / name for name in read_folder(folder).artifact.files]
    paths = [path for file in files for path in (file, *file.rglob("*")) if path.is_file()]
    for values in weights_of(folder):
        raw = values.tobytes()
        for path in paths:
            data = path.read_bytes()
            if data.count(raw) == 1 and not np.array_equal(changed := change(values.copy()), values):
                path.write_bytes(data.replace(raw, np.ascontiguousarray(changed, values.dtype).tobytes()))
                return reseal(folder)
    raise LookupError(f"no weight of {folder} stands in its files once")


def weight_with_a_row_negated(folder: Path) -> None:
    def change(values: Weights) -> Weights:
        values[1] *= -1
        return values

    with_another_weight(folder, change)


def weight_with_rows_shuffled(folder: Path) -> None:
    with_another_weight(folder, lambda values: np.roll(values, 1, axis=0))


def weight_by_a_stale_scale(folder: Path) -> None:
    with_another_weight(folder, lambda values: (values * np.float32(2)).astype(values.dtype))


def weight_saturated(folder: Path) -> None:
    with_another_weight(folder, lambda values: np.clip(values, -0.3 * abs(values).max(), 0.3 * abs(values).max()))


def weight_with_a_nan(folder: Path) -> None:
    def change(values: Weights) -> Weights:
        values.flat[3] = np.nan
        return values

    with_another_weight(folder, change)


def weight_with_a_row_lost(folder: Path) -> None:
    def change(values: Weights) -> Weights:
        values[2] = 0
        return values

    with_another_weight(folder, change)


def labels_shuffled(folder: Path) -> None:
    labels = manifest_of(folder)["labels"]
    reseal(folder, labels=[labels[1], labels[0], *labels[2:]])


def _preprocessing(folder: Path, **changes: Any) -> None:
    reseal(folder, preprocessing={**manifest_of(folder)["preprocessing"], **changes})


def manifest_with_another_mean(folder: Path) -> None:
    _preprocessing(folder, mean=[mean + 0.02 for mean in manifest_of(folder)["preprocessing"]["mean"]])


def manifest_with_another_std(folder: Path) -> None:
    _preprocessing(folder, std=[std * 1.02 for std in manifest_of(folder)["preprocessing"]["std"]])


def manifest_with_bgr(folder: Path) -> None:
    _preprocessing(folder, channel_order="BGR")


def manifest_with_another_kernel(folder: Path) -> None:
    kernel = manifest_of(folder)["preprocessing"]["resize_kernel"]
    _preprocessing(folder, resize_kernel="bilinear" if kernel != "bilinear" else "bicubic")


def manifest_with_another_crop(folder: Path) -> None:
    _preprocessing(folder, crop_fraction=0.7)


def precision_relabelled(folder: Path) -> None:
    reseal(folder, precision="fp32" if manifest_of(folder)["precision"] == "fp16" else "fp16")


def of_another_checkpoint(folder: Path) -> None:
    checkpoint = manifest_of(folder)["checkpoint"]
    reseal(folder, checkpoint={**checkpoint, "sha256": "0" * 64})


def golden_images_brightened(folder: Path) -> None:
    path = folder / "golden" / "images.npy"
    np.save(path, np.clip(np.load(path).astype(np.int16) + 24, 0, 255).astype(np.uint8))
    reseal(folder)


def golden_outputs_exchanged(folder: Path) -> None:
    path = next(path for path in (folder / "golden").glob("*.npy") if path.name != "images.npy")
    np.save(path, np.roll(np.load(path), 1, axis=0))
    reseal(folder)


def one_byte_changed(folder: Path) -> None:
    """The hashes are left as they were."""
    path = max((folder / name for name in files_in(folder)), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)


def manifest_edited_and_not_resealed(folder: Path) -> None:
    """One number, in an editor."""
    (folder / MANIFEST).write_text(json.dumps({**manifest_of(folder), "noise_rel": {"logits": 1e-3}}))


EDITS: Mapping[str, Callable[[Path], None]] = {
    edit.__name__: edit
    for edit in (
        weight_with_a_row_negated,
        weight_with_rows_shuffled,
        weight_by_a_stale_scale,
        weight_saturated,
        weight_with_a_nan,
        weight_with_a_row_lost,
        labels_shuffled,
        manifest_with_another_mean,
        manifest_with_another_std,
        manifest_with_bgr,
        manifest_with_another_kernel,
        manifest_with_another_crop,
        precision_relabelled,
        of_another_checkpoint,
        golden_images_brightened,
        golden_outputs_exchanged,
        one_byte_changed,
        manifest_edited_and_not_resealed,
    )
}
