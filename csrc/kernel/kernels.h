// What every instruction set's kernels offer to dispatch.cpp, each in a namespace of its name.
#pragma once
#include "attention.h"

#define QKV_DECLARE_KERNELS(isa)                     \
    namespace isa {                                  \
    Status run(const Attention& call);               \
    Status run_backward(const Backward& call);       \
    Status run_observation(const Observation& call); \
    Status run_cover(const Attention&, Cover& to);   \
    Limits limits();                                 \
    }
