"""Which techniques keep features true to the image: GATE (Meng et al., arXiv 2410.06719, section 5)."""

from dsd_fast.features.gate.guide import Guide, GuideResult
from dsd_fast.features.gate.result import GateResult
from dsd_fast.features.gate.run import gate

__all__ = ["GateResult", "Guide", "GuideResult", "gate"]
