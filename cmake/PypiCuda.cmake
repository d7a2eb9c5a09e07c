# MORIEP_BUILD_CUDA=PYPI: the CUDA compiler of the packages nvidia-* in the building Python's environment, so that a
# machine without CUDA builds libmoriep_cuda.so. pyproject.toml says which packages; `-C cuda.toolkit=pypi` installs them.

find_package(Python REQUIRED COMPONENTS Interpreter)
# The packages share the folder nvidia/cu13, which is no package itself and so may lie in several places.
execute_process(
  COMMAND
    ${Python_EXECUTABLE} -c
    "import importlib.util as u, pathlib; \
     found = [p for p in u.find_spec('nvidia.cu13').submodule_search_locations if (pathlib.Path(p) / 'bin/nvcc').is_file()]; \
     print(found[0], end='')"
  OUTPUT_VARIABLE toolkit
  ERROR_QUIET)
# A file of each package.
foreach(file bin/nvcc nvvm/bin/cicc include/crt/host_config.h lib/libcudart_static.a include/cccl/nv/target)
  if(NOT toolkit OR NOT EXISTS ${toolkit}/${file})
    message(FATAL_ERROR
      "MORIEP_BUILD_CUDA=PYPI must find CUDA's compiler in the packages of ${Python_EXECUTABLE}, which lack "
      "nvidia/cu13/${file}; build with `pip install . -C cuda.toolkit=pypi`, or without build isolation install "
      "nvidia-cuda-nvcc, nvidia-nvvm, nvidia-cuda-crt, nvidia-cuda-runtime and nvidia-cuda-cccl as pyproject.toml "
      "lists them")
  endif()
endforeach()
message(STATUS "CUDA compiler from PyPI: ${toolkit}")

set(CMAKE_CUDA_COMPILER ${toolkit}/bin/nvcc)
set(CUDAToolkit_ROOT ${toolkit})
# FindCUDAToolkit looks for libcudart.so, of which the packages have the numbered name only; it takes the folder from it.
file(GLOB CUDA_CUDART ${toolkit}/lib/libcudart.so.*)
# nvcc links against lib64 beside it; the packages have lib.
string(APPEND CMAKE_CUDA_FLAGS " -L${toolkit}/lib")
