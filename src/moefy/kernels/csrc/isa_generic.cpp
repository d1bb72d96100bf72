#include "lanes_generic.h"
// after the lanes:
#include "kernels.h"

namespace moefy {
extern const Kernels k_generic;
const Kernels k_generic = make_table("generic");
}  // namespace moefy
