#pragma once
#include "attention.h"

namespace qkv {

// Whether the call's mask program fits (program_fits), and its operands hold all that the call may read of them.
bool program_runs(const Attention& call);

}  // namespace qkv
