"""Whole models for inference: projections merged, activations compressed once, norms fused, static-cache decoding."""

from .fp8 import FP8Linear
from .merged import MergedLinear
from .model import OptimizeReport, deoptimize, optimize
from .static import StaticDecoder

__all__ = ["FP8Linear", "MergedLinear", "OptimizeReport", "StaticDecoder", "deoptimize", "optimize"]
