"""Loading of Stable Diffusion models and the bundle that holds their parts."""

from dsd_fast.models.bundle import Model
from dsd_fast.models.controlnet import Control, load_controlnet
from dsd_fast.models.errors import ModelError
from dsd_fast.models.load import from_pipeline, load
from dsd_fast.models.prompts import PromptStates
from dsd_fast.models.splice import Splice

__all__ = ["Control", "Model", "ModelError", "PromptStates", "Splice", "from_pipeline", "load", "load_controlnet"]
