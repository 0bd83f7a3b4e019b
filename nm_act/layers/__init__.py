"""Layers: NMLinear, what it derives from its weight, and which tokens of a call it treats apart."""
