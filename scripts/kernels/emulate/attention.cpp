// The attention kernels as a shared library for the CPU: g++ -O2 -shared -fPIC -DHEAD_DIM=64 -I<emulate> -I<ops/attention>.
#include "prelude.cuh"
#include "attention.cuh"
namespace forward {
#include "attention/forward.cu"
}
namespace backward {
#include "attention/backward.cu"
}
namespace decoding {
#include "attention/decode.cu"
}
namespace plain {
#include "attention/plain.cu"
}
using namespace forward;
using namespace backward;
using namespace decoding;
using namespace plain;

#define EXPORT(name)                                                                                       \
    extern "C" void emu_##name(const AttentionParams* p, u32 blocks, u32 threads, u32 shared, u32 order) { \
        emu::launch<AttentionParams>(name, p, blocks, threads, shared, order);                             \
    }
EXPORT(attention_forward)
EXPORT(attention_backward_queries)
EXPORT(attention_backward_keys)
EXPORT(attention_decode)
EXPORT(attention_join)
EXPORT(attention_forward_plain_bf16)
EXPORT(attention_forward_plain_f32)
EXPORT(attention_queries_plain_bf16)
EXPORT(attention_queries_plain_f32)
EXPORT(attention_keys_plain_bf16)
EXPORT(attention_keys_plain_f32)
EXPORT(attention_append_2)
EXPORT(attention_append_4)
EXPORT(attention_append_16)
