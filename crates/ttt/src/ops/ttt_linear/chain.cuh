// What the backward's preparation leaves for its chain, one record a mini-batch and head: everything that does not depend on dW.
#pragma once
#include "tiles.cuh"

struct Record {
    // 16 bytes a thread each. In row layout, bf16: x̂, e, and dĜ without the part through dW'. In A layout: dZ̄.
    static constexpr u32 XHAT = 0, E = 16 * THREADS, DGHAT = 32 * THREADS, DZBAR = 48 * THREADS;
    // [token][8] f32: 1 / s, mean γe x̂, mean γe, mean γ² x̂, mean γ² x̂², lr
    static constexpr u32 ROWS = 64 * THREADS;
    static constexpr u32 BYTES = ROWS + 32 * TOKENS;
};
