"""The category discrimination model: pictures beside the names of classes, learned from seen classes alone."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsd_fast.engine.guides import Guide, clip_space
from dsd_fast.engine.network import PixelNetwork, vision_network
from dsd_fast.engine.preprocessing import Picture
from dsd_fast.engine.settings import Fields, above, check_fields, integer, is_text, number
from dsd_fast.engine.templates import check_templates
from dsd_fast.generation.grids import read_classes
from dsd_fast.jobs import locked, read_tensors, remove_stale, tensors_hash, write_tensors
from dsd_fast.kernels.common.host import as_tensor, ordinary, own_types
from dsd_fast.kernels.common.transfer import upload
from dsd_fast.training import Descent, as_json, seed_of, seeded

if TYPE_CHECKING:
    from dsd_fast.models import Model

FILE = "cdm.safetensors"
_CLIP_NORM = 1.0


@dataclass(frozen=True)
class CdmConfig:
    """How a category discrimination model is made.

    Fu et al. 2024, "DIG-ZSL": a frozen encoder, an MLP into CLIP's space of texts, trained on seen classes. Its widths,
    loss, temperature and steps are not published: these are this package's. On the mini model's scenes a hidden layer,
    or more steps, told unseen classes apart less well by CLIP's features.

    Attributes:
        encoder: of pictures: "clip", the image side of the model's CLIP, or a folder or hub id, see
            :func:`dsd_fast.engine.network.vision_network`.
        templates: texts with one "{}" or "{class}" each, over which a class's prototype is the mean.
        widths: of the MLP's hidden layers; () makes it a linear map.
        dropout: share of each hidden layer that a step leaves out.
        temperature: that cosines are divided by, in the cross-entropy over the seen classes and in a guide.
        steps, batch_size: of the optimiser, AdamW; a batch is of single pictures.
        learning_rate, weight_decay: the rate falls to 0 by a cosine; the decay is of matrices.
        save_every: seconds between checkpoints in the output folder.
        seed: of the first weights, the order of pictures, and dropout.

    Raises:
        ValueError: a value outside its range, by name.
    """

    encoder: str = "clip"
    templates: tuple[str, ...] = ("a photo of a {}",)
    widths: tuple[int, ...] = ()
    dropout: float = 0.5
    temperature: float = 0.05
    steps: int = 500
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    save_every: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "templates", tuple(check_templates(self.templates)))
        check_fields(self, _FIELDS)


def _are_widths(x: object) -> bool:
    return isinstance(x, tuple) and all(map(integer(1), x))


_FIELDS: Fields = {
    "encoder": (lambda x: is_text(x) and bool(x), '"clip", a folder or a hub id'),
    "widths": (_are_widths, "integers of at least 1"),
    "dropout": (lambda x: number(0, 1)(x) and x < 1, "a number from 0 to below 1"),
    "temperature": (above(0), "a number above 0"),
    "steps": (integer(1), "an integer of at least 1"),
    "batch_size": (integer(1), "an integer of at least 1"),
    "learning_rate": (above(0), "a number above 0"),
    "weight_decay": (number(0), "a number of at least 0"),
    "save_every": (number(0), "a number of at least 0"),
    "seed": (integer(0, 2**32 - 1), "an integer from 0 to 2**32 - 1"),
}


def encoder_of(config: CdmConfig, model: Model, **options: Any) -> PixelNetwork:
    """Load the encoder that a config names, onto the model's device.

    Args:
        options: of :func:`dsd_fast.engine.network.vision_network`, for one that is not CLIP.

    Raises:
        ModelError, ValueError: as that function does; a model without a CLIP.
    """
    if config.encoder == "clip":
        return clip_space(model, "crop").vision
    return vision_network(config.encoder, **{"device": model.device, **options})


class CategoryDiscriminator:
    """Tells by its cosine with the text of a class's name how much a picture is of that class.

    :meth:`fit` and :meth:`load` make one.

    Attributes:
        encoder: the frozen one, from pictures to features (n, D).
        classes: the seen ones.
        config: how it was made.
    """

    def __init__(
        self, model: Model, encoder: PixelNetwork, classes: Sequence[str], config: CdmConfig, width: int
    ) -> None:
        self.encoder, self.classes, self.config = encoder, read_classes(classes), config
        self._space = clip_space(model, "crop")
        with ordinary():
            self._prototypes = self.prototypes(self.classes).float()
            with seeded(seed_of(config.seed), torch.device("cpu")):
                network = _Network((width, *config.widths, self._prototypes.shape[1]), config.dropout)
            self._network = network.eval().requires_grad_(False).to(encoder.device)

    @classmethod
    def fit(
        cls,
        encoder: PixelNetwork,
        features: Any,
        labels: Any,
        classes: Sequence[str],
        model: Model,
        config: CdmConfig | None = None,
        *,
        out: str | os.PathLike[str] | None = None,
    ) -> CategoryDiscriminator:
        """Train one.

        Args:
            encoder: that made the features.
            features: (N, D) of pictures of the seen classes.
            labels: (N,) positions among the classes.
            classes: names of the seen classes.
            model: with a ``clip``, for the names' texts.
            config: how.
            out: folder for checkpoints and the result: a call that was killed goes on where it was, and one that is
                repeated gives what is there.

        Raises:
            ValueError: features, labels or classes that are not as said; a model without a CLIP; or a folder of another
                fit, with the names of what differs.
            OSError: the folder cannot be written.
        """
        x, y = _examples(features, labels, len(read_classes(classes)))
        made = cls(model, encoder, classes, config or CdmConfig(), x.shape[1])
        folder = None if out is None else Path(out)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        with nullcontext() if folder is None else locked(folder):
            if folder is not None:
                remove_stale(folder / FILE)
            made._train(x, y, folder)
            if folder is not None:
                made.save(folder)
        return made

    def embed(self, features: Tensor) -> Tensor:
        """Give (n, E) float32 of unit length, in CLIP's space, of the encoder's features (n, D)."""
        with own_types(self.encoder.device):
            embeds: Tensor = self._network(upload(features, self.encoder.device, torch.float32))
        return embeds

    def prototypes(self, classes: Sequence[str]) -> Tensor:
        """Give the texts of names, (C, E) of unit length."""
        return upload(self._space.of_classes(classes, self.config.templates), self.encoder.device)

    def guide(self, classes: Sequence[str], temperature: float | None = None) -> CdmGuide:
        """Make a guide among classes, known by their names alone.

        Args:
            classes: names; DIG-ZSL's are the unseen ones.
            temperature: that cosines are divided by; None: as in training. 1 is what DIG-ZSL's formula shows.

        Raises:
            ValueError: another temperature, or a name that CLIP does not know.
        """
        temperature = self.config.temperature if temperature is None else temperature
        if not above(0)(temperature):
            raise ValueError(f"temperature: got {temperature!r}, expected a number above 0")
        return CdmGuide(self, read_classes(classes), float(temperature))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``cdm.safetensors``: the MLP, and in its header how it was made.

        Raises:
            OSError: the folder cannot be written.
        """
        write_tensors(Path(folder) / FILE, self._network.state_dict(), self._about())

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], model: Model, encoder: PixelNetwork | None = None
    ) -> CategoryDiscriminator:
        """Read what :meth:`save` wrote.

        Args:
            encoder: the one that it was trained with; None: the one of its config.

        Raises:
            ValueError: no such file, one of another format, or an encoder or a CLIP that is another than in training.
        """
        file = Path(folder) / FILE
        if not file.is_file():
            raise ValueError(f"folder: {file} does not exist")
        from safetensors import SafetensorError

        try:
            tensors, about = read_tensors(file)
            config, classes, width = CdmConfig(**about["config"]), about["classes"], len(tensors["mean"])
        except (SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"folder: {file} is no category discrimination model ({error})") from error
        made = cls(model, encoder or encoder_of(config, model), classes, config, width)
        own = made._about()
        other = sorted(key for key in {*about, *own} if about.get(key) != own.get(key))
        if other:
            raise ValueError(f"folder: {file} was made with another {' and another '.join(other)}")
        made._network.load_state_dict(tensors)
        return made

    def settings(self) -> dict[str, Any]:
        """Tell all that changes answers, as JSON."""
        return {**self._about(), "weights": tensors_hash(self._network.state_dict())}

    def _about(self) -> dict[str, Any]:
        config = {name: value for name, value in asdict(self.config).items() if name != "save_every"}
        told = {"encoder": self.encoder.settings(), "clip": self._space.settings(), "classes": self.classes}
        about: dict[str, Any] = as_json({**told, "config": config})
        return about

    def _train(self, x: Tensor, y: Tensor, folder: Path | None) -> None:
        config, device, network = self.config, self.encoder.device, self._network
        per_epoch = math.ceil(len(x) / config.batch_size)

        @lru_cache(maxsize=1)
        def order(epoch: int) -> Tensor:
            return torch.from_numpy(np.random.default_rng((config.seed, epoch)).permutation(len(x)))

        def losses(step: int, backward: Callable[[Tensor], None]) -> None:
            epoch, place = divmod(step, per_epoch)
            rows = order(epoch)[place * config.batch_size : (place + 1) * config.batch_size]
            with seeded(seed_of(config.seed, step, 1), device), own_types(device):
                logits = network(upload(x[rows], device)) @ self._prototypes.T / config.temperature
                backward(F.cross_entropy(logits, upload(y[rows], device)))

        with ordinary(), torch.enable_grad():
            network.standardise(x)
            network.train().requires_grad_()
            descent = Descent(
                dict(network.named_parameters()),
                losses,
                lambda name: name.endswith("weight"),
                lambda _, step: config.learning_rate * (1 + math.cos(math.pi * step / config.steps)) / 2,
                lambda is_matrix: config.weight_decay if is_matrix else 0.0,
                steps=config.steps,
                clip_norm=_CLIP_NORM,
                validate_every=config.steps,
                folder=folder,
                fingerprint={**self._about(), "examples": tensors_hash({"features": x, "labels": y})},
                save_every=config.save_every,
                report=lambda step, loss, record: None,
            )
            descent.fit()
            network.eval().requires_grad_(False).zero_grad()


