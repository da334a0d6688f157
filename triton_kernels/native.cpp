// A chain of plain steps for few tokens on a CPU, in one call: what native.py beside it compiles, ACTIVATE given, and
// calls. The state is float32, and so are sums. Weights are float32, or bfloat16: those meet a state that is rounded to
// bfloat16 where the processor multiplies pairs of such numbers, and are widened as they are read where it does not.
//
// A thread has a share of each step's rows, the same of A and of B: it makes h of them and what they add to the state,
// and so waits for the others once a step, not twice. Each then adds all threads' sums, in one order, to a state of its
// own: the result depends on the number of threads, and on nothing else. A token's does not depend on the others.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <new>
#include <type_traits>
#include <utility>
#include <omp.h>
#include <sched.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

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
static inline void store(BFloat16* p, V v) {  // rounded to the nearest, to the even one of two
    U u = (U)v;
    u = v == v ? u + 0x7fff + (u >> 16 & 1) : u | 0x400000;
    H h = __builtin_convertvector(u >> 16, H);
    std::memcpy(p, &h, sizeof h);
}
// The sums of W vectors, in their order. Blocks of G numbers are folded in halves, those of two vectors into one.
template <int G, int... J>
static inline V folded(V a, V b, std::integer_sequence<int, J...>) {
#if defined(__clang__) || __GNUC__ >= 12
    V low = __builtin_shufflevector(a, b, (J / (G / 2) * G + J % (G / 2))...);
    V high = __builtin_shufflevector(a, b, (J / (G / 2) * G + J % (G / 2) + G / 2)...);
#else
    V low = __builtin_shuffle(a, b, I{(J / (G / 2) * G + J % (G / 2))...});
    V high = __builtin_shuffle(a, b, I{(J / (G / 2) * G + J % (G / 2) + G / 2)...});
#endif
    return low + high;
}
template <int G = W>
static inline V sums(const V* s) {
    if constexpr (G == 1) {
        return *s;
    } else {
        V half[G / 2];
        const std::make_integer_sequence<int, W> all;
        for (int i = 0; i < G / 2; i++) half[i] = folded<G>(s[2 * i], s[2 * i + 1], all);
        return sums<G / 2>(half);
    }
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

// How products with weights E are formed. `Number` is what they read of the state and of h, WIDTH the columns of a
// vector of A; a block of B is ROWS high and two vectors of sums wide, of which `left` columns are there, 16 at least.
template <typename E>
struct Widened {  // to float32: nothing is rounded
    typedef E Weight;
    typedef float Number;
    typedef V Vector;
    static constexpr int WIDTH = W, ROWS = 1;
    template <typename N> static Vector vector(const N* p, Int) { return load(p); }
    static Vector spread(const Number* h) { return V{} + *h; }
    static V plus(V s, Vector a, Vector b) { return s + a * b; }
    static void block(const Weight* B, Int, Int left, Vector& a, Vector& b) {
        a = load(B);
        b = left >= 2 * W ? load(B + W) : V{};
    }
    static void add(V a, V b, float* to, Int left) {
        store(to, load(to) + a);
        if (left >= 2 * W) store(to + W, load(to + W) + b);
    }
    static const Number* narrow(const float* from, void*, Int) { return from; }
};

#ifdef __AVX512BF16__
// Pairs of bfloat16 numbers, two products a lane and instruction; what is read of the state and of h is rounded to
// bfloat16, as torch's own products with such weights have it. Sums are float32.
struct Paired {
    typedef BFloat16 Weight;
    typedef BFloat16 Number;
    typedef __m512i Vector;
    static constexpr int WIDTH = 32, ROWS = 2;
    static Vector vector(const Weight* p, Int left) {
        return left >= 32 ? _mm512_loadu_si512(p) : _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i*)p));
    }
    static Vector spread(const Number* h) {
        int32_t two;
        std::memcpy(&two, h, sizeof two);
        return _mm512_set1_epi32(two);
    }
    static V plus(V s, Vector a, Vector b) { return (V)_mm512_dpbf16_ps((__m512)s, (__m512bh)a, (__m512bh)b); }
    static void block(const Weight* B, Int d, Int left, Vector& a, Vector& b) {
        Vector first = vector(B, left), second = vector(B + d, left);
        a = _mm512_unpacklo_epi16(first, second);  // of each 8 columns the first 4
        b = _mm512_unpackhi_epi16(first, second);  // the others
    }
    static void add(V a, V b, float* to, Int left) {
        const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
        store(to, load(to) + (V)_mm512_permutex2var_ps((__m512)a, first, (__m512)b));
        if (left >= 32) store(to + 16, load(to + 16) + (V)_mm512_permutex2var_ps((__m512)a, second, (__m512)b));
    }
    static const Number* narrow(const float* from, void* space, Int n) {
        Number* to = (Number*)space;
        for (Int c = 0; c < n; c += 16) {
            __m256bh v = _mm512_cvtneps_pbh(_mm512_loadu_ps(from + c));
            std::memcpy(to + c, &v, sizeof v);
        }
        return to;
    }
};
template <typename E> using Products = std::conditional_t<std::is_same_v<E, BFloat16>, Paired, Widened<E>>;
#else
template <typename E> using Products = Widened<E>;
#endif

