"""Optimizes whole models for inference: merged projections, fused norms, e4m3 weights, decoding with static caches."""

from .fp8 import FP8Linear
from .merged import MergedLinear
from .model import deoptimize, optimize
from .report import OptimizeReport
from .static import StaticDecoder

__all__ = ["FP8Linear", "MergedLinear", "OptimizeReport", "StaticDecoder", "deoptimize", "optimize"]
