#include "cuda/baseline/gemm.cuh"

template struct quant_baseline::Tile<64>;
template struct quant_baseline::Tile<128>;
