// What 32 queries see of a block of keys. Included by each instruction set's file, for itself.
#pragma once
#include <algorithm>
#include <cstdint>

#include "amx_training_attention.h"

AMX_BEGIN
namespace {

constexpr int64_t GROUP = 32;  // queries that are looked up at once; keys that are skipped at once

// For one member of a batch.
struct Sight {
    const uint8_t *mask;  // null: causal
    int64_t stride, queries, keys;

    Sight(const Attention &call, int64_t batch)
        : mask(call.mask ? static_cast<const uint8_t *>(call.mask->at) + batch * call.mask->batch
                         : nullptr),
          stride(call.mask ? call.mask->row : 0), queries(call.T), keys(call.S) {}

    // The key after the last that a query could see.
    int64_t end(int64_t query) const {
        return mask ? keys : std::clamp<int64_t>(keys - queries + query + 1, 0, keys);
    }
};

// Of 32 queries and `Groups` · 32 keys: a bit for each query and key. Groups [first, last) have any;
// of those that every query sees in `full`, no bits are kept.
template <int Groups>
struct Seen {
    alignas(64) uint32_t bits[Groups][GROUP];
    bool full[Groups];
    int64_t first, last;

    bool any() const { return first < last; }

    // Queries from `query` on and keys from `key` on; bits of keys that do not exist are 0.
    void look(const Sight &sight, int64_t query, int64_t key) {
        if (sight.mask) return read(sight, query, key);
        const int64_t least = sight.end(query) - key;  // keys that the first of them sees
        const int64_t most = sight.end(std::min(query + GROUP, sight.queries) - 1) - key;
        first = 0, last = std::clamp<int64_t>((most + GROUP - 1) / GROUP, 0, Groups);
        for (int64_t group = 0; group < last; group++) {
            full[group] = least >= (group + 1) * GROUP;
            for (int64_t row = 0; !full[group] && row < GROUP; row++)
                bits[group][row] = lowest(sight.end(query + row) - key - group * GROUP);
        }
    }

  private:
    static uint32_t lowest(int64_t count) {
        return count >= 32 ? ~uint32_t(0) : count <= 0 ? 0 : (uint32_t(1) << count) - 1;
    }

    void read(const Sight &sight, int64_t query, int64_t key) {
        const int64_t rows = std::min<int64_t>(GROUP, sight.queries - query);
        first = Groups, last = 0;
        for (int64_t group = 0; group < Groups; group++) {
            const int64_t from = key + group * GROUP;
            const uint32_t within = lowest(sight.keys - from);
            uint32_t either = 0, both = ~uint32_t(0);
            for (int64_t row = 0; row < GROUP; row++) {
                uint32_t seen = row < rows ? within : 0;
                if (seen) {
                    const __m256i bytes = _mm256_maskz_loadu_epi8(
                        seen, sight.mask + (query + row) * sight.stride + from);
                    seen = _mm256_test_epi8_mask(bytes, bytes);
                }
                bits[group][row] = seen, either |= seen, both &= seen;
            }
            full[group] = both == ~uint32_t(0);
            if (either) first = std::min(first, group), last = group + 1;
        }
    }
};

}  // namespace
TARGET_END
