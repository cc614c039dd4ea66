// Mutants of the CUDA source, all in one build: mutants.py marks each place with a number; one of them is switched on when a driver runs.
#pragma once

namespace mcshim {
constexpr int kMarks = 2048;
inline int g_mutant = 0;  // 0: the source as it is; -1: note where a mutant would act
inline unsigned char g_reached[kMarks];

// Whether mutant k is on.
inline bool mutant(int k) {
  if (g_mutant < 0) __atomic_store_n(&g_reached[k], 1, __ATOMIC_RELAXED);
  return g_mutant == k;
}
}  // namespace mcshim
