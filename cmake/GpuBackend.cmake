# Which GPU backends are built. A compiler that CMake finds but cannot use must not cost the backends that need none,
# and enable_language and the generate step end the configuration when they fail: so a CMake of its own is asked first.

set(MORIEP_PROBE_DIR ${CMAKE_CURRENT_LIST_DIR}/probe)

# Refuses other values of a switch than the named ones, and makes its value upper case.
function(moriep_check_switch switch)
  string(TOUPPER "${${switch}}" value)
  if(NOT value IN_LIST ARGN)
    list(JOIN ARGN ", " values)
    message(FATAL_ERROR "${switch}=${${switch}} must be one of ${values}; pick one of these")
  endif()
  set(${switch} ${value} PARENT_SCOPE)
endfunction()

# Sets MORIEP_CUDA or MORIEP_ROCM to whether the backend is built, and MORIEP_CUDA_WHY_NOT or MORIEP_ROCM_WHY_NOT to
# one line that says why it is not and the cure. It is an error if the user asked for a backend that cannot be built.
function(moriep_gpu_backend backend language cure)
  string(TOUPPER ${backend} name)
  set(switch MORIEP_BUILD_${name})
  set(value ${${switch}})
  set(MORIEP_${name} OFF PARENT_SCOPE)
  set(MORIEP_${name}_WHY_NOT "" PARENT_SCOPE)
  if(value STREQUAL "OFF")
    set(MORIEP_${name}_WHY_NOT "it was built with ${switch}=${value}" PARENT_SCOPE)
    return()
  endif()
  moriep_probe(${language} why_not)
  if(why_not STREQUAL "")
    set(MORIEP_${name} ON PARENT_SCOPE)
  elseif(value STREQUAL "AUTO")
    set(MORIEP_${name}_WHY_NOT "${why_not}; ${cure}" PARENT_SCOPE)
    # NOTICE, because CMake breaks a warning into several lines.
    message(NOTICE "libmoriep_${backend}.so is not built: ${why_not}; ${cure}")
  else()
    message(FATAL_ERROR "${switch}=${value} must find a ${language} compiler that works: ${why_not}; ${cure}")
  endif()
endfunction()

# Sets `why_not` to the reason why a small project in that language, with the options of ours, cannot be configured and
# built, in one line; empty if it can.
function(moriep_probe language why_not)
  string(TOLOWER ${language} folder)
  set(folder ${CMAKE_BINARY_DIR}/probe-${folder})
  set(settings)
  foreach(
    variable CMAKE_MAKE_PROGRAM CMAKE_TOOLCHAIN_FILE CMAKE_PREFIX_PATH CMAKE_CXX_COMPILER CUDAToolkit_ROOT CUDA_CUDART
             CMAKE_${language}_COMPILER CMAKE_${language}_HOST_COMPILER CMAKE_${language}_FLAGS
             CMAKE_${language}_ARCHITECTURES CMAKE_${language}_PLATFORM CMAKE_${language}_COMPILER_ROCM_ROOT)
    if(DEFINED ${variable})
      string(APPEND settings "set(${variable} [==[${${variable}}]==] CACHE STRING \"\")\n")
    endif()
  endforeach()
  # What an earlier probe found may have been mended since.
  file(REMOVE_RECURSE ${folder})
  # A file, because a list in a variable does not survive a command line.
  file(WRITE ${folder}/settings.cmake "${settings}")
  execute_process(
    COMMAND ${CMAKE_COMMAND} -S ${MORIEP_PROBE_DIR} -B ${folder} -G ${CMAKE_GENERATOR} -C ${folder}/settings.cmake
            -DLANGUAGE=${language}
    RESULT_VARIABLE result
    OUTPUT_VARIABLE output
    ERROR_VARIABLE output)
  if(result EQUAL 0)
    execute_process(
      COMMAND ${CMAKE_COMMAND} --build ${folder}
      RESULT_VARIABLE result
      OUTPUT_VARIABLE output
      ERROR_VARIABLE output)
  endif()
  if(result EQUAL 0)
    set(${why_not} "" PARENT_SCOPE)
    return()
  endif()
  set(log)
  if(output MATCHES "could not be identified|not able to compile")
    # There CMake keeps what the compiler said.
    set(file ${folder}/CMakeFiles/CMakeConfigureLog.yaml)
    if(EXISTS ${file})
      file(READ ${file} log)
    endif()
  endif()
  moriep_first_error("${output}\n${log}" ${language} reason)
  set(${why_not} "${reason}" PARENT_SCOPE)
endfunction()

# Sets `reason` to the first thing in the output of a failed build that says what is wrong, as one line.
function(moriep_first_error output language reason)
  if(output MATCHES "No CMAKE_${language}_COMPILER could be found")
    set(found "CMake ${CMAKE_VERSION} finds no ${language} compiler")
  elseif(output MATCHES "[^\n]*(fatal error|nvcc fatal|[ :]error ?:|#error)[^\n]*")
    # A compiler's own word says more than CMake's word about it.
    set(found "${CMAKE_MATCH_0}")
  elseif(output MATCHES "CMake Error.*")
    string(REGEX REPLACE "\n(Call Stack|-- ).*" "" found "${CMAKE_MATCH_0}")
    string(REGEX REPLACE "^CMake Error[^\n]*:[ \n]" "" found "${found}")
    string(PREPEND found "CMake ${CMAKE_VERSION} says: ")
  else()
    set(found "${output}")
  endif()
  string(REGEX REPLACE "[ \t\r\n]+" " " found "${found}")
  string(REGEX REPLACE "[ .:]+$" "" found "${found}")
  string(STRIP "${found}" found)
  string(LENGTH "${found}" length)
  if(length GREATER 400)
    string(SUBSTRING "${found}" 0 400 found)
    string(APPEND found "...")
  endif()
  set(${reason} "${found}" PARENT_SCOPE)
endfunction()
