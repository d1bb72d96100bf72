// Threads. The extension is loaded after torch, whose wheel ships libgomp under its plain name: both use one pool.
#pragma once
#include <omp.h>

#include <cstdint>

namespace moefy {

// After a fork the child has the pool's memory but none of its threads, and a parallel region would wait for them
// for ever. The child therefore runs on one thread.
bool in_forked_child();

inline int allowed(int threads) { return threads < 1 || in_forked_child() ? 1 : threads; }

// Without a parallel region for one thread: libgomp is not entered at all.
template <class Work>
void parallel(int threads, int64_t count, const Work& work) {
  threads = allowed(threads);
  if (threads == 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) work(i);
    return;
  }
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t i = 0; i < count; ++i) work(i);
}

}  // namespace moefy
