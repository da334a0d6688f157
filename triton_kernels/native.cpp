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
    constexpr I low = {J / (G / 2) * G + J % (G / 2)...};
    return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, low + G / 2);
}
template <int N = W>
static inline V sums(const V* s) {
    if constexpr (N == 1)
        return *s;
    else
        return folded<2 * W / N>(sums<N / 2>(s), sums<N / 2>(s + N / 2), std::make_integer_sequence<int, W>());
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
    static Vector spread(const Number* h) { return *h - V{}; }  // of V{} + *h the sum would be done, for its sign of 0
    static V plus(V s, Vector a, Vector b) { return s + a * b; }
    static void block(const Weight* B, Int, Int left, Vector& a, Vector& b) {
        a = load(B);
        b = left >= 2 * W ? load(B + W) : V{};
    }
    static void add(V a, V b, float* to, Int left) {
        store(to, load(to) + a);
        if (left >= 2 * W) store(to + W, load(to + W) + b);
    }
    static void narrow(const float* from, Number* to, Int n) { std::memcpy(to, from, n * sizeof *from); }
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
    static void narrow(const float* from, Number* to, Int n) {
        for (Int c = 0; c < n; c += 16) {
            __m256bh v = _mm512_cvtneps_pbh(_mm512_loadu_ps(from + c));
            std::memcpy(to + c, &v, sizeof v);
        }
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
    inline void fetch(int lines) {  // now and then some lines too many, which does no harm
        if (next >= end) return;
        for (int i = 0; i < lines; i++) __builtin_prefetch(next + i * LINE, 0, 2);
        next += lines * LINE;
    }
};

static Int round_up(Int n, Int to) { return (n + to - 1) / to * to; }
constexpr Int ROOM = 256;  // rows of a block, at most: a number, so that one register is enough to find h of 8 tokens

// h[t, i] = activate(<row i of A, z[t]>) of R rows and T tokens, R T = W: A [R, d], z as `pack` gives it, h [T, ROOM]
template <typename P, int R, int T>
static inline void read_rows(const typename P::Weight* A, const typename P::Number* z, typename P::Number* h, Int d,
                             Ahead& fetched) {
    V s[W] = {};
    Ahead ahead = fetched;
    Int c = 0;
    const auto columns = [&](Int left) {
        typename P::Vector w[R];
        for (int i = 0; i < R; i++) w[i] = P::vector(A + i * d + c, left);
        ahead.fetch(R);
        for (int t = 0; t < T; t++) {
            typename P::Vector v = P::vector(z + t * P::WIDTH, P::WIDTH);
            for (int i = 0; i < R; i++) s[t * R + i] = P::plus(s[t * R + i], w[i], v);
        }
        z += T * P::WIDTH;
    };
    for (; c + P::WIDTH <= d; c += P::WIDTH) columns(P::WIDTH);
    if (c < d) columns(d - c);
    fetched = ahead;
    float wide[W];
    typename P::Number all[W];
    store(wide, activate(sums(s)));
    P::narrow(wide, all, W);
    for (int t = 0; t < T; t++) std::memcpy(h + t * ROOM, all + t * R, R * sizeof *h);
}

// added[t] += sum_i h[t, i] B[i] of T tokens, C blocks of columns at a time, from column c on
template <typename P, int T, int C>
static inline void write_columns(const typename P::Weight* B, const typename P::Number* h, float* added, Int d,
                                 Int rows, Ahead& fetched, Int c = 0) {
    Ahead ahead = fetched;
    constexpr Int wide = 2 * W, lines = std::max<Int>(1, wide * P::ROWS * sizeof(*B) / LINE);
    const auto columns = [&](Int left) {
        V s[T][2 * C] = {};
        for (Int i = 0; i < rows; i += P::ROWS) {
            typename P::Vector f[T], a, b;
            for (int t = 0; t < T; t++) f[t] = P::spread(h + t * ROOM + i);
            for (int k = 0; k < C; k++) {
                P::block(B + i * d + c + wide * k, d, left, a, b);
                ahead.fetch(lines);
                for (int t = 0; t < T; t++) {
                    s[t][2 * k] = P::plus(s[t][2 * k], a, f[t]);
                    s[t][2 * k + 1] = P::plus(s[t][2 * k + 1], b, f[t]);
                }
            }
        }
        for (int t = 0; t < T; t++)
            for (int k = 0; k < C; k++)
                P::add(s[t][2 * k], s[t][2 * k + 1], added + t * d + c + wide * k, left);
    };
    for (; c + wide * C <= d; c += wide * C) columns(wide);
    if (C == 1 && c < d) columns(d - c);
    fetched = ahead;
    if constexpr (C > 1) write_columns<P, T, 1>(B, h, added, d, rows, fetched, c);
}

// What a block of a step's rows adds to the state, z as `pack` gives it. The next block, as large at most, begins at
// `after`; at `h` there is room for it.
template <typename P, typename E = typename P::Weight>
static void add_block(const E* A, const E* B, const E* after, const typename P::Number* z, float* added,
                      typename P::Number* h, Int d, Int tokens, Int rows) {
    constexpr int Q = W / 4;
    const Int row = round_up(d, P::WIDTH);
    Ahead none, ahead{(const char*)B, (const char*)(B + rows * d)};
    Int t;
    for (Int i = 0; i < rows; i += W) {
        const E* a = A + i * d;
        for (t = 0; t + Q <= tokens; t += Q)
            for (Int j = 0; j < W; j += 4)
                read_rows<P, 4, Q>(a + j * d, z + t * row, h + t * ROOM + i + j, d, t ? none : ahead);
        for (; t < tokens; t++) read_rows<P, W, 1>(a, z + t * row, h + t * ROOM + i, d, t ? none : ahead);
    }
    ahead = {(const char*)after, (const char*)(after + rows * d)};
    for (t = 0; t + 2 * Q <= tokens; t += 2 * Q)
        write_columns<P, 2 * Q, 1>(B, h + t * ROOM, added + t * d, d, rows, t ? none : ahead);
    for (; t + Q <= tokens; t += Q)
        write_columns<P, Q, 2>(B, h + t * ROOM, added + t * d, d, rows, t ? none : ahead);
    for (; t < tokens; t++) write_columns<P, 1, 4>(B, h + t * ROOM, added + t * d, d, rows, t ? none : ahead);
}

// z as it is read, one address after the other: groups of W / 4 tokens, then those that are left one by one; of a group
// a vector of each token, then the next ones; zeros after the last column.
template <typename P>
static const typename P::Number* pack(const float* z, float* space, Int d, Int tokens) {
    constexpr Int Q = W / 4, N = P::WIDTH;
    auto* to = (typename P::Number*)space;
    for (Int t = 0, group; t < tokens; t += group) {
        group = t + Q <= tokens ? Q : 1;
        for (Int c = 0; c < d; c += N, to += group * N)
            for (Int j = 0; j < group; j++) {
                const Int there = std::min(N, d - c);
                P::narrow(z + (t + j) * d + c, to + j * N, there);
                if (there < N) std::memset(to + j * N + there, 0, (N - there) * sizeof *to);
            }
    }
    return (const typename P::Number*)space;
}

// Bytes of A, and of B, that are worked on at a time: both stay in a processor's own cache. At 2048 features 16 tokens
// take 1.5 times as long in float32 with 512 KiB, 64 tokens 1.2 times as long in bfloat16 with 64 KiB.
constexpr Int BLOCK = 256 << 10;

// What a share of a step's rows adds to the state; `space` is for what is read of z, and for `add_block`.
template <typename P, typename E = typename P::Weight>
static void add_share(const E* A, const E* B, const E* after, const float* z, float* added, float* space, Int d,
                      Int tokens, Int rows) {
    const Int most = std::min(ROOM, std::max<Int>(16, BLOCK / (d * sizeof(E)) / 16 * 16));
    const auto* read = pack<P>(z, space, d, tokens);
    auto* h = (typename P::Number*)(space + tokens * round_up(d, P::WIDTH));
    for (Int i = 0; i < rows; i += most) {
        const Int block = std::min(most, rows - i);
        const E* next = i + block < rows ? A + (i + block) * d : after;
        add_block<P>(A + i * d, B + i * d, next, read, added, h, d, tokens, block);
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

// Bytes that a thread's share of a step has at least, for up to 4 tokens, with fewer for more: some 50 us. Where
// threads waited for one another after less, a call now and then took 6 to 50 times as long on a busy machine of two cores.
constexpr Int SHARE = 512 << 10;

// Floats that a thread needs: its sums, by turns, its state, what is read of it, and h.
static Int space_of(Int d, Int tokens) { return tokens * (4 * round_up(d, 32) + ROOM); }

// y = scale * (the sum over lanes of what their steps add to x) + bias: x, y [tokens, d]; scale, bias [d]; A and B
// [lanes, depth, rank, d].
// The team is always torch's whole one, those that have no share in it waiting: for a smaller one OpenMP would end
// threads, and start them again for torch's next product.
template <typename X, typename E>
static void run(const X* x, const E* A, const E* B, const float* scale, const float* bias, X* y, float* space,
                Int lanes, Int depth, Int rank, Int d, Int tokens, int threads) {
    const Int n = tokens * d, own = space_of(d, tokens);
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
                // Alone it adds to its state, of which the step has a copy.
                float* added = team == 1 ? z : space + me * own + turn;
                if (team > 1) std::memset(added, 0, n * sizeof(float));
                add_share<Products<E>>(A + at, B + at, A + at + rank * d, z, added, z + n, d, tokens, rows);
                if (team == 1) continue;
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
    float* space = new (std::nothrow) float[threads * space_of(d, tokens) + tokens * d];
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
