"""Converts a dense model to a sparse one: sparsify, calibrated data, and undoing a conversion that fails."""
