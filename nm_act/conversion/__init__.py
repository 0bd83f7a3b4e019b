"""From a dense model to a sparse one and back: sparsify, calibrated data, undoing a conversion that fails."""
