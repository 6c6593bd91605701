"""Judges of images, against transformers' own preprocessing, CLIP and pipeline of classification."""

import functools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

import dsd_fast as dsd
from dsd_fast.engine.guides import outputs_of
from dsd_fast.generation.accept import AcceptClip, NearDuplicates, Verdict, accept_settings, verdicts
from dsd_fast.generation.guides import AcceptClassifier, AcceptZeroShot
from dsd_fast.generation.rows import GenerateRow
from dsd_fast.models import ModelError
from dsd_fast.models.mini.scenes import EVAL_SEED, scene
from tests.tiny import trained_like

LABELS = ["tench, Tinca tinca", "Wild_Dog", "crane"]


@pytest.fixture(scope="module")
def model():
    return dsd.load("mini")


@pytest.fixture(scope="module")
def scenes():
    return [scene(EVAL_SEED + number, objects=1) for number in range(12)]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A folder with a small classifier whose processor resizes and normalises."""
    folder = tmp_path_factory.mktemp("classifier")
    config = ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8,
        id2label=dict(enumerate(LABELS)), label2id={label: number for number, label in enumerate(LABELS)},
    )  # fmt: skip
    trained_like(ViTForImageClassification(config), 0).save_pretrained(folder)
    ViTImageProcessor(
        size={"height": 16, "width": 16}, image_mean=[0.4] * 3, image_std=[0.2, 0.3, 0.4]
    ).save_pretrained(folder)
    return folder


def pictures(count=6, side=24):
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def rows_of(labels):
    return [GenerateRow("a", label=label) for label in labels]


def wide(images):
    """What CLIP's own preprocessing cuts off on both sides, beside the images."""
    bars = np.random.default_rng(0).integers(0, 256, (2, *images.shape), dtype=np.uint8)
    return np.concatenate([bars[0], images, bars[1]], axis=2)


@torch.no_grad()
def clips_logits(model, images, texts):
    """What CLIPModel says of images and texts, by its own processor and tokenizer."""
    folder = model.clip.name_or_path
    tokens = AutoTokenizer.from_pretrained(folder)(texts, padding="max_length", return_tensors="pt")
    pixels = AutoImageProcessor.from_pretrained(folder)(images=list(images), return_tensors="pt")["pixel_values"]
    return model.clip(input_ids=tokens["input_ids"], pixel_values=pixels).logits_per_image


def test_clip_accepts_by_the_cosine_with_the_prompt(model, scenes):
    images = wide(np.stack([each.image for each in scenes]))
    logits = clips_logits(model, images, [each.caption for each in scenes])
    want = (logits / model.clip.logit_scale.exp()).diagonal()
    middle = float(want.sort().values[5:7].mean())
    found = AcceptClip(model, middle)(images, [GenerateRow(each.caption) for each in scenes])
    # Float32 through two small networks.
    np.testing.assert_allclose([each.score for each in found], want, atol=1e-5)
    assert [each.accepted for each in found] == (want >= middle).tolist()
    assert {each.reason for each in found if not each.accepted} == {"low-clip-score"}


def test_clip_tells_classes_without_having_seen_them(model, scenes):
    classes = sorted({f"{each.objects[0].colour} {each.objects[0].shape}" for each in scenes})
    labels = [f"{each.objects[0].colour} {each.objects[0].shape}" for each in scenes]
    images = wide(np.stack([each.image for each in scenes]))
    want = clips_logits(model, images, [f"one {name}" for name in classes]).softmax(-1)
    guide = AcceptZeroShot(model, classes, 0.5, template="one {}")
    np.testing.assert_allclose(guide.probabilities(images), want, atol=1e-4)
    found = guide(images, rows_of(labels))
    right = want.argmax(-1) == torch.tensor([classes.index(label) for label in labels])
    scores = want[range(12), [classes.index(label) for label in labels]]
    assert [each.accepted for each in found] == (right & (scores >= 0.5)).tolist()
    # It is a CLIP that was trained on such scenes.
    assert right.float().mean() > 0.5
    with pytest.raises(ValueError, match="label: got 'x', expected one of accept's classes: 'blue"):
        guide.check(GenerateRow("a", label="x"))


def test_a_classifier_of_transformers_says_what_its_pipeline_says(classifier):
    images = pictures()
    judge = pipeline("image-classification", model=str(classifier), top_k=None)
    said = [{each["label"]: each["score"] for each in answer} for answer in judge([*map(Image.fromarray, images)])]
    labels = [max(answer, key=answer.get) for answer in said[:4]] + [min(answer, key=answer.get) for answer in said[4:]]
    # Each class by a name that is not exactly the label.
    short = {"tench, Tinca tinca": "tinca tinca", "Wild_Dog": "wild dog", "crane": "crane"}
    threshold = min(max(answer.values()) for answer in said[:3])
    guide = AcceptClassifier(classifier, list(short.values()), threshold)
    found = guide(images, rows_of([short[label] for label in labels]))
    scores = [answer[label] for answer, label in zip(said, labels, strict=True)]
    np.testing.assert_allclose([each.score for each in found], scores, rtol=1e-5)
    for each, answer, label, score in zip(found, said, labels, scores, strict=True):
        reason = "" if score >= threshold else "low-probability"
        reason = reason if score == max(answer.values()) else "other-class"
        if abs(score - threshold) > 1e-5:
            assert (each.accepted, each.reason) == (not reason, reason), label
    assert {each.reason for each in found} >= {"", "other-class"}
    json.dumps(guide.settings())
    assert guide.settings() != AcceptClassifier(classifier, list(short.values()), threshold / 2).settings()


