"""Edges of a picture, as the usual ControlNets take them."""

import numpy as np
from PIL import Image

from dsd_fast.images.load import load_image


def canny(image: Image.Image, low: float = 100, high: float = 200) -> Image.Image:
    """Canny's edges (Canny 1986, "A Computational Approach to Edge Detection") by OpenCV, white on black.

    Sobel filter of side 3 on each colour, of which the strongest counts; the L1 norm of the gradient; no smoothing
    before it. That is what ControlNets for edges were trained on (Zhang et al. 2023, "Adding Conditional Control to
    Text-to-Image Diffusion Models"). Edges depend on the size: resize the picture to the network's input before.

    Args:
        image: a Pillow image; modes other than RGB are converted as in `load_image`.
        low, high: thresholds on the gradient of 8-bit values. Edges start above `high` and go on above `low`.

    Returns:
        RGB of the same size with three equal channels, every value 0 or 255.

    Raises:
        ValueError: thresholds that are negative or in the wrong order.
        ImageError: the image cannot be converted to RGB.
        ImportError: OpenCV is not installed.
    """
    if not 0 <= low <= high:
        raise ValueError(f"low and high are {low!r} and {high!r}, expected 0 <= low <= high")
    try:
        import cv2
    except ImportError as error:
        raise ImportError("edges need OpenCV: pip install 'dsd-fast[control]'") from error
    rgb = image if image.mode == "RGB" else load_image(image)
    edges = cv2.Canny(np.asarray(rgb), low, high)
    return Image.fromarray(edges).convert("RGB")
