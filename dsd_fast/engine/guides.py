"""What tells how much pictures are of each class, and with what gradient."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dsd_fast.engine.clip import ClipSpace
from dsd_fast.engine.network import PixelNetwork, check_absent, load_with_processor, preprocessing_of, wide
from dsd_fast.engine.preprocessing import Picture, check_pictures, to_pixels
from dsd_fast.engine.templates import check_templates

if TYPE_CHECKING:
    from dsd_fast.models import Model

# What transformers calls the outputs of a classifier whose makers have named none.
_NAMELESS = "LABEL_{}"


class Guide:
    """Tells classes of pictures, differentiably; a subclass says how.

    Attributes:
        labels: names of the outputs, or None.
        count: of the outputs.
    """

    labels: tuple[str, ...] | None
    count: int

    def logits(self, pixels: Tensor) -> Tensor:
        """Give (n, outputs) of (n, 3, H, W) pixels in [−1, 1]: float32, or float64 of a network that is."""
        raise NotImplementedError

    def of_images(self, images: Sequence[Picture]) -> Tensor:
        """Give (n, outputs) of n pictures (H, W, 3) of 8 bits and one size, without gradients."""
        check_pictures(images)
        with torch.no_grad():
            return self.logits(to_pixels(np.stack(images)))

    def settings(self) -> dict[str, Any]:
        """Tell all that changes answers, as JSON."""
        raise NotImplementedError


class NetworkGuide(Guide):
    """A classifier.

    Args:
        network: from pixels to logits (n, outputs), or to what has them as ``logits``.
        labels: names of the outputs, or None.
        count: of the outputs.

    Raises:
        ValueError: another number of labels than of outputs.
    """

    def __init__(self, network: PixelNetwork, labels: Sequence[str] | None, count: int) -> None:
        if labels is not None and len(labels) != count:
            raise _wrong_count(len(labels), count)
        self.network, self.count = network, count
        self.labels = None if labels is None else tuple(labels)

    def logits(self, pixels: Tensor) -> Tensor:
        """Give (n, outputs) of (n, 3, H, W) pixels in [−1, 1].

        Raises:
            ValueError: the classifier has another number of outputs than it was said to have.
        """
        return self._checked(self.network(pixels), len(pixels))

    def of_images(self, images: Sequence[Picture]) -> Tensor:
        """Give (n, outputs) of n pictures (H, W, 3) of 8 bits, as its makers' own preprocessing gives them."""
        return self._checked(self.network.of_images(images), len(images))

    def settings(self) -> dict[str, Any]:
        """Tell all that changes answers, as JSON."""
        return {**self.network.settings(), "labels": self.labels and list(self.labels)}

    def _checked(self, logits: Tensor, rows: int) -> Tensor:
        if logits.shape != (rows, self.count):
            raise ValueError(
                f"classifier gave logits of shape {tuple(logits.shape)}, expected ({rows}, {self.count}): an output "
                "for each of its labels, or of the classes where it has none"
            )
        return wide(logits)


class ZeroShotGuide(Guide):
    """A model's CLIP, which knows classes by their names: its scaled cosines with their texts.

    Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", section 3.1.
    """

    def __init__(self, model: Model, classes: Sequence[str], templates: str | Sequence[str]) -> None:
        self.templates = check_templates(templates)
        self.space = clip_space(model, "crop")
        self.labels, self.count = tuple(classes), len(classes)
        self._texts = self.space.of_classes(self.labels, self.templates)

    def logits(self, pixels: Tensor) -> Tensor:
        """Give (n, classes) of (n, 3, H, W) pixels in [−1, 1]."""
        return self.space.scale * self.space.of_pixels(pixels) @ self._texts.T

    def of_images(self, images: Sequence[Picture]) -> Tensor:
        """Give (n, classes) of n pictures (H, W, 3) of 8 bits, as CLIP's own preprocessing gives them."""
        return self.space.scale * self.space.of_images(images) @ self._texts.T

    def settings(self) -> dict[str, Any]:
        """Tell all that changes answers, as JSON."""
        return {**self.space.settings(), "labels": list(self.labels or ()), "templates": self.templates}


