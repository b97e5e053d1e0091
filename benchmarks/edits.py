"""Artefact folders changed by a hand that also mends the hashes, so that nothing but the content can tell."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from castling_deploy import contract
from castling_deploy.artifact import read_folder, sealed
from castling_deploy.export.pte_contents import pte_contents
from castling_deploy.folder import MANIFEST, files_in, sha256
from castling_deploy.plain import plain
from castling_deploy.rechecking.golden import judged_by, read_golden
from castling_deploy.rechecking.saved import PARITY
from castling_deploy.selftests.facts import facts_of, golden_document
from castling_deploy.selftests.texts import texts
from castling_deploy.target import TARGETS, Readable, target_named

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


def _claim(folder: Path, change: Callable[[dict[str, Any]], object], file: str = MANIFEST) -> None:
    """One of the folder's documents changed, and the manifest resealed."""
    document = json.loads((folder / file).read_text())
    change(document)
    (folder / file).write_text(json.dumps(document))
    reseal(folder)


def _parity(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    _claim(folder, change, PARITY)


def target_relabelled(folder: Path) -> None:
    """As one that writes a file of the same name, where there is one."""
    own = target_named(manifest_of(folder)["target"])
    others = [target_named(name) for name in TARGETS if name != own.name]
    other = next((other for other in others if other.file == own.file), others[0])
    reseal(folder, target=other.name)


def _input(folder: Path, **changes: Any) -> None:
    """The first input changed, and the steps of preprocessing that name it."""
    seen = read_folder(folder)
    spec = replace(seen.artifact.inputs[0], **changes)
    reseal(folder, inputs=plain([spec]), preprocessing_steps=plain(contract.steps(seen.preprocessing, spec)))


def input_renamed(folder: Path) -> None:
    _input(folder, name="picture")


def input_with_another_batch(folder: Path) -> None:
    batch, *rest = read_folder(folder).artifact.inputs[0].shape
    _input(folder, shape=(batch + 1, *rest))


def input_of_another_dtype(folder: Path) -> None:
    _input(folder, dtype="float64")


def input_with_another_layout(folder: Path) -> None:
    _input(folder, layout="NCWH")


def output_reshaped(folder: Path) -> None:
    _claim(folder, lambda manifest: manifest["outputs"][0]["shape"].append(1))


def output_with_another_layout(folder: Path) -> None:
    _claim(folder, lambda manifest: manifest["outputs"][0].update(layout="CN"))


def output_added(folder: Path) -> None:
    """One that would follow from the others, were it there."""
    _claim(folder, lambda manifest: manifest["outputs"].append({**manifest["outputs"][0], "name": "scores"}))


def _model(folder: Path, **changes: Any) -> None:
    _claim(folder, lambda manifest: manifest["model"].update(changes))


def model_renamed(folder: Path) -> None:
    _model(folder, name="another-network")


def family_relabelled(folder: Path) -> None:
    _model(folder, family="castling-mvitv2")


def task_relabelled(folder: Path) -> None:
    _model(folder, task="segmentation" if manifest_of(folder)["model"]["task"] != "segmentation" else "detection")


def classes_miscounted(folder: Path) -> None:
    model = manifest_of(folder)["model"]
    _model(folder, classes=model["classes"] + 1, config={**model["config"], "classes": model["classes"] + 1})


def a_label_dropped(folder: Path) -> None:
    reseal(folder, labels=manifest_of(folder)["labels"][:-1])


def options_relabelled(folder: Path) -> None:
    _claim(folder, lambda manifest: manifest["options"].update(opset=25, input="image"))


def details_edited(folder: Path) -> None:
    """The first detail that is counted."""
    details = manifest_of(folder)["details"]
    name = next(name for name in details if isinstance(details[name], int | dict))
    reseal(folder, details={**details, name: 7})


def tools_relabelled(folder: Path) -> None:
    _claim(folder, lambda manifest: manifest["tools"].update(torch="1.13.0"))


def golden_limit_loosened(folder: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        for output in manifest["golden"]["outputs"]:
            output["limit"] *= 100

    _claim(folder, change)


def golden_spreads_loosened(folder: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        for output in manifest["golden"]["outputs"]:
            output["spreads"] = [100 * spread for spread in output["spreads"]]

    _claim(folder, change)


def with_golden(folder: Path, real: int, **changes: Any) -> None:
    """`changes` into the manifest, and `real` golden images: spreads, limits and self-tests as if exported so."""
    reseal(folder, **changes, golden={**manifest_of(folder)["golden"], "real": real})
    seen = read_folder(folder)
    judged = judged_by(read_golden(seen), seen)
    made = texts(target_named(seen.target).selftests, facts_of(seen.artifact, seen.preprocessing, judged))
    for name, text in made.items():
        (folder / "selftest" / name).write_text(text)
    reseal(folder, golden=plain(golden_document(judged, real)))


def flat_images_called_real(folder: Path) -> None:
    with_golden(folder, len(np.load(folder / "golden" / "images.npy")))


def noise_exaggerated(folder: Path) -> None:
    """A wrong output would be called undecided then."""
    noise = {name: 1e3 * noise for name, noise in manifest_of(folder)["noise_rel"].items()}
    with_golden(folder, read_folder(folder).golden_real, noise_rel=noise)


def parity_limit_loosened(folder: Path) -> None:
    def change(parity: dict[str, Any]) -> None:
        for judged in (parity["rungs"][-1], *parity["witnesses"]):
            judged["limit"] *= 100

    _parity(folder, change)


def parity_spread_loosened(folder: Path) -> None:
    """With the errors that are divided by it."""

    def change(parity: dict[str, Any]) -> None:
        for output in (output for seen in parity["witnesses"] for output in seen["outputs"]):
            output.update(spread=100 * output["spread"], rel=output["rel"] / 100)
        parity["rungs"][-1]["rel"] /= 100

    _parity(folder, change)


def parity_with_a_smaller_error(folder: Path) -> None:
    def change(parity: dict[str, Any]) -> None:
        parity["rungs"][-1]["rel"] /= 2

    _parity(folder, change)


def _text(folder: Path, name: str, old: str, new: str) -> None:
    path = folder / name
    text = path.read_text()
    if old not in text:
        raise LookupError(f"'{old}' does not stand in {name}")
    path.write_text(text.replace(old, new, 1))
    reseal(folder)


def selftest_that_always_passes(folder: Path) -> None:
    _text(folder, "selftest/selftest.py", "FAIL", "PASS")


def readme_with_another_error(folder: Path) -> None:
    _text(folder, "README.md", "| pass |", "| pass, exactly |")


def readme_that_loads_something_else(folder: Path) -> None:
    _text(folder, "README.md", "```python\n", "```python\nimport another_model\n")


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
        target_relabelled,
        input_renamed,
        input_with_another_batch,
        input_of_another_dtype,
        input_with_another_layout,
        output_reshaped,
        output_with_another_layout,
        output_added,
        model_renamed,
        family_relabelled,
        task_relabelled,
        classes_miscounted,
        a_label_dropped,
        options_relabelled,
        details_edited,
        tools_relabelled,
        golden_limit_loosened,
        golden_spreads_loosened,
        flat_images_called_real,
        noise_exaggerated,
        parity_limit_loosened,
        parity_spread_loosened,
        parity_with_a_smaller_error,
        selftest_that_always_passes,
        readme_with_another_error,
        readme_that_loads_something_else,
        golden_images_brightened,
        golden_outputs_exchanged,
        one_byte_changed,
        manifest_edited_and_not_resealed,
    )
}
