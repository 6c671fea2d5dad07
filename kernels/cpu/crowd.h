// Threads that wait for each other on a machine that is busy with other processes.
//
// GNU's OpenMP has a thread that is done spin for milliseconds until the others are. Where another process takes a core, the
// thread that all wait for gets none as long as they spin, and a region of microseconds takes a time slice: models ran 40 to
// 150 times as long beside two busy processes on two cores, and twice as long where threads sleep soon instead. But on a quiet
// machine spinning is up to three times faster. So threads spin until regions are seen to wait for too long. For a while there
// are then more threads than CPUs, which has OpenMP's threads sleep soon (libgomp's manual, GOMP_SPINCOUNT).

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

namespace crowd {

constexpr double kLate = 1e-3;  // seconds that are waited, if it is half as long as the work: a time slice, no uneven share
constexpr int kRegions = 3;     // that are late,
constexpr double kWithin = 0.1;  // within so many seconds
constexpr int kMost = 18;        // threads that are started for it
constexpr double kWhile = 2.0, kLongest = 8.0;  // seconds until threads spin again; twice as long where they were late again

std::atomic<int> late{0};
std::atomic<int64_t> times{0}, started{0};  // that threads were told to sleep soon, and how many were started for it
std::atomic<double> since{0}, until{0}, lasted{kWhile};

// Whether so many threads can be started. OpenMP ends the process where it can start none.
inline bool startable(int count) {
  std::vector<std::thread> threads;
  std::atomic<bool> all{false};
  bool found = true;
  try {
    for (int i = 0; i < count; ++i) threads.emplace_back([&all] {
      while (!all.load()) std::this_thread::yield();
    });
  } catch (...) {
    found = false;
  }
  all.store(true);
  for (std::thread& thread : threads) thread.join();
  return found;
}

// `threads` are those that are late.
inline void sleep_soon(int threads) {
  const int helpers = std::max(2, omp_get_num_procs() - threads + 2);  // with itself, one more than the CPUs that are left
  if (helpers > kMost) return;  // there are CPUs enough, but not for this process
  const double now = omp_get_wtime();
  double before = until.load();
  if (now < before) return;
  const double last = lasted.load(), seconds = now - before < 1 ? std::min(2 * last, kLongest) : kWhile;
  if (!until.compare_exchange_strong(before, now + seconds)) return;
  lasted.store(seconds);
  times.fetch_add(1);
  if (!startable(helpers + 2)) return;
  try {
    std::thread([seconds, helpers] {
#pragma omp parallel num_threads(helpers)
      started.fetch_add(1);  // GCC makes no region of nothing
      std::this_thread::sleep_for(std::chrono::duration<double>(seconds));  // OpenMP's threads are there as long as this one
    }).detach();
  } catch (...) {  // no more threads
  }
}

// Beside a parallel region, in the thread that begins it. Each thread says in the region when it begins to work, and when it has
// nothing left to do. The others are waited for at both ends: a region begins when all have left the one before.
class Region {
 public:
  void work() {
    if (omp_get_thread_num() == 0) work_ = omp_get_wtime(), threads_ = omp_get_num_threads();
  }
  void done() {
    if (omp_get_thread_num() == 0) done_ = omp_get_wtime();
  }
  ~Region() {
    if (done_ == 0) return;
    const double work = done_ - work_, wait = omp_get_wtime() - start_ - work;
    if (wait < kLate || wait < work / 2) return;
    if (start_ > since.load() + kWithin) since.store(start_), late.store(0);
    if (late.fetch_add(1) + 1 >= kRegions) since.store(0), sleep_soon(threads_);
  }

 private:
  const double start_ = omp_get_wtime();
  double work_ = 0, done_ = 0;
  int threads_ = 1;
};

}  // namespace crowd

// How often threads were told to sleep soon.
extern "C" int64_t sqcompile_crowded() { return crowd::times.load(); }