def guide_of(
    classifier: Guide | nn.Module | str | os.PathLike[str],
    *,
    model: Model | None = None,
    classes: Sequence[str] | None = None,
    templates: str | Sequence[str] = "a photo of a {}",
    labels: Sequence[str] | None = None,
    processor: Any = None,
    size: tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Guide:
    """Make a guide of what a caller has.

    Args:
        classifier: a guide, which is given back. "clip": the model's CLIP, by the names of the classes. A folder or hub
            id of an image classifier of transformers (safetensors and JSON alone, no code that lies beside them). Or a
            module in eval mode, which stays as it is: one of transformers with its ``processor``, one of timm, or any
            from normalised pixels (n, 3, H, W) to logits (n, outputs), or to what has them as ``logits``.
        model, classes, templates: of "clip", and their texts. Of others the classes say how many outputs there are,
            where nothing else does.
        labels: names of the outputs; None: those that a classifier of transformers has.
        processor: image processor of a module of transformers.
        size: (height, width) that a module takes, to which pictures are resized (bicubic); None: that of the pictures.
        mean, std: three numbers each, of a module's normalisation, of values in [0, 1].
        device: of a classifier given by name; None: the model's, or the CPU.
        revision, local_files_only, cache_dir: as in `dsd_fast.load`.

    Raises:
        ModelError: a classifier that cannot be loaded.
        ValueError: arguments that do not go with the classifier; preprocessing that is not known; a module in training
            mode, or with another number of outputs than of labels; a model without a CLIP.
    """
    if isinstance(classifier, Guide) or (isinstance(classifier, str) and classifier == "clip"):
        source = type(classifier) if isinstance(classifier, Guide) else classifier
        check_absent(source, labels=labels, processor=processor, size=size, mean=mean, std=std)
        if isinstance(classifier, Guide):
            return classifier
        if model is None or classes is None:
            raise ValueError("classifier: got 'clip', expected a model and classes with it")
        return ZeroShotGuide(model, classes, templates)
    if isinstance(classifier, nn.Module):
        network, preprocessing = classifier, preprocessing_of(classifier, processor, size=size, mean=mean, std=std)
    else:
        check_absent(classifier, processor=processor, size=size, mean=mean, std=std)
        where = device if device is not None else "cpu" if model is None else model.device
        network, processor = load_with_processor(
            classifier,
            "AutoModelForImageClassification",
            "classifier",
            device=where,
            revision=revision,
            local_files_only=local_files_only,
            cache_dir=cache_dir,
        )
        preprocessing = preprocessing_of(network, processor)
    config = getattr(network, "config", None)
    if getattr(config, "problem_type", None) == "multi_label_classification":
        raise ValueError(
            f"classifier {classifier!s:.80} gives each label a probability of its own, expected one whose labels "
            "exclude each other"
        )
    if labels is None and getattr(config, "id2label", None):
        labels = _labels_of(config)
    outputs = getattr(config, "num_labels", None) or getattr(network, "num_classes", None)
    names = labels if labels is not None else classes
    if not isinstance(outputs, int):
        if names is None:
            raise ValueError("labels: got None for a module, expected the names of its outputs, or the classes")
        outputs = len(names)

    def run(x: Tensor) -> Tensor:
        found = network(x)
        logits = getattr(found, "logits", found)
        if not isinstance(logits, Tensor):
            raise ValueError(f"classifier gave {type(found).__name__}, expected logits (n, outputs), or what has them")
        return logits

    return NetworkGuide(PixelNetwork(network, preprocessing, run), labels, outputs)


def targets_of(
    guide: Guide, classes: Sequence[str], targets: Mapping[str, int | str] | Sequence[int | str] | None = None
) -> dict[str, int]:
    """Tell which outputs classes are.

    Args:
        classes: names.
        targets: output of each, or its label; by name, or in the classes' order. None: each class is the output of its
            name: exactly, else without regard to case and with "_" as a space, else as one of the names between commas
            that ImageNet's labels are. Outputs that have no names are the classes in their order, where they are as
            many.

    Raises:
        ValueError: a class of no output, or of several; two classes of one label; outputs without names that are not as
            many as the classes; a single output.
    """
    if guide.count < 2:
        raise ValueError("classes: there is one output, whose probability is 1 of any image; expected at least two")
    if targets is None:
        if guide.labels is None and guide.count != len(classes):
            raise _wrong_count(len(classes), guide.count)
        return outputs_of(classes, classes if guide.labels is None else guide.labels)
    if not isinstance(targets, Mapping):
        if isinstance(targets, str) or len(targets) != len(classes):
            raise ValueError(f"targets: got {targets!r:.80}, expected one for each of the {len(classes)} classes")
        targets = dict(zip(classes, targets, strict=True))
    result = {}
    for name in classes:
        target = targets.get(name)
        if isinstance(target, str) and guide.labels is not None:
            (target,) = outputs_of([target], guide.labels).values()
        if not isinstance(target, int | np.integer) or isinstance(target, bool) or not 0 <= target < guide.count:
            raise ValueError(
                f"targets: got {target!r} for {name!r}, expected an output from 0 to {guide.count - 1}"
                + ("" if guide.labels is None else ", or a label")
            )
        result[name] = int(target)
    return result


def outputs_of(classes: Sequence[str], labels: Sequence[str]) -> dict[str, int]:
    """Class → output of a classifier with these labels, see :func:`targets_of`.

    Raises:
        ValueError: a class of no output, or of several; two classes of one.
    """
    exact: dict[str, set[int]] = defaultdict(set)
    plain: dict[str, set[int]] = defaultdict(set)
    parts: dict[str, set[int]] = defaultdict(set)
    for number, label in enumerate(labels):
        exact[label].add(number)
        plain[_plain(label)].add(number)
        for part in label.split(","):
            parts[_plain(part)].add(number)
    found: dict[str, int] = {}
    for name in classes:
        outputs = exact.get(name) or plain.get(_plain(name)) or parts.get(_plain(name)) or set()
        if len(outputs) != 1:
            many = ", ".join(repr(labels[output]) for output in sorted(outputs))
            raise ValueError(
                f"classes: {name!r} is "
                + (f"several of the classifier's labels ({many})" if many else "none of the classifier's labels")
                + f", which are {some(labels)}; expected their names, or labels= in the outputs' order"
            )
        found[name] = outputs.pop()
        other = next(each for each in found if found[each] == found[name])
        if other != name:
            raise ValueError(f"classes: {other!r} and {name!r} are both the classifier's {labels[found[name]]!r}")
    return found


def clip_space(model: Model, resize: str = "whole") -> ClipSpace:
    """The space of a model's CLIP; to judge images as CLIP's own preprocessing does, they are to "crop".

    Raises:
        ValueError: it has none.
    """
    if model.clip is None:
        raise ValueError(f"model {model.name!r} has no CLIP; load it with clip=, a CLIPModel, a folder or a hub id")
    return ClipSpace(model, resize=resize)


def some(names: Sequence[str], most: int = 8) -> str:
    """The first of many names, for errors."""
    return ", ".join(map(repr, names[:most])) + (f", … ({len(names)} in all)" if len(names) > most else "")


def _wrong_count(names: int, outputs: int) -> ValueError:
    return ValueError(
        f"labels: got {names} names for the {outputs} outputs of the classifier, expected one each; where it has none, "
        "the classes are they"
    )


def _plain(label: str) -> str:
    return " ".join(label.replace("_", " ").split()).casefold()


def _labels_of(config: Any) -> list[str] | None:
    """The names of the outputs of a classifier of transformers, None where they have none."""
    labels = [str(config.id2label[number]) for number in range(config.num_labels)]
    return None if labels == [_NAMELESS.format(number) for number in range(len(labels))] else labels
