// L2 norm on the CPU. Arrays are cut into pieces of a fixed size. Whichever thread reaches a piece sums it,
// in a fixed order, into the piece's own slot. The slots are then added up in order.
#include "global_norm.h"

#include <algorithm>
#include <cmath>

#include "pieces.h"

namespace lumi {
namespace {

constexpr std::size_t kLanes = 32;  // independent sums, which the compiler keeps in vector registers

// The square of a float is exact in double, so it would not even matter whether multiply and add are fused.
LUMI_VECTOR_CLONES
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
    for (const FloatArray& array : arrays) {
        for (std::size_t start = 0; start < array.size; start += kPieceSize) {
            pieces.push_back({array.data + start, std::min(kPieceSize, array.size - start)});
        }
    }
    std::vector<double> sums(pieces.size());
    for_each_piece(pieces.size(), max_threads, kPiecesPerThread,
                   [&](std::size_t i, int) { sums[i] = sum_of_squares(pieces[i]); });
    double sum = 0.0;
    for (const double piece_sum : sums) sum += piece_sum;
    return std::sqrt(sum);
}

}  // namespace lumi
