// A chain of plain steps for few tokens on a CPU, in one call: what native.py beside it compiles, ACTIVATE given, and
// calls. The state is float32; weights are float32 or bfloat16, widened as they are read; sums are float32.
//
// A thread has a share of each step's rows, the same of A and of B: it makes h of them and what they add to the state,
// and so waits for the others once a step, not twice. Each then adds all threads' sums, in one order, to a state of its
// own: the result depends on the number of threads, and on nothing else.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <new>
#include <type_traits>
#include <omp.h>
#include <sched.h>

#ifdef __AVX512F__
constexpr int W = 16;
#else
constexpr int W = 8;
#endif
typedef float V __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint16_t H __attribute__((vector_size(2 * W)));
typedef int64_t Int;
struct BFloat16 { uint16_t bits; };

static inline V load(const float* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
static inline V load(const BFloat16* p) {
    H h;
    std::memcpy(&h, p, sizeof h);
    return (V)(__builtin_convertvector(h, U) << 16);
}
static inline void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
static inline float sum(V v) {  // by quarters: one after another, these sums would take a third of 16 tokens' products
    typedef float Q __attribute__((vector_size(16)));
    float all[W];
    store(all, v);
    Q q = {};
    for (int i = 0; i < W; i += 4) {
        Q part;
        std::memcpy(&part, all + i, sizeof part);
        q += part;
    }
    return (q[0] + q[1]) + (q[2] + q[3]);
}

// e^x to 3e-7 of itself: 2^n times Taylor's polynomial of f, |f| <= ln(2) / 2. NaN stays; beyond +-87 it saturates.
static inline V exponential(V x) {
    x = x > 87.f ? V{} + 87.f : x;
    x = x < -87.f ? V{} - 87.f : x;
    V n = (x * 1.44269504f + 12582912.f) - 12582912.f;  // 1.5 * 2^23: rounds to a whole number
    V f = (x - n * 0.693359375f) + n * 2.12194440e-4f, p = V{} + 1.f / 5040;
    for (float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f}) p = p * f + c;
    n = n == n ? n : V{};
    return p * (V)((__builtin_convertvector(n, I) + 127) << 23);
}
static inline V sigmoid(V x) { return 1.f / (1.f + exponential(-x)); }
static inline V positive(V x) { return x < 0.f ? V{} : x; }
static inline V erf(V x) {  // Abramowitz and Stegun 7.1.26: off by 1.5e-7 at most
    V a = x < 0.f ? -x : x, t = 1.f / (1.f + 0.3275911f * a), p = V{} + 1.061405429f;
    for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) p = p * t + c;
    V e = 1.f - p * t * exponential(-a * a);
    return x < 0.f ? -e : e;
}
static inline V activate(V p) { return ACTIVATE; }

// h[i, t] = <row i of A, z[t]> for R rows and T tokens: A [R, d], z [T, d], h [R, stride]
template <int R, int T, typename E>
static inline void read_rows(const E* A, const float* z, float* h, Int d, Int stride) {
    V s[R][T] = {};
    for (Int c = 0; c < d; c += W) {
        V w[R];
        for (int i = 0; i < R; i++) w[i] = load(A + i * d + c);
        for (int t = 0; t < T; t++) {
            V v = load(z + t * d + c);
            for (int i = 0; i < R; i++) s[i][t] += w[i] * v;
        }
    }
    for (int i = 0; i < R; i++)
        for (int t = 0; t < T; t++) h[i * stride + t] = sum(s[i][t]);
}

// added[t] += sum_i h[i, t] B[i]: B [R, d], added [T, d]
template <int R, int T, typename E>
static inline void write_rows(const E* B, const float* h, float* added, Int d, Int stride) {
    V f[R][T];
    for (int i = 0; i < R; i++)
        for (int t = 0; t < T; t++) f[i][t] = V{} + h[i * stride + t];
    for (Int c = 0; c < d; c += W) {
        V w[R];
        for (int i = 0; i < R; i++) w[i] = load(B + i * d + c);
        for (int t = 0; t < T; t++) {
            V v = load(added + t * d + c);
            for (int i = 0; i < R; i++) v += f[i][t] * w[i];
            store(added + t * d + c, v);
        }
    }
}

// What R rows add, for all tokens, S of them at a time; h has W - 1 numbers to spare.
template <int R, int S, typename E>
static void add_rows(const E* A, const E* B, const float* z, float* h, float* added, Int d, Int tokens) {
    Int t = 0;
    for (; t + S <= tokens; t += S) read_rows<R, S>(A, z + t * d, h + t, d, tokens);
    for (; t < tokens; t++) read_rows<R, 1>(A, z + t * d, h + t, d, tokens);
    for (Int i = 0; i < R * tokens; i += W) store(h + i, activate(load(h + i)));
    for (t = 0; t + S <= tokens; t += S) write_rows<R, S>(B, h + t, added + t * d, d, tokens);
    for (; t < tokens; t++) write_rows<R, 1>(B, h + t, added + t * d, d, tokens);
}

