// Memory in which reading or writing one element too many does not go unseen.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>

#ifdef __SANITIZE_ADDRESS__
constexpr bool FORBIDDEN_PAGE = false;  // a block of the heap of exactly this size, watched
#else
constexpr bool FORBIDDEN_PAGE = true;  // numbers end where a page begins that nobody may touch
#endif

template <typename T>
class Buffer {
   public:
    explicit Buffer(size_t count) : count_(count) {
        const size_t bytes = count * sizeof(T);
        if (!FORBIDDEN_PAGE) {
            data_ = static_cast<T *>(std::malloc(bytes ? bytes : 1));
        } else {
            const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
            mapped_ = (bytes + page - 1) / page * page + page;
            base_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (base_ == MAP_FAILED) std::abort();
            char *end = static_cast<char *>(base_) + mapped_ - page;
            mprotect(end, page, PROT_NONE);
            data_ = reinterpret_cast<T *>(end - bytes);
        }
        if (data_ == nullptr) std::abort();
        for (size_t i = 0; i < count; ++i) data_[i] = T(0);
    }
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;
    ~Buffer() {
        if (mapped_) munmap(base_, mapped_);
        else std::free(data_);
    }
    T *get() const { return data_; }
    T &operator[](size_t i) const { return data_[i]; }
    size_t size() const { return count_; }

   private:
    size_t count_, mapped_ = 0;
    void *base_ = nullptr;
    T *data_ = nullptr;
};

// The same numbers on every machine, which the standard's distributions are not.
struct Draws {
    std::mt19937 engine{7};
    int below(int n) { return static_cast<int>(engine() % static_cast<uint32_t>(n)); }
    int between(int low, int high) { return low + below(high - low + 1); }
};
