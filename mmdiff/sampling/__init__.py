"""The one decoding engine: text and image tokens, any network, any method.

`decode` is the loop; every other name is a part that is given to it.
"""

from mmdiff.sampling.blocks import Fixed, Whole
from mmdiff.sampling.caches import Cache, DllmCache, Dual, MaxLogit, Prefix
from mmdiff.sampling.canvas import Backbone, Canvas, CodeBackbone, TextBackbone, layout
from mmdiff.sampling.constraints import Constraint
from mmdiff.sampling.continuous import LatentBackbone, PromptedLatents, latent_canvas
from mmdiff.sampling.credit import Credit
from mmdiff.sampling.editors import T2T, Remask
from mmdiff.sampling.exits import Eos, Stop
from mmdiff.sampling.guidance import Cfg
from mmdiff.sampling.heads import Ddpm, DpmSolver
from mmdiff.sampling.loop import decode, steps
from mmdiff.sampling.orders import Ordered, SharedReveal
from mmdiff.sampling.proposal import Proposal
from mmdiff.sampling.samplers import Greedy, Gumbel, Multinomial
from mmdiff.sampling.schedules import Cosine, Energy, Expected, Independent, Linear, Shift
from mmdiff.sampling.selectors import (
    CertaintyDensity,
    Entropy,
    Margin,
    Quota,
    Random,
    RandomTopK,
    TopConfidence,
)
from mmdiff.sampling.thresholds import (
    EntropyBound,
    EntropyThreshold,
    Factor,
    Hierarchy,
    LocalLeap,
    Threshold,
    ThresholdOrQuota,
)
from mmdiff.sampling.trace import Decoded, Drift, Pass, Step, Trace

__all__ = [
    "T2T",
    "Backbone",
    "Cache",
    "Canvas",
    "CertaintyDensity",
    "Cfg",
    "CodeBackbone",
    "Constraint",
    "Cosine",
    "Credit",
    "Ddpm",
    "Decoded",
    "DllmCache",
    "DpmSolver",
    "Drift",
    "Dual",
    "Energy",
    "Entropy",
    "EntropyBound",
    "EntropyThreshold",
    "Eos",
    "Expected",
    "Factor",
    "Fixed",
    "Greedy",
    "Gumbel",
    "Hierarchy",
    "Independent",
    "LatentBackbone",
    "Linear",
    "LocalLeap",
    "Margin",
    "MaxLogit",
    "Multinomial",
    "Ordered",
    "Pass",
    "Prefix",
    "PromptedLatents",
    "Proposal",
    "Quota",
    "Random",
    "RandomTopK",
    "Remask",
    "SharedReveal",
    "Shift",
    "Step",
    "Stop",
    "TextBackbone",
    "Threshold",
    "ThresholdOrQuota",
    "TopConfidence",
    "Trace",
    "Whole",
    "decode",
    "latent_canvas",
    "layout",
    "steps",
]
