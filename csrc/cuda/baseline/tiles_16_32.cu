#include "cuda/baseline/gemm.cuh"

template struct quant_baseline::Tile<16>;
template struct quant_baseline::Tile<32>;
