"""Converts a dense model to a sparse one: sparsify, calibrated data, and undoing a failed conversion."""