class CdmGuide(Guide):
    """A category discrimination model among some classes: its cosines with their names, over a temperature."""

    def __init__(self, discriminator: CategoryDiscriminator, classes: Sequence[str], temperature: float) -> None:
        self.labels, self.count, self.temperature = tuple(classes), len(classes), temperature
        self._discriminator, self._encoder = discriminator, discriminator.encoder
        # In the encoder's own precision, if it is a higher one.
        self._dtype = torch.promote_types(self._encoder.dtype, torch.float32)
        self._network = copy.deepcopy(discriminator._network).to(self._dtype)
        self._prototypes = discriminator.prototypes(self.labels).to(self._dtype)

    def logits(self, pixels: Tensor) -> Tensor:
        """Give (n, classes) of (n, 3, H, W) pixels in [−1, 1]."""
        return self._cosines(self._encoder(pixels))

    @torch.no_grad()
    def of_images(self, images: Sequence[Picture]) -> Tensor:
        """Give (n, classes) of n pictures (H, W, 3) of 8 bits, as the encoder's own preprocessing gives them."""
        return self._cosines(self._encoder.of_images(images))

    def of_features(self, features: Tensor) -> Tensor:
        """Give (n, classes) of the encoder's features (n, D)."""
        return self._cosines(upload(features, self._encoder.device))

    def settings(self) -> dict[str, Any]:
        """Tell all that changes answers, as JSON."""
        return {**self._discriminator.settings(), "labels": list(self.labels or ()), "temperature": self.temperature}

    def _cosines(self, features: Tensor) -> Tensor:
        with own_types(features.device):
            cosines: Tensor = self._network(features.to(self._dtype)) @ self._prototypes.T
        return cosines / self.temperature


