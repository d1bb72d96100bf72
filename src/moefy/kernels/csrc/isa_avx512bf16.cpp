#include "lanes_avx512.h"
// after the lanes:
#include "kernels.h"

namespace moefy {
extern const Kernels k_avx512bf16;
const Kernels k_avx512bf16 = make_table("avx512bf16");
}  // namespace moefy
