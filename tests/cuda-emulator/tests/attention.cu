// Attention kernels against plain attention in f64, and against each other bit for bit.

#include "attention_generic.cu"
#include "attention_paged.cu"
#include "attention_varlen.cu"

#include "harness.h"

#include <algorithm>
#include <cstring>

namespace {

using harness::Random;

bf16 rounded(float x) {
    return to_bf16(x);
}

/// A step over a paged cache, with poison wherever nothing is to be read.
struct Paged {
    int group, kv_heads, dim, block_size;
    std::vector<int> tokens, kv_len;
    std::vector<int> first_token;
    int num_tokens = 0, stride = 0, num_blocks = 0;
    std::vector<bf16> qkv, k_cache, v_cache;
    std::vector<uint32_t> block_tables;

    Paged(int group_, int kv_heads_, int dim_, int block_size_, std::vector<int> tokens_, std::vector<int> kv_len_)
        : group(group_), kv_heads(kv_heads_), dim(dim_), block_size(block_size_), tokens(tokens_), kv_len(kv_len_) {
        Random random{7};
        for (size_t s = 0; s < tokens.size(); s++) {
            first_token.push_back(num_tokens);
            num_tokens += tokens[s];
            stride = std::max(stride, (kv_len[s] + block_size - 1) / block_size);
            num_blocks += (kv_len[s] + block_size - 1) / block_size;
        }
        num_blocks += 3;
        const bf16 nan{0x7fff};
        qkv.assign(static_cast<size_t>(num_tokens + 2) * cols(), nan);
        for (int i = 0; i < num_tokens * cols(); i++) qkv[i] = rounded(2.0f * random.next());
        k_cache.assign(static_cast<size_t>(num_blocks) * kv_heads * block_size * dim, nan);
        v_cache = k_cache;
        block_tables.assign(tokens.size() * stride, 0);
        // Blocks in no order; block 0 is poisoned.
        std::vector<uint32_t> ids;
        for (int i = 1; i < num_blocks; i++) ids.push_back(i);
        for (size_t i = ids.size(); i > 1; i--) std::swap(ids[i - 1], ids[random.bits() % i]);
        for (size_t s = 0; s < tokens.size(); s++) {
            for (int position = 0; position < kv_len[s]; position++) {
                uint32_t& block = block_tables[s * stride + position / block_size];
                if (position % block_size == 0) {
                    block = ids.back();
                    ids.pop_back();
                }
                for (int head = 0; head < kv_heads; head++) {
                    for (int d = 0; d < dim; d++) {
                        k_cache[at(s, position, head) + d] = rounded(2.0f * random.next());
                        v_cache[at(s, position, head) + d] = rounded(random.next());
                    }
                }
            }
        }
    }

    int cols() const { return (group + 2) * kv_heads * dim; }
    int out_cols() const { return group * kv_heads * dim; }
    size_t at(size_t s, int position, int head) const {
        const size_t block = block_tables[s * stride + position / block_size];
        return ((block * kv_heads + head) * block_size + position % block_size) * dim;
    }

    /// Plan words. Rows from `large_from` on go to large tiles; `splits`: each chunk alone.
    std::vector<uint32_t> plan(int large_from, bool splits) const {
        std::vector<uint32_t> words(16, 0), small, large, merges;
        uint32_t slot = 0;
        for (size_t s = 0; s < tokens.size(); s++) {
            const int rows = tokens[s] * group, height = rows >= large_from ? 128 : 16;
            for (int first = 0; first < rows; first += height) {
                const int count = std::min(height, rows - first);
                const int visible = kv_len[s] - tokens[s] + 1 + (first + count - 1) / group;
                const uint32_t chunks = (visible + 1023) / 1024, step = height / 16;
                std::vector<uint32_t>& section = height == 16 ? small : large;
                const auto add = [&](uint32_t from, uint32_t to, uint32_t slot_) {
                    for (uint32_t word : {uint32_t(s), uint32_t(first_token[s]), uint32_t(tokens[s]), uint32_t(kv_len[s]), uint32_t(first), from, to, slot_})
                        section.push_back(word);
                };
                if (!splits || chunks == 1) {
                    add(0, chunks, WHOLE);
                    continue;
                }
                for (uint32_t chunk = 0; chunk < chunks; chunk++) add(chunk, chunk + 1, slot + chunk * step);
                for (int row = 0; row < count; row += 16) {
                    for (uint32_t word : {uint32_t(first_token[s]), uint32_t(first + row), uint32_t(std::min(16, count - row)), chunks, slot + row / 16, step, 0u, 0u})
                        merges.push_back(word);
                }
                slot += chunks * step;
            }
        }
        const uint32_t header[7] = {uint32_t(small.size() / 8), 0, uint32_t(large.size() / 8), uint32_t(small.size() / 8),
                                    uint32_t(merges.size() / 8), uint32_t((small.size() + large.size()) / 8), uint32_t(stride)};
        std::copy(header, header + 7, words.begin());
        for (const auto* section : {&small, &large, &merges}) words.insert(words.end(), section->begin(), section->end());
        return words;
    }

