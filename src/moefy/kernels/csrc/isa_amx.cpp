#include "lanes_avx512.h"
// after the lanes:
#include "amx.h"

namespace moefy {
extern const Kernels k_amx;
const Kernels k_amx = {"amx", true, true, true, up_tiled, up_row_tiled, down_tiled, up_joined, down_joined, select, gate};
}  // namespace moefy
