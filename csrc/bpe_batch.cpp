// Many documents, in one thread or in several.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <numeric>
#include <system_error>
#include <thread>

#include "bpe_encoder.hpp"

namespace bpe {
namespace {

constexpr size_t kBlock = 1 << 17;  // bytes a thread takes at a time: their ids stay in its cache

// Puts the ids of finished blocks behind each other, in the order of the blocks. No thread waits for another's
// turn: it hands its block over and goes on with the next, and whoever finds blocks whose turn it is moves them.
class Queue {
 public:
  Queue(size_t blocks, uint16_t* out) : finished_(blocks), out_(out) {}

  // Takes over the ids of `block` and leaves some other memory in their place.
  void hand_over(size_t block, std::vector<uint16_t>& ids, size_t count) {
    std::unique_lock<std::mutex> lock(mutex_);
    finished_[block].ids.swap(ids);
    finished_[block].count = count;
    if (moving_) return;
    moving_ = true;
    for (; next_ < finished_.size() && finished_[next_].count != kNotYet; ++next_) {
      Block& turn = finished_[next_];
      lock.unlock();
      out_ = std::copy_n(turn.ids.begin(), turn.count, out_);
      ids.swap(turn.ids);
      turn.ids = {};
      lock.lock();
    }
    moving_ = false;
  }

 private:
  static constexpr size_t kNotYet = SIZE_MAX;
  struct Block {
    std::vector<uint16_t> ids;
    size_t count = kNotYet;
  };

  std::mutex mutex_;
  std::vector<Block> finished_;
  size_t next_ = 0;
  bool moving_ = false;
  uint16_t* out_;
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
    Queue queue(rooms.size(), out);
    std::atomic<size_t> next{0};
    std::mutex failing;
    std::exception_ptr failure;
    auto work = [&] {
      try {
        std::vector<uint16_t> ids;
        for (size_t block; (block = next++) < rooms.size();) {
          ids.resize(std::max(ids.size(), rooms[block]));
          size_t count = encode_some(borders[block], borders[block + 1], ids.data());
          queue.hand_over(block, ids, count);
        }
      } catch (...) {
        std::lock_guard<std::mutex> lock(failing);
        failure = std::current_exception();
        next = rooms.size();
      }
    };
    std::vector<std::thread> others;
    try {
      for (size_t t = 1; t < std::min<size_t>(threads, rooms.size()); ++t) others.emplace_back(work);
    } catch (const std::system_error&) {  // no more threads to be had: those there are do it all
    }
    work();
    for (std::thread& other : others) other.join();
    if (failure) std::rethrow_exception(failure);
  }
  std::partial_sum(offsets.begin(), offsets.end(), offsets.begin());
  return offsets;
}

}  // namespace bpe
