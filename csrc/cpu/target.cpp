// All operators for one target.
#include "attention.h"
#include "cross_entropy.h"
#include "decode_attention.h"
#include "linear.h"
#include "rms_norm.h"
#include "rope.h"
#include "swiglu.h"

namespace lumi::LUMI_TARGET {

template <typename T>
constexpr CpuOperators table(const char* target) {
    return {target,
            rms_norm<T>,
            rms_norm_backward<T>,
            rms_norm_pieces,
            swiglu<T>,
            swiglu_backward<T>,
            rope<T>,
            linear<T>,
            cross_entropy<T>,
            cross_entropy_scratch,
            attention<T>,
            attention_backward<T>,
            attention_scratch,
            decode_attention<T>,
            decode_scratch};
}

#define LUMI_NAME(name) LUMI_STRING(name)
#define LUMI_STRING(name) #name
extern const CpuOperators operators[2] = {table<float>(LUMI_NAME(LUMI_TARGET)),
                                          table<BFloat16>(LUMI_NAME(LUMI_TARGET))};

}  // namespace lumi::LUMI_TARGET
