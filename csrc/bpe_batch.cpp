// Many documents, in one thread or in several.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <numeric>
#include <system_error>
#include <thread>

#include "bpe_encoder.hpp"

namespace bpe {
namespace {

constexpr size_t kBlock = 1 << 17;  // bytes a thread takes at a time: their ids stay in its cache

// Lets threads put what they have made behind each other, in the order of the blocks.
class Queue {
 public:
  // Waits for the blocks before, and returns where this one of `size` ids begins.
  size_t place(size_t block, size_t size) {
    std::unique_lock<std::mutex> lock(mutex_);
    turn_.wait(lock, [&] { return next_ == block || failure_; });
    if (failure_) std::rethrow_exception(failure_);
    size_t begin = end_;
    end_ += size;
    ++next_;
    turn_.notify_all();
    return begin;
  }

  void fail(std::exception_ptr failure) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!failure_) failure_ = failure;
    turn_.notify_all();
  }

  void check() const {
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  std::mutex mutex_;
  std::condition_variable turn_;
  size_t next_ = 0, end_ = 0;
  std::exception_ptr failure_;
};

}  // namespace

std::vector<int64_t> Encoder::encode(const std::vector<Document>& documents, const std::vector<uint16_t>& around,
                                     int threads, uint16_t* out) const {
  std::vector<int64_t> offsets(documents.size() + 1);
  auto encode_some = [&](size_t first, size_t last, uint16_t* target) {
    uint16_t* cursor = target;
    for (size_t i = first; i < last; ++i) {
      uint16_t* begin = cursor;
      if (!around.empty()) *cursor++ = around[0];
      cursor += encode(documents[i], cursor);
      if (!around.empty()) *cursor++ = around[1];
      offsets[i + 1] = cursor - begin;
    }
    return static_cast<size_t>(cursor - target);
  };

  if (threads == 1) {
    encode_some(0, documents.size(), out);
  } else {
    std::vector<size_t> borders = {0}, rooms;
    for (size_t i = 0, room = 0; i < documents.size(); ++i) {
      room += this->room(documents[i].size) + around.size();
      if (room < kBlock && i + 1 < documents.size()) continue;
      borders.push_back(i + 1);
      rooms.push_back(room);
      room = 0;
    }
    Queue queue;
    std::atomic<size_t> next{0};
    auto work = [&] {
      try {
        std::vector<uint16_t> ids;
        for (size_t block; (block = next++) < rooms.size();) {
          ids.resize(std::max(ids.size(), rooms[block]));
          size_t count = encode_some(borders[block], borders[block + 1], ids.data());
          std::copy_n(ids.begin(), count, out + queue.place(block, count));
        }
      } catch (...) {
        queue.fail(std::current_exception());
      }
    };
    std::vector<std::thread> others;
    try {
      for (size_t t = 1; t < std::min<size_t>(threads, rooms.size()); ++t) others.emplace_back(work);
    } catch (const std::system_error&) {  // no more threads to be had: those there are do it all
    }
    work();
    for (std::thread& other : others) other.join();
    queue.check();
  }
  std::partial_sum(offsets.begin(), offsets.end(), offsets.begin());
  return offsets;
}

}  // namespace bpe
