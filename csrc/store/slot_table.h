#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "../pages.h"

namespace memcore {

// A 64-bit hash of `size` bytes. Both steps of a word are one-to-one, so keys that differ in one word never collide.
inline uint64_t hash_bytes(const void* data, int64_t size) {
  uint64_t h = 0x243f6a8885a308d3u ^ (uint64_t)size;
  const char* p = (const char*)data;
  for (; size > 0; p += 8, size -= 8) {
    uint64_t word = 0;
    std::memcpy(&word, p, size < 8 ? (size_t)size : 8);
    h = (h ^ word) * 0x9e3779b97f4a7c15u;
    h ^= h >> 32;
  }
  h = (h ^ (h >> 31)) * 0xd6e8feb86659fd93u;
  return h ^ (h >> 32);
}

template <class T> struct Array {  // zeros that the system hands out page by page, in huge pages where there are any
  explicit Array(int64_t n) : memory(nullptr, std::free) {
    if ((size_t)n > (SIZE_MAX - kHugePage) / sizeof(T)) throw std::bad_alloc();
    const size_t bytes = (size_t)(n ? n : 1) * sizeof(T), room = bytes < kHugePage ? 0 : kHugePage;
    memory.reset(std::calloc(bytes + room, 1));
    if (!memory) throw std::bad_alloc();
    first = (T*)(room ? ((uintptr_t)memory.get() + room - 1) / room * room : (uintptr_t)memory.get());
    if (room) ask_huge_pages(first, (int64_t)bytes);
  }
  T& operator[](int64_t i) const { return first[i]; }
  T* first;
  std::unique_ptr<void, void (*)(void*)> memory;
};

// Where the entries of A dictionaries of N slots are: hash -> slot, and the slots in the order of their last use. Slots 0..count-1
// of a dictionary are taken: removing one moves the last one into it.
class SlotTable {
 public:
  enum Kind { UPDATED, APPENDED, REPLACED };

  SlotTable(int64_t A, int64_t N) : A(A), N(N), shift(32), buckets(2), count(A), nodes(A * (N + 1)), index(size_index(A)) {
    for (int64_t a = 0; a < A; a++) set_prev(a, N, N), set_next(a, N, N);
  }

  const int64_t A, N;

  int64_t size(int64_t a) const { return count[a]; }
  uint64_t hash_of(int64_t a, int64_t slot) const { return node(a, slot).hash; }

  int64_t find(int64_t a, uint64_t h) const {
    const Bucket* t = &index[a * buckets];
    const uint32_t tag = tag_of(h);
    for (int64_t i = home(tag);; i = (i + 1) & (buckets - 1)) {
      if (t[i].place == 0) return -1;
      if (t[i].tag == tag && node(a, t[i].place - 1).hash == h) return t[i].place - 1;
    }
  }

  // The slot of `h`, which becomes the latest used: its own, a free one, or that of the entry used least recently.
  int64_t put(int64_t a, uint64_t h, Kind& kind) {
    int64_t slot = find(a, h);
    if (slot >= 0) {
      kind = UPDATED;
      touch(a, slot);
      return slot;
    }
    if (count[a] < N) {
      kind = APPENDED;
      slot = count[a]++;
      link(a, slot);
    } else {
      kind = REPLACED;
      slot = replaced(a);
      unindex(a, slot);
      touch(a, slot);
    }
    node(a, slot).hash = h;
    enter(a, slot);
    return slot;
  }

  // What `put` of h will want, step by step, each to be asked for some time before the next: its bucket; its node if it is there, else that of
  // the entry used least recently; the neighbours of that in the order of use. The last two return the slot, -1 if a free one will do.
  void fetch_bucket(int64_t a, uint64_t h) const { __builtin_prefetch(&index[a * buckets + home(tag_of(h))], 1); }
  int64_t fetch_node(int64_t a, uint64_t h) const {
    const uint32_t tag = tag_of(h);
    const Bucket& t = index[a * buckets + home(tag)];
    const int64_t slot = t.place && t.tag == tag ? t.place - 1 : replaced(a);
    if (slot >= 0) fetch_slot(a, slot);
    return slot;
  }
  // The entry whose slot a new one takes; -1 if a free one will do.
  int64_t replaced(int64_t a) const { return count[a] < N ? -1 : next(a, N); }
  // One entry alone: both buckets, its own and that of whom it replaces, and the latter's neighbour, side by side.
  void fetch_replaced(int64_t a, uint64_t h) const {
    fetch_bucket(a, h);
    const int64_t slot = replaced(a);
    if (slot < 0) return;
    fetch_bucket(a, hash_of(a, slot));
    fetch_slot(a, next(a, slot));
  }
  void fetch_slot(int64_t a, int64_t slot) const { __builtin_prefetch(&node(a, slot), 1); }
  void fetch_links(int64_t a, int64_t slot) const {
    __builtin_prefetch(&node(a, prev(a, slot)), 1);
    __builtin_prefetch(&node(a, next(a, slot)), 1);
  }

