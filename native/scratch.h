// Room to work in that a thread keeps from call to call: fresh memory costs a page fault every 4 KiB,
// which is more than most kernels take.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

class Scratch {
  public:
    ~Scratch() { std::free(memory_); }

    // At least `count` of T, aligned to a cache line, with whatever was there before.
    template <class T> T *room(size_t count) {
        const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
        if (bytes > bytes_) {
            std::free(memory_);
            memory_ = nullptr;
            bytes_ = 0;
            memory_ = std::aligned_alloc(64, bytes);
            if (!memory_) throw std::bad_alloc();
            bytes_ = bytes;
        }
        return static_cast<T *>(memory_);
    }

  private:
    void *memory_ = nullptr;
    size_t bytes_ = 0;
};

// Parts of one room, one after the other, each aligned to a cache line. Without a base it only counts.
struct Room {
    uintptr_t base = 0;
    size_t used = 0;

    template <class T> T *take(size_t count) {
        T *const part = reinterpret_cast<T *>(base + used);
        used += (count * sizeof(T) + 63) / 64 * 64;
        return part;
    }
};
