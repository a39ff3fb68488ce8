// SPDX-License-Identifier: MIT
// Compiled once per instruction set, with FLA_ISA its name; what it exports is one table. Decay and
// erase are template arguments: each pair has code of its own, without branches in its loops.
#include "kernels.h"

#include "backward.h"
#include "conv.h"
#include "gated.h"
#include "selective.h"
#include "token.h"

namespace FLA_ISA {

template <template <Decay, Erase> class Run>
struct Dispatch {
  template <Decay D>
  static int64_t of(const Problem& p, Task task, float* workspace) {
    if (p.erase == NO_ERASE) return Run<D, NO_ERASE>::run(p, task, workspace);
    if (p.erase == DELTA) return Run<D, DELTA>::run(p, task, workspace);
    return Run<D, LOW_RANK>::run(p, task, workspace);
  }
  static int64_t run(const Problem& p, Task task, float* workspace) {
    if (p.decay == NO_DECAY) return of<NO_DECAY>(p, task, workspace);
    if (p.decay == SCALAR) return of<SCALAR>(p, task, workspace);
    return of<VECTOR>(p, task, workspace);
  }
};

template <Decay D, Erase E>
struct Forward {
  static int64_t run(const Problem& p, Task task, float* w) { return forward<D, E>(p, task, w); }
};

template <Decay D, Erase E>
struct Backwards {
  static int64_t run(const Problem& p, Task task, float* w) { return backward<D, E>(p, task, w); }
};

template <Decay D, Erase E>
struct Tokens {
  static int64_t run(const Problem& p, Task task, float* w) { return tokens<D, E>(p, task, w); }
};

// A decay of value channels comes alone, without an erase.
static int64_t chunks(const Problem& p, Task task, float* w) {
  return p.gv.data ? forward<COLUMN, NO_ERASE>(p, task, w) : Dispatch<Forward>::run(p, task, w);
}
static int64_t chunks_backward(const Problem& p, Task task, float* w) {
  return p.gv.data ? backward<COLUMN, NO_ERASE>(p, task, w) : Dispatch<Backwards>::run(p, task, w);
}

extern const Kernels kernels = {chunks,       chunks_backward, Dispatch<Tokens>::run,
                                conv_forward, conv_backward,   scan_forward,
                                scan_backward, gated_forward,   gated_backward};

}  // namespace FLA_ISA
