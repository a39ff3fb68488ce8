// SPDX-License-Identifier: MIT
// What every instruction set provides: functions that run one task in a workspace [floats] of the
// thread's own, and with a null workspace only return the number of floats they need.
#pragma once
#include "problem.h"

template <class P>
using Kernel = int64_t (*)(const P&, Task, float*);

struct Kernels {
  Kernel<Problem> forward, backward, token;
  Kernel<Conv> conv_forward, conv_backward;
  Kernel<Scan> scan_forward, scan_backward;
  Kernel<Gated> gated_forward, gated_backward;
};
