// Which of the kernels that setup.py compiles once per instruction set are called.
#pragma once

#include <ATen/Version.h>

#include <string>

namespace robustloss {

/// AVX512, AVX2 or DEFAULT: the best that this processor has; honours ATEN_CPU_CAPABILITY.
inline const std::string& instruction_set() {
    static const std::string best = []() -> std::string {
#ifdef __x86_64__
        const std::string capability = at::get_cpu_capability();
        if (capability == "AVX512" || capability == "AVX2") return capability;
#endif
        return "DEFAULT";
    }();
    return best;
}

}  // namespace robustloss

/// `kernels` of the namespace of the best instruction set. Other processors than x86-64 have the plain one
/// alone.
#ifdef __x86_64__
#define ROBUSTLOSS_BEST(kernels)                                   \
    (::robustloss::instruction_set() == "AVX512" ? AVX512::kernels \
     : ::robustloss::instruction_set() == "AVX2" ? AVX2::kernels   \
                                                 : DEFAULT::kernels)
#else
#define ROBUSTLOSS_BEST(kernels) (DEFAULT::kernels)
#endif
