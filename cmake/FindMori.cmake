# Finds the amd-mori wheel whose headers and libraries libmoriep_mori.so is built with: sets mori_dir, its package folder,
# or MORIEP_MORI_WHY_NOT, why there is none that fits. MORIEP_MORI_DIR names a folder; else the building Python's is taken.

set(MORIEP_MORI_VERSION 1.2.4) # its classes are compiled in, and their layouts change from release to release
find_package(Python REQUIRED COMPONENTS Interpreter)
set(mori_dir ${MORIEP_MORI_DIR})
if(NOT mori_dir)
  # Located and not imported: mori's own modules need torch.
  execute_process(
    COMMAND
      ${Python_EXECUTABLE} -c
      "import importlib.util as u; print(u.find_spec('mori').submodule_search_locations[0], end='')"
    OUTPUT_VARIABLE mori_dir
    ERROR_QUIET)
endif()
if(EXISTS ${mori_dir}/mori/_jit-sources)
  set(mori_dir ${mori_dir}/mori)
endif()

set(MORIEP_MORI_WHY_NOT "")
file(GLOB mori_dist_info ${mori_dir}/../amd_mori-*.dist-info)
if(NOT mori_dir OR NOT EXISTS ${mori_dir}/_jit-sources/include/mori/ops/dispatch_combine/dispatch_combine.hpp)
  set(MORIEP_MORI_WHY_NOT "there is no amd-mori at '${mori_dir}'")
elseif(NOT mori_dist_info MATCHES "/amd_mori-${MORIEP_MORI_VERSION}\\.dist-info$")
  set(MORIEP_MORI_WHY_NOT "${mori_dir} is another amd-mori than ${MORIEP_MORI_VERSION}: ${mori_dist_info}")
endif()
if(MORIEP_MORI_WHY_NOT)
  string(APPEND MORIEP_MORI_WHY_NOT
    "; run `pip install amd-mori==${MORIEP_MORI_VERSION}` for ${Python_EXECUTABLE}, or set MORIEP_MORI_DIR to the "
    "folder mori of an unpacked wheel")
else()
  message(STATUS "amd-mori ${MORIEP_MORI_VERSION}: ${mori_dir}")
endif()
