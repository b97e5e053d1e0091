"""What happens to an image before the network sees it: the contract between a camera and a model.

The numbers are fixed in `manifest.json`; the same object prepares the inputs of every parity check, so that
an artefact is compared under exactly the preprocessing that it ships with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from castling_deploy.errors import ShapeError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL.Image import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """Resize without distortion, crop the centre, scale to 0..1, subtract `mean`, divide by `std`.

    `size` is (height, width) of the network's input in pixels. The picture is resized so that it covers `size` /
    `crop_fraction` (0.875: for a square, the short side to 256, crop 224; facebookresearch/deit main.py). `mean` and
    `std` have one entry per channel, in `channel_order`, for values in 0..1. Without `keep_ratio`, the whole picture is
    resized to `size` and nothing is cropped (detectors).
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    resize_kernel: str = "bicubic"
    crop_fraction: float = 0.875
    channel_order: str = "RGB"
    keep_ratio: bool = True

    def resized(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """One image of any size, (h, w) or (h, w, C) uint8, to the network's own (H, W, C) uint8."""
        import numpy as np
        from PIL import Image

        height, width = self.size
        picture = Image.fromarray(image).convert("L" if len(self.mean) == 1 else "RGB")
        if not self.keep_ratio:
            return np.asarray(self.scaled(picture, height, width)).reshape(height, width, len(self.mean))
        scale = max(height / self.crop_fraction / picture.height, width / self.crop_fraction / picture.width)
        picture = self.scaled(
            picture, max(height, round(picture.height * scale)), max(width, round(picture.width * scale))
        )
        left, top = (picture.width - width) // 2, (picture.height - height) // 2
        cropped = np.asarray(picture.crop((left, top, left + width, top + height)))
        return cropped.reshape(height, width, len(self.mean))

    def scaled(self, picture: Image, height: int, width: int) -> Image:
        """A picture at another size: its width first, then its height. Pillow 13, asked for both at once, begins with
        the height where a picture gets wider and lower, and older ones never do: up to one level apart."""
        from PIL import Image

        kernel = Image.Resampling[self.resize_kernel.upper()]
        return picture.resize((width, picture.height), kernel).resize((width, height), kernel)

    def normalised(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """(B, H, W, C) uint8 in `channel_order` -> (B, C, H, W) float32, what the network is fed."""
        import numpy as np

        if images.dtype != np.uint8 or images.shape[1:] != (*self.size, len(self.mean)) or not len(images):
            wanted = f"uint8 (B, {self.size[0]}, {self.size[1]}, {len(self.mean)}), B at least 1,"
            raise ShapeError(
                f"images are {images.dtype} {images.shape} where {wanted} is needed",
                hint="resize them with Preprocessing.resized first",
            )
        scaled = images.astype(np.float32) / np.float32(255)
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return np.ascontiguousarray(((scaled - mean) / std).transpose(0, 3, 1, 2))
