#include "c_api.h"

#include "modules.h"
#include "moriep/group_api.h"

int32_t moriep_aiter_load(int32_t device, const char* name, const uint8_t* image,
                          const char* symbol, char* error, int64_t error_size) {
  return moriep::api::report(moriep::aiter::load_kernel(device, name, image, symbol), error,
                             error_size);
}