  void touch(int64_t a, int64_t slot) {
    if (prev(a, N) == slot) return;
    unlink(a, slot);
    link(a, slot);
  }

  // Frees the slot of `h` (-1: not there); the entry of slot `moved`, the last one, must be moved into it.
  int64_t remove(int64_t a, uint64_t h, int64_t& moved) {
    const int64_t slot = find(a, h);
    if (slot < 0) return -1;
    unindex(a, slot);
    unlink(a, slot);
    moved = --count[a];
    if (moved != slot) {
      unindex(a, moved);
      node(a, slot).hash = node(a, moved).hash;
      enter(a, slot);
      const int64_t p = prev(a, moved), n = next(a, moved);  // takes its place in the order of use, too
      set_prev(a, slot, p), set_next(a, slot, n), set_next(a, p, slot), set_prev(a, n, slot);
    }
    return slot;
  }

  void clear(int64_t a) {
    count[a] = 0;
    std::memset(&index[a * buckets], 0, sizeof(Bucket) * (size_t)buckets);
    set_prev(a, N, N), set_next(a, N, N);
  }

  // Slots from the least to the most recently used.
  void order(int64_t a, int64_t* out) const {
    for (int64_t s = next(a, N); s != N; s = next(a, s)) *out++ = s;
  }

  // These slots, in this order, become the least recently used.
  void oldest(int64_t a, const int64_t* slots, int64_t n) {
    for (int64_t i = n - 1; i >= 0; i--) {
      unlink(a, slots[i]);
      const int64_t first = next(a, N);
      set_prev(a, slots[i], N), set_next(a, slots[i], first), set_next(a, N, slots[i]), set_prev(a, first, slots[i]);
    }
  }

 private:
  struct Node {
    uint64_t hash;
    int32_t before, after;
  };
  struct Bucket {
    uint32_t tag;    // upper half of the mixed hash, so that a probe seldom asks a node
    uint32_t place;  // slot + 1; 0: empty
  };

  // The list of a dictionary is a ring through node N.
  Node& node(int64_t a, int64_t s) const { return nodes[a * (N + 1) + s]; }
  int64_t prev(int64_t a, int64_t s) const { return node(a, s).before; }
  int64_t next(int64_t a, int64_t s) const { return node(a, s).after; }
  void set_prev(int64_t a, int64_t s, int64_t to) { node(a, s).before = (int32_t)to; }
  void set_next(int64_t a, int64_t s, int64_t to) { node(a, s).after = (int32_t)to; }
  void unlink(int64_t a, int64_t s) {
    const int64_t p = prev(a, s), n = next(a, s);
    set_next(a, p, n), set_prev(a, n, p);
  }
  void link(int64_t a, int64_t s) {
    const int64_t p = prev(a, N);
    set_prev(a, s, p), set_next(a, s, N), set_next(a, p, s), set_prev(a, N, s);
  }

  // Linear probing at most half full; a removal closes its gap, so that there are no tombstones.
  int64_t size_index(int64_t dictionaries) {
    while (buckets < 2 * N) buckets *= 2;
    for (int64_t b = buckets; b > 1; b /= 2) shift--;
    return dictionaries * buckets;
  }
  static uint32_t tag_of(uint64_t h) { return (uint32_t)((h * 0x9e3779b97f4a7c15u) >> 32); }
  int64_t home(uint32_t tag) const { return (int64_t)(tag >> shift); }
  void enter(int64_t a, int64_t slot) {
    Bucket* t = &index[a * buckets];
    const uint32_t tag = tag_of(node(a, slot).hash);
    int64_t i = home(tag);
    while (t[i].place != 0) i = (i + 1) & (buckets - 1);
    t[i] = {tag, (uint32_t)slot + 1};
  }
  void unindex(int64_t a, int64_t slot) {
    Bucket* t = &index[a * buckets];
    const int64_t mask = buckets - 1;
    int64_t gap = home(tag_of(node(a, slot).hash));
    while (t[gap].place != slot + 1) gap = (gap + 1) & mask;
    for (int64_t i = (gap + 1) & mask; t[i].place != 0; i = (i + 1) & mask) {
      const int64_t want = home(t[i].tag);
      if (((i - want) & mask) >= ((i - gap) & mask)) t[gap] = t[i], gap = i;
    }
    t[gap].place = 0;
  }

  int shift;
  int64_t buckets;
  std::vector<int64_t> count;
  Array<Node> nodes;
  Array<Bucket> index;
};

// Where a table's rows lie in host memory.
struct Rings {
  int64_t D = 0, V = 0, element = 4;
  char *keys = nullptr, *values = nullptr;
  int64_t* head = nullptr;  // an epoch, odd while rows change, then the counts
  char* norms = nullptr;
  uint16_t* mirror = nullptr;
  float* rounding = nullptr;
  int64_t* steps = nullptr;  // of the optimizer, two numbers of 32 bits; 0 with a new entry
};

}  // namespace memcore
