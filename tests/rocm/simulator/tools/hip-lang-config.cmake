# What CMake's HIP language asks of a ROCm installation, with the simulated runtime. It lies in lib/cmake/hip-lang of one.
get_filename_component(_lib ${CMAKE_CURRENT_LIST_DIR}/../.. ABSOLUTE)
add_library(hip-lang::amdhip64 SHARED IMPORTED)
set_target_properties(
  hip-lang::amdhip64 PROPERTIES IMPORTED_LOCATION ${_lib}/libamdhip64.so IMPORTED_SONAME libamdhip64.so.7)
add_library(hip-lang::device INTERFACE IMPORTED)
set_target_properties(
  hip-lang::device PROPERTIES INTERFACE_LINK_LIBRARIES hip-lang::amdhip64
                              INTERFACE_LINK_OPTIONS "$<$<LINK_LANGUAGE:HIP>:--hip-link>")
set(_CMAKE_HIP_DEVICE_RUNTIME_TARGET hip-lang::device)
