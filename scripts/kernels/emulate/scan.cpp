// The kernels of the selective scan as a shared library for the CPU: g++ -O2 -shared -fPIC -DTTT_BF16 -I<emulate> -I<ops>.
#define WARPS 12
#include "selective_scan/forward.cu"
#include "selective_scan/backward.cu"

#define EXPORT(name, Params)                                                                               \
    extern "C" void emu_##name(const Params* p, u32 blocks, u32 threads, u32 shared, u32 order) {          \
        emu::launch<Params>(name, p, blocks, threads, shared, order);                                      \
    }
EXPORT(scan_forward, ScanParams)
EXPORT(scan_step, ScanParams)
EXPORT(scan_backward, ScanGradParams)
EXPORT(scan_reduce, ScanReduceParams)
