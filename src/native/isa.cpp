#include "isa.hpp"

namespace kvant {

std::vector<const Kernels*> available_kernels() {
    std::vector<const Kernels*> found{&kernels_scalar};
#if defined(KVANT_X86)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    if (avx2) found.push_back(&kernels_avx2);
    if (avx2 && __builtin_cpu_supports("avxvnni")) found.push_back(&kernels_avxvnni);
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni"))
        found.push_back(&kernels_avx512);
    if (found.back() == &kernels_avx512 && __builtin_cpu_supports("avx512bf16"))
        found.push_back(&kernels_avx512bf16);
#endif
    return found;
}

}  // namespace kvant
