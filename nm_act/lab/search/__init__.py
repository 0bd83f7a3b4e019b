"""Choosing a pattern for every projection of every layer: sensitivities, costs, and a solver."""
