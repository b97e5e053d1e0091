"""An error is put down to preprocessing or to the model, and the mistake in it is named."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from deployments import castling
from detectors import detector
from edits import reseal
from networks import small
from PIL import Image
from rich.console import Console

import castling_deploy
from castling_deploy import bundled
from castling_deploy.artifact import read_folder
from castling_deploy.attribution.mistakes import candidates, frames
from castling_deploy.attribution.own_preprocessing import preprocess, print_attribution
from castling_deploy.attribution.resize_check import MATTERS, Cause, attribute, picture, prepared
from castling_deploy.errors import ShapeError, UsageError
from castling_deploy.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from castling_deploy.scenes import scenes

Array = npt.NDArray[np.generic]
Pixels = npt.NDArray[np.uint8]
PRE = Preprocessing((64, 64))  # of the small LeViT: bicubic, the crop is 0.875 of the resized picture
MEAN, STD = np.array(IMAGENET_MEAN, np.float32), np.array(IMAGENET_STD, np.float32)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scene of digits and photographs on a canvas of a camera's ratio."""
    (scene,) = scenes(*bundled.digits(), (427, 641), 1, seed=5)
    canvas = scene.image.copy()
    for index, (top, left) in enumerate([(20, 30), (240, 200), (100, 420)]):
        canvas[top : top + 160, left : left + 160] = bundled.photographs()[index]
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(canvas).save(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = castling_deploy.export(small("levit"), target="onnx", output=tmp_path_factory.mktemp("out")).path
    assert path is not None
    assert read_folder(path).preprocessing == PRE
    return path


def stored(photo: Path) -> Pixels:
    return np.asarray(Image.open(photo))


def normalised(pixels: Pixels) -> npt.NDArray[np.float32]:
    """(1, C, H, W), the right way."""
    return PRE.normalised(pixels[None])


def resized(photo: Path, size: tuple[int, int] = (110, 73), kernel: str = "BICUBIC") -> Pixels:
    """(73, 110, 3): what the network's 64 x 64 are cropped from."""
    return np.asarray(Image.open(photo).resize(size, Image.Resampling[kernel]))


def cropped(pixels: Pixels, top: int = 4, left: int = 23) -> Pixels:
    return pixels[top : top + 64, left : left + 64]


def without_antialias(photo: Path, mode: str) -> Pixels:
    given = torch.from_numpy(stored(photo).copy()).permute(2, 0, 1)[None].float()
    scaled = torch.nn.functional.interpolate(given, (73, 110), mode=mode, align_corners=False)
    return cropped(scaled.round().clamp(0, 255).byte()[0].permute(1, 2, 0).numpy())


def right(photo: Path) -> Pixels:
    return cropped(resized(photo))


def raw(photo: Path) -> npt.NDArray[np.float32]:
    """(1, C, H, W) 0..255."""
    return right(photo).transpose(2, 0, 1)[None].astype(np.float32)


MISTAKES: dict[str, Callable[[Path], Array]] = {
    "the channels are in the order BGR": lambda photo: normalised(right(photo)[..., ::-1]),
    "nearest instead of bicubic": lambda photo: normalised(cropped(resized(photo, kernel="NEAREST"))),
    "bilinear instead of bicubic": lambda photo: normalised(cropped(resized(photo, kernel="BILINEAR"))),
    "lanczos instead of bicubic": lambda photo: normalised(cropped(resized(photo, kernel="LANCZOS"))),
    "box instead of bicubic": lambda photo: cropped(resized(photo, kernel="BOX")),
    "bilinear without antialias instead of bicubic with it": lambda photo: without_antialias(photo, "bilinear"),
    "bicubic without antialias instead of bicubic with it": lambda photo: without_antialias(photo, "bicubic"),
    "the crop is moved by 1 rows and 0 columns": lambda photo: normalised(cropped(resized(photo), top=5)),
    "the crop is moved by 0 rows and -1 columns": lambda photo: cropped(resized(photo), left=22),
    "stretched instead of cropped": lambda photo: normalised(resized(photo, (64, 64))),
    "the crop is 1.0 of the resized picture instead of 0.875": lambda photo: cropped(resized(photo, (96, 64)), 0, 16),
    "Inception's (0.5, 0.5) mean and std": lambda photo: raw(photo) / 127.5 - 1,
    "not divided by 255": lambda photo: ((raw(photo).transpose(0, 2, 3, 1) - MEAN) / STD).transpose(0, 3, 1, 2),
    "divided by 255, mean and std left out": lambda photo: raw(photo) / 255,
    "not normalised at all: 0..255": raw,
    "mean and std in the order BGR": lambda photo: (
        ((raw(photo) / 255).transpose(0, 2, 3, 1) - MEAN[::-1]) / STD[::-1]
    ).transpose(0, 3, 1, 2),
    "the axes are (H, W, C) where (C, H, W) is right": lambda photo: normalised(right(photo)).transpose(0, 2, 3, 1),
    "the shape is (C, H, W), the values lie as (H, W, C): reshaped, not transposed": lambda photo: (
        normalised(right(photo)).transpose(0, 2, 3, 1).reshape(1, 3, 64, 64)
    ),
}
MENDED = "the axes are (H, W, C) where (C, H, W) is right"  # the artefact cannot be run on such axes: on mended ones


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_known_mistake_is_named_alone(mistake: str, folder: Path, photo: Path) -> None:
    found = attribute(folder, photo, MISTAKES[mistake](photo))
    assert found.explanation.mistakes == (mistake,)
    assert found.explained and found.explanation.levels < 0.02
    assert (found.mean_levels > 0.2 and found.largest_levels >= 3) or mistake == MENDED
    (effect,) = found.effects
    assert effect.rel is not None
    assert found.cause is (Cause.PREPROCESSING if effect.rel > MATTERS else Cause.NEITHER)
    assert effect.rel > 1e-3 or mistake == MENDED


@pytest.mark.parametrize("layout", ["uint8", "uint8 channels first", "tensor", "tensor without a batch"])
def test_what_is_right_is_called_so(layout: str, folder: Path, photo: Path) -> None:
    pixels, tensor = right(photo), normalised(right(photo))
    mine = {
        "uint8": pixels,
        "uint8 channels first": pixels.transpose(2, 0, 1)[None],
        "tensor": tensor,
        "tensor without a batch": tensor[0],
    }[layout]
    found = attribute(folder, photo, mine)
    assert found.explanation.mistakes == () and found.explained and found.mean_levels < 1e-3
    assert found.cause is Cause.NEITHER
    (effect,) = found.effects
    assert effect.rel is not None and effect.rel < 1e-4 and effect.ours == effect.theirs is not None


def test_two_mistakes_at_once_are_both_named(folder: Path, photo: Path) -> None:
    bilinear = cropped(resized(photo, kernel="BILINEAR"))
    found = attribute(folder, photo, bilinear[..., ::-1])
    assert set(found.explanation.mistakes) == {"bilinear instead of bicubic", "the channels are in the order BGR"}
    found = attribute(folder, photo, normalised(bilinear[..., ::-1]).transpose(0, 2, 3, 1))
    assert len(found.explanation.mistakes) == 3 and found.explanation.levels < 0.02


def test_a_mistake_is_named_through_the_noise_of_a_jpeg(folder: Path, photo: Path) -> None:
    noise = np.random.default_rng(0).normal(scale=1.5, size=(64, 64, 3))
    noisy = np.clip(cropped(resized(photo), top=3)[..., ::-1] + noise, 0, 255).round().astype(np.uint8)
    found = attribute(folder, photo, noisy)
    assert set(found.explanation.mistakes) == {
        "the crop is moved by -1 rows and 0 columns",
        "the channels are in the order BGR",
    }
    assert 0.5 < found.explanation.levels < 2


def test_what_nothing_known_explains_is_not_explained(folder: Path, photo: Path) -> None:
    found = attribute(folder, photo, np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    assert not found.explained and found.explanation.mistakes == ()
    assert found.cause is Cause.PREPROCESSING


def test_a_rotation_that_the_file_asks_for_is_not_applied(folder: Path, photo: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.open(photo).save(tmp_path / "turned.png", exif=exif)
    lying, shown = picture(tmp_path / "turned.png")
    assert shown is not None and lying.shape == (427, 641, 3) and shown.shape == (641, 427, 3)
    assert attribute(folder, tmp_path / "turned.png", PRE.resized(lying)).explanation.mistakes == ()
    found = attribute(folder, tmp_path / "turned.png", PRE.resized(shown))
    assert found.explanation.mistakes == ("the EXIF rotation was applied",)


def test_a_wrong_model_is_the_models_fault(folder: Path, photo: Path, tmp_path: Path) -> None:
    wrong = castling_deploy.export(small("levit", seed=1), target="onnx", output=tmp_path / "b").path
    copy = shutil.copytree(folder, tmp_path / "a")
    assert wrong is not None
    shutil.copyfile(wrong / "model.onnx", copy / "model.onnx")
    reseal(copy)
    assert attribute(copy, photo, right(photo)).cause is Cause.MODEL


@pytest.mark.parametrize(
    ("mine", "hint"),
    [
        (lambda photo: resized(photo), "resized and not cropped"),
        (lambda photo: stored(photo), "was not resized"),
        (lambda photo: np.zeros((2, 3, 64, 64), np.float32), "save one image of 64 x 64 pixels"),
        (lambda photo: np.zeros((64, 64, 3), np.int64), "save uint8 pixels, or a float tensor"),
        (lambda photo: np.zeros((3, 64, 64), np.complex64), "save uint8 pixels, or a float tensor"),
        (lambda photo: np.full((64, 64, 3), np.nan, np.float32), "divides"),
    ],
)
def test_another_size_is_refused_with_the_step_that_is_missing(
    mine: Callable[[Path], Array], hint: str, folder: Path, photo: Path
) -> None:
    with pytest.raises(ShapeError) as caught:
        attribute(folder, photo, mine(photo))
    assert hint in (caught.value.hint or "")


def test_a_detectors_pictures_are_stretched(photo: Path, tmp_path: Path) -> None:
    path = castling_deploy.export(detector(), target="onnx", output=tmp_path).path
    assert path is not None
    pre = read_folder(path).preprocessing
    mine = prepared(path, photo)
    found = attribute(path, photo, mine)
    assert found.cause is Cause.NEITHER and [effect.ours for effect in found.effects] == [None] * 8
    height, width = pre.size  # 96 x 128
    inner = np.asarray(Image.open(photo).resize((width, round(427 * width / 641)), Image.Resampling.BILINEAR))
    boxed = np.full((height, width, 3), 114, np.uint8)
    top = (height - len(inner)) // 2
    boxed[top : top + len(inner)] = inner
    found = attribute(path, photo, boxed)
    assert found.explanation.mistakes == ("letterboxed on gray instead of stretched",)
    assert found.cause is Cause.PREPROCESSING


def test_an_artefact_that_takes_pixels(photo: Path, tmp_path: Path) -> None:
    if castling_deploy.target.target_named("coreml").missing() is not None:
        pytest.skip("coremltools is not installed here")
    path = castling_deploy.export(small("levit"), target="coreml", output=tmp_path, input="image").path
    assert path is not None
    mine = prepared(path, photo)
    assert mine.dtype == np.uint8 and mine.shape == (1, 64, 64, 3)
    found = attribute(path, photo, mine)
    assert found.explanation.mistakes == () and found.cause is Cause.NEITHER and found.effects[0].rel == 0
    found = attribute(path, photo, normalised(mine[0].astype(np.uint8)).transpose(0, 2, 3, 1))
    assert found.explanation.mistakes == ("normalised, which the artefact does itself",) and found.effects == ()


@pytest.mark.parametrize(("height", "width"), [(427, 641), (641, 427), (64, 64), (30, 50), (73, 73)])
@pytest.mark.parametrize("keep_ratio", [True, False])
def test_the_first_candidate_is_what_the_artefact_does(height: int, width: int, keep_ratio: bool) -> None:
    pre = Preprocessing((48, 64), keep_ratio=keep_ratio, resize_kernel="bilinear")
    scene = scenes(*bundled.digits(), (height, width), 1, seed=1)[0].image
    made = list(candidates(scene, pre))
    assert made[0].mistakes == ()
    np.testing.assert_array_equal(made[0].pixels, pre.resized(scene))
    assert len({each.mistakes for each in made}) == len(made)
    assert all(each.pixels.shape == (48, 64, 3) and each.pixels.dtype == np.uint8 for each in made)
    assert len(set(frames(pre, height, width).values())) == len(frames(pre, height, width))


def test_gray_pictures_have_no_order_of_channels(photo: Path) -> None:
    pre = Preprocessing((48, 64), mean=(0.5,), std=(0.5,), channel_order="L")
    made = list(candidates(stored(photo), pre))
    np.testing.assert_array_equal(made[0].pixels, pre.resized(stored(photo)))
    assert not any("BGR" in mistake for each in made for mistake in each.mistakes)


def test_the_command_saves_ours_and_says_what_it_found(folder: Path, photo: Path, tmp_path: Path) -> None:
    ours, mine = tmp_path / "ours.npy", tmp_path / "mine.npy"
    assert preprocess(folder, photo, None, ours) is None
    np.testing.assert_array_equal(np.load(ours), normalised(right(photo)))
    np.save(mine, MISTAKES["the channels are in the order BGR"](photo))
    found = preprocess(folder, photo, mine, None)
    assert found is not None
    text = io.StringIO()
    print_attribution(found, Console(file=text, width=80))
    for words in ("explained by: the channels are in the order BGR", "cause: the preprocessing", "logits: ", "rel "):
        assert words in text.getvalue()
    for arguments, message in (
        ((None, None), "nothing to do"),
        ((None, ours), "cannot write"),
        ((tmp_path / "none.npy", None), "cannot be read"),
        ((photo, None), "cannot be read"),
    ):
        with pytest.raises(UsageError, match=message):
            preprocess(folder, photo, *arguments)
    run = castling("preprocess", folder, "--image", photo, "--save", tmp_path / "again.npy")
    assert run.code == 0 and run.out == ""
    assert f"written: {tmp_path / 'again.npy'}, what the artefact takes of '{photo}'" in run.err
    with pytest.raises(UsageError, match="cannot be read as a picture"):
        attribute(folder, mine, np.load(mine))
