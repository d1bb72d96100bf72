#include "lanes_avx2.h"
// after the lanes:
#include "kernels.h"

namespace moefy {
extern const Kernels k_avx2;
const Kernels k_avx2 = make_table("avx2");
}  // namespace moefy
