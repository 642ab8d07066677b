// The unit in which attention_map_splat adds, for the CPU and for CUDA: SPLAT_FRACTION_BITS in
// reference.py, which says why.

#pragma once

namespace sparse_detr {

constexpr int kSplatFractionBits = 38;
constexpr double kSplatUnitsPerOne = 1LL << kSplatFractionBits;

}  // namespace sparse_detr
