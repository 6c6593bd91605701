"""Classifiers that accept an image of which they say its class."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsd_fast.generation.accept import (
    Images,
    Judge,
    Verdict,
    by_score,
    check_threshold,
    clip_about,
    clip_space,
    to_pixels,
)
from dsd_fast.generation.grids import check_templates, filled, read_classes
from dsd_fast.generation.rows import GenerateRow
from dsd_fast.jobs import row_id, weights_hash
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

if TYPE_CHECKING:
    from dsd_fast.models import Model

# What transformers calls the outputs of a classifier whose makers have named none.
_NAMELESS = "LABEL_{}"


class Guide(Judge):
    """Accepts an image of which a classifier says its row's label.

    The label must be the first of all outputs ("other-class"), with at least the threshold's probability
    ("low-probability"); the score is that probability.

    Attributes:
        classes: the job's.
    """

    def __init__(self, classes: Sequence[str] | os.PathLike[str], threshold: float, **about: Any) -> None:
        self.classes = read_classes(classes)
        super().__init__(check_threshold(threshold, 0), classes=self.classes, **about)

    def _know(self, outputs: Mapping[str, int], count: int) -> None:
        """Tell which outputs the classes are, of so many."""
        if count < 2:
            raise ValueError("classes: there is one output, whose probability is 1 of any image; expected at least two")
        self._outputs, self._count = outputs, count

    def probabilities(self, images: Images) -> Tensor:
        """Give (n, outputs) float32 of (n, H, W, 3) images of 8 bits."""
        raise NotImplementedError

    def __call__(self, images: Images, rows: Sequence[GenerateRow]) -> list[Verdict]:
        wanted = [self.output_of(row.label) for row in rows]
        with torch.no_grad():
            found = self.probabilities(images)
            firsts = found.argmax(-1).tolist()
            scores = found[range(len(wanted)), wanted].tolist()
        return [
            by_score(score, self.threshold, "low-probability")
            if first == output
            else Verdict(False, "other-class", score)
            for first, output, score in zip(firsts, wanted, scores, strict=True)
        ]

    def check(self, row: GenerateRow) -> None:
        """Refuse a row of another class."""
        self.output_of(row.label)

    def output_of(self, label: str | None) -> int:
        """The output of a class.

        Raises:
            ValueError: it is none of the classes.
        """
        if label is None or label not in self._outputs:
            raise ValueError(f"label: got {label!r}, expected one of accept's classes: {_some(self.classes)}")
        return self._outputs[label]


class AcceptClassifier(Guide):
    """Accepts by a classifier's probabilities, the softmax of its outputs.

    Args:
        classifier: a folder or hub id of an image classifier of transformers, whose own image processor resizes and
            normalises (safetensors and JSON alone, no code that lies beside them); or a module from normalised pixels,
            (n, 3, H, W) float32, to logits (n, outputs), or to what has them as ``logits``.
        classes: the job's, names or a file of one a line. Each is the output of its name: exactly, else without regard
            to case and with "_" as a space, else as one of the names between commas that ImageNet's labels are. Outputs
            that have no names are the classes in their order, where they are as many.
        threshold: the least probability, 0 to 1.
        labels: names of the outputs; None: those that a classifier of transformers has.
        size: (height, width) that a module takes; None: that of the images.
        mean, std: three numbers each, of the module's normalisation, of pixels in [0, 1].
        device: of a classifier given by name. A module stays where it is.
        revision, local_files_only, cache_dir: as in `dsd_fast.load`.

    Raises:
        ModelError: a classifier that cannot be loaded.
        ValueError: a class of no output, or of several; outputs without names of another number; arguments that do not
            go with the classifier; a module in training mode.
    """

    def __init__(
        self,
        classifier: nn.Module | str | os.PathLike[str],
        classes: Sequence[str] | os.PathLike[str],
        threshold: float = 0.0,
        *,
        labels: Sequence[str] | None = None,
        size: tuple[int, int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        device: str | torch.device = "cpu",
        revision: str | None = None,
        local_files_only: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(classes, threshold)
        normalisation = {"size": size, "mean": mean, "std": std}
        if isinstance(classifier, nn.Module):
            if mean is None or std is None or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
                raise ValueError(f"mean, std: got {mean} and {std}, expected three numbers each for a module")
            if classifier.training:
                raise ValueError("classifier: it is in training mode, expected a module after eval()")
            network, self._processor, outputs = classifier, None, None
            about: dict[str, Any] = {
                name: None if value is None else [float(each) for each in value]
                for name, value in normalisation.items()
            }
            about["name"] = named(type(classifier))
        else:
            given = [name for name, value in normalisation.items() if value is not None]
            if given:
                raise ValueError(
                    f"{given[0]}: got {normalisation[given[0]]}, but {classifier!r} has its own, expected None"
                )
            network, self._processor = _load(classifier, resolve_device(device), revision, local_files_only, cache_dir)
            labels = _labels_of(network) if labels is None else labels
            outputs = network.config.num_labels
            # What is off or not set may as well be missing, as in a library that knows less.
            said = self._processor.to_dict().items()
            known = {name: value for name, value in said if value is not None and value is not False and name[0] != "_"}
            about = {"processor": row_id(json.dumps(known, sort_keys=True, default=str))}
        self._network, self._size = network, size
        self._weight = next(network.parameters(), torch.empty(0, dtype=torch.float32, device="cpu"))
        self._about |= {"weights": weights_hash([network]), "labels": labels and list(labels), **about}
        # Without names the classes are the outputs, of a module as many as probabilities() finds.
        names = self.classes if labels is None else labels
        if outputs not in (None, len(names)):
            raise ValueError(
                f"labels: got {len(names)} names for the {outputs} outputs of {classifier!r}, expected one each; where "
                "it has none, the classes are they"
            )
        self._know(outputs_of(self.classes, names), len(names))
        self._statistics = (mean, std)

    def probabilities(self, images: Images) -> Tensor:
        """Give (n, outputs) float32 of (n, H, W, 3) images of 8 bits.

        Raises:
            ValueError: another number of outputs than of names for them.
        """
        with own_types(self._weight.device):
            found = self._network(self._pixels(images))
        logits: Tensor = getattr(found, "logits", found)
        if logits.shape != (len(images), self._count):
            raise ValueError(
                f"classifier gave logits of shape {tuple(logits.shape)}, expected ({len(images)}, {self._count}): an "
                "output for each of its labels, or of the classes where it has none"
            )
        return logits.float().softmax(-1)

    def _pixels(self, images: Images) -> Tensor:
        if self._processor is not None:
            said = self._processor(images=list(images), input_data_format="channels_last", return_tensors="pt")
            return upload(said["pixel_values"], self._weight.device, self._weight.dtype)
        x = (to_pixels(images) + 1) / 2
        if self._size is not None and x.shape[-2:] != tuple(self._size):
            x = F.interpolate(x, tuple(self._size), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (
            torch.tensor(each, dtype=torch.float32, device="cpu").view(1, 3, 1, 1) for each in self._statistics
        )
        return upload((x - mean) / std, self._weight.device, self._weight.dtype)


class AcceptZeroShot(Guide):
    """Accepts by CLIP's probabilities among the job's classes: the softmax of its scaled cosines.

    Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", section 3.1.

    Args:
        model: with a ``clip``.
        classes: the job's, names or a file of one a line.
        threshold: the least probability, 0 to 1.
        template: text of a class, as in :func:`dsd_fast.generation.grid`.

    Raises:
        ValueError: a model without one, another threshold, a template without a place for the class, or a name that
            CLIP does not know.
    """

    def __init__(
        self,
        model: Model,
        classes: Sequence[str] | os.PathLike[str],
        threshold: float = 0.0,
        *,
        template: str = "a photo of a {}",
    ) -> None:
        (text,) = check_templates(template)
        self._space, self._scale = clip_space(model, "crop"), model.clip.logit_scale
        super().__init__(classes, threshold, template=text, **clip_about(model))
        self._know({name: number for number, name in enumerate(self.classes)}, len(self.classes))
        with torch.no_grad():
            self._texts = self._space.of_texts([filled(text, name) for name in self.classes])

    def probabilities(self, images: Images) -> Tensor:
        """Give (n, classes) float32 of (n, H, W, 3) images of 8 bits."""
        cosines = self._space.of_pixels(to_pixels(images)) @ self._texts.T
        logits: Tensor = self._scale.float().exp() * cosines
        return logits.softmax(-1)


def outputs_of(classes: Sequence[str], labels: Sequence[str]) -> dict[str, int]:
    """Class → output of a classifier with these labels, see :class:`AcceptClassifier`.

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
                + f", which are {_some(labels)}; expected their names, or labels= in the outputs' order"
            )
        found[name] = outputs.pop()
        other = next(each for each in found if found[each] == found[name])
        if other != name:
            raise ValueError(f"classes: {other!r} and {name!r} are both the classifier's {labels[found[name]]!r}")
    return found


