// Which kernels this processor can run.
#pragma once

#include <string>
#include <vector>

#include "kernels.hpp"

namespace kvant {

// Worst first, best last; "scalar" is always there.
std::vector<const Kernels*> available_kernels();

}  // namespace kvant
