// Which instruction sets this build has and this machine can run; fork detection.
#include <pthread.h>
#ifdef MOEFY_X86
#include <cpuid.h>
#endif
#ifdef MOEFY_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstring>

#include "ffn.h"
#include "team.h"

namespace moefy {

extern const Kernels k_generic;
#ifdef MOEFY_X86
extern const Kernels k_avx2, k_avx512, k_avx512bf16;
#endif
#ifdef MOEFY_AMX
extern const Kernels k_amx;
#endif
#ifdef MOEFY_NEON
extern const Kernels k_neon;
#endif

namespace {

struct Entry {
  const Kernels* kernels;
  bool (*runs_here)();
};

#ifdef MOEFY_X86
bool has_f16c() {  // not a name that every compiler's __builtin_cpu_supports knows
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Zen 4 makes two halves of 512 bits, and a value is spread over 512 bits in 1.3 cycles or more. A tile of one panel
// needs that for every product, where AVX2 spreads it once for two: 89 GFLOP/s instead of 117 with everything in L1. So
// the up phase of ungated experts of 8 takes 16-24 % less from 64 tokens on. The bits are the same.
bool is_zen4() {
  static const bool found = [] {
    unsigned a, b, c, d;
    if (!has_avx512bf16() || !__builtin_cpu_is("amd") || !__get_cpuid(1, &a, &b, &c, &d)) return false;
    return (a >> 8 & 15) + (a >> 20 & 255) == 0x19;  // the family of Zen 3 and 4
  }();
  return found;
}
bool has_avx512bf16_whole() { return has_avx512bf16() && !is_zen4(); }
void up_zen4(const UpTask& task) {
  constexpr int kOneTile = 6;  // rows: those wait for DRAM, which AVX-512 reads as fast or faster
  const bool one_panel = task.bank->up_panels() == 1 && task.rows > kOneTile && !task.dot;
  (one_panel ? k_avx2 : k_avx512bf16).up(task);
}
const Kernels k_zen4 = [] {
  Kernels table = k_avx512bf16;
  table.up = up_zen4;
  return table;
}();
#endif
#ifdef MOEFY_AMX
bool has_amx() {  // Linux gives the registers to a process that asks for them; what has no AMX is refused
  static const bool granted = [] {
    unsigned a, b, c, d;
    if (!has_avx512bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool bf16 = d >> 22 & 1, tile = d >> 24 & 1;
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return bf16 && tile && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return granted;
}
#endif
bool always() { return true; }

const Entry kEntries[] = {
    {&k_generic, always},
#ifdef MOEFY_X86
    {&k_avx2, has_avx2},
    {&k_avx512, has_avx512},
    {&k_avx512bf16, has_avx512bf16_whole},
    {&k_zen4, is_zen4},  // under the same name
#endif
#ifdef MOEFY_AMX
    {&k_amx, has_amx},
#endif
#ifdef MOEFY_NEON
    {&k_neon, always},
#endif
};

std::atomic<bool> forked{false};
const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

bool in_forked_child() { return forked.load(std::memory_order_relaxed) || registered != 0; }

bool two_products() {
#ifdef MOEFY_X86
  static const bool found = __builtin_cpu_is("intel") && has_avx512();
  return found;
#else
  return false;
#endif
}

int instruction_sets(const char** names, int capacity) {
  int count = 0;
  for (const Entry& entry : kEntries)
    if (entry.runs_here() && count < capacity) names[count++] = entry.kernels->name;
  return count;
}

const Kernels* kernels(const char* name) {
  for (const Entry& entry : kEntries)
    if (std::strcmp(entry.kernels->name, name) == 0 && entry.runs_here()) return entry.kernels;
  return nullptr;
}

}  // namespace moefy
