#include "lanes_generic.h"
// after the lanes:
#include "kernels.h"

namespace moefy {
extern const Kernels k_neon;
const Kernels k_neon = make_table("neon");
}  // namespace moefy
