// A chain of plain steps for few tokens on a CPU, in one call: what triton_kernels/native.py compiles and calls.
//
// The state is float32, weights are float32, bfloat16 or float16 and are widened as they are read, sums are float32.
// A thread has a share of a step's rows of A and B alike, the same rows in both: it makes h of its rows and what they
// add to the state, and waits for the others once a step, not twice. Each thread then sums what all of them added, in
// their order, to a state of its own: the result depends on the number of threads, and on nothing else.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#ifdef _OPENMP
#include <omp.h>
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

struct Bf16 { uint16_t bits; };

static inline V load(const float* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
static inline V load(const Bf16* p) {
    H h;
    std::memcpy(&h, p, sizeof h);
    return (V)(__builtin_convertvector(h, U) << 16);
}
static inline void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
static inline V all(float x) { return V{} + x; }
static inline float sum(V v) {
    float s = 0;
    for (int i = 0; i < W; i++) s += v[i];
    return s;
}

// e^x to 2e-7 of itself: 2^n times a polynomial of Taylor's on |f| <= ln(2) / 2; NaN stays, beyond +-87 it saturates.
static inline V exponential(V x) {
    x = x > 87.f ? all(87.f) : x;
    x = x < -87.f ? all(-87.f) : x;
    V k = x * 1.44269504f, n = k + 12582912.f;  // 1.5 * 2^23 rounds to a whole number
    n -= 12582912.f;
    V f = x - n * 0.693359375f;
    f += n * 2.12194440e-4f;
    V p = all(1.f / 5040);
    for (float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f}) p = p * f + c;
    V safe = n == n ? n : V{};
    return p * (V)((__builtin_convertvector(safe, I) + 127) << 23);
}
static inline V sigmoid(V x) { return 1.f / (1.f + exponential(-x)); }
static inline V positive(V x) { return x < 0.f ? V{} : x; }

// Abramowitz and Stegun 7.1.26: off by 1.5e-7 at most.
static inline V erf(V x) {
    V a = x < 0.f ? -x : x, t = 1.f / (1.f + 0.3275911f * a), p = all(1.061405429f);
    for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) p = p * t + c;
    V e = 1.f - p * t * exponential(-a * a);
    return x < 0.f ? -e : e;
}

static inline V activate(int act, V p) {  // the numbers of ACTS in native.py
    switch (act) {
        case 0: return p * sigmoid(p);
        case 1: return 0.5f * p * (1.f + erf(0.70710678f * p));
        case 2: return p * sigmoid(1.5957691216f * (p + 0.044715f * p * p * p));
        case 3: return positive(p);
        case 4: return positive(p) * positive(p);
        case 5: return p * sigmoid(1.702f * p);
        case 6: return sigmoid(p);
        case 7: return 2.f * sigmoid(2.f * p) - 1.f;
        default: return p;
    }
}

// h[i, t] = <row i of A, token t>, for R rows and N tokens from t on; h is [.., T]
template <int R, int N, typename E>
static inline void read_rows(const E* A, const float* z, float* h, int64_t d, int64_t T) {
    V s[R][N] = {};
    for (int64_t c = 0; c < d; c += W) {
        V w[R];
        for (int i = 0; i < R; i++) w[i] = load(A + i * d + c);
        for (int t = 0; t < N; t++) {
            V v = load(z + t * d + c);
            for (int i = 0; i < R; i++) s[i][t] += w[i] * v;
        }
    }
    for (int i = 0; i < R; i++)
        for (int t = 0; t < N; t++) h[i * T + t] = sum(s[i][t]);
}

// sums[t] += sum_i h[i, t] row i of B
template <int R, int N, typename E>
static inline void write_rows(const E* B, const float* h, float* sums, int64_t d, int64_t T) {
    V f[R][N];
    for (int i = 0; i < R; i++)
        for (int t = 0; t < N; t++) f[i][t] = all(h[i * T + t]);
    for (int64_t c = 0; c < d; c += W) {
        V w[R];
        for (int i = 0; i < R; i++) w[i] = load(B + i * d + c);
        for (int t = 0; t < N; t++) {
            V v = load(sums + t * d + c);
            for (int i = 0; i < R; i++) v += f[i][t] * w[i];
            store(sums + t * d + c, v);
        }
    }
}

template <int R, typename E>
static void rows(const E* A, const E* B, const float* z, float* h, float* sums, int64_t d, int64_t T, int act) {
    int64_t t = 0;
    for (; t + 4 <= T; t += 4) read_rows<R, 4>(A, z + t * d, h + t, d, T);
    if (t + 2 <= T) read_rows<R, 2>(A, z + t * d, h + t, d, T), t += 2;
    if (t < T) read_rows<R, 1>(A, z + t * d, h + t, d, T);
    for (int64_t i = 0; i < R * T; i += W) store(h + i, activate(act, load(h + i)));  // h has W - 1 to spare
    for (t = 0; t + 4 <= T; t += 4) write_rows<R, 4>(B, h + t, sums + t * d, d, T);
    if (t + 2 <= T) write_rows<R, 2>(B, h + t, sums + t * d, d, T), t += 2;
    if (t < T) write_rows<R, 1>(B, h + t, sums + t * d, d, T);
}

// y = sum over lanes of what their steps add to x
template <typename E>
static int run(const float* x, const E* A, const E* B, float* y, int64_t L, int64_t K, int64_t r, int64_t d, int64_t T,
               int act, int threads) {
    const int64_t n = T * d;
    // Two sets of sums, by turns: a thread may be a step ahead of one that still reads the last.
    float* sums = new (std::nothrow) float[2 * threads * n];
    float* state = new (std::nothrow) float[threads * n];
    if (!sums || !state) return delete[] sums, delete[] state, 1;
    std::fill(y, y + n, 0.f);
#pragma omp parallel num_threads(threads)
    {
        int me = 0, team = 1;
#ifdef _OPENMP
        me = omp_get_thread_num(), team = omp_get_num_threads();
#endif
        float *z = state + me * n, h[4 * 64 + W];
        const int64_t groups = r / 4, from = groups * me / team * 4, to = groups * (me + 1) / team * 4;
        int turn = 0;
        for (int64_t l = 0; l < L; l++) {
            std::memcpy(z, x, n * sizeof(float));
            for (int64_t k = 0; k < K; k++, turn ^= 1) {
                const int64_t at = (l * K + k) * r * d;
                float* mine = sums + (2 * me + turn) * n;
                std::fill(mine, mine + n, 0.f);
                for (int64_t i = from; i < to; i += 4) rows<4>(A + at + i * d, B + at + i * d, z, h, mine, d, T, act);
#pragma omp barrier
                for (int other = 0; other < team; other++) {
                    const float* s = sums + (2 * other + turn) * n;
                    for (int64_t c = 0; c < n; c += W) store(z + c, load(z + c) + load(s + c));
                }
            }
            if (me == 0)
                for (int64_t c = 0; c < n; c += W) store(y + c, load(y + c) + (load(z + c) - load(x + c)));
        }
    }
    delete[] sums;
    delete[] state;
    return 0;
}

extern "C" int dlr_chain(const float* x, const void* A, const void* B, float* y, int64_t L, int64_t K, int64_t r,
                         int64_t d, int64_t T, int act, int itemsize, int threads) {
    if (itemsize == 4) return run(x, (const float*)A, (const float*)B, y, L, K, r, d, T, act, threads);
    return run(x, (const Bf16*)A, (const Bf16*)B, y, L, K, r, d, T, act, threads);
}
