"""The one decoding engine: text and image tokens, any network, any method.

`decode` is the loop; every other name is a part that is given to it.
"""

from mmdiff.sampling.blocks import Fixed, Whole
from mmdiff.sampling.caches import Cache, DllmCache, Dual, Prefix
from mmdiff.sampling.canvas import Backbone, Canvas, CodeBackbone, TextBackbone, layout
from mmdiff.sampling.constraints import Constraint
from mmdiff.sampling.exits import Eos
from mmdiff.sampling.guidance import Cfg
from mmdiff.sampling.loop import decode, steps
from mmdiff.sampling.proposal import Proposal
from mmdiff.sampling.samplers import Greedy, Gumbel, Multinomial
from mmdiff.sampling.schedules import Cosine, Energy, Expected, Linear, Shift
from mmdiff.sampling.selectors import (
    Entropy,
    Factor,
    Margin,
    Quota,
    Random,
    RandomTopK,
    Threshold,
    TopConfidence,
)
from mmdiff.sampling.trace import Decoded, Drift, Pass, Step, Trace

__all__ = [
    "Backbone",
    "Cache",
    "Canvas",
    "Cfg",
    "CodeBackbone",
    "Constraint",
    "Cosine",
    "Decoded",
    "DllmCache",
    "Drift",
    "Dual",
    "Energy",
    "Entropy",
    "Eos",
    "Expected",
    "Factor",
    "Fixed",
    "Greedy",
    "Gumbel",
    "Linear",
    "Margin",
    "Multinomial",
    "Pass",
    "Prefix",
    "Proposal",
    "Quota",
    "Random",
    "RandomTopK",
    "Shift",
    "Step",
    "TextBackbone",
    "Threshold",
    "TopConfidence",
    "Trace",
    "Whole",
    "decode",
    "layout",
    "steps",
]
