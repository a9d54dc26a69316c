// Room to work in that a thread keeps from call to call: fresh memory costs a page fault every 4 KiB,
// which is more than most kernels take.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

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
            const bool large = bytes >= LARGE_PAGE / 4;
            const size_t size = large ? (bytes + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE : bytes;
            memory_ = std::aligned_alloc(large ? LARGE_PAGE : 64, size);
            if (!memory_) throw std::bad_alloc();
#if defined(__linux__)
            if (large) madvise(memory_, size, MADV_HUGEPAGE);
#endif
            bytes_ = size;
        }
        return static_cast<T *>(memory_);
    }

  private:
    static constexpr size_t LARGE_PAGE = 2 << 20;
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

// Gives `lay` a room of the size that it takes.
template <class Lay> void lay_out(Scratch &scratch, Lay lay) {
    Room counted;
    lay(counted);
    Room room{reinterpret_cast<uintptr_t>(scratch.room<uint8_t>(counted.used))};
    lay(room);
}
