#include "blocks.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <fstream>
#include <mutex>
#include <string>
#include <vector>

#include "pages.h"

#if defined(__linux__)
#include <pthread.h>
#include <unistd.h>
#endif

namespace memcore {
namespace {

#if defined(__has_feature)
#if __has_feature(address_sanitizer) && !defined(__SANITIZE_ADDRESS__)
#define __SANITIZE_ADDRESS__  // GCC's name of it
#endif
#endif

// AddressSanitizer would take no notice of what is read past the end of a block, or after it was given back.
#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
constexpr bool kBlocks = true;
#else
constexpr bool kBlocks = false;
#endif

constexpr int64_t kMostByDefault = 512 << 20;
constexpr size_t kMostBlocks = 512;

// Sizes come in eight steps an octave, so that arrays of about the same size share blocks.
int64_t stepped(int64_t bytes) {
  int64_t octave = kBlock;
  while (octave <= bytes / 2) octave *= 2;
  const int64_t step = octave / 8;
  return (bytes + step - 1) / step * step;
}

#if defined(__linux__)
// Bytes of memory that there are for this process: the machine's, or its control group's if that is less.
int64_t memory_there() {
  int64_t least = std::max<int64_t>(0, (int64_t)sysconf(_SC_PHYS_PAGES) * (int64_t)sysconf(_SC_PAGESIZE));
  for (const char* path : {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}) {
    int64_t limit;
    if (std::ifstream(path) >> limit && limit > 0) least = std::min(least, limit);  // else there is none, or it is "max"
  }
  return least;
}

void* map(int64_t size) {
  const bool huge = size >= (int64_t)kHugePage;
  const size_t room = (size_t)size + (huge ? kHugePage : 0);
  void* p = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) return nullptr;
  if (!huge) return p;
  const uintptr_t from = (uintptr_t)p, at = (from + kHugePage - 1) / kHugePage * kHugePage, end = at + (uintptr_t)size;
  if (at > from) munmap(p, at - from);
  munmap((void*)end, from + room - end);
  ask_huge_pages((void*)at, size);
  return (void*)at;
}
void unmap(void* p, int64_t size) { munmap(p, (size_t)size); }
#else
int64_t memory_there() { return 0; }
void* map(int64_t) { return nullptr; }
void unmap(void*, int64_t) {}
#endif

class Blocks {
 public:
  Blocks() {
    kept_.reserve(kMostBlocks);
    most_ = std::min(kMostByDefault, memory_there() / 16);
    const char* asked = std::getenv("MEMCORE_CACHE_MB");
    if (!asked || !*asked) return;
    char* end;
    errno = 0;
    const long long mib = std::strtoll(asked, &end, 10);
    if (*end || errno || mib < 0 || mib > (INT64_MAX >> 20))
      wrong_ = "memcore: MEMCORE_CACHE_MB must be a whole number of MiB, 0 or more, got '" + std::string(asked) + "'";
    else most_ = mib << 20;
  }

  // A kept block, or null; `wanted` says whether there is to be one at all.
  void* take(int64_t size, bool& wanted) {
    const std::lock_guard<std::mutex> lock(mutex_);
    wanted = most_ > 0;
    for (size_t i = kept_.size(); i-- > 0;)  // the last one given: its lines may be in the caches still
      if (kept_[i].size == size) {
        void* p = kept_[i].p;
        kept_.erase(kept_.begin() + (std::ptrdiff_t)i);
        bytes_ -= size;
        return p;
      }
    return nullptr;
  }
  bool give(void* p, int64_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (size > most_) return false;
    shrink(most_ - size, kMostBlocks - 1);
    kept_.push_back({p, size});  // which finds room
    bytes_ += size;
    return true;
  }
  int64_t limit(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::swap(most_, bytes);
    shrink(most_, kMostBlocks);
    return bytes;
  }
  int64_t drop() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const int64_t bytes = bytes_;
    shrink(0, 0);
    return bytes;
  }
  int64_t bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return bytes_;
  }
  int64_t most() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return most_;
  }
  const std::string& wrong() const { return wrong_; }

  // Around fork(): no other thread is half way through a change, and the child lets go of what would otherwise be in both processes.
  void before_fork() { mutex_.lock(); }
  void after_fork(bool child) {
    if (child) shrink(0, 0);
    mutex_.unlock();
  }

 private:
  struct Kept {
    void* p;
    int64_t size;
  };
  void shrink(int64_t bytes, size_t count) {
    size_t n = 0;
    for (; bytes_ > bytes || kept_.size() - n > count; n++) {
      unmap(kept_[n].p, kept_[n].size);
      bytes_ -= kept_[n].size;
    }
    kept_.erase(kept_.begin(), kept_.begin() + (std::ptrdiff_t)n);
  }

  std::mutex mutex_;
  std::vector<Kept> kept_;  // the longest kept first
  int64_t bytes_ = 0, most_;
  std::string wrong_;
};

Blocks& blocks() {
  static Blocks& all = [] () -> Blocks& {
    Blocks& made = *new Blocks;  // never destroyed: tensors may live longer than statics
#if defined(__linux__)
    static Blocks* forked = &made;
    pthread_atfork([] { forked->before_fork(); }, [] { forked->after_fork(false); }, [] { forked->after_fork(true); });
#endif
    return made;
  }();
  return all;
}

}  // namespace

void* take_block(int64_t bytes) noexcept {
  if (!kBlocks) return nullptr;
  const int64_t size = stepped(bytes);
  bool wanted;
  void* p = blocks().take(size, wanted);
  if (p || !wanted) return p;
  p = map(size);
  return !p && blocks().drop() > 0 ? map(size) : p;  // what is kept must not be what is missing
}
void give_block(void* block, int64_t bytes) noexcept {
  const int64_t size = stepped(bytes);
  if (!blocks().give(block, size)) unmap(block, size);
}

int64_t limit_blocks(int64_t bytes) { return blocks().limit(std::max<int64_t>(0, bytes)); }
int64_t block_limit() { return kBlocks ? blocks().most() : 0; }
int64_t drop_blocks() { return blocks().drop(); }
int64_t kept_blocks() { return blocks().bytes(); }
const std::string& wrong_block_limit() { return blocks().wrong(); }

}  // namespace memcore