// One token waits for memory, which wants many rows under way: 16 of float32 take 0.75 of the time of 8. From FEW on
// products decide: tiles of 4 x 4 fill the registers, and 16-bit rows are widened once, not once for every 4 tokens.
constexpr int FEW = 4, TILE = 4;

template <typename E>
static void add_share(const E* A, const E* B, const float* z, float* h, float* added, float* wide, Int d, Int tokens,
                      Int rows) {
    if (tokens < FEW) {
        constexpr int R = sizeof(E) == 4 ? 16 : 8;
        for (Int i = 0; i < rows; i += R) add_rows<R, 1>(A + i * d, B + i * d, z, h, added, d, tokens);
        return;
    }
    for (Int i = 0; i < rows; i += TILE) {
        const E *a = A + i * d, *b = B + i * d;
        if constexpr (std::is_same_v<E, float>) {
            add_rows<TILE, TILE>(a, b, z, h, added, d, tokens);
        } else {
            float *wide_a = wide, *wide_b = wide + TILE * d;
            for (Int c = 0; c < TILE * d; c += W) store(wide_a + c, load(a + c)), store(wide_b + c, load(b + c));
            add_rows<TILE, TILE>(wide_a, wide_b, z, h, added, d, tokens);
        }
    }
}

// Waits for a team. OpenMP's own barrier spins for milliseconds, which on a busy machine keep the processor from the
// very thread that is waited for: this one soon yields.
struct Barrier {
    std::atomic<Int> arrived{0}, passed{0};
    void wait(Int team) {
        const Int before = passed.load(std::memory_order_acquire);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == team) {
            arrived.store(0, std::memory_order_relaxed);
            passed.store(before + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; passed.load(std::memory_order_acquire) == before; spins++)
            if (spins > 1000) sched_yield();
    }
};

// Bytes that a thread's share of a step has at least, for up to 4 tokens, with fewer for more: some 50 us. Where threads
// waited for one another after less, a call now and then took 6 to 50 times as long on a busy machine of two cores.
constexpr Int SHARE = 512 << 10;

// Floats that a thread needs: its sums, by turns, its state, widened rows, and h.
static Int space_of(Int d, Int tokens) { return 3 * tokens * d + 2 * TILE * d + 16 * tokens + W; }

// y [tokens, d]: the sum over lanes of what their steps add to x [tokens, d]; A and B [lanes, depth, rank, d]
// The team is always torch's whole one, those that have no share in it waiting: for a smaller one OpenMP would end
// threads, and start them again for torch's next product.
template <typename E>
static void run(const float* x, const E* A, const E* B, float* y, float* space, Int lanes, Int depth, Int rank, Int d,
                Int tokens, int threads) {
    const Int n = tokens * d, own = space_of(d, tokens);
    const Int work = 2 * rank * d * sizeof(E) * std::max<Int>(1, tokens / 4);
    const Int most = std::max<Int>(1, std::min(rank / 16, work / SHARE));
    std::memset(y, 0, n * sizeof(float));
    omp_set_num_threads(threads);
    Barrier barrier;
#pragma omp parallel if (threads > 1 && most > 1)
    {
        const Int me = omp_get_thread_num(), team = std::min<Int>(omp_get_num_threads(), most);
        // Of the sums there are two, by turns: a thread may be a step ahead of one that still reads the last.
        float *z = space + me * own + 2 * n, *wide = z + n, *h = wide + 2 * TILE * d;
        const Int first = rank / 16 * me / team * 16, rows = rank / 16 * (me + 1) / team * 16 - first;
        Int turn = 0;
        for (Int lane = 0; me < team && lane < lanes; lane++) {
            std::memcpy(z, x, n * sizeof(float));
            for (Int k = 0; k < depth; k++, turn = n - turn) {
                const Int at = ((lane * depth + k) * rank + first) * d;
                float* added = space + me * own + turn;
                std::memset(added, 0, n * sizeof(float));
                add_share(A + at, B + at, z, h, added, wide, d, tokens, rows);
                barrier.wait(team);
                for (Int other = 0; other < team; other++) {
                    const float* theirs = space + other * own + turn;
                    for (Int c = 0; c < n; c += W) store(z + c, load(z + c) + load(theirs + c));
                }
            }
            if (me == 0)
                for (Int c = 0; c < n; c += W) store(y + c, load(y + c) + (load(z + c) - load(x + c)));
        }
    }
}

// 0, or 1 where there is no memory. d is a multiple of W, rank of 16.
extern "C" int dlr_chain(const float* x, const void* A, const void* B, float* y, Int lanes, Int depth, Int rank, Int d,
                         Int tokens, int itemsize, int threads) {
    float* space = new (std::nothrow) float[threads * space_of(d, tokens)]();
    if (!space) return 1;
    if (itemsize == 4)
        run(x, (const float*)A, (const float*)B, y, space, lanes, depth, rank, d, tokens, threads);
    else
        run(x, (const BFloat16*)A, (const BFloat16*)B, y, space, lanes, depth, rank, d, tokens, threads);
    delete[] space;
    return 0;
}
