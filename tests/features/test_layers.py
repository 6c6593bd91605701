"""Which layers a request names."""

import json

import pytest

import dsd_fast
from dsd_fast.features import SETS, FeatureExtractor, layer_set
from dsd_fast.features.layers import resolve_layers
from dsd_fast.unet import UNetProgram
from tests.tiny import tiny_unet

# METHODS of the papers: channels of the concatenated sets of SD 1.5 and SDXL.
CHANNELS = {"practical-15": 3520, "legacy-15": 3520, "practical-xl": 3840, "legacy-xl": 2240}
WIDTHS = {"15": (320, 640, 1280, 1280), "xl": (320, 640, 1280)}


@pytest.fixture(scope="module")
def mini():
    return UNetProgram(dsd_fast.load("mini").unet)


@pytest.mark.parametrize("name", CHANNELS)
def test_published_sets_have_the_published_channels(name):
    """Counted from the widths of the published networks: an id of an up level has that level's width."""
    widths = WIDTHS[name.rsplit("-", 1)[1]]
    total = sum(widths[len(widths) - 1 - int(each.removeprefix("up-level")[0])] for each in SETS[name])
    assert total == CHANNELS[name]


def test_a_kind_takes_the_set_of_the_network(mini):
    assert layer_set("practical", UNetProgram(tiny_unet("sd15"))) == SETS["practical-15"]
    assert layer_set("legacy", UNetProgram(tiny_unet("sd21"))) == SETS["legacy-15"]
    assert layer_set("practical", mini) == SETS["practical-mini"]
    assert layer_set("all", mini) == mini.layer_ids
    with pytest.raises(ValueError, match="no set of the kind 'legacy' fits"):
        layer_set("legacy", mini)


def test_official_json_files(mini, tmp_path):
    wanted = {"mid-vit-out": True, "unet-out": False, "mid-vit-block0-cross-k": True, "up-level0-repeat0-vit-out": True}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(wanted))
    assert resolve_layers(file, mini) == resolve_layers(wanted, mini) == ("mid-vit-out", "up-level0-repeat0-vit-out")
    assert FeatureExtractor(dsd_fast.load("mini"), file).layers == ("mid-vit-out", "up-level0-repeat0-vit-out")
    for text, message in (
        ("{", "is no JSON"),
        ("[]", "no object of layer ids"),
        ('{"a": 1}', "no object of layer ids"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            resolve_layers(file, mini)