def test_a_module_gets_normalised_pixels_of_its_size():
    network = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(12, 2)).eval()
    images = pictures(side=8)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.25, 2.0]
    normalised = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        want = network.double()(normalised).softmax(-1)
    network.float()
    guide = AcceptClassifier(network, ["a", "b"], mean=mean, std=std)
    torch.testing.assert_close(guide.probabilities(images).double(), want, atol=1e-6, rtol=1e-6)
    assert [each.accepted for each in guide(images, rows_of("ababab"))] == [
        int(each.argmax()) == number % 2 for number, each in enumerate(want)
    ]
    assert json.dumps(guide.settings()) == json.dumps(
        AcceptClassifier(network, ["a", "b"], mean=np.array(mean), std=tuple(std)).settings()
    )
    # What is no number accepts nothing.
    broken = nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).eval()
    broken[1].bias.data.fill_(np.nan)
    (verdict,) = AcceptClassifier(broken, ["a", "b"], mean=mean, std=std)(images[:1], rows_of("a"))
    assert verdict == Verdict(False, "low-probability")
    # Pictures of another size are brought to the module's.
    large = np.repeat(np.repeat(images, 2, 1), 2, 2)
    sized = AcceptClassifier(network, ["a", "b"], size=(8, 8), mean=mean, std=std)
    assert sized.probabilities(large).shape == (6, 2)
    with pytest.raises(ValueError, match=r"classifier gave logits of shape \(6, 2\), expected \(6, 3\)"):
        AcceptClassifier(network, ["a", "b", "c"], mean=mean, std=std)(images, rows_of("abcabc"))
    for options, wrong in (
        ({}, "mean: got None for a module, expected three numbers"),
        ({"mean": mean, "std": [1, 1, 0]}, "std: got"),
        ({"mean": mean, "std": std, "threshold": 1.5}, "threshold: got 1.5, expected a number from 0 to 1"),
        ({"mean": mean, "std": std, "labels": ["b", "c"]}, "classes: 'a' is none of the classifier's labels"),
        # Its softmax is 1, whatever the image is.
        ({"mean": mean, "std": std, "classes": ["a"]}, "classes: there is one output, whose probability is 1 of any"),
    ):
        with pytest.raises(ValueError, match=wrong):
            AcceptClassifier(network, **{"classes": ["a", "b"], **options})
    with pytest.raises(ValueError, match="classifier: it is in training mode"):
        AcceptClassifier(network.train(), ["a", "b"], mean=mean, std=std)


@pytest.mark.parametrize(
    ("classes", "labels", "want"),
    [
        (["b", "a"], ["a", "b"], [1, 0]),
        (["A", "a"], ["a", "A"], [1, 0]),
        (["wild dog", " TENCH"], LABELS, [1, 0]),
        (["tench, tinca  tinca"], LABELS, [0]),
        (["cat"], LABELS, "'cat' is none of the classifier's labels, which are 'tench, Tinca tinca', 'Wild_Dog'"),
        (["crane"], ["crane", "crane"], "'crane' is several of the classifier's labels"),
        (["tench", "Tinca tinca"], LABELS, "'tench' and 'Tinca tinca' are both the classifier's 'tench, Tinca tinca'"),
    ],
)
def test_classes_are_outputs_by_name(classes, labels, want):
    if isinstance(want, list):
        assert list(outputs_of(classes, labels).values()) == want
        return
    with pytest.raises(ValueError, match=f"classes: {want}"):
        outputs_of(classes, labels)


