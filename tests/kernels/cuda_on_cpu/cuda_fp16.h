#pragma once

#include <cuda_runtime.h>

using __half = c10::Half;
inline float __half2float(__half x) { return static_cast<float>(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline __half __ushort_as_half(unsigned short x) { return __half(x, __half::from_bits()); }
inline unsigned short __half_as_ushort(__half x) { return x.x; }
