// A stable argsort of one row, for the ops that sort.
#pragma once

#include <cstdint>
#include <memory>

namespace robustloss {

/// Memory that the caller keeps, so that many rows share it: fresh memory costs page faults, more than a sort
/// does.
template <typename T>
class Scratch {
  public:
    /// At least n elements of no particular content; what was reserved before is lost.
    T* reserve(int64_t n) {
        if (n > capacity_) {
            elements_.reset();
            capacity_ = 0;  // should the next line throw
            elements_ = std::make_unique_for_overwrite<T[]>(n);
            capacity_ = n;
        }
        return elements_.get();
    }

  private:
    std::unique_ptr<T[]> elements_;
    int64_t capacity_ = 0;
};

/// One thread at a time.
using SortWorkspace = Scratch<uint64_t>;

/// values[order[0]], values[order[1]], ... is sorted; equal values, among which -0 and +0 count, keep their
/// order. NaN comes after infinity (before, where descending) or, with its sign bit set, at the other end.
/// For float and double; n < 2^31.
template <typename T>
void argsort(const T* values, int64_t n, bool descending, int32_t* order, SortWorkspace& workspace);

}  // namespace robustloss