class _Network(nn.Module):
    """An MLP of standardised features, (n, D), to unit length, (n, E)."""

    mean: Tensor
    scale: Tensor

    def __init__(self, widths: Sequence[int], dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.GELU(), nn.Dropout(dropout)] if layers else []
            layers.append(nn.Linear(before, after, dtype=torch.float32, device="cpu"))
        self.layers = nn.Sequential(*layers)
        self.register_buffer("mean", torch.zeros(widths[0], dtype=torch.float32, device="cpu"))
        self.register_buffer("scale", torch.ones((), dtype=torch.float32, device="cpu"))

    def standardise(self, x: Tensor) -> None:
        """Take the mean of features, (N, D), and one scale for all their dimensions, as some may hardly vary."""
        x = x.double()
        self.mean.copy_(x.mean(0))
        self.scale.copy_(x.var(0, correction=0).mean().sqrt().clamp(min=1e-12))

    def forward(self, x: Tensor) -> Tensor:
        embeds: Tensor = self.layers((x - self.mean) / self.scale)
        return F.normalize(embeds, dim=-1)


def _examples(features: Any, labels: Any, classes: int) -> tuple[Tensor, Tensor]:
    """Features (N, D) float32 and labels (N,) int64, on the CPU."""
    x, y = as_tensor(features).detach().cpu().float(), as_tensor(labels).detach().cpu()
    if x.ndim != 2 or not len(x) or not x.isfinite().all():
        raise ValueError(
            f"features: got shape {tuple(x.shape)}, expected finite numbers (N, D) of at least one picture"
        )
    if y.shape != x.shape[:1] or y.is_floating_point() or y.min() < 0 or y.max() >= classes:
        raise ValueError(
            f"labels: got {y.dtype} of shape {tuple(y.shape)}, expected ({len(x)},) positions from 0 to {classes - 1}"
        )
    if classes < 2:
        raise ValueError("classes: got one, which there is nothing to tell from; expected at least two")
    return x, y.long()
