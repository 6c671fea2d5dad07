// Memory of large results, kept from call to call.
//
// The C library gives memory of this size back to the system as soon as it is free, and gets pages anew for the next layer: for an
// encoder's 4,000 tokens a third of the time. A block goes back to the list of its size instead. What is held in all is at
// most twice what was in use at once lately: where a model's inputs become small, the blocks that were not used for longest go back
// to the system.

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <list>
#include <map>
#include <mutex>

namespace pool {

constexpr int64_t kLeast = 1 << 16;  // bytes; smaller ones are the C library's, which keeps them
constexpr int64_t kAlignment = 64;
constexpr int64_t kLately = 2048;  // results, of any size; between one and two times as many are looked back at

struct Block {
  void* data;
  int64_t size, freed;  // the latter: when, by a count
  std::list<Block>::iterator self;
};

class Pool {
 public:
  // A result that is no block.
  void small() {
    if (!due()) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    roll();
  }

  // At least `bytes`; null where there are none left.
  Block* take(int64_t bytes) {
    const int64_t size = rounded(bytes);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (due()) roll();
    std::list<Block>& alike = free_[size];
    if (!alike.empty()) {
      busy_.splice(busy_.begin(), alike, alike.begin());
      kept_ -= size;
    } else {
      trim(size);
      busy_.push_front({nullptr, size, 0, {}});
      void* data = std::aligned_alloc(kAlignment, size);
      if (!data) free_all(), data = std::aligned_alloc(kAlignment, size);
      if (!data) return busy_.pop_front(), nullptr;
      busy_.front().data = data, busy_.front().self = busy_.begin();
    }
    used_ += size;
    most_ = std::max(most_, used_);
    return &busy_.front();
  }

  void give(Block* block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::list<Block>& alike = free_.find(block->size)->second;
    alike.splice(alike.begin(), busy_, block->self);
    block->freed = ++count_;
    used_ -= block->size, kept_ += block->size;
    trim(0);
  }

  int64_t kept() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return kept_;
  }

  void release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_all();
  }

  static Pool& one() {
    static Pool& found = *new Pool;  // for ever: tensors may outlive what is static
    return found;
  }

 private:
  Pool() {  // a process may be forked while another thread holds the lock
    pthread_atfork([] { one().mutex_.lock(); }, [] { one().mutex_.unlock(); }, [] { one().mutex_.unlock(); });
  }

  // Eight sizes from one power of two to the next.
  static int64_t rounded(int64_t bytes) {
    int64_t step = kLeast / 8;
    while (16 * step < bytes) step *= 2;
    return (bytes + step - 1) / step * step;
  }

  bool due() { return results_.fetch_add(1, std::memory_order_relaxed) % kLately == kLately - 1; }

  void roll() {
    before_ = most_, most_ = used_;
    trim(0);
  }

  // Makes room for a new block, of the free ones that were not used for longest.
  void trim(int64_t size) {
    const int64_t limit = 2 * std::max({most_, before_, used_ + size});
    while (kept_ && used_ + kept_ + size > limit) {
      std::list<Block>* oldest = nullptr;
      for (auto& [_, blocks] : free_)
        if (!blocks.empty() && (!oldest || blocks.back().freed < oldest->back().freed)) oldest = &blocks;
      drop(*oldest);
    }
  }

  void free_all() {
    for (auto& [_, blocks] : free_)
      while (!blocks.empty()) drop(blocks);
  }

  void drop(std::list<Block>& blocks) {
    kept_ -= blocks.back().size;
    std::free(blocks.back().data);
    blocks.pop_back();
  }

  std::mutex mutex_;
  std::map<int64_t, std::list<Block>> free_;  // by size, the last that was freed first
  std::list<Block> busy_;
  std::atomic<int64_t> results_{0};
  int64_t used_ = 0, kept_ = 0, count_ = 0;
  int64_t most_ = 0, before_ = 0;  // bytes in use at once, lately and in the time before
};

}  // namespace pool
