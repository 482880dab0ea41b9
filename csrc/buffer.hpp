// Memory that starts on a cache line, as tiles want it.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

template <typename T>
class Buffer {
 public:
  explicit Buffer(long size)
      : data_(static_cast<T*>(::operator new(static_cast<std::size_t>(size) * sizeof(T), std::align_val_t{64}))) {}

  T* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* data) const { ::operator delete(data, std::align_val_t{64}); }
  };
  std::unique_ptr<T, Free> data_;
};
