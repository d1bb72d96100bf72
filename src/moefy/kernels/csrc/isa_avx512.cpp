#include "lanes_avx512.h"
// after the lanes:
#include "kernels.h"

namespace moefy {
extern const Kernels k_avx512;
const Kernels k_avx512 = make_table("avx512");
}  // namespace moefy
