"""Networks of pictures, from pixels: frozen, and differentiable in the pixels."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dsd_fast.engine.preprocessing import Picture, Preprocessing, of_processor, of_timm
from dsd_fast.engine.settings import above, is_size, number, or_none
from dsd_fast.jobs import config_hash, row_id, weights_hash
from dsd_fast.kernels.common.host import ordinary, own_types
from dsd_fast.kernels.common.transfer import upload
from dsd_fast.models.controlnet import named
from dsd_fast.models.hub import find_folder
from dsd_fast.models.load import (
    TRANSFORMERS_STEM,
    check_weights,
    load_network,
    reported,
    resolve_device,
    weight_patterns,
)

_TOLD = (int, float, str, FunctionType, BuiltinFunctionType, type)


class PixelNetwork:
    """A network with its own preprocessing.

    Gradients go to the pixels alone: its parameters get none, and neither they nor anything else of it is changed.

    Args:
        network: in eval mode.
        preprocessing: its own.
        run: from prepared pictures (n, 3, h, w) to a tensor (n, …).
    """

    def __init__(self, network: nn.Module, preprocessing: Preprocessing, run: Callable[[Tensor], Tensor]) -> None:
        self.network, self.preprocessing, self._run = network, preprocessing, run
        weights = (each for each in network.parameters() if each.is_floating_point())
        weight = next(weights, torch.empty(0, dtype=torch.float32, device="cpu"))
        self.device, self.dtype = weight.device, weight.dtype

    def __call__(self, pixels: Tensor) -> Tensor:
        """Run on (n, 3, H, W) in [−1, 1]; what lies outside counts as its bounds, as in a picture.

        Raises:
            ValueError: pixels of another shape or type.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
            raise ValueError(f"pixels: got {pixels.dtype} of shape {tuple(pixels.shape)}, expected (n, 3, H, W) floats")
        x = upload(pixels, self.device, torch.promote_types(pixels.dtype, torch.float32))
        return self._forward(self.preprocessing(x))

    def of_images(self, images: Sequence[Picture]) -> Tensor:
        """Run on n pictures (H, W, 3) of 8 bits, resized in 8 bits as by its makers; without gradients."""
        with torch.no_grad():
            return self._forward(self.preprocessing.of_images(images))

    def _forward(self, prepared: Tensor) -> Tensor:
        x = upload(prepared, self.device, self.dtype)
        with own_types(self.device), torch.set_grad_enabled(x.requires_grad and torch.is_grad_enabled()):
            if torch.is_grad_enabled() and any(each.requires_grad for each in self.network.parameters()):
                result: Tensor = _ToInput.apply(x, self._run)  # type: ignore[no-untyped-call]
                return result
            return self._run(x)

    def settings(self) -> dict[str, Any]:
        """Tell what changes answers, as JSON: weights, structure and preprocessing."""
        network: Any = self.network
        has_config = hasattr(getattr(network, "config", None), "to_dict")
        return {
            "name": named(type(network)),
            "weights": weights_hash([network]),
            "structure": config_hash(network) if has_config else _structure(network),
            "preprocessing": self.preprocessing.settings(),
        }


def _structure(network: nn.Module) -> str:
    """A hash of the classes of modules and of what they hold besides weights: numbers, texts and functions.

    Not of their representation, which other versions of torch give otherwise.
    """

    def is_told(value: Any) -> bool:
        if isinstance(value, list | tuple):
            return all(map(is_told, value))
        return isinstance(value, _TOLD)

    told: dict[str, Any] = {}
    for path, module in network.named_modules():
        # What is off may as well be missing.
        held = {key: x for key, x in vars(module).items() if key[0] != "_" and x is not False and is_told(x)}
        told[path] = [named(type(module)), held]
    return row_id(json.dumps(told, sort_keys=True, default=named))


