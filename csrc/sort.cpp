// A stable argsort: entries (key, index) in 64 bits, sorted by insertion where they are few, else by radix.
#include "sort.h"

#include <algorithm>
#include <array>
#include <bit>

namespace robustloss {
namespace {

// Up to here insertion is faster, measured on normally distributed floats. Digits of 11 bits gain 7% at 65536
// values and lose at 1024, so that 8 bits serve every size.
constexpr int64_t kInsertion = 40;
constexpr int kDigitBits = 8, kPasses = 32 / kDigitBits;
constexpr uint64_t kDigits = 1 << kDigitBits;

// An integer that is ordered as the values are: a negative number's bits are flipped, and another's sign bit.
// Adding 0 makes +0 of -0.
uint32_t key(float value) {
    const auto bits = std::bit_cast<uint32_t>(value + 0.0f);
    return bits ^ (-(bits >> 31) | 0x8000'0000u);
}
uint64_t key(double value) {
    const auto bits = std::bit_cast<uint64_t>(value + 0.0);
    return bits ^ (-(bits >> 63) | 0x8000'0000'0000'0000u);
}

uint64_t entry(uint32_t key, int64_t index) { return uint64_t{key} << 32 | static_cast<uint64_t>(index); }

void sort_by_insertion(uint64_t* entries, int64_t n) {
    for (int64_t i = 1; i < n; ++i) {
        const uint64_t inserted = entries[i];
        int64_t to = i;
        for (; to > 0 && entries[to - 1] > inserted; --to) entries[to] = entries[to - 1];
        entries[to] = inserted;
    }
}

/// Least significant digit first, over the keys: the indices are in order already, and every pass is stable.
void sort_by_radix(uint64_t* entries, int64_t n, uint64_t* buffer) {
    const auto digit = [](uint64_t entry, int pass) {
        return entry >> (32 + pass * kDigitBits) & (kDigits - 1);
    };
    std::array<std::array<int32_t, kDigits>, kPasses> offsets{};
    for (int64_t i = 0; i < n; ++i) {
        for (int pass = 0; pass < kPasses; ++pass) ++offsets[pass][digit(entries[i], pass)];
    }
    uint64_t *from = entries, *to = buffer;
    for (int pass = 0; pass < kPasses; ++pass) {
        auto& offset = offsets[pass];
        if (offset[digit(entries[0], pass)] == n) continue;  // all have this digit
        int32_t sum = 0;
        for (int32_t& count : offset) {
            const int32_t here = count;
            count = sum;
            sum += here;
        }
        for (int64_t i = 0; i < n; ++i) to[offset[digit(from[i], pass)]++] = from[i];
        std::swap(from, to);
    }
    if (from != entries) std::copy(from, from + n, entries);
}

void sort_entries(uint64_t* entries, int64_t n, uint64_t* buffer) {
    if (n <= kInsertion) {
        sort_by_insertion(entries, n);
    } else {
        sort_by_radix(entries, n, buffer);
    }
}

}  // namespace

template <typename T>
void argsort(const T* values, int64_t n, bool descending, int32_t* order, SortWorkspace& workspace) {
    constexpr int low_bits = 8 * (sizeof(T) - 4);
    using Key = decltype(key(T()));
    uint64_t* entries = workspace.reserve(2 * n);
    uint64_t* buffer = entries + n;
    const Key flip = descending ? ~Key(0) : Key(0);
    for (int64_t i = 0; i < n; ++i) {
        entries[i] = entry(static_cast<uint32_t>((key(values[i]) ^ flip) >> low_bits), i);
    }
    sort_entries(entries, n, buffer);
    if constexpr (low_bits > 0) {
        // Few doubles share the upper half of their key, so the lower halves are sorted within those only.
        for (int64_t begin = 0, end; begin < n; begin = end) {
            for (end = begin + 1; end < n && entries[end] >> 32 == entries[begin] >> 32;) ++end;
            if (end - begin == 1) continue;
            for (int64_t i = begin; i < end; ++i) {
                const auto index = static_cast<uint32_t>(entries[i]);
                entries[i] = entry(static_cast<uint32_t>(key(values[index]) ^ flip), index);
            }
            sort_entries(entries + begin, end - begin, buffer);
        }
    }
    for (int64_t i = 0; i < n; ++i) order[i] = static_cast<int32_t>(entries[i]);
}

template void argsort(const float*, int64_t, bool, int32_t*, SortWorkspace&);
template void argsort(const double*, int64_t, bool, int32_t*, SortWorkspace&);

}  // namespace robustloss
