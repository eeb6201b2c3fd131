#pragma once

#include "status.h"

/// Exported under its C name.
#define API extern "C" __attribute__((visibility("default"))) int
