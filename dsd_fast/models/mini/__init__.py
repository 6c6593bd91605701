"""The embedded mini model: a small Stable-Diffusion-shaped model that ships inside the package.

The task it was trained on is in `scenes` (procedural, captioned pictures) and `digits` (scikit-learn's handwritten
digits); `benchmarks/mini` reproduces the shipped weights, and the bench suite `mini-card` measures them.
"""

from importlib import resources
from pathlib import Path

__all__ = ["path"]


def path() -> Path:
    """Folder of the shipped weights, in the layout that `StableDiffusionPipeline.from_pretrained` reads.

    Besides the pipeline's components it has `clip/`, a `CLIPModel` whose text tower equals `text_encoder/`.

    Raises:
        FileNotFoundError: the installation has no weights.
    """
    folder = Path(str(resources.files(__name__))) / "weights"
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"the embedded mini model's weights are missing: {folder} has no model_index.json")
    return folder
