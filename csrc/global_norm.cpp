// L2 norm of many float arrays taken as one vector: arrays are cut into pieces of a fixed size, each piece is summed in a fixed order
// into a slot of its own by whichever thread reaches it, and the slots are added up in order.
#include "global_norm.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <system_error>
#include <thread>

namespace lumi {
namespace {

constexpr std::size_t kPieceSize = 1 << 16;  // floats: 256 KiB, so that taking a piece costs nothing beside summing it
constexpr std::size_t kPiecesPerThread = 8;  // below this, starting a thread costs more than it saves
constexpr std::size_t kLanes = 32;           // independent sums, which the compiler keeps in vector registers

// Compiled twice where the loader can choose by processor. Both give the same bits: the lanes are the same, and the square of a float
// is exact in double, so it does not matter whether multiply and add are fused.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target_clones("avx2", "default")))
#endif
double sum_of_squares(const FloatArray& piece) {
    double lanes[kLanes] = {};
    const std::size_t whole = piece.size / kLanes * kLanes;
    for (std::size_t i = 0; i < whole; i += kLanes) {
        for (std::size_t lane = 0; lane < kLanes; ++lane) {
            const double x = piece.data[i + lane];
            lanes[lane] += x * x;
        }
    }
    double sum = 0.0;
    for (std::size_t lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
    for (std::size_t i = whole; i < piece.size; ++i) {
        const double x = piece.data[i];
        sum += x * x;
    }
    return sum;
}

}  // namespace

double global_norm(const std::vector<FloatArray>& arrays, int max_threads) {
    std::vector<FloatArray> pieces;
    std::size_t total = 0;
    for (const FloatArray& array : arrays) {
        total += array.size;
        for (std::size_t start = 0; start < array.size; start += kPieceSize) {
            pieces.push_back({array.data + start, std::min(kPieceSize, array.size - start)});
        }
    }

    std::vector<double> sums(pieces.size());
    std::atomic<std::size_t> next{0};
    const auto work = [&] {
        for (std::size_t i = next++; i < pieces.size(); i = next++) sums[i] = sum_of_squares(pieces[i]);
    };

    const std::size_t useful = std::max<std::size_t>(total / (kPieceSize * kPiecesPerThread), 1);
    const std::size_t num_threads = std::min<std::size_t>(std::max(max_threads, 1), useful);
    std::vector<std::thread> helpers;
    helpers.reserve(num_threads - 1);
    try {
        for (std::size_t i = 1; i < num_threads; ++i) helpers.emplace_back(work);
    } catch (const std::system_error&) {
        // The system has no thread left to give: those that there are do the same work to the same result.
    }
    work();
    for (std::thread& helper : helpers) helper.join();

    double sum = 0.0;
    for (const double piece_sum : sums) sum += piece_sum;
    return std::sqrt(sum);
}

}  // namespace lumi
