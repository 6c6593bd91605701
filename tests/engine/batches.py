"""Batches as Ray Data hands them over."""

import io

import numpy as np
from PIL import Image


def pictures(count):
    draw = np.random.default_rng(0)
    return draw.integers(0, 256, (count, 40, 64, 3), np.uint8)


def encoded(picture):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def objects(values):
    found = np.empty(len(values), dtype=object)
    found[:] = values
    return found
