// SPDX-License-Identifier: MIT
// Plain C entry points: the choice of an instruction set, the split into tasks, the threads.
#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <cstdlib>
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
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("bmi2") &&
              __builtin_cpu_supports("fma");
     }},
    {"avx2", &avx2::kernels,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"baseline", &baseline::kernels, [] { return true; }},
};
constexpr int ISA_COUNT = sizeof(ISAS) / sizeof(ISAS[0]);

enum Status { DONE = 0, OUT_OF_MEMORY = 1, NO_SUCH_ISA = 2 };

constexpr int64_t CACHE = 1 << 19;      // bytes of states that go through the tokens together
constexpr double ALONE = 1e5;           // multiply-adds not worth a second thread
constexpr int64_t EXPONENTIAL = 16;     // multiply-adds in the time of one exponential

// torch's threads are OpenMP's. Between its operators they spin for a while, so threads of our own
// would share the cores with them: where OpenMP is in the process, its threads run our tasks. They
// do not survive a fork.
typedef void (*OpenMP)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<bool> forked{false};
const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

OpenMP openmp() {
  static const OpenMP found = reinterpret_cast<OpenMP>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return forked ? nullptr : found;
}

// Runs `work` on several threads at once, and returns when all are done.
template <class Work>
void on_threads(int threads, Work& work) {
  if (threads > 1)
    if (OpenMP parallel = openmp())
      return parallel([](void* x) { (*static_cast<Work*>(x))(); }, &work, unsigned(threads), 0);
  std::vector<std::thread> others;
  for (int i = 1; i < threads; i++) {
    try {
      others.emplace_back([&work] { work(); });
    } catch (const std::exception&) {
      break;  // fewer threads do the same work
    }
  }
  work();
  for (auto& other : others) other.join();
}

// `count` tasks on up to `threads` threads, each with a workspace of its own. What a task computes
// does not depend on the thread that runs it, so results are the same for any number of threads.
template <class Run, class P, class Split>
int run_tasks(Run kernel, const P& p, int64_t count, int threads, Split split) {  // split(i): Task
  std::atomic<int64_t> next{0};
  std::atomic<int> status{DONE};
  auto work = [&] {
    float* workspace = nullptr;
    for (int64_t i; status == DONE && (i = next++) < count;) {
      if (!workspace) {  // the first task is the largest
        const int64_t size = kernel(p, split(0), nullptr);
        workspace = static_cast<float*>(std::aligned_alloc(64, (size * 4 + 63) / 64 * 64));
      }
      if (workspace)
        kernel(p, split(i), workspace);
      else
        status = OUT_OF_MEMORY;
    }
    std::free(workspace);
  };
  on_threads(count < threads ? int(count) : threads, work);
  return status;
}

// Splits the work into groups of heads of every sequence, and the panels of each group into `parts`
// parts; 0: more than one only where there are fewer groups than threads.
int run(Kernel<Problem> Kernels::*which, const Problem* p, int isa, int threads,
        int64_t heads,  // H or HV: heads that may go apart
        int parts) {
  if (isa < 0 || isa >= ISA_COUNT || !ISAS[isa].runs()) return NO_SUCH_ISA;
  const int64_t total = p->N * heads;
  if (!total) return DONE;
  const double tokens = double(p->bounds ? p->T : p->N * p->T);
  if (tokens * double(p->HV * p->K * p->V) < ALONE) threads = 1;
  const int64_t state = p->HV / heads * p->K * p->V * 4;
  const int64_t fit = state < CACHE ? CACHE / (state + 1) : 1;
  int64_t each = (total + threads - 1) / threads;
  each = each < fit ? each : fit;
  each = each < 1 ? 1 : each < heads ? each : heads;
  const int64_t groups = (heads + each - 1) / each, missing = threads / (p->N * groups);
  const int all = panels(*p);
  if (!parts) parts = missing < 1 ? 1 : missing < all ? int(missing) : all;
  const int64_t count = p->N * groups * parts;
  const auto cut = [=](int64_t part) { return int((part * all + parts - 1) / parts); };
  return run_tasks(ISAS[isa].kernels->*which, *p, count, threads, [=](int64_t i) {
    const int64_t part = i % parts, group = i / parts % groups, end = (group + 1) * each;
    return Task{i / parts / groups, group * each, end < heads ? end : heads,
                cut(part), cut(part + 1), int(part)};
  });
}