// Weights come from memory: what the next half of a step reads is fetched while this one is computed. One token takes
// 2.2 times as long with what the processor foresees by itself.
constexpr Int LINE = 64;  // bytes
struct Ahead {
    const char *next = nullptr, *end = nullptr;
    inline void fetch(int lines) {
        for (int i = 0; i < lines && next < end; i++, next += LINE) __builtin_prefetch(next, 0, 2);
    }
};

// h[t, i] = activate(<row i of A, z[t]>) of R rows and T tokens, R T = W: A [R, d], z [T, d], h [T, rows]
template <typename P, int R, int T>
static inline void read_rows(const typename P::Weight* A, const typename P::Number* z, float* h, Int d, Int rows,
                             Ahead& ahead) {
    V s[W] = {};
    for (Int c = 0; c < d; c += P::WIDTH) {
        typename P::Vector w[R];
        for (int i = 0; i < R; i++) w[i] = P::vector(A + i * d + c, d - c);
        ahead.fetch(R);
        for (int t = 0; t < T; t++) {
            typename P::Vector v = P::vector(z + t * d + c, d - c);
            for (int i = 0; i < R; i++) s[t * R + i] = P::plus(s[t * R + i], w[i], v);
        }
    }
    float all[W];
    store(all, activate(sums(s)));
    for (int t = 0; t < T; t++) std::memcpy(h + t * rows, all + t * R, R * sizeof(float));
}

// added[t] += sum_i h[t, i] B[i] of T tokens, C blocks of columns at a time, from column c on
template <typename P, int T, int C>
static inline void write_columns(const typename P::Weight* B, const typename P::Number* h, float* added, Int d,
                                 Int rows, Ahead& ahead, Int c = 0) {
    constexpr Int wide = 2 * W, lines = std::max<Int>(1, wide * P::ROWS * sizeof(*B) / LINE);
    for (; c < d && (C == 1 || c + wide * C <= d); c += wide * C) {
        V s[T][2 * C] = {};
        for (Int i = 0; i < rows; i += P::ROWS) {
            typename P::Vector f[T], a, b;
            for (int t = 0; t < T; t++) f[t] = P::spread(h + t * rows + i);
            for (int k = 0; k < C; k++) {
                P::block(B + i * d + c + wide * k, d, d - c - wide * k, a, b);
                ahead.fetch(lines);
                for (int t = 0; t < T; t++) {
                    s[t][2 * k] = P::plus(s[t][2 * k], a, f[t]);
                    s[t][2 * k + 1] = P::plus(s[t][2 * k + 1], b, f[t]);
                }
            }
        }
        for (int t = 0; t < T; t++)
            for (int k = 0; k < C; k++)
                P::add(s[t][2 * k], s[t][2 * k + 1], added + t * d + c + wide * k, d - c - wide * k);
    }
    if constexpr (C > 1) write_columns<P, T, 1>(B, h, added, d, rows, ahead, c);
}

// What a block of a step's rows adds to the state. The next block, as large at most, begins at `after`; at `h` there is
// room for h, and for what is read of it.
template <typename P, typename E = typename P::Weight>
static void add_block(const E* A, const E* B, const E* after, const typename P::Number* z, float* added, float* h,
                      Int d, Int tokens, Int rows) {
    constexpr int Q = W / 4;
    Ahead none, ahead{(const char*)B, (const char*)(B + rows * d)};
    Int t;
    for (Int i = 0; i < rows; i += W) {
        const E* a = A + i * d;
        for (t = 0; t + Q <= tokens; t += Q)
            for (Int j = 0; j < W; j += 4)
                read_rows<P, 4, Q>(a + j * d, z + t * d, h + t * rows + i + j, d, rows, t ? none : ahead);
        for (; t < tokens; t++) read_rows<P, W, 1>(a, z + t * d, h + t * rows + i, d, rows, t ? none : ahead);
    }
    const auto* f = P::narrow(h, h + tokens * rows, tokens * rows);
    ahead = {(const char*)after, (const char*)(after + rows * d)};
    for (t = 0; t + 2 * Q <= tokens; t += 2 * Q)
        write_columns<P, 2 * Q, 1>(B, f + t * rows, added + t * d, d, rows, t ? none : ahead);
    for (; t + Q <= tokens; t += Q) write_columns<P, Q, 2>(B, f + t * rows, added + t * d, d, rows, t ? none : ahead);
    for (; t < tokens; t++) write_columns<P, 1, 4>(B, f + t * rows, added + t * d, d, rows, t ? none : ahead);
}

