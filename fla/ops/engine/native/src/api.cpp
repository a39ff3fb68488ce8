// SPDX-License-Identifier: MIT
// Plain C entry points: the choice of an instruction set, the split into tasks, the threads.
#include <atomic>
#include <cstdlib>
#include <new>
#include <thread>
#include <vector>

#include "kernels.h"

#define DECLARE(ISA) \
  namespace ISA {    \
  extern const Kernels kernels; \
  }
DECLARE(baseline)
#if defined(__x86_64__)
DECLARE(avx2)
DECLARE(avx512)
#endif

namespace {

struct Isa {
  const char* name;
  const Kernels* kernels;
  bool (*runs)();
};

const Isa ISAS[] = {  // the best first
#if defined(__x86_64__)
    {"avx512", &avx512::kernels,
     [] { return __builtin_cpu_supports("x86-64-v4") != 0; }},
    {"avx2", &avx2::kernels,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"baseline", &baseline::kernels, [] { return true; }},
};
constexpr int ISA_COUNT = sizeof(ISAS) / sizeof(ISAS[0]);

enum Status { DONE = 0, OUT_OF_MEMORY = 1, NO_SUCH_ISA = 2 };

// Tasks in order on up to `threads` threads, each with a workspace of its own. What a task computes
// does not depend on who runs it.
template <class Split>
int run(Kernel kernel, const Problem& p, int64_t count, int threads, Split split) {
  const int64_t size = kernel(p, Task{}, nullptr);
  if (threads > count) threads = int(count);
  std::atomic<int64_t> next{0};
  std::atomic<int> status{DONE};
  auto work = [&] {
    float* workspace = static_cast<float*>(std::aligned_alloc(64, (size * 4 + 63) / 64 * 64));
    if (!workspace) {
      status = OUT_OF_MEMORY;
      return;
    }
    for (int64_t i; status == DONE && (i = next++) < count;) kernel(p, split(i), workspace);
    std::free(workspace);
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; i++) {
    try {
      others.emplace_back(work);
    } catch (const std::exception&) {
      break;  // fewer threads do the same work
    }
  }
  work();
  for (auto& other : others) other.join();
  return status;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) int fla_isa_count() { return ISA_COUNT; }

__attribute__((visibility("default"))) const char* fla_isa_name(int i) { return ISAS[i].name; }

__attribute__((visibility("default"))) int fla_isa_runs(int i) { return ISAS[i].runs(); }

__attribute__((visibility("default"))) int64_t fla_problem_size() { return sizeof(Problem); }

__attribute__((visibility("default"))) int fla_forward(const Problem* p, int isa, int threads) {
  if (isa < 0 || isa >= ISA_COUNT || !ISAS[isa].runs()) return NO_SUCH_ISA;
  const int64_t heads = p->N * p->HV, all = panels(*p);
  int64_t parts = heads ? (threads + heads - 1) / heads : 1;  // few heads: split their values, too
  parts = parts < 1 ? 1 : parts > all ? all : parts;
  return run(ISAS[isa].kernels->forward, *p, heads * parts, threads, [&](int64_t i) {
    const int64_t head = i / parts, part = i % parts;
    return Task{head / p->HV, head % p->HV, int(part * all / parts), int((part + 1) * all / parts)};
  });
}

__attribute__((visibility("default"))) int fla_backward(const Problem* p, int isa, int threads) {
  if (isa < 0 || isa >= ISA_COUNT || !ISAS[isa].runs()) return NO_SUCH_ISA;
  return run(ISAS[isa].kernels->backward, *p, p->N * p->H, threads,
             [&](int64_t i) { return Task{i / p->H, i % p->H, 0, 0}; });
}

__attribute__((visibility("default"))) int fla_token(const Problem* p, int isa, int threads) {
  if (isa < 0 || isa >= ISA_COUNT || !ISAS[isa].runs()) return NO_SUCH_ISA;
  return run(ISAS[isa].kernels->token, *p, p->N * p->HV, threads,
             [&](int64_t i) { return Task{i / p->HV, i % p->HV, 0, 0}; });
}
}
