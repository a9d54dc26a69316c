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

// A bit for each query and key, `Words` · 64 keys wide; groups of keys [first, last) have any.
template <int Words>
struct Seen {
    uint64_t bits[GROUP][Words];
    int64_t first, last;
    bool all;  // of these groups' keys, by every query

    bool any() const { return first < last; }
    __mmask16 of(int64_t query, int64_t tile) const {
        return static_cast<__mmask16>(bits[query][tile / 4] >> tile % 4 * 16);
    }

    // Queries from `query` on and keys from `key` on; bits of what does not exist are 0.
    void look(const Sight &sight, int64_t query, int64_t key) {
        const int64_t last_query = std::min(query + GROUP, sight.queries) - 1;
        all = !sight.mask && sight.end(query) >= key + Words * 64;
        first = 0, last = Words * 2;
        if (all) return;
        uint64_t either[Words] = {}, both[Words];
        for (int word = 0; word < Words; word++) both[word] = ~uint64_t(0);
        for (int64_t row = 0; row < GROUP; row++)
            for (int64_t word = 0; word < Words; word++) {
                const int64_t from = key + word * 64;
                const int64_t left = row + query > last_query ? 0 : sight.end(query + row) - from;
                uint64_t seen = left >= 64 ? ~uint64_t(0) : left <= 0 ? 0 : (uint64_t(1) << left) - 1;
                if (sight.mask && seen) {
                    const uint8_t *at = sight.mask + (query + row) * sight.stride + from;
                    const __m512i bytes = _mm512_maskz_loadu_epi8(seen, at);
                    seen = _mm512_test_epi8_mask(bytes, bytes);
                }
                bits[row][word] = seen, either[word] |= seen, both[word] &= seen;
            }
        const auto dark = [&](int64_t group) {
            return !static_cast<uint32_t>(either[group / 2] >> group % 2 * 32);
        };
        while (last > 0 && dark(last - 1)) last--;
        while (first < last && dark(first)) first++;
        all = true;
        for (int64_t group = first; group < last; group++)
            all &= static_cast<uint32_t>(both[group / 2] >> group % 2 * 32) == 0xffffffff;
    }
};

}  // namespace
TARGET_END
