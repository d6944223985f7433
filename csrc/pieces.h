// Work in pieces of a fixed size, done by as many threads as pay. Any thread may take any piece, so the work
// on a piece must not depend on its thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace lumi {

// In floats, 256 KiB: taking a piece costs nothing beside working on it.
constexpr std::size_t kPieceSize = 1 << 16;
constexpr std::size_t kPiecesPerThread = 8;  // of kPieceSize; with fewer, threads cost more than they save

// Calls work(index, thread) once for each index below num_pieces, and returns when all are done. thread is
// below max_threads. One thread does it all if there are not pieces_per_thread for each of two.
template <typename Work>
void for_each_piece(std::size_t num_pieces, int max_threads, std::size_t pieces_per_thread,
                    const Work& work) {
    if (max_threads <= 1 || num_pieces < 2 * pieces_per_thread) {
        for (std::size_t i = 0; i < num_pieces; ++i) work(i, 0);
        return;
    }
#ifdef _OPENMP
    // These are torch's threads, if it brings the same OpenMP: after a backward pass they spin for a while
    // and would slow any others down. Always the same number, since OpenMP ends those that a smaller number
    // leaves out.
#pragma omp parallel for schedule(dynamic, 1) num_threads(max_threads)
    for (std::int64_t i = 0; i < static_cast<std::int64_t>(num_pieces); ++i)
        work(static_cast<std::size_t>(i), omp_get_thread_num());
#else
    std::atomic<std::size_t> next{0};
    const auto take = [&](int thread) {
        for (std::size_t i = next++; i < num_pieces; i = next++) work(i, thread);
    };
    const std::size_t num_threads = std::min<std::size_t>(max_threads, num_pieces / pieces_per_thread);
    std::vector<std::thread> helpers;
    helpers.reserve(num_threads - 1);
    try {
        for (std::size_t i = 1; i < num_threads; ++i) helpers.emplace_back(take, static_cast<int>(i));
    } catch (const std::system_error&) {
        // The system has no thread left to give: fewer threads do the same work to the same result.
    }
    take(0);
    for (std::thread& helper : helpers) helper.join();
#endif
}

}  // namespace lumi

// Compiles a function twice if the loader can choose by processor. Both versions give the same bits: neither
// has fused multiply-add, and without that vectors round as scalars do.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define LUMI_VECTOR_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define LUMI_VECTOR_CLONES
#endif
