"""Guides, against the networks that they are made of, finite differences, and label names."""

import copy
import importlib.util
import json

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    CLIPImageProcessor,
    ConvNextConfig,
    ConvNextImageProcessor,
    ConvNextModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

import dsd_fast as dsd
from dsd_fast.engine.guides import Guide, guide_of, targets_of
from dsd_fast.engine.network import vision_network
from dsd_fast.engine.preprocessing import to_pixels
from dsd_fast.models import ModelError
from tests.tiny import trained_like

# With torchvision transformers' processors round their weights, too: by a level of 255, over a deviation of 0.2.
RESIZED = 1e-5 if importlib.util.find_spec("torchvision") is None else 0.05
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
CONFIG = ViTConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8,
    id2label={0: "tench, Tinca tinca", 1: "Wild_Dog", 2: "crane"},
)  # fmt: skip


class Counting(nn.Module):
    """A classifier with every kind of state."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(144, 3))

    def forward(self, x):
        return self.layers(x)


def network():
    torch.manual_seed(0)
    return Counting().eval()


def pictures(count=2, side=12):
    return list(np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A folder with a classifier; what an encoder would pool with is not in it."""
    folder = tmp_path_factory.mktemp("vit")
    trained_like(ViTForImageClassification(CONFIG), 0).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=MEAN, image_std=STD).save_pretrained(folder)
    return folder


def test_the_gradient_goes_to_the_pixels_alone():
    module, called = network().double(), []
    module.layers[1].register_forward_hook(lambda *_: called.append(1))
    module.layers[0].weight.requires_grad_(False)
    before = copy.deepcopy(module.state_dict())
    guide = guide_of(module, labels=["a", "b", "c"], size=(8, 8), mean=MEAN, std=STD)
    pixels = (torch.rand(2, 3, 12, 12, dtype=torch.float64) * 1.8 - 0.9).requires_grad_()
    logits = guide.logits(pixels)
    assert (logits.shape, logits.dtype, len(called)) == ((2, 3), torch.float64, 1)
    weights = torch.randn(2, 3, dtype=torch.float64)
    (logits * weights).sum().backward()
    direction = torch.randn_like(pixels)
    with torch.no_grad():
        higher, lower = ((guide.logits(pixels + step * direction) * weights).sum() for step in (1e-5, -1e-5))
    # Central differences: the third derivative times 1e-10, and rounding over 2e-5.
    assert float((pixels.grad * direction).sum()) == pytest.approx(float((higher - lower) / 2e-5), rel=1e-7)
    # Nothing of the module is other than it was, and without a gradient of the pixels there is none.
    assert not guide.logits(pixels.detach()).requires_grad
    assert all(each.grad is None for each in module.parameters())
    assert [each.requires_grad for each in module.parameters()] == [False, *[True] * 5]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not module.training
    # With its parameters frozen the gradient is the same, and what a program is under changes nothing.
    frozen = guide_of(
        copy.deepcopy(module).requires_grad_(False), labels=["a", "b", "c"], size=(8, 8), mean=MEAN, std=STD
    )
    other = pixels.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        (frozen.logits(other) * weights).sum().backward()
    torch.testing.assert_close(other.grad, pixels.grad, rtol=0, atol=0)


def test_classifiers_of_transformers_by_folder_and_as_modules(vit):
    by_folder = guide_of(vit)
    module = ViTForImageClassification.from_pretrained(vit)
    given = guide_of(module, processor=ViTImageProcessor.from_pretrained(vit))
    assert by_folder.labels == given.labels == ("tench, Tinca tinca", "Wild_Dog", "crane")
    assert by_folder.count == 3
    pixels = to_pixels(np.stack(pictures(side=16))).requires_grad_()
    with torch.no_grad():
        want = module((((pixels + 1) / 2) - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)).logits
    for guide in (by_folder, given):
        # Pictures of the classifier's own size: 8 bits and floats are the same.
        torch.testing.assert_close(guide.logits(pixels), want, rtol=0, atol=1e-5)
        torch.testing.assert_close(guide.of_images(pictures(side=16)), want, rtol=0, atol=1e-5)
    assert by_folder.settings() == given.settings() == json.loads(json.dumps(given.settings()))
    changed = guide_of(module, processor=ViTImageProcessor.from_pretrained(vit, image_mean=[0.4] * 3))
    assert changed.settings() != given.settings()
    with pytest.raises(ValueError, match=r"mean: got .*, but .* has its own, expected None"):
        guide_of(vit, mean=MEAN)
    with pytest.raises(ValueError, match=r"size: got .*, but ViTImageProcessor.* has its own, expected None"):
        guide_of(module, processor=ViTImageProcessor(), size=(8, 8))


