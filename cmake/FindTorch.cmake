# Finds the torch of Python_EXECUTABLE and defines the target nm_act_torch.
#
# find_package(Torch) is not used: it drags in the CUDA toolkit and every torch library, and fails with a CUDA torch
# where no toolkit is installed. Needed are the headers, libtorch_cpu, libc10 and torch's own OpenMP runtime: a second
# runtime in the process would fight it for the cores.
find_package(Python 3.11 REQUIRED COMPONENTS Interpreter Development.Module)

# PYTHONPATH is dropped so that an isolated pip build, which hides the environment that way, still finds its torch. No
# torch backend is loaded: one may be broken, such as the entry point of the nm_act 0.1 that this build replaces.
execute_process(
  COMMAND ${CMAKE_COMMAND} -E env --unset=PYTHONPATH TORCH_DEVICE_BACKEND_AUTOLOAD=0
    ${Python_EXECUTABLE} -c
    "import torch; print(torch.__path__[0], torch.__version__, torch.version.cuda or '', int(torch.compiled_with_cxx11_abi()), sep=';')"
  OUTPUT_VARIABLE torch_facts OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE torch_missing ERROR_VARIABLE torch_error)
if(torch_missing)
  message(FATAL_ERROR "expected torch 2.11 or newer in the environment of ${Python_EXECUTABLE}, found none that imports; "
    "install torch there first (nm_act builds against it and downloads none itself)\n${torch_error}")
endif()
list(GET torch_facts 0 torch_root)
list(GET torch_facts 1 NM_ACT_TORCH_VERSION)
list(GET torch_facts 2 NM_ACT_TORCH_CUDA)
list(GET torch_facts 3 torch_abi)
if(NM_ACT_TORCH_VERSION VERSION_LESS 2.11)
  message(FATAL_ERROR "expected torch 2.11 or newer, found ${NM_ACT_TORCH_VERSION}; upgrade torch")
endif()
message(STATUS "torch ${NM_ACT_TORCH_VERSION} in ${torch_root}")

add_library(nm_act_torch INTERFACE)
target_include_directories(nm_act_torch SYSTEM INTERFACE
  ${torch_root}/include ${torch_root}/include/torch/csrc/api/include)
target_compile_definitions(nm_act_torch INTERFACE _GLIBCXX_USE_CXX11_ABI=${torch_abi})
# at::parallel_for is an OpenMP template in the headers: without the flag it would run on one thread.
target_compile_options(nm_act_torch INTERFACE -fopenmp)
file(GLOB torch_openmp ${torch_root}/lib/libgomp*.so* ${torch_root}/../torch.libs/libgomp*.so*)
if(NOT torch_openmp)
  message(WARNING "torch brings no libgomp of its own: linking the system's, and a second OpenMP runtime in the process "
    "may make threads slower")
  set(torch_openmp gomp)
endif()
target_link_directories(nm_act_torch INTERFACE ${torch_root}/lib)
target_link_libraries(nm_act_torch INTERFACE torch_cpu c10 ${torch_openmp})

# The C++ runtime by its file name: some toolchains link it statically, and an exception thrown by a second copy in the
# process crashes instead of becoming a Python error. First in the link line, so that nothing else provides its symbols.
find_library(NM_ACT_LIBSTDCXX NAMES libstdc++.so.6 PATHS /usr/lib/${CMAKE_LIBRARY_ARCHITECTURE} /usr/lib64)
if(NM_ACT_LIBSTDCXX)
  target_link_libraries(nm_act_torch INTERFACE ${NM_ACT_LIBSTDCXX})
endif()

# What the CUDA side of the operators needs on top: c10's streams and guards, and the CUDA headers they include.
if(NM_ACT_TORCH_CUDA)
  add_library(nm_act_torch_cuda INTERFACE)
  target_link_libraries(nm_act_torch_cuda INTERFACE c10_cuda torch_cuda)
  find_path(NM_ACT_CUDA_INCLUDE cuda_runtime_api.h HINTS $ENV{CUDA_HOME}/include /usr/local/cuda/include)
  target_include_directories(nm_act_torch_cuda SYSTEM INTERFACE ${NM_ACT_CUDA_INCLUDE})
endif()
