// The libraries hide every symbol but those that are declared with this.
#pragma once

#define MORIEP_EXPORT extern "C" __attribute__((visibility("default")))