def test_outputs_without_names_are_the_classes_where_they_are_as_many(classifier, tmp_path):
    for file in classifier.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"id2label": {str(n): f"LABEL_{n}" for n in range(3)}, "label2id": {f"LABEL_{n}": n for n in range(3)}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    images = pictures()
    want = AcceptClassifier(classifier, LABELS)(images, rows_of([LABELS[1]] * 6))
    named = AcceptClassifier(tmp_path, ["xyz"], labels=["q", "xyz", "r"])
    assert named(images, rows_of(["xyz"] * 6)) == want
    assert AcceptClassifier(tmp_path, ["x", "y", "z"])(images, rows_of("yyyyyy")) == want
    with pytest.raises(ValueError, match="classes: got none"):
        AcceptClassifier(tmp_path / "missing", [])
    for classes, options in ((["x", "y"], {}), (["x"], {"labels": ["x", "y"]})):
        with pytest.raises(ValueError, match=r"labels: got 2 names for the 3 outputs of .*, expected one each"):
            AcceptClassifier(tmp_path, classes, **options)
    (tmp_path / "config.json").write_text(json.dumps({**config, "problem_type": "multi_label_classification"}))
    with pytest.raises(ValueError, match="gives each label a probability of its own"):
        AcceptClassifier(tmp_path, ["x", "y", "z"])
    with pytest.raises(ValueError, match=r"size: got \(8, 8\), but .* has its own, expected None"):
        AcceptClassifier(tmp_path, ["x", "y", "z"], size=(8, 8))
    (tmp_path / "model.safetensors").rename(tmp_path / "model.bin")
    with pytest.raises(ModelError, match="has its weights only as pickle"):
        AcceptClassifier(tmp_path, ["x", "y", "z"])


def test_near_duplicates_are_near_in_clips_space(model, scenes):
    images = np.stack([scenes[0].image, scenes[0].image ^ 1, scenes[1].image])
    finder = NearDuplicates(model, 0.98)
    first, second, other = finder.vectors(images)
    np.testing.assert_allclose(np.linalg.norm(first), 1, rtol=1e-6)
    assert finder.near(first, [other, second])
    assert not finder.near(first, [other])
    assert not finder.near(first, [])


def test_any_function_is_a_judge():
    images = pictures(2)
    rows = rows_of("ab")
    assert verdicts(None, images, rows) == [Verdict(True)] * 2
    given = verdicts(lambda images, rows: np.array([True, False]), images, rows)
    assert given == [Verdict(True), Verdict(False, "rejected")]
    assert verdicts(lambda images, rows: [Verdict(False, "dark", 0.1), True], images, rows)[0].reason == "dark"
    # Of a judge's own arithmetic; what is not finite has no place in JSON.
    for score, plain in ((np.float32(0.5), 0.5), (torch.tensor(0.5), 0.5), (float("nan"), None), (np.inf, None)):
        made = Verdict(np.bool_(True), "", score)
        assert (type(made.accepted), made.score, json.loads(json.dumps(made.score))) == (bool, plain, plain)
    for about in ((0.3,), (True, None), (True, "", "high"), (True, "", np.zeros(2))):
        with pytest.raises(ValueError, match=r"verdict: got Verdict.*, expected True or False, a text, and a number"):
            Verdict(*about)
    # A score is no verdict: 0.01 would be true.
    for answer, wrong in (([0.01, 0.9], "accept gave 0.01, expected True, False"), ([True], "1 verdicts for 2 images")):
        with pytest.raises(ValueError, match=wrong):
            verdicts(lambda images, rows, answer=answer: answer, images, rows)


def test_what_judges_a_folder_is_in_its_settings(model):
    assert accept_settings(None) is None
    assert accept_settings(rows_of) == f"{__name__}.rows_of"
    assert accept_settings(functools.partial(rows_of, limit=3)) == f"{__name__}.rows_of(limit=3)"
    with pytest.raises(ValueError, match=r"accept is .*<lambda>, which a later run could not tell from another"):
        accept_settings(lambda images, rows: [])
    # Modules that are alike but for their weights.
    networks = [nn.Linear(2, 2), nn.Linear(2, 2)]
    told = [accept_settings(functools.partial(rows_of, network=network)) for network in (*networks, networks[0])]
    assert told[0] == told[2] != told[1]
    assert accept_settings(networks[0]) != accept_settings(networks[1])
    settings = accept_settings(AcceptClip(model, 0.25))
    assert settings == json.loads(json.dumps(settings))
    assert (settings["kind"], settings["threshold"]) == ("AcceptClip", 0.25)


@pytest.mark.parametrize(
    "make", [AcceptClip, NearDuplicates, lambda model, value: AcceptZeroShot(model, ["a", "b"], value)]
)
def test_what_clip_cannot_judge_is_refused(model, make):
    for value in (1.5, "0.5", True, float("nan")):
        with pytest.raises(ValueError, match="threshold: got"):
            make(model, value)
    bare = dsd.from_pipeline(model.to_pipeline())
    with pytest.raises(ValueError, match="has no CLIP; load it with clip="):
        make(bare, 0.5)


def test_clip_refuses_learned_tokens():
    model = dsd.load("mini")
    pipe = model.to_pipeline()
    pipe.load_textual_inversion({"<new>": torch.ones(1, model.text_width)}, token="<new>")
    judge = AcceptClip(dsd.from_pipeline(pipe, clip=model.clip), 0.5)
    judge.check(GenerateRow("a cat"))
    for ask in (judge.check, lambda row: judge(pictures(1), [row])):
        with pytest.raises(ValueError, match="texts: 'a <new>' has tokens beyond CLIP's"):
            ask(GenerateRow("a <new>"))