class _ToInput(torch.autograd.Function):
    """A function whose gradient goes to its argument, and not to what else it is made of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_()
            ctx.y = run(ctx.x)
        y: Tensor = ctx.y.detach()
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (result,) = torch.autograd.grad(ctx.y, ctx.x, gradient, retain_graph=True)
        return result, None


def wide(x: Tensor) -> Tensor:
    """Give float32, or float64 as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def vision_network(
    encoder: PixelNetwork | nn.Module | str | os.PathLike[str],
    *,
    processor: Any = None,
    size: tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    local_files_only: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
) -> PixelNetwork:
    """Make what gives features (n, D) of pictures: float32, or float64 of a network that is.

    Args:
        encoder: one made before, which is given back; a folder or hub id of a vision model of transformers or timm; or
            a module in eval mode, which stays as it is: one of transformers with its ``processor``, one of timm, or any
            from normalised pixels (n, 3, H, W) to features. Of transformers' outputs the pooled one is taken, else the
            first token, or the mean over positions; of timm's models what is before the classifier.
        processor, size, mean, std, device, revision, local_files_only, cache_dir: see
            :func:`dsd_fast.engine.guides.guide_of`.

    Raises:
        ModelError: an encoder that cannot be loaded.
        ValueError: arguments that do not go with it; preprocessing that is not known; a module in training mode.
    """
    if isinstance(encoder, PixelNetwork):
        return encoder
    network: Any = encoder
    if not isinstance(encoder, nn.Module):
        check_absent(encoder, processor=processor, size=size, mean=mean, std=std)
        network, processor = load_with_processor(
            encoder,
            "AutoModel",
            "encoder",
            device=device,
            revision=revision,
            local_files_only=local_files_only,
            cache_dir=cache_dir,
        )
    preprocessing = preprocessing_of(network, processor, size=size, mean=mean, std=std)
    is_timm = callable(getattr(network, "forward_head", None)) and callable(getattr(network, "forward_features", None))

    def run(x: Tensor) -> Tensor:
        if is_timm:
            return wide(network.forward_head(network.forward_features(x), pre_logits=True))
        return wide(_features(network(x)))

    return PixelNetwork(network, preprocessing, run)


def _features(output: Any) -> Tensor:
    for name in ("image_embeds", "pooler_output", "last_hidden_state"):
        value = output if isinstance(output, Tensor) else getattr(output, name, None)
        if isinstance(value, Tensor):
            # Of (n, L, D) the first token, of (n, D, h, w) the mean over positions.
            value = value[:, 0] if value.ndim == 3 else value.flatten(2).mean(-1) if value.ndim == 4 else value
            if value.ndim == 2:
                return value
    raise ValueError(f"encoder gave {type(output).__name__}, expected features (n, D), or an output that has them")


def check_absent(source: str | os.PathLike[str] | type, **given: Any) -> None:
    """Refuse what a source, by its name or class, has itself.

    Raises:
        ValueError: something that is not None, by name.
    """
    for name, value in given.items():
        if value is not None:
            who = source.__name__ if isinstance(source, type) else repr(os.fspath(source))
            raise ValueError(f"{name}: got {value!s:.80}, but {who} has its own, expected None")


def preprocessing_of(
    network: nn.Module,
    processor: Any = None,
    *,
    size: tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Preprocessing:
    """Tell what is done to pictures before a module.

    Args:
        processor: an image processor of transformers, the module's own.
        size, mean, std: of a module without one, see :func:`dsd_fast.engine.guides.guide_of`; unless they are given,
            those of a model of timm (its ``pretrained_cfg``).

    Raises:
        ValueError: neither, or both; a preprocessing that is not known; a module in training mode.
    """
    if any(module.training for module in network.modules()):
        raise ValueError("classifier: it is in training mode, expected a module after eval()")
    if processor is not None:
        check_absent(type(processor), size=size, mean=mean, std=std)
        return of_processor(processor, f"processor {type(processor).__name__}")
    if size is mean is std is None and getattr(network, "pretrained_cfg", None):
        import timm

        return of_timm(timm.data.resolve_model_data_config(network), f"classifier {type(network).__name__}")
    three: dict[str, tuple[float, ...]] = {}
    values: Any
    for name, values, allowed in (("mean", mean, number(0, 1)), ("std", std, above(0, 10))):
        if np.shape(values) != (3,) or not all(map(allowed, values)):
            raise ValueError(f"{name}: got {values} for a module, expected three numbers, of values in [0, 1]")
        three[name] = tuple(map(float, values))
    sides = tuple(size) if isinstance(size, list) else size
    if not or_none(is_size)(sides):
        raise ValueError(f"size: got {size}, expected (height, width), or None")
    return Preprocessing(sides, None, "bicubic", three["mean"], three["std"])


@ordinary()
def load_with_processor(
    source: str | os.PathLike[str],
    kind: str,
    what: str,
    *,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    local_files_only: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
) -> tuple[Any, Any]:
    """Load a network of transformers, frozen and in float32, and its image processor.

    Args:
        source: a folder or hub id: safetensors and JSON alone, no code that lies beside them.
        kind: name of the auto class of transformers.
        what: it is, in errors.

    Raises:
        ModelError: it cannot be loaded.
    """
    import transformers

    target = resolve_device(device)
    folder, _ = find_folder(
        source,
        ["config.json", "preprocessor_config.json", *weight_patterns(TRANSFORMERS_STEM, None)],
        what=what,
        revision=revision,
        local_files_only=local_files_only,
        cache_dir=cache_dir,
    )
    name = f"{what} {os.fspath(source)!r}"
    check_weights(folder, TRANSFORMERS_STEM, None, name)
    network = load_network(getattr(transformers, kind), folder, torch.float32, None, name, "pooler")
    # Of a CLIP and its like.
    network = getattr(network, "vision_model", network) if kind == "AutoModel" else network
    with reported(name):
        processor = transformers.AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    return network.requires_grad_(False).to(target), processor
