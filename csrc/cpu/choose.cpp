// The targets that the processor has.
#include "operators.h"

namespace lumi {

namespace portable {
extern const CpuOperators operators[2];
}
#ifdef LUMI_X86_TARGETS
namespace avx2 {
extern const CpuOperators operators[2];
}
namespace avx512 {
extern const CpuOperators operators[2];
}
#endif

std::vector<const CpuOperators*> cpu_targets() {
    std::vector<const CpuOperators*> targets;
#ifdef LUMI_X86_TARGETS
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (has_avx2 && has_avx512) targets.push_back(avx512::operators);
    if (has_avx2) targets.push_back(avx2::operators);
#endif
    targets.push_back(portable::operators);
    return targets;
}

}  // namespace lumi
