#include "cuda/baseline/gemm.cuh"

template struct quant_baseline::Tile<256>;
