// What a forward keeps of one element's addressing for the backward.
#pragma once

#include <cstdint>

namespace memcore {

// Similarities [H, Np], squared norms [Np], then zeros: enough for rows of whole vectors, however wide these are. In the accumulation type.
inline int64_t similar_numbers(int64_t H, int64_t N) { return (H + 1) * ((N + 15) / 16 * 16); }

}  // namespace memcore
