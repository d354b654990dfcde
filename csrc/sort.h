// A stable argsort of one row, for the ops that sort.
#pragma once

#include <cstdint>
#include <memory>

namespace robustloss {

/// Scratch memory of `argsort`: kept by the caller, so that many rows share it. One thread at a time.
class SortWorkspace {
  public:
    /// Two buffers of n entries each, of no particular content.
    uint64_t* reserve(int64_t n);

  private:
    std::unique_ptr<uint64_t[]> entries_;
    int64_t capacity_ = 0;
};

/// values[order[0]], values[order[1]], ... is sorted; equal values, among which -0 and +0 count, keep their
/// order. NaN comes after infinity (before, where descending) or, with its sign bit set, at the other end.
/// For float and double; n < 2^31.
template <typename T>
void argsort(const T* values, int64_t n, bool descending, int32_t* order, SortWorkspace& workspace);

}  // namespace robustloss
