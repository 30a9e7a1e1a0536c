// TTT-MLP's kernels as a shared library for the CPU, as ttt_linear.cpp.
#include "prelude.cuh"
#if defined(PLAIN)
#include "../../../crates/ttt/src/ops/ttt_mlp/plain.cu"
#else
#include "mlp_tiles.cuh"
namespace forward_kernel {
#include "../../../crates/ttt/src/ops/ttt_mlp/forward.cu"
}
namespace backward_kernel {
#include "../../../crates/ttt/src/ops/ttt_mlp/backward.cu"
}
namespace decode_kernel {
#include "../../../crates/ttt/src/ops/ttt_mlp/decode.cu"
}
using namespace decode_kernel;
using namespace forward_kernel;
using namespace backward_kernel;
#endif

#define EXPORT(name, Params, ...)                                                                          \
    extern "C" void emu_##name(const Params* p, u32 blocks, u32 threads, u32 shared, u32 order) {          \
        emu::launch<Params>(name, p, blocks, threads, shared, order, ##__VA_ARGS__);                       \
    }
#if defined(PLAIN)
EXPORT(ttt_mlp_forward_plain_bf16, MlpForwardParams)
EXPORT(ttt_mlp_forward_plain_f32, MlpForwardParams)
EXPORT(ttt_mlp_backward_plain_bf16, MlpBackwardParams)
EXPORT(ttt_mlp_backward_plain_f32, MlpBackwardParams)
#else
EXPORT(ttt_mlp_forward, MlpForwardParams)
EXPORT(ttt_mlp_decode, MlpForwardParams)
EXPORT(ttt_mlp_backward, MlpBackwardParams, 2)
#endif