def test_structure_is_in_a_guides_settings(vit):
    def told(*layers, **held):
        torch.manual_seed(0)
        module = nn.Sequential(*layers, nn.Flatten(), nn.Linear(3, 2))
        vars(module).update(held)
        return guide_of(module.eval(), classes=["a", "b"], mean=MEAN, std=STD).settings()

    same = told(nn.AvgPool2d(8))
    for other in (
        told(nn.MaxPool2d(8)),
        told(nn.AvgPool2d(8, stride=4)),
        told(nn.AvgPool2d(8), scale=2.0),
        told(nn.AvgPool2d(8), act=torch.tanh),
    ):
        assert (other["weights"], other["preprocessing"]) == (same["weights"], same["preprocessing"])
        assert other["structure"] != same["structure"]
    # What another version of a library calls, shows or keeps besides is no other network.
    assert told(nn.AvgPool2d(8), bias=None, exact=False, _cache=1) == same
    module, processor = ViTForImageClassification.from_pretrained(vit), ViTImageProcessor.from_pretrained(vit)
    same = guide_of(module, processor=processor).settings()
    module.vit.add_module("unused", nn.Dropout())
    module.config.transformers_version, module.config.another = "9.9.9", None
    assert guide_of(module.eval(), processor=processor).settings() == same
    module.config.hidden_act = "relu"
    assert guide_of(module, processor=processor).settings() != same