    std::vector<bf16> run(int large_from, bool splits, unsigned blocks) const {
        const std::vector<uint32_t> words = plan(large_from, splits);
        const PlanHeader* header = reinterpret_cast<const PlanHeader*>(words.data());
        std::vector<float> partials(4096 * 16 * 128, NAN);
        std::vector<float2> states(4096 * 16, make_float2(NAN, NAN));
        std::vector<float4> totals(static_cast<size_t>(blocks) * LargeTile::CARRIED / 4 * 128, make_float4(NAN, NAN, NAN, NAN));
        std::vector<bf16> out(static_cast<size_t>(num_tokens + 2) * out_cols(), bf16{0x7fff});
        const float scale = static_cast<float>(M_LOG2E / std::sqrt(static_cast<double>(dim)));
        const auto launch = [&](const char* name, int bytes) {
            harness::launch(name, {blocks}, {128}, static_cast<size_t>(bytes), qkv.data(), k_cache.data(), v_cache.data(), block_tables.data(),
                            header, partials.data(), states.data(), totals.data(), out.data(), group, kv_heads, block_size, scale);
        };
        launch("attention_paged_small_bf16", SmallTile::SHARED_BYTES);
        launch("attention_paged_large_bf16", LargeTile::SHARED_BYTES);
        harness::launch("attention_merge_bf16", {blocks}, {256}, 0, header, const_cast<const float*>(partials.data()),
                        const_cast<const float2*>(states.data()), out.data(), group, kv_heads);
        return out;
    }

    std::vector<bf16> run_generic(unsigned blocks) const {
        const std::vector<uint32_t> words = plan(65, false);
        std::vector<bf16> out(static_cast<size_t>(num_tokens + 2) * out_cols(), bf16{0x7fff});
        const float scale = static_cast<float>(M_LOG2E / std::sqrt(static_cast<double>(dim)));
        harness::launch("attention_paged_generic_bf16", {blocks}, {128}, static_cast<size_t>(4 * (16 * dim + 32 * (dim + 1))), qkv.data(),
                        k_cache.data(), v_cache.data(), block_tables.data(), reinterpret_cast<const PlanHeader*>(words.data()), out.data(),
                        group, kv_heads, block_size, dim, scale);
        return out;
    }

    /// Largest difference to plain attention of every row; infinite if any is no number.
    double error(const std::vector<bf16>& out) const {
        double worst = 0.0;
        for (size_t s = 0; s < tokens.size(); s++) {
            for (int token = 0; token < tokens[s]; token++) {
                const int visible = kv_len[s] - tokens[s] + 1 + token;
                for (int head = 0; head < group * kv_heads; head++) {
                    const bf16* query = &qkv[static_cast<size_t>(first_token[s] + token) * cols() + head * dim];
                    std::vector<double> weights(visible), sums(dim, 0.0);
                    double total = 0.0;
                    for (int position = 0; position < visible; position++) {
                        double dot = 0.0;
                        for (int d = 0; d < dim; d++) dot += double(to_float(query[d])) * to_float(k_cache[at(s, position, head / group) + d]);
                        weights[position] = std::exp(dot / std::sqrt(double(dim)));
                        total += weights[position];
                    }
                    for (int position = 0; position < visible; position++) {
                        for (int d = 0; d < dim; d++) sums[d] += weights[position] / total * to_float(v_cache[at(s, position, head / group) + d]);
                    }
                    for (int d = 0; d < dim; d++) {
                        const double found = to_float(out[static_cast<size_t>(first_token[s] + token) * out_cols() + head * dim + d]);
                        if (!(std::abs(found - sums[d]) <= worst)) worst = std::isnan(found) ? INFINITY : std::abs(found - sums[d]);
                    }
                }
            }
        }
        return worst;
    }

    bool padding_is_untouched(const std::vector<bf16>& out) const {
        return std::all_of(out.begin() + num_tokens * out_cols(), out.end(), [](bf16 x) { return x.bits == 0x7fff; });
    }
};

bool same(const std::vector<bf16>& a, const std::vector<bf16>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(bf16)) == 0;
}

constexpr int NEVER = 1 << 30;

}  // namespace

