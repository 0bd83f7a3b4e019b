// The kernels of prune_windows.cu for prune.cpp: a source of their own, as they name things as prune.cu does.
#include "emulate_cuda.h"
// After it: the kernels.
#include "kernels/prune/prune_windows.cu"
