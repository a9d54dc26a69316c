// Attention of few queries on the paged latents of MLA; see amx_attention.cpp.
#pragma once
#include <cstdint>

// Whether this processor and these widths will do.
bool amx_attention_takes(int64_t width, int64_t latent, int64_t page_tokens);

// queries [N, H, E] and out [N, H, C] in bfloat16. Query n sees the first lengths[n] (one or more)
// rows of the pages tables[n][...]; a page is [page_tokens, E] of `entries`, in bfloat16 (bits 16) or
// with the C latents in int8 (bits 8; amx_rows.h).
void amx_attention(const uint16_t *queries, const void *entries, int bits, const int64_t *tables,
                   int64_t table_width, const int64_t *lengths, uint16_t *out, int64_t N, int64_t H,
                   int64_t E, int64_t C, int64_t page_tokens, float scale);
