// What a forward keeps of one element's addressing for the backward.
#pragma once

#include <cstdint>

namespace memcore {

// In the accumulation type: the length Np of a row, which is that of the instruction set, and zeros up to 16 numbers; similarities [H, Np] and squared
// norms [Np]; zeros up to rows of whole vectors of any instruction set.
constexpr int64_t kKeptHead = 16;
inline int64_t similar_numbers(int64_t H, int64_t N) { return kKeptHead + (H + 1) * ((N + 15) / 16 * 16); }

}  // namespace memcore