def _plain(label: str) -> str:
    return " ".join(label.replace("_", " ").split()).casefold()


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(map(repr, names[:most])) + (f", … ({len(names)} in all)" if len(names) > most else "")


def _labels_of(network: Any) -> list[str] | None:
    """The names of the outputs of a classifier of transformers, None where they have none."""
    config = network.config
    labels = [str(config.id2label[number]) for number in range(config.num_labels)]
    return None if labels == [_NAMELESS.format(number) for number in range(len(labels))] else labels


@ordinary()
def _load(
    source: str | os.PathLike[str],
    device: torch.device,
    revision: str | None,
    local_files_only: bool,
    cache_dir: str | os.PathLike[str] | None,
) -> tuple[Any, Any]:
    """An image classifier of transformers, and its image processor."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    folder, _ = find_folder(
        source,
        ["config.json", "preprocessor_config.json", *weight_patterns(TRANSFORMERS_STEM, None)],
        what="classifier",
        revision=revision,
        local_files_only=local_files_only,
        cache_dir=cache_dir,
    )
    what = f"classifier {os.fspath(source)!r}"
    check_weights(folder, TRANSFORMERS_STEM, None, what)
    network = load_network(AutoModelForImageClassification, folder, torch.float32, None, what)
    if getattr(network.config, "problem_type", None) == "multi_label_classification":
        raise ValueError(
            f"{what} gives each label a probability of its own, expected one whose labels exclude each other"
        )
    with reported(what):
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return network.requires_grad_(False).to(device), processor
