// The kernels of linear attention and batch descent as a shared library for the CPU: g++ -O2 -shared -fPIC -DTTT_BF16 -I<emulate> -I<ops>.
#define __align__(n) __attribute__((aligned(n)))
#include "linear_attention/products.cu"
#include "linear_attention/rows.cu"
#include "ttt_batch/rows.cu"

#define EXPORT(name, Params)                                                                               \
    extern "C" void emu_##name(const Params* p, u32 blocks, u32 threads, u32 shared, u32 order) {          \
        emu::launch<Params>(name, p, blocks, threads, shared, order);                                      \
    }
EXPORT(chunk_product, ProductParams)
EXPORT(chunk_sum, SumParams)
EXPORT(running_sum, RunningParams)
EXPORT(features, FeatureParams)
EXPORT(normalise, NormaliseParams)
EXPORT(feature_gradients, FeatureGradParams)
EXPORT(descent_gradients, DescentParams)
EXPORT(descent_output, DescentParams)
EXPORT(descent_output_backward, DescentParams)
EXPORT(descent_gradients_backward, DescentParams)
