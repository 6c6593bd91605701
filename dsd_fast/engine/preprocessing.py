"""What a network of pictures does to them first, as its makers do it, differentiable."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from dsd_fast.images import MAX_PIXELS, ImageError
from dsd_fast.kernels.common.host import own_types
from dsd_fast.kernels.common.transfer import upload
from dsd_fast.models.load import reported

Picture = npt.NDArray[np.uint8]


def _bilinear(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _bicubic(x: Tensor) -> Tensor:
    # Keys 1981, a = −1/2.
    x = x.abs()
    return torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, torch.where(x < 2, ((2.5 - x / 2) * x - 4) * x + 2, 0.0))


def _lanczos(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 3, torch.sinc(x) * torch.sinc(x / 3), 0.0)


FILTERS: Mapping[str, Callable[[Tensor], Tensor]] = {"bilinear": _bilinear, "bicubic": _bicubic, "lanczos": _lanczos}
"""By Pillow's name."""

# In a check: the size of pictures that are neither resized nor cut; how many of 255 levels one that is rounded may be
# from one that is not. Half a level in the first pass, which the second weighs with Σ|w| < 1.5, half in the second; and
# torchvision rounds the weights, too.
_NO_SIZE = (32, 32)
_LEVELS = 3.0


@dataclass(frozen=True)
class Preprocessing:
    """Resize, cut out the centre and normalise.

    Pictures are resampled as by Pillow (Resample.c: where a picture becomes smaller the filter becomes wider), by a
    product with a matrix along each side, which has a gradient in any floating type, and on a GPU the same every time.

    Attributes:
        size: (height, width), or of the shorter side alone, the ratio being kept; None does not resize.
        crop: (height, width) of what is cut out of the centre; None cuts nothing.
        resample: one of FILTERS.
        mean, std: of the three channels, of values in [0, 1].
        nearest_even: whether half a pixel beside the cut is rounded to an even number, as torchvision does, not down.
        reverse: whether the network takes blue, green, red.

    Raises:
        ValueError: another filter; a cut that is larger than the picture; a mean or a std that is not of three numbers,
            or divides by nothing.
    """

    size: tuple[int, int] | int | None
    crop: tuple[int, int] | None
    resample: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    nearest_even: bool = False
    reverse: bool = False

    def __post_init__(self) -> None:
        if self.resample not in FILTERS:
            raise ValueError(f"resample: got {self.resample!r}, expected one of {', '.join(FILTERS)}")
        least = (self.size, self.size) if isinstance(self.size, int) else self.size or self.crop
        if self.crop and least and (self.crop[0] > least[0] or self.crop[1] > least[1]):
            raise ValueError(f"crop: got {self.crop}, expected what pictures of {self.size} have")
        if len(self.mean) != 3 or len(self.std) != 3 or not min(self.std) > 0:
            raise ValueError(f"mean, std: got {self.mean} and {self.std}, expected three numbers each, of std above 0")

    def __call__(self, pixels: Tensor) -> Tensor:
        """Prepare (n, 3, H, W) in [−1, 1], floats of at least 32 bits, as (n, 3, h, w); what lies outside is cut off.

        Raises:
            ValueError: pictures that are smaller than what is cut out of them.
        """
        x = (pixels.clamp(-1, 1) + 1) / 2
        height, width = self._resized(*x.shape[2:])
        with own_types(x.device):
            x = _along(x, width, self.resample)
            x = _along(x.mT, height, self.resample).mT
        return self._finish(x.clamp(0, 1))

    def of_images(self, images: Sequence[Picture]) -> Tensor:
        """Prepare n pictures (H, W, 3) of 8 bits, each of its own size, resized by Pillow: (n, 3, h, w) float32.

        Raises:
            ImageError: a picture so long that, resized, it is too large.
            ValueError: none, pictures of another type or shape, or smaller ones than what is cut out of them.
        """
        check_pictures(images)
        return torch.cat([self.of_image(Image.fromarray(image)) for image in images])

    def of_image(self, image: Image.Image) -> Tensor:
        """Prepare an RGB picture as :meth:`of_images` does, (1, 3, h, w) float32, without an array of all its pixels.

        Raises:
            ImageError, ValueError: as there.
        """
        height, width = self._resized(image.height, image.width)
        if height * width > MAX_PIXELS:
            told = f"{image.width} × {image.height} pixels, of which {width} × {height} would be made"
            raise ImageError("picture", "too-large", f"a picture has {told}; the limit is {MAX_PIXELS} in all")
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling[self.resample.upper()])
        # Cut first, so that of a long picture no more becomes floats.
        rows, columns = self._kept(height, width)
        return self._finish((to_pixels(np.array(image)[None, rows, columns]) + 1) / 2)

    def check(self, own: Callable[[Picture], Tensor], what: str) -> None:
        """Compare with the original, of one picture (H, W, 3) to (1, 3, h, w), on two pictures of noise.

        Raises:
            ValueError: they differ by more than the rounding of 8 bits.
        """
        height, width = next(size for size in (self.crop, self.size, _NO_SIZE) if isinstance(size, tuple))
        std = torch.tensor(self.std, dtype=torch.float32, device="cpu").view(3, 1, 1)
        for size in ((height * 2 + 1, width * 3 // 2 + 2), (height * 2 // 3 + 1, width)):
            # Of so little contrast that no filter goes beyond black and white, where the order of passes would count.
            picture = np.random.default_rng(0).integers(64, 192, (*size, 3), dtype=np.uint8)
            want = own(picture).float()
            for got in (self(to_pixels(picture[None])), self.of_images([picture])):
                same = want.shape == got.shape
                levels = float(((want - got) * std).abs().max()) * 255 if same else math.nan
                if not levels <= _LEVELS:
                    how = f"by {levels:.1f} of 255 levels" if same else f"as its pictures are {tuple(want.shape)}"
                    raise ValueError(
                        f"{what} prepares pictures in a way that is not known: what comes nearest, {self}, differs "
                        f"{how}; expected one that resizes, cuts out the centre and normalises"
                    )

    def settings(self) -> dict[str, Any]:
        """Tell all, as JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if isinstance(self.size, int):
            short = min(height, width)
            return int(self.size * height / short), int(self.size * width / short)
        return self.size or (height, width)

    def _kept(self, height: int, width: int) -> tuple[slice, slice]:
        """Rows and columns of a resized picture that are not cut off."""
        crop = self.crop or (height, width)
        rest = height - crop[0], width - crop[1]
        if min(rest) < 0:
            raise ValueError(f"pixels: got pictures of {(height, width)}, expected at least {crop}")
        top, left = (round(each / 2) if self.nearest_even else each // 2 for each in rest)
        return slice(top, top + crop[0]), slice(left, left + crop[1])

    def _finish(self, x: Tensor) -> Tensor:
        """Cut and normalise values in [0, 1]."""
        rows, columns = self._kept(*x.shape[2:])
        x = x[..., rows, columns]
        mean, std = (
            upload(torch.tensor(each, dtype=x.dtype, device="cpu"), x.device).view(3, 1, 1)
            for each in (self.mean, self.std)
        )
        return ((x.flip(1) if self.reverse else x) - mean) / std


def check_pictures(images: Sequence[Picture]) -> None:
    """Refuse what is no picture of 8 bits, as numbers from 0 to 1 would be taken for black.

    Raises:
        ValueError: none, or an array of another type or shape.
    """
    if not len(images):
        raise ValueError("images: got none, expected at least one picture")
    for image in images:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"images: got {image.dtype} of shape {image.shape}, expected uint8 (H, W, 3)")


def to_pixels(images: Picture) -> Tensor:
    """Images of 8 bits, (n, H, W, 3), as pixels in [−1, 1], (n, 3, H, W) float32 on the CPU."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1)


def of_processor(processor: Any, what: str) -> Preprocessing:
    """Tell what an image processor of transformers does, and check it.

    Raises:
        ValueError: it does something else, by name.
    """
    if hasattr(processor, "data_config"):
        return of_timm(processor.data_config, what)
    made = as_said(processor.to_dict(), what)

    def own(picture: Picture) -> Tensor:
        with reported(what):
            prepared = processor(images=[picture], input_data_format="channels_last", return_tensors="pt")
            return torch.as_tensor(prepared["pixel_values"])

    made.check(own, what)
    return made


def as_said(config: Mapping[str, Any], what: str) -> Preprocessing:
    """Make what the config of an image processor of transformers says.

    Raises:
        ValueError: another way to resize, by name.
    """
    said = {name: value for name, value in config.items() if value is not None}
    size: Any = said.get("size") if said.get("do_resize") else None
    crop: Any = said.get("crop_size") if said.get("do_center_crop") else None
    if size is not None:
        sides = {name: int(value) for name, value in size.items() if value is not None}
        if sides.keys() == {"height", "width"}:
            size = (sides["height"], sides["width"])
        elif sides.keys() == {"shortest_edge"}:
            size = sides["shortest_edge"]
        else:
            raise ValueError(f"{what} resizes to {sides}, expected a height and width, or a shortest_edge")
        if "crop_pct" in said and isinstance(size, int):
            # ConvNeXT's way.
            if size < 384:
                crop = {"height": size, "width": size}
                size = int(size / said["crop_pct"])
            else:
                size = (size, size)
    factor = 255 * float(said["rescale_factor"]) if said.get("do_rescale") else 255.0
    mean, std = (said["image_mean"], said["image_std"]) if said.get("do_normalize") else ((0.0,) * 3, (1.0,) * 3)
    return Preprocessing(
        size=size,
        crop=crop and (int(crop["height"]), int(crop["width"])),
        resample=Image.Resampling(said.get("resample", Image.Resampling.BILINEAR)).name.lower(),
        mean=tuple(float(each) / factor for each in mean),
        std=tuple(float(each) / factor for each in std),
        reverse=bool(said.get("do_flip_channel_order")),
    )


def of_timm(config: Mapping[str, Any], what: str) -> Preprocessing:
    """Tell what timm does before a model of this data config (its ``transforms_imagenet_eval``), and check it.

    Raises:
        ValueError: it does something else, by name.
    """
    channels, height, width = config["input_size"]
    share, mode = config["crop_pct"], config["crop_mode"]
    scaled = (math.floor(height / share), math.floor(width / share))
    if channels != 3 or mode not in ("center", "squash") or (mode == "center" and scaled[0] != scaled[1]):
        raise ValueError(
            f"{what} takes pictures of {tuple(config['input_size'])} by crop_mode {mode!r}, expected three channels, "
            "and 'squash', or 'center' of a square"
        )
    made = Preprocessing(
        size=scaled if mode == "squash" else scaled[0],
        crop=(height, width),
        resample=config["interpolation"],
        mean=tuple(map(float, config["mean"])),
        std=tuple(map(float, config["std"])),
        nearest_even=True,
    )
    import timm

    transform = timm.data.create_transform(**config, is_training=False)
    made.check(lambda picture: transform(Image.fromarray(picture))[None], what)
    return made


def _along(x: Tensor, after: int, resample: str) -> Tensor:
    """Bring the last side to another length, (…, w)."""
    before = x.shape[-1]
    return x if before == after else x @ upload(_weights(before, after, resample), x.device, x.dtype)


@lru_cache(maxsize=32)
def _weights(before: int, after: int, resample: str) -> Tensor:
    """What each of the positions before has in each of those after: (before, after) float64."""
    scale = before / after
    positions, centres = (torch.arange(n, dtype=torch.float64, device="cpu") + 0.5 for n in (before, after))
    weights = FILTERS[resample]((positions[:, None] - centres * scale) / max(scale, 1.0))
    return weights / weights.sum(0)
