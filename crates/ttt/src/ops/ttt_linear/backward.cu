#include "tiles.cuh"
KERNEL ttt_linear_backward(const __grid_constant__ BackwardParams p) {}
