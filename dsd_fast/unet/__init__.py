"""The UNet as a program: plans that tap what is asked for and stop after it."""

from dsd_fast.unet.output import Output
from dsd_fast.unet.plan import Plan
from dsd_fast.unet.program import UNetProgram
from dsd_fast.unet.refusals import UnsupportedNetworkError
from dsd_fast.unet.text import TextKV

__all__ = ["Output", "Plan", "TextKV", "UNetProgram", "UnsupportedNetworkError"]
