# Decides NM_ACT_WITH_CUDA, and if it is off says why in NM_ACT_WHY_NO_CUDA.
#
# AUTO compiles the CUDA kernels when this torch can use them and nvcc is there. ON compiles them whatever torch is (they
# do not need it), for a library that is carried to another machine; the operators are linked to them only with a CUDA
# torch.
set(NM_ACT_WITH_CUDA OFF)
set(NM_ACT_WHY_NO_CUDA "")
find_program(NM_ACT_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin /usr/local/cuda/bin)
if(NM_ACT_CUDA STREQUAL "OFF")
  set(NM_ACT_WHY_NO_CUDA "NM_ACT_CUDA=OFF was set when it was built")
elseif(NM_ACT_CUDA STREQUAL "AUTO" AND NOT NM_ACT_TORCH_CUDA)
  set(NM_ACT_WHY_NO_CUDA "torch ${NM_ACT_TORCH_VERSION} has no CUDA; install a CUDA torch and build again")
elseif(NM_ACT_CUDA_LIBRARY)
  set(NM_ACT_WITH_CUDA ON)
elseif(NOT NM_ACT_NVCC)
  set(NM_ACT_WHY_NO_CUDA "no nvcc was found; install the CUDA toolkit or set CUDA_HOME and build again")
  if(NM_ACT_CUDA STREQUAL "ON")
    message(FATAL_ERROR "expected nvcc for NM_ACT_CUDA=ON, found none; install the CUDA toolkit or set CUDA_HOME")
  endif()
else()
  set(NM_ACT_WITH_CUDA ON)
  set(CMAKE_CUDA_COMPILER ${NM_ACT_NVCC})
endif()
if(NM_ACT_WITH_CUDA AND NOT NM_ACT_TORCH_CUDA)
  set(NM_ACT_WHY_NO_CUDA "torch ${NM_ACT_TORCH_VERSION} has no CUDA; install a CUDA torch and build again")
endif()
message(STATUS "CUDA kernels: ${NM_ACT_WITH_CUDA} ${NM_ACT_WHY_NO_CUDA}")