TEST(paged_equals_plain_attention) {
    for (int group : {1, 5, 7, 8, 16, 20}) {
        const Paged step(group, 2, 128, 16, {1, 3, 0, 30, 1}, {1, 66, 0, 70, 200});
        const std::vector<bf16> out = step.run(65, true, 5);
        const double error = step.error(out);
        CHECK(error < 4e-3);
        if (!(error < 4e-3)) std::printf("group %d: %g\n", group, error);
        CHECK(step.padding_is_untouched(out));
        CHECK(same(step.run(1, true, 3), out));
        CHECK(same(step.run(NEVER, false, 64), out));
    }
}

TEST(paged_chunks_have_the_same_bits_anywhere) {
    const Paged step(4, 1, 128, 32, {1, 40, 1}, {1500, 2070, 3100});
    const std::vector<bf16> out = step.run(65, true, 7);
    CHECK(step.error(out) < 4e-3);
    CHECK(same(step.run(65, false, 2), out));
    CHECK(same(step.run(1, true, 9), out));
    CHECK(same(step.run(NEVER, false, 3), out));
}

TEST(paged_generic_equals_plain_attention) {
    for (int dim : {16, 80, 128, 256}) {
        const Paged step(3, 2, dim, 5, {1, 3, 0, 30, 1}, {1, 66, 0, 70, 200});
        const std::vector<bf16> out = step.run_generic(4);
        CHECK(step.error(out) < 4e-3);
        CHECK(step.padding_is_untouched(out));
    }
}

TEST(varlen_equals_plain_attention) {
    constexpr int HEADS = 2, DIM = 80, HIDDEN = HEADS * DIM;
    const std::vector<int> lengths = {64, 4, 1, 63, 65, 300, 16};
    int patches = 0;
    for (int len : lengths) patches += len;
    Random random{3};
    std::vector<bf16> qkv(static_cast<size_t>(patches) * 3 * HIDDEN), out(static_cast<size_t>(patches) * HIDDEN, bf16{0x7fff}), generic(out);
    for (bf16& value : qkv) value = rounded(2.0f * random.next());
    std::vector<uint32_t> short_items, long_items;
    uint32_t start = 0;
    for (int len : lengths) {
        for (uint32_t row = 0; row < uint32_t(len); row += 128) {
            for (uint32_t word : {start, uint32_t(len), row, 0u}) (len <= 64 ? short_items : long_items).push_back(word);
        }
        start += len;
    }
    const float scale = static_cast<float>(M_LOG2E / std::sqrt(double(DIM)));
    for (const auto* items : {&short_items, &long_items}) {
        const bool is_short = items == &short_items;
        const unsigned count = items->size() / 4;
        harness::launch(is_short ? "attention_varlen_short_bf16" : "attention_varlen_long_bf16", {count, HEADS}, {128},
                        static_cast<size_t>(is_short ? ShortTile::SHARED_BYTES : LongTile::SHARED_BYTES), const_cast<const bf16*>(qkv.data()),
                        reinterpret_cast<const VarlenItem*>(items->data()), out.data(), HEADS, DIM, scale);
        harness::launch("attention_varlen_generic_bf16", {count, HEADS, is_short ? 4u : 8u}, {128}, 4 * (16 * DIM + 32 * (DIM + 1)),
                        const_cast<const bf16*>(qkv.data()), reinterpret_cast<const uint4*>(items->data()), generic.data(), HEADS, DIM, scale);
    }
    double worst = 0.0;
    start = 0;
    for (int len : lengths) {
        for (int row = 0; row < len; row++) {
            for (int head = 0; head < HEADS; head++) {
                const auto value = [&](int position, int which, int d) {
                    return double(to_float(qkv[(static_cast<size_t>(start + position) * 3 + which) * HIDDEN + head * DIM + d]));
                };
                std::vector<double> weights(len), sums(DIM, 0.0);
                double total = 0.0;
                for (int position = 0; position < len; position++) {
                    double dot = 0.0;
                    for (int d = 0; d < DIM; d++) dot += value(row, 0, d) * value(position, 1, d);
                    total += weights[position] = std::exp(dot / std::sqrt(double(DIM)));
                }
                for (int d = 0; d < DIM; d++) {
                    double sum = 0.0;
                    for (int position = 0; position < len; position++) sum += weights[position] / total * value(position, 2, d);
                    const size_t at = static_cast<size_t>(start + row) * HIDDEN + head * DIM + d;
                    for (const auto* found : {&out, &generic}) {
                        const double error = std::abs(to_float((*found)[at]) - sum);
                        if (!(error <= worst)) worst = std::isnan(error) ? INFINITY : error;
                    }
                }
            }
        }
        start += len;
    }
    CHECK(worst < 8e-3);
}

int main(int argc, char** argv) {
    return harness::run_all(argc, argv);
}