// Blocks of CHANNELS channels of every sequence; `each`: multiply-adds per channel and token.
template <class P>
int run_channels(Kernel<P> Kernels::*which, const P* p, int isa, int threads, int64_t each) {
  if (isa < 0 || isa >= ISA_COUNT || !ISAS[isa].runs()) return NO_SUCH_ISA;
  const int64_t blocks = (p->D + CHANNELS - 1) / CHANNELS;
  if (double(p->bounds ? p->T : p->N * p->T) * double(p->D * each) < ALONE) threads = 1;
  return run_tasks(ISAS[isa].kernels->*which, *p, p->N * blocks, threads,
                   [=](int64_t i) { return Task{i / blocks, i % blocks, 0, 0, 0, 0}; });
}

// Blocks of BLOCK rows.
int run_rows(Kernel<Gated> Kernels::*which, const Gated* p, int isa, int threads) {
  if (isa < 0 || isa >= ISA_COUNT || !ISAS[isa].runs()) return NO_SUCH_ISA;
  if (double(p->N) * double(p->D) * (p->gate ? EXPONENTIAL : 4) < ALONE) threads = 1;
  return run_tasks(ISAS[isa].kernels->*which, *p, (p->N + BLOCK - 1) / BLOCK, threads,
                   [](int64_t i) { return Task{i, 0, 0, 0, 0, 0}; });
}

}  // namespace

#define EXPORT __attribute__((visibility("default")))

extern "C" {

EXPORT int fla_isa_count() { return ISA_COUNT; }

EXPORT const char* fla_isa_name(int i) { return ISAS[i].name; }

EXPORT int fla_isa_runs(int i) { return ISAS[i].runs(); }

EXPORT int64_t fla_problem_size() { return sizeof(Problem); }

EXPORT int fla_forward(const Problem* p, int isa, int threads) {
  return run(&Kernels::forward, p, isa, threads, p->HV, 0);
}

EXPORT int fla_backward(const Problem* p, int isa, int threads) {
  return run(&Kernels::backward, p, isa, threads, p->H, p->parts);
}

EXPORT int64_t fla_conv_size() { return sizeof(Conv); }

EXPORT int fla_conv_forward(const Conv* p, int isa, int threads) {
  return run_channels(&Kernels::conv_forward, p, isa, threads, p->W);
}

EXPORT int fla_conv_backward(const Conv* p, int isa, int threads) {
  return run_channels(&Kernels::conv_backward, p, isa, threads, p->W);
}

EXPORT int64_t fla_scan_size() { return sizeof(Scan); }

EXPORT int fla_scan_forward(const Scan* p, int isa, int threads) {
  return run_channels(&Kernels::scan_forward, p, isa, threads, EXPONENTIAL * p->K);
}

EXPORT int fla_scan_backward(const Scan* p, int isa, int threads) {
  return run_channels(&Kernels::scan_backward, p, isa, threads, EXPONENTIAL * p->K);
}

EXPORT int64_t fla_gated_size() { return sizeof(Gated); }

EXPORT int fla_gated_forward(const Gated* p, int isa, int threads) {
  return run_rows(&Kernels::gated_forward, p, isa, threads);
}

EXPORT int fla_gated_backward(const Gated* p, int isa, int threads) {
  return run_rows(&Kernels::gated_backward, p, isa, threads);
}

EXPORT int fla_token(const Problem* p, int isa, int threads) {
  return run(&Kernels::token, p, isa, threads, p->HV, 1);
}
}
