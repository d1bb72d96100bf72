// The limits of this machine: DRAM read bandwidth and multiply-add rate, for one and for all threads.
// Built and run by limits.py; prints one JSON line.
#include <omp.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

#ifdef __AVX512F__
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
typedef float V __attribute__((vector_size(kBytes)));
constexpr int kFloats = kBytes / 4, kChains = 12;  // latency 4, two a cycle: 8 chains are enough, 12 fit 16 registers

static double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static double gflops_once(int threads, long rounds) {
  const double start = now();
#pragma omp parallel num_threads(threads)
  {
    V sum[kChains];
    V x = V{} + 0.999f, y = V{} + 1e-3f;
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sum[i] = V{} + 0.1f * i;
    for (long r = 0; r < rounds; ++r) {
      asm volatile("" : "+x"(x), "+x"(y));  // keeps the loop
#pragma GCC unroll 12
      for (int i = 0; i < kChains; ++i) sum[i] = sum[i] * x + y;
    }
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) asm volatile("" ::"x"(sum[i]));  // keeps every lane
  }
  return threads * double(rounds) * kChains * kFloats * 2 / (now() - start) / 1e9;
}

// The best of some: a limit is what the machine can do, not what a neighbour left of it for 30 ms.
static double gflops(int threads, long rounds) {
  double best = 0;
  for (int round = 0; round < 8; ++round) {
    const double rate = gflops_once(threads, rounds);
    best = rate > best ? rate : best;
  }
  return best;
}

static double gigabytes(int threads, const float* data, size_t floats) {
  double best = 0;
  for (int round = 0; round < 8; ++round) {
    const double start = now();
#pragma omp parallel num_threads(threads)
    {
      const size_t share = floats / omp_get_num_threads() / 64 * 64;
      const V* p = reinterpret_cast<const V*>(data + share * omp_get_thread_num());
      const size_t half = share / kFloats / 2;  // two streams: a core reads more that way
      V sum[4] = {};
      for (size_t i = 0; i + 2 <= half; i += 2) {
        sum[0] += p[i], sum[1] += p[i + 1], sum[2] += p[half + i], sum[3] += p[half + i + 1];
      }
      for (int i = 0; i < 4; ++i) asm volatile("" ::"x"(sum[i]));
    }
    const double rate = floats * 4 / (now() - start) / 1e9;
    best = rate > best ? rate : best;
  }
  return best;
}

int main() {
  const int threads = omp_get_max_threads();
  const size_t floats = size_t(128) << 20;
  float* data = static_cast<float*>(std::aligned_alloc(1 << 21, floats * 4));
  for (size_t i = 0; i < floats; ++i) data[i] = 1e-9f * i;
  gflops(threads, 1000000);  // wakes the clock
  std::printf("{\"threads\": %d, \"vector_bits\": %d, \"gflops_1\": %.1f, \"gflops\": %.1f, \"gbps_1\": %.1f, \"gbps\": %.1f}\n",
              threads, kBytes * 8, gflops(1, 20000000), gflops(threads, 20000000), gigabytes(1, data, floats),
              gigabytes(threads, data, floats));
}
