// TTT-Linear's kernels as a shared library for the CPU: g++ -O2 -shared -fPIC -DHEAD_DIM=64 -I<emulate> -I<ops/ttt_linear>.
#include "prelude.cuh"
#if defined(PLAIN)
#include "plain.cu"
#else
#include "chain.cuh"
namespace forward_kernel {
#include "forward.cu"
}
namespace backward_kernel {
#include "backward.cu"
}
namespace chain_kernel {
#include "backward_chain.cu"
}
namespace decode_kernel {
#include "decode.cu"
}
using namespace decode_kernel;
using namespace chain_kernel;
using namespace forward_kernel;
using namespace backward_kernel;
#endif

#define EXPORT(name, Params)                                                                               \
    extern "C" void emu_##name(const Params* p, u32 blocks, u32 threads, u32 shared, u32 order) {          \
        emu::launch<Params>(name, p, blocks, threads, shared, order);                                      \
    }
#if defined(PLAIN)
EXPORT(ttt_linear_forward_plain_bf16, ForwardParams)
EXPORT(ttt_linear_forward_plain_f32, ForwardParams)
EXPORT(ttt_linear_backward_plain_bf16, BackwardParams)
EXPORT(ttt_linear_backward_plain_f32, BackwardParams)
EXPORT(ttt_linear_reduce, ReduceParams)
#else
EXPORT(ttt_linear_forward, ForwardParams)
EXPORT(ttt_linear_forward_chain, ForwardParams)
EXPORT(ttt_linear_decode, ForwardParams)
EXPORT(ttt_linear_backward, BackwardParams)
EXPORT(ttt_linear_backward_prepare, BackwardParams)
EXPORT(ttt_linear_backward_chain, BackwardParams)
#endif
