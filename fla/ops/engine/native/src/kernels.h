// SPDX-License-Identifier: MIT
// What every instruction set provides: functions that run one task in a workspace, and with a null
// workspace return the floats it needs.
#pragma once
#include "problem.h"

typedef int64_t (*Kernel)(const Problem&, Task, float*);

typedef int64_t (*ConvKernel)(const Conv&, Task, float*);

struct Kernels {
  Kernel forward, backward, token;
  ConvKernel conv_forward, conv_backward;
};
