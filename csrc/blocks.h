// Blocks of memory for large tensors and scratch. What is given back is kept for what comes next: a fresh block costs the system a fault and a pass of
// zeros for every page, which can take as long as the operator itself. No torch header and no inline function: kernel files
// include this.
#pragma once

#include <cstdint>
#include <string>

namespace memcore {

constexpr int64_t kBlock = 1 << 20;  // bytes from which on an array has a block of its own

// Uninitialised, at the start of a page (huge pages where there can be some); null if there is none to be had, if none may be kept, or if this system has
// no such thing: then the array comes from elsewhere.
void* take_block(int64_t bytes) noexcept;
// A block of as many bytes as were asked for; any thread may give it.
void give_block(void* block, int64_t bytes) noexcept;

// Bytes that may be kept; what exceeds them goes back to the system, the longest kept first. Returns what held before.
int64_t limit_blocks(int64_t bytes);
int64_t block_limit();
int64_t drop_blocks();  // all that are kept; returns their bytes
int64_t kept_blocks();  // bytes
const std::string& wrong_block_limit();  // what is wrong with MEMCORE_CACHE_MB, which sets the limit at first, or nothing

}  // namespace memcore