def test_what_goes_not_together_is_refused():
    model, module = dsd.load("mini"), network()
    known = {"mean": MEAN, "std": STD}
    guide = guide_of(module, classes=["a", "b"], size=(8, 8), **known)
    for pixels, wrong in (
        (torch.zeros(2, 3, 8, 8), r"logits of shape \(2, 3\), expected \(2, 2\)"),
        (torch.zeros(2, 8, 8, 3), r"pixels: got torch.float32 of shape \(2, 8, 8, 3\), expected \(n, 3, H, W\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "pixels: got torch.uint8"),
    ):
        with pytest.raises(ValueError, match=wrong):
            guide.logits(pixels)
    for images, wrong in (
        ([], "images: got none, expected at least one picture"),
        ([np.zeros((8, 8, 3), np.float32)], r"images: got float32 of shape \(8, 8, 3\), expected uint8 \(H, W, 3\)"),
        ([np.zeros((8, 8), np.uint8)], r"images: got uint8 of shape \(8, 8\)"),
    ):
        for each in (guide, Fixed(None, 3)):
            with pytest.raises(ValueError, match=wrong):
                each.of_images(images)
    assert guide_of(guide) is guide
    for classifier, options, wrong in (
        (guide, {"labels": ["a", "b"]}, "labels: got .*, but .* has its own"),
        ("clip", {"model": model}, "classifier: got 'clip', expected a model and classes"),
        ("clip", {"model": model, "classes": ["a", "b"], "templates": "none"}, "templates: got 'none'"),
        ("clip", {"model": dsd.from_pipeline(model.to_pipeline()), "classes": ["a", "b"]}, "has no CLIP"),
        (module, known, "labels: got None for a module, expected the names of its outputs"),
        (module, {"labels": ["a", "b"], "mean": MEAN}, "std: got None for a module, expected three numbers"),
        (module, {**known, "mean": (123.7, 116.3, 103.5)}, r"mean: got \(123.7, .*, of values in \[0, 1\]"),
        (module, {**known, "std": (0.5, float("nan"), 0.5)}, "std: got"),
        (module, {**known, "mean": 0.5}, "mean: got 0.5 for a module, expected three numbers"),
        (module, {**known, "size": 8}, r"size: got 8, expected \(height, width\), or None"),
        (module, {**known, "size": [0, 8]}, r"size: got \[0, 8\], expected"),
        (network().train(), {"labels": ["a", "b"], **known}, "classifier: it is in training mode"),
    ):
        with pytest.raises(ValueError, match=wrong):
            guide_of(classifier, **options)
    bare = ViTModel(CONFIG, add_pooling_layer=False).eval()
    with pytest.raises(ValueError, match="classifier gave BaseModelOutputWithPooling, expected logits"):
        guide_of(bare, **known).logits(torch.zeros(1, 3, 16, 16))
    part = network()
    part.layers[1].train()
    with pytest.raises(ValueError, match="in training mode"):
        guide_of(part, labels=["a", "b", "c"], **known)
    with pytest.raises(ModelError, match="is a folder that does not exist"):
        guide_of("./nowhere")


class Fixed(Guide):
    """A guide of a caller's own."""

    def __init__(self, labels, count):
        self.labels, self.count = labels, count

    def logits(self, pixels):
        return pixels.mean((2, 3))

    def settings(self):
        return {}


LABELS = ("tench, Tinca tinca", "Wild_Dog", "crane")


@pytest.mark.parametrize(
    ("labels", "classes", "targets", "want"),
    [
        (LABELS, ["wild dog", "TENCH"], None, [1, 0]),
        (LABELS, ["x", "y"], {"x": 2, "y": "wild dog"}, [2, 1]),
        (LABELS, ["x", "y"], [np.int64(1), 1], [1, 1]),
        (None, ["x", "y", "z"], None, [0, 1, 2]),
        (None, ["x"], [2], [2]),
        (None, ["x", "y"], None, "labels: got 2 names for the 3 outputs"),
        (LABELS, ["cat"], None, "classes: 'cat' is none of the classifier's labels"),
        (LABELS, ["x", "y"], {"x": 2}, "targets: got None for 'y', expected an output from 0 to 2, or a label"),
        (LABELS, ["x"], [3], "targets: got 3 for 'x', expected an output from 0 to 2, or a label"),
        (LABELS, ["x"], [True], "targets: got True for 'x'"),
        (None, ["x"], ["crane"], "targets: got 'crane' for 'x', expected an output from 0 to 2"),
        (LABELS, ["x", "y"], [1], r"targets: got \[1\], expected one for each of the 2 classes"),
        (LABELS, ["x"], "0", "targets: got '0', expected one for each"),
    ],
)
def test_targets(labels, classes, targets, want):
    guide = Fixed(labels, 3)
    if isinstance(want, list):
        assert list(targets_of(guide, classes, targets).values()) == want
        return
    with pytest.raises(ValueError, match=want):
        targets_of(guide, classes, targets)


def test_a_guide_of_a_callers_own():
    with pytest.raises(ValueError, match="classes: there is one output"):
        targets_of(Fixed(None, 1), ["x"])
    images = pictures()
    want = torch.from_numpy(np.stack(images)).double().mean((1, 2)) / 127.5 - 1
    torch.testing.assert_close(Fixed(None, 3).of_images(images).double(), want, rtol=0, atol=1e-6)


def test_encoders_give_features(vit):
    images = pictures(side=16)
    pixels = to_pixels(np.stack(images))
    prepared = ((pixels + 1) / 2 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    # Nothing to pool with is in the file: not random weights, but the first token.
    model = ViTModel.from_pretrained(vit, add_pooling_layer=False)
    with torch.no_grad():
        want = model(prepared).last_hidden_state[:, 0]
    encoder = vision_network(vit)
    torch.testing.assert_close(encoder(pixels), want, rtol=0, atol=1e-5)
    torch.testing.assert_close(encoder.of_images(images), want, rtol=0, atol=1e-5)
    # Of a CLIP its vision model, of pictures each of its own size.
    clip = dsd.load("mini").clip
    sizes = [np.ascontiguousarray(np.pad(image, ((0, 50 + 9 * n), (0, 60), (0, 0)))) for n, image in enumerate(images)]
    processor = CLIPImageProcessor.from_pretrained(clip.name_or_path)
    with torch.no_grad():
        want = clip.vision_model(**processor(images=sizes, return_tensors="pt")).pooler_output
    torch.testing.assert_close(vision_network(clip.name_or_path).of_images(sizes), want, rtol=0, atol=RESIZED)
    # Pooled over positions, as a module, and differentiable.
    config = ConvNextConfig(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, patch_size=2)
    module = trained_like(ConvNextModel(config), 0)
    processor = ConvNextImageProcessor(size={"shortest_edge": 16}, crop_pct=0.8)
    encoder = vision_network(module, processor=processor)
    with torch.no_grad():
        want = module(**processor(images=images, input_data_format="channels_last", return_tensors="pt")).pooler_output
    torch.testing.assert_close(encoder.of_images(images), want, rtol=0, atol=RESIZED)
    pixels = pixels.clone().requires_grad_()
    encoder(pixels).sum().backward()
    assert pixels.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"encoder gave .*, expected features \(n, D\)"):
        vision_network(ViTForImageClassification(CONFIG).eval(), processor=ViTImageProcessor.from_pretrained(vit))(
            pixels
        )


def test_models_of_timm():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    module = timm.create_model("test_resnet", num_classes=3).eval()
    guide, encoder = guide_of(module, classes=["a", "b", "c"]), vision_network(module)
    from PIL import Image

    own = timm.data.create_transform(**timm.data.resolve_model_data_config(module), is_training=False)
    images = pictures(side=200)
    prepared = torch.stack([own(Image.fromarray(image)) for image in images])
    with torch.no_grad():
        torch.testing.assert_close(guide.of_images(images), module(prepared))
        want = module.forward_head(module.forward_features(prepared), pre_logits=True)
    torch.testing.assert_close(encoder.of_images(images), want)
    with pytest.raises(ValueError, match="labels: got 2 names for the 3 outputs"):
        targets_of(guide_of(module, classes=["a", "b"]), ["a", "b"])