// Bytes of A, and of B, that are worked on at a time: both stay in a processor's own cache. At 2048 features in float32,
// 16 tokens take 1.5 times as long with 512 KiB; with 64 KiB 64 tokens in bfloat16 take 1.2 times as long.
constexpr Int BLOCK = 256 << 10;

// What a share of a step's rows adds to the state; `space` is for what is read of z, and for `add_block`.
template <typename P, typename E = typename P::Weight>
static void add_share(const E* A, const E* B, const E* after, const float* z, float* added, float* space, Int d,
                      Int tokens, Int rows) {
    const Int most = std::max<Int>(16, BLOCK / (d * sizeof(E)) / 16 * 16);
    const auto* read = P::narrow(z, space, tokens * d);
    std::memset(added, 0, tokens * d * sizeof(float));
    for (Int i = 0; i < rows; i += most) {
        const Int block = std::min(most, rows - i);
        const E* next = i + block < rows ? A + (i + block) * d : after;
        add_block<P>(A + i * d, B + i * d, next, read, added, space + tokens * d, d, tokens, block);
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

// Floats that a thread needs: its sums, by turns, its state, h, and what is read of both.
static Int space_of(Int d, Int rank, Int tokens) { return 4 * tokens * d + 2 * tokens * rank; }

// y = scale * (the sum over lanes of what their steps add to x) + bias: x, y [tokens, d]; scale, bias [d]; A and B
// [lanes, depth, rank, d].
// The team is always torch's whole one, those that have no share in it waiting: for a smaller one OpenMP would end
// threads, and start them again for torch's next product.
template <typename X, typename E>
static void run(const X* x, const E* A, const E* B, const float* scale, const float* bias, X* y, float* space,
                Int lanes, Int depth, Int rank, Int d, Int tokens, int threads) {
    const Int n = tokens * d, own = space_of(d, rank, tokens);
    const Int work = 2 * rank * d * sizeof(E) * std::max<Int>(1, tokens / 4);
    const Int most = std::max<Int>(1, std::min(rank / 16, work / SHARE));
    float* all = space + threads * own;  // what the lanes add
    std::memset(all, 0, n * sizeof(float));
    omp_set_num_threads(threads);
    Barrier barrier;
#pragma omp parallel if (threads > 1 && most > 1)
    {
        const Int me = omp_get_thread_num(), team = std::min<Int>(omp_get_num_threads(), most);
        // Of the sums there are two, by turns: a thread may be a step ahead of one that still reads the last.
        float* z = space + me * own + 2 * n;
        const Int first = rank / 16 * me / team * 16, rows = rank / 16 * (me + 1) / team * 16 - first;
        Int turn = 0;
        for (Int lane = 0; me < team && lane < lanes; lane++) {
            for (Int c = 0; c < n; c += W) store(z + c, load(x + c));
            for (Int k = 0; k < depth; k++, turn = n - turn) {
                const Int at = ((lane * depth + k) * rank + first) * d;
                float* added = space + me * own + turn;
                add_share<Products<E>>(A + at, B + at, A + at + rank * d, z, added, z + n, d, tokens, rows);
                barrier.wait(team);
                for (Int other = 0; other < team; other++) {
                    const float* theirs = space + other * own + turn;
                    for (Int c = 0; c < n; c += W) store(z + c, load(z + c) + load(theirs + c));
                }
            }
            if (me == 0)
                for (Int c = 0; c < n; c += W) store(all + c, load(all + c) + (load(z + c) - load(x + c)));
        }
    }
    for (Int t = 0; t < tokens; t++)
        for (Int c = 0; c < d; c += W) store(y + t * d + c, load(scale + c) * load(all + t * d + c) + load(bias + c));
}

template <typename X>
static int run_any(const void* x, const void* A, const void* B, const float* scale, const float* bias, void* y,
                   Int lanes, Int depth, Int rank, Int d, Int tokens, int narrow_weights, int threads) {
    float* space = new (std::nothrow) float[threads * space_of(d, rank, tokens) + tokens * d];
    if (!space) return 1;
    const auto run_with = [&](auto* a, auto* b) {
        run((const X*)x, a, b, scale, bias, (X*)y, space, lanes, depth, rank, d, tokens, threads);
    };
    if (narrow_weights)
        run_with((const BFloat16*)A, (const BFloat16*)B);
    else
        run_with((const float*)A, (const float*)B);
    delete[] space;
    return 0;
}

// 0, or 1 where there is no memory. Tokens and weights are bfloat16 where they are narrow, else float32. d and rank are
// multiples of 16.
extern "C" int dlr_chain(const void* x, const void* A, const void* B, const float* scale, const float* bias, void* y,
                         Int lanes, Int depth, Int rank, Int d, Int tokens, int narrow, int narrow_weights,
                         int threads) {
    auto run_it = narrow ? run_any<BFloat16> : run_any<float>;
    return run_it(x, A, B, scale, bias, y, lanes, depth, rank, d, tokens, narrow_weights, threads);
}
