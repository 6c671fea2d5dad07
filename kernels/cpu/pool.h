// Memory of large results, kept from call to call.
//
// The C library gives memory of this size back to the system as soon as it is free, and gets pages anew for the next layer: for an
// encoder's 4,000 tokens a third of the time. A block goes back to the list of its size instead. What is held in all is at
// most twice what was in use at once lately: where a model's inputs become small, the blocks that were not used for longest go back
// to the system with the next that are freed.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <list>
#include <mutex>

namespace pool {

constexpr int64_t kLeast = 1 << 16;  // bytes; smaller ones are the C library's, which keeps them
constexpr int64_t kAlignment = 64;
constexpr int kLately = 1024;  // blocks that were freed; between one and two times as many are looked back at

struct Block {
  void* data;
  int64_t size;
};

class Pool {
 public:
  // At least `bytes`; null where there are none left.
  Block* take(int64_t bytes) {
    const int64_t size = rounded(bytes);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (auto at = free_.begin(); at != free_.end(); ++at)
        if ((*at)->size == size) {
          Block* const block = *at;
          free_.erase(at);
          count(size);
          kept_ -= size;
          return block;
        }
    }
    void* const data = std::aligned_alloc(kAlignment, size);
    if (!data) return nullptr;
    const std::lock_guard<std::mutex> lock(mutex_);
    count(size);
    return new Block{data, size};
  }

  void give(Block* block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    used_ -= block->size, kept_ += block->size;
    free_.push_front(block);
    if (++freed_ == kLately) before_ = most_, most_ = used_, freed_ = 0;
    while (used_ + kept_ > 2 * std::max(most_, before_)) {
      Block* const oldest = free_.back();
      free_.pop_back();
      kept_ -= oldest->size;
      std::free(oldest->data);
      delete oldest;
    }
  }

  int64_t kept() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return kept_;
  }

 private:
  // Eight sizes from one power of two to the next.
  static int64_t rounded(int64_t bytes) {
    int64_t step = kLeast / 8;
    while (16 * step < bytes) step *= 2;
    return (bytes + step - 1) / step * step;
  }

  void count(int64_t size) {
    used_ += size;
    most_ = std::max(most_, used_);
  }

  std::mutex mutex_;
  std::list<Block*> free_;  // the last that was freed first; there are tens
  int64_t used_ = 0, kept_ = 0, most_ = 0, before_ = 0;  // bytes; the two last: at once, lately and in the time before
  int freed_ = 0;
};

inline Pool& pool() {
  static Pool& found = *new Pool;  // for ever: tensors may outlive what is static
  return found;
}

}  // namespace pool
