# Sets NM_ACT_CUTLASS_INCLUDE to the CUTLASS 4.2 headers and NM_ACT_CUTLASS_VERSION to their version.
#
# Looked for in this order: NM_ACT_CUTLASS_DIR (CMake option or environment variable), the submodule third_party/cutlass,
# the headers inside the Python package nvidia-cutlass, in build/cutlass (where `make` puts it: an environment that has it
# without what it requires makes pip complain at every later install) or in the environment.
set(cutlass_candidates)
set(cutlass_wanted ${NM_ACT_CUTLASS_DIR})
if(NOT cutlass_wanted AND DEFINED ENV{NM_ACT_CUTLASS_DIR})
  set(cutlass_wanted $ENV{NM_ACT_CUTLASS_DIR})
endif()
if(cutlass_wanted)
  list(APPEND cutlass_candidates ${cutlass_wanted}/include ${cutlass_wanted})
else()
  execute_process(
    COMMAND ${CMAKE_COMMAND} -E env --unset=PYTHONPATH ${Python_EXECUTABLE} -c
      "import importlib.util as u; s = u.find_spec('cutlass_library'); print(s.submodule_search_locations[0] if s else '')"
    OUTPUT_VARIABLE cutlass_package OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  list(APPEND cutlass_candidates ${CMAKE_SOURCE_DIR}/third_party/cutlass/include
    ${CMAKE_SOURCE_DIR}/build/cutlass/cutlass_library/source/include)
  if(cutlass_package)
    list(APPEND cutlass_candidates ${cutlass_package}/source/include)
  endif()
endif()

unset(NM_ACT_CUTLASS_INCLUDE)
foreach(candidate IN LISTS cutlass_candidates)
  if(EXISTS ${candidate}/cutlass/version.h)
    set(NM_ACT_CUTLASS_INCLUDE ${candidate})
    break()
  endif()
endforeach()
if(NOT NM_ACT_CUTLASS_INCLUDE)
  message(FATAL_ERROR "expected the CUTLASS 4.2 headers, found none in: ${cutlass_candidates}; run 'git submodule update "
    "--init third_party/cutlass', or 'pip install --no-deps --target build/cutlass nvidia-cutlass==4.2.0.0', or set NM_ACT_CUTLASS_DIR")
endif()
file(STRINGS ${NM_ACT_CUTLASS_INCLUDE}/cutlass/version.h cutlass_lines REGEX "define CUTLASS_(MAJOR|MINOR|PATCH) +[0-9]+")
string(REGEX REPLACE "[^0-9]+([0-9]+)[^0-9]+([0-9]+)[^0-9]+([0-9]+).*" "\\1.\\2.\\3" NM_ACT_CUTLASS_VERSION "${cutlass_lines}")
if(NOT NM_ACT_CUTLASS_VERSION MATCHES "^4\\.2\\.")
  message(FATAL_ERROR "expected CUTLASS 4.2, found ${NM_ACT_CUTLASS_VERSION} in ${NM_ACT_CUTLASS_INCLUDE}; check out a v4.2 tag")
endif()
message(STATUS "CUTLASS ${NM_ACT_CUTLASS_VERSION} in ${NM_ACT_CUTLASS_INCLUDE}")
