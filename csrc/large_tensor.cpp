#include "large_tensor.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <mutex>
#include <type_traits>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace robustloss {

#ifdef __linux__
namespace {

constexpr size_t kHugePage = 2 << 20, kLarge = 2 * kHugePage;

struct Block {
    void* address = nullptr;
    size_t bytes = 0;

    void release() {
        if (address != nullptr) munmap(address, bytes);
        *this = {};
    }
};

/// At most one block, the one that was given back last. Linux may take its pages whenever memory is short.
class SpareBlock {
    std::mutex mutex;
    Block spare;

  public:
    /// A block of at least so many bytes; its address is null where there is no memory.
    Block take(size_t bytes) {
        bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
        {
            const std::lock_guard lock(mutex);
            if (bytes <= spare.bytes && spare.bytes <= 2 * bytes) return std::exchange(spare, {});
            spare.release();  // the new one takes its place, and until then there is one block too few, not
                              // too many
        }
        void* address = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (address == MAP_FAILED) return {};
        madvise(address, bytes, MADV_HUGEPAGE);  // where there are none, nothing is lost
        return {address, bytes};
    }

    void give_back(Block block) {
        madvise(block.address, block.bytes, MADV_FREE);
        {
            const std::lock_guard lock(mutex);
            std::swap(spare, block);
        }
        block.release();
    }
};

SpareBlock spare_block;
static_assert(std::is_trivially_destructible_v<SpareBlock>, "a tensor may outlive what is static");

}  // namespace
#endif

at::Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options) {
#ifdef __linux__
    const size_t bytes = c10::multiply_integers(sizes) * options.dtype().itemsize();
    if (bytes >= kLarge) {
        const Block block = spare_block.take(bytes);
        if (block.address != nullptr) {
            return at::from_blob(
                block.address, sizes, [block](void*) { spare_block.give_back(block); }, options);
        }
    }
#endif
    return at::empty(sizes, options);
}

}  // namespace robustloss
