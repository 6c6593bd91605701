"""Where the host waits for the device: a committed list for each loop, read off a device that is not there."""

import contextlib

import pytest
import torch

import dsd_fast as dsd
from dsd_fast.features import FeatureExtractor, Technique
from dsd_fast.models import load_controlnet
from dsd_fast.models.controlnet import Control
from dsd_fast.models.mini.scenes import scene
from dsd_fast.unet import UNetProgram
from tests.pretend import CUDA, pretended, to_device
from tests.tiny import CROSS_ATTENTION_DIM, tiny_unet

IMAGES = [scene(1_000_000_000 + seed).image for seed in range(4)]
CAPTIONS = ["a red circle", "a blue ring"]


def main():
    from collections import Counter
    with pretended() as device:
        model = dsd.load("mini", local_files_only=True)
        for part in (model.unet, model.vae, *model.text_encoders, model.clip):
            to_device(part)
        def show(name):
            print("==", name, device.launches)
            for k, v in device.waits.items(): print("   ", v, k)
            print("   behind", dict(device.behind))
            device.waits.clear(); device.behind.clear()
        show("load")
        matcher = dsd.Matcher(model, dsd.MatchConfig(timesteps=[100, 500], memory_budget=20<<20))
        show("matcher")
        s = matcher.score(IMAGES, CAPTIONS)
        show("score")
        matcher.heatmap(IMAGES[0], CAPTIONS[0])
        show("heatmap")
        ex = FeatureExtractor(model, timesteps=[50, 200], memory_budget=20<<20)
        show("extractor")
        ex.extract(IMAGES)
        show("extract")
        ex.extract(IMAGES, CAPTIONS*2)
        show("extract with prompts")
    return
if __name__ == "__main__": main()
