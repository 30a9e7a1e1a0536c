// The kernels of a decoding step as a shared library for the CPU: g++ -O2 -shared -fPIC -DHEAD_DIM=64 -I<emulate> -I<ops>.
#include "prelude.cuh"
#include "step.cuh"
namespace products {
#include "step/product.cu"
}
namespace rows {
#include "step/rows.cu"
}
namespace token {
#include "ttt_linear/decode.cu"
}
namespace choice {
#include "sample/kernel.cu"
}
using namespace products;

#define EXPORT(space, name, Params)                                                                        \
    extern "C" void emu_##name(const Params* p, u32 blocks, u32 threads, u32 shared, u32 order) {          \
        emu::launch<Params>(space::name, p, blocks, threads, shared, order);                               \
    }
#define PRODUCTS(name) EXPORT(products, name, Product)
EXPORT(products, conv_norm_product, ConvProduct)
PRODUCTS(norm_product)
PRODUCTS(norm_product_swiglu)
PRODUCTS(gated_product_add)
PRODUCTS(product_bf16_8)
PRODUCTS(product_f32_16)
PRODUCTS(product_add_8)
PRODUCTS(product_add_16)
PRODUCTS(product_swiglu_16)
EXPORT(rows, pre_conv, PreConv)
EXPORT(rows, gated_norm, Product)
EXPORT(rows, rms_norm, Product)
EXPORT(token, ttt_linear_step, token::StepParams)
EXPORT(token, ttt_linear_decode, token::ForwardParams)
EXPORT(choice, sample, choice::SampleParams)
