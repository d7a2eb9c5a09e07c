# Defines the target xla_ffi: the XLA FFI headers of the jaxlib in the building Python's environment.
#
# The package is located but not imported: an import takes seconds, and jaxlib need not be usable here.

find_package(Python REQUIRED COMPONENTS Interpreter)
if(NOT XLA_FFI_INCLUDE_DIR)
  execute_process(
    COMMAND
      ${Python_EXECUTABLE} -c
      "import importlib.util as u; print(u.find_spec('jaxlib').submodule_search_locations[0], end='')"
    OUTPUT_VARIABLE jaxlib_dir
    ERROR_QUIET)
  set(XLA_FFI_INCLUDE_DIR ${jaxlib_dir}/include)
endif()
set(c_api ${XLA_FFI_INCLUDE_DIR}/xla/ffi/api/c_api.h)
if(NOT EXISTS ${c_api})
  message(FATAL_ERROR
    "${c_api} does not exist: ${Python_EXECUTABLE} has no jaxlib with XLA FFI headers; run "
    "`pip install jaxlib==0.10.2` there, or set XLA_FFI_INCLUDE_DIR to a folder that holds xla/ffi/api/c_api.h")
endif()

file(STRINGS ${c_api} api_minor REGEX "^#define XLA_FFI_API_MINOR ")
string(REGEX REPLACE "[^0-9]" "" api_minor "${api_minor}")
set(oldest_api_minor 3) # of jaxlib 0.10.2
if(api_minor GREATER oldest_api_minor)
  message(WARNING
    "The headers in ${XLA_FFI_INCLUDE_DIR} are of FFI API 0.${api_minor}: the library will not load on a "
    "jaxlib older than this one. Build with jaxlib==0.10.2 to serve every supported jaxlib")
endif()
message(STATUS "XLA FFI headers: ${XLA_FFI_INCLUDE_DIR} (API 0.${api_minor})")

add_library(xla_ffi INTERFACE)
# SYSTEM: the headers warn under -Wall, and that is not for us to fix.
target_include_directories(xla_ffi SYSTEM INTERFACE ${XLA_FFI_INCLUDE_DIR})
