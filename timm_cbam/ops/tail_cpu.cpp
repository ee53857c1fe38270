// The passes of tail.py's operator as native loops: all of a block's tail in one call, forward and backward.
//
// No torch headers: native.py hands over the address of torch_parallel_for (a C function of PyTorch's stable ABI), so
// that PyTorch's own threads do the work, and tail_cpu.py hands over addresses of tensors in the struct Args.
//
// A map is read as few times as the mathematics allows: forward three times (pooling over space, pooling over channels,
// result), backward three (g and its sums; sums that need the spatial gate's gradient; dx). Where the batch is a
// multiple of the threads, a thread does all that it can with one sample while it is in the cache. F = batch_norm(x)
// and F' = F * mc are computed anew from x in each pass, by the same two operations, so that they have the same bits
// each time: ties of a maximum are found by comparing with it. Every sum is over the same pieces in the same order,
// whatever the number of threads.
//
// Rounding is PyTorch's: a * b + c of a batch-norm is one operation where PyTorch's own loops of this SIMD level have
// FMA (mad), and the output of a batch-norm in bfloat16 is rounded to it. So a warm start (weights.py) computes the
// plain ResNet's bits. NaN: a comparison is written such that NaN passes, or its absence is checked by a sum.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#define EXPORT extern "C" __attribute__((visibility("default")))
#define R __restrict__

namespace {

using i64 = int64_t;
using Body = void (*)(i64, i64, void*);
using ParallelFor = int32_t (*)(i64, i64, i64, Body, void*);
ParallelFor parallel_for;

// Run f(begin, end) over pieces of 0..n; inside of another par everything runs in the calling thread.
template <class F>
void par(i64 n, i64 grain, F&& f) {
    const int32_t failed = parallel_for(0, n, std::max<i64>(1, grain), [](i64 begin, i64 end, void* context) {
        (*static_cast<std::remove_reference_t<F>*>(context))(begin, end);
    }, &f);
    if (failed) throw std::bad_alloc();  // the only exception that f can throw; torch_parallel_for has caught it
}

struct bfloat16 {
    uint16_t bits;
    bfloat16() = default;
    explicit bfloat16(float value) { *this = value; }
    void operator=(float value) {  // of the number, not the struct, which compilers do not vectorise
        uint32_t u;
        std::memcpy(&u, &value, 4);
        uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // to nearest, ties to even
        bits = static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
    }
    explicit operator float() const {
        uint32_t u = static_cast<uint32_t>(bits) << 16;
        float value;
        std::memcpy(&value, &u, 4);
        return value;
    }
};

// a * b + c, rounded once where PyTorch's own loops of this SIMD level do so
template <class A>
inline A mad(A a, A b, A c) {
#ifdef __FMA__
    return std::fma(a, b, c);
#else
    return a * b + c;
#endif
}

// exp for the loops over pixels, which the compiler can vectorise; relative error below 2e-7, exp(0) = 1. Above 88
// infinity, so that the sigmoid of -inf is zero.
inline float exponential(float given) {
    const float x = given > 88.f ? 88.f : given < -87.f ? -87.f : given;
    float shifted = mad(x, 1.44269504f, 12582912.f);  // rounds to an integer, held in the low bits
    float n = shifted - 12582912.f;
    float r = mad(n, -0.693359375f, x);
    r = mad(n, 2.12194440e-4f, r);
    float p = 1.9875691500e-4f;
    p = mad(p, r, 1.3981999507e-3f);
    p = mad(p, r, 8.3334519073e-3f);
    p = mad(p, r, 4.1665795894e-2f);
    p = mad(p, r, 1.6666665459e-1f);
    p = mad(p, r, 5.0000001201e-1f);
    p = mad(p, r * r, r) + 1.f;
    uint32_t bits;
    std::memcpy(&bits, &shifted, 4);
    bits = (bits << 23) + 0x3f800000u;
    float power;
    std::memcpy(&power, &bits, 4);
    return given > 88.f ? std::numeric_limits<float>::infinity() : p * power;
}
inline double exponential(double x) { return std::exp(x); }

template <class A>
inline A sigmoid(A x) { return A(1) / (A(1) + exponential(-x)); }

template <class A>
inline A relu(A x) { return x <= 0 ? A(0) : x; }

template <class A>
inline A larger(A a, A b) { return a != a || a > b ? a : b; }  // NaN if one of both is

constexpr i64 LANES = 16;
inline i64 padded(i64 n) { return (n + LANES - 1) / LANES * LANES; }

}  // namespace

// In the order of tail_cpu.py. Maps are of the tensors' dtype, everything else of the dtype of accumulation: float for
// float and bfloat16, double for double. b, c, h, w: sizes of the map; r: hidden width of the MLP; k: of the kernel, with
// its strides. collect: compute the batch's mean and variance here, otherwise they are in stats; round_invstd: PyTorch
// holds 1 / deviation in bfloat16.
struct Args {
    i64 dtype, channels_last, threads, b, c, h, w, r, k, stride_c, stride_y, stride_x, training, bn_training, collect;
    i64 round_invstd;
    double eps, bn_eps;
    const void *x, *shortcut;
    void* out;
    const void *weight, *bias, *mean, *var;  // (C,) of the batch-norm
    const void *fc1, *fc1_bias, *fc2, *fc2_bias, *kernel;
    const void *bn_weight, *bn_bias, *bn_mean, *bn_var;  // (1,) of the spatial batch-norm
    const void* factor;                                  // (B,) of the branch, stochastic depth
    // results for the backward pass, all or, in inference, none of them
    void *stats, *bn_stats;  // (4, C), (4,) mean, variance, weight and bias of both batch-norms as the forward pass had them
    void *space;             // (3, B, C) average, maximum and minimum of x over space
    void *hidden;            // (2, B, R) of the MLP before its activation, for both poolings
    void *mc;                // (B, C)
    void *pooled;            // (B, 2, H, W) average and maximum of F' over the channels
    void *conv;              // (B, H, W) output of the 7x7 convolution
    // backward
    const void* grad;
    void *g, *dx, *dweight, *dbias, *dfc1, *dfc1_bias, *dfc2, *dfc2_bias, *dkernel, *dbn;  // dbn: (2,) weight and bias
};

namespace {

template <class T, class A, bool CL>
struct Tail {
    const Args& a;
    const i64 B, C, H, W, P, HID, K, Q;
    const A *fc1, *fc1_bias, *fc2, *fc2_bias, *factor;
    std::unique_ptr<A[]> memory;
    A *scale, *shift, *invstd, *kernel, *gates;  // gates: ms, (B, P)
    A *mean, *var, *weight, *bias, *bn_stats, *avg, *maximum, *minimum, *hidden, *mc, *pooled, *conv;
    static constexpr A INF = std::numeric_limits<A>::infinity();

    explicit Tail(const Args& args)
        : a(args), B(a.b), C(a.c), H(a.h), W(a.w), P(a.h * a.w), HID(a.r), K(a.k), Q(a.k / 2) {
        fc1 = small(a.fc1), fc1_bias = small(a.fc1_bias), fc2 = small(a.fc2), fc2_bias = small(a.fc2_bias);
        factor = small(a.factor);
        const i64 n = a.kernel ? B : 0, taps = 2 * K * K;  // norm_relu has no attention
        memory.reset(new A[3 * C + taps + n * P + (a.stats ? 0 : 4 * C + 4 + n * (4 * C + 2 * HID + 3 * P))]);
        A* next = memory.get();
        auto take = [&](void* given, i64 size) {
            return given ? static_cast<A*>(given) : std::exchange(next, next + size);
        };
        scale = take(nullptr, C), shift = take(nullptr, C), invstd = take(nullptr, C);
        kernel = take(nullptr, taps), gates = take(nullptr, n * P);
        mean = take(a.stats, 4 * C), var = mean + C, weight = var + C, bias = weight + C;
        bn_stats = take(a.bn_stats, 4);
        avg = take(a.space, 3 * n * C), maximum = avg + n * C, minimum = maximum + n * C;
        hidden = take(a.hidden, 2 * n * HID), mc = take(a.mc, n * C);
        pooled = take(a.pooled, 2 * n * P), conv = take(a.conv, n * P);
        for (i64 t = 0; n && t < taps; t++)
            kernel[t] = small(a.kernel)[t / (K * K) * a.stride_c + t / K % K * a.stride_y + t % K * a.stride_x];
    }
    static const A* small(const void* p) { return static_cast<const A*>(p); }

    // The forward pass begins with the batch-norms as they are now.
    void read_norms() {
        if (!a.training) std::copy_n(small(a.mean), C, mean), std::copy_n(small(a.var), C, var);
        std::copy_n(small(a.weight), C, weight);
        std::copy_n(small(a.bias), C, bias);
        if (!a.bn_weight) return void(std::fill_n(bn_stats, 4, A(0)));
        bn_stats[0] = *small(a.bn_mean), bn_stats[1] = *small(a.bn_var);
        bn_stats[2] = *small(a.bn_weight), bn_stats[3] = *small(a.bn_bias);
    }

    const T* map(const void* p, i64 sample) const { return static_cast<const T*>(p) + sample * C * P; }
    T* map(void* p, i64 sample) const { return static_cast<T*>(p) + sample * C * P; }

    // Pixels of a piece of work: enough pieces for the threads at batch 1, long enough for the caches otherwise.
    i64 piece(i64 least, i64 most) const { return std::min(P, std::clamp<i64>(padded(B * P / 8), least, most)); }
    i64 chunk() const { return CL ? piece(16, 128) : piece(32, 1024); }
    i64 chunks() const { return (P + chunk() - 1) / chunk(); }

    // Whether each thread takes whole samples. Not where a sample is smaller than the weights of the MLP, which every
    // sample would read again.
    bool by_sample() const { return B > 1 && HID <= P / 4 && (B % a.threads == 0 || B >= 4 * a.threads); }

    template <class F>
    void samples(F&& f) {
        if (by_sample()) {
            par(B, 1, [&](i64 b0, i64 b1) {
                for (i64 b = b0; b < b1; b++) f(b, b + 1);
            });
        } else {
            f(i64(0), B);
        }
    }

    void prepare() {
        for (i64 c = 0; c < C; c++) {
            // As PyTorch: in training the root is computed in double.
            if (a.training) invstd[c] = static_cast<A>(1 / std::sqrt(static_cast<double>(var[c]) + a.eps));
            else invstd[c] = 1 / std::sqrt(var[c] + static_cast<A>(a.eps));
            if (a.round_invstd) invstd[c] = static_cast<float>(bfloat16(static_cast<float>(invstd[c])));
            scale[c] = invstd[c] * weight[c];
            shift[c] = mad(-mean[c], scale[c], bias[c]);
        }
    }

    // F at one element, as PyTorch's batch-norm rounds it
    static A norm(A x, A scale, A shift) { return static_cast<A>(static_cast<T>(mad(x, scale, shift))); }

    A pooled_avg(i64 b, i64 c) const { return mad(avg[b * C + c] - mean[c], scale[c], bias[c]); }
    A pooled_max(i64 b, i64 c) const {
        // F falls with x where the scale is negative, and is constant or NaN where it is zero.
        return larger(norm(maximum[b * C + c], scale[c], shift[c]), norm(minimum[b * C + c], scale[c], shift[c]));
    }
    A top(i64 b, i64 c) const { return scale[c] < 0 ? minimum[b * C + c] : maximum[b * C + c]; }

    // ---- forward

    // Mean and variance over batch and space in the very order of PyTorch's contiguous loops, element by element in
    // double; several channels at a time, because one addition waits for the one before. While a channel is in the
    // cache, its poolings over space are computed, too.
    void collect() {
        constexpr i64 G = 8;
        par((C + G - 1) / G, 1, [&](i64 s, i64 e) {
            for (i64 group = s; group < e; group++) {
                i64 c0 = group * G, n = std::min(G, C - c0);
                double sum[G] = {}, square[G] = {};
                A m[G] = {};
                // the usual number of channels as a constant, so that the compiler unrolls the loop over them
                auto each = [&](i64 b, auto&& f) {
                    const T* R x = map(a.x, b) + c0 * P;
                    for (i64 p = 0; p < P; p++) {
                        if (n == G)
                            for (i64 j = 0; j < G; j++) f(j, static_cast<A>(x[j * P + p]));
                        else
                            for (i64 j = 0; j < n; j++) f(j, static_cast<A>(x[j * P + p]));
                    }
                };
                for (i64 b = 0; b < B; b++) each(b, [&](i64 j, A v) { sum[j] += static_cast<double>(v); });
                for (i64 j = 0; j < n; j++) mean[c0 + j] = m[j] = static_cast<A>(sum[j] / (B * P));
                for (i64 b = 0; b < B; b++) {
                    each(b, [&](i64 j, A v) { square[j] += static_cast<double>((v - m[j]) * (v - m[j])); });
                    pool_rows(b * C + c0, b * C + c0 + n);
                }
                for (i64 j = 0; j < n; j++) var[c0 + j] = static_cast<A>(square[j]) / static_cast<A>(B * P);
            }
        });
    }

    void pool_rows(i64 begin, i64 end) {
        for (i64 i = begin; i < end; i++) {
            const T* R x = static_cast<const T*>(a.x) + i * P;
            constexpr i64 N = 2 * LANES;
            A sums[N] = {}, highs[N], lows[N];
            std::fill(highs, highs + N, -INF);
            std::fill(lows, lows + N, INF);
            auto add = [&](i64 p, i64 lanes) {
#pragma omp simd
                for (i64 l = 0; l < lanes; l++) {
                    const A v = static_cast<A>(x[p + l]);
                    sums[l] += v;
                    highs[l] = highs[l] > v ? highs[l] : v;
                    lows[l] = lows[l] < v ? lows[l] : v;
                }
            };
            i64 p = 0;
            for (; p + N <= P; p += N) add(p, N);
            if (p < P) add(p, P - p);
            const A sum = reduce<N>(sums, [](A u, A v) { return u + v; });
            A high = reduce<N>(highs, [](A u, A v) { return u > v ? u : v; });
            A low = reduce<N>(lows, [](A u, A v) { return u < v ? u : v; });
            if (sum != sum)
                for (i64 p = 0; p < P; p++)
                    if (A v = static_cast<A>(x[p]); v != v) high = low = v;
            avg[i] = sum / static_cast<A>(P);
            maximum[i] = high;
            minimum[i] = low;
        }
    }

    void pool_space(i64 b0, i64 b1) {
        if (!CL) return par((b1 - b0) * C, 16384 / P, [&](i64 s, i64 e) { pool_rows(b0 * C + s, b0 * C + e); });
        const i64 size = chunk(), n = chunks();
        std::unique_ptr<A[]> parts(new A[(b1 - b0) * n * 3 * C]);
        par((b1 - b0) * n, 1, [&](i64 s, i64 e) {
            for (i64 i = s; i < e; i++) {
                const i64 p0 = i % n * size, p1 = std::min(P, p0 + size);
                A *R sum = parts.get() + i * 3 * C, *R high = sum + C, *R low = high + C;
                const T* R x = map(a.x, b0 + i / n) + p0 * C;
                for (i64 c = 0; c < C; c++) sum[c] = high[c] = low[c] = static_cast<A>(x[c]);
                x += C;
                i64 p = p0 + 1;
                for (; p + 4 <= p1; p += 4, x += 4 * C) {
#pragma omp simd
                    for (i64 c = 0; c < C; c++) {
                        A u = static_cast<A>(x[c]), v = static_cast<A>(x[C + c]);
                        A s2 = static_cast<A>(x[2 * C + c]), t = static_cast<A>(x[3 * C + c]);
                        sum[c] += (u + v) + (s2 + t);
                        A uv = u > v ? u : v, st = s2 > t ? s2 : t, top4 = uv > st ? uv : st;
                        high[c] = high[c] > top4 ? high[c] : top4;
                        uv = u < v ? u : v, st = s2 < t ? s2 : t, top4 = uv < st ? uv : st;
                        low[c] = low[c] < top4 ? low[c] : top4;
                    }
                }
                for (; p < p1; p++, x += C) {
#pragma omp simd
                    for (i64 c = 0; c < C; c++) {
                        A v = static_cast<A>(x[c]);
                        sum[c] += v;
                        high[c] = high[c] > v ? high[c] : v;
                        low[c] = low[c] < v ? low[c] : v;
                    }
                }
            }
        });
        par((b1 - b0) * C, 4096, [&](i64 s, i64 e) {
            for (i64 i = s; i < e; i++) {
                const i64 b = i / C, c = i % C;
                const A* R part = parts.get() + b * n * 3 * C + c;
                A sum = 0, high = -INF, low = INF;
                for (i64 j = 0; j < n; j++) {
                    sum += part[3 * j * C];
                    high = std::max(high, part[(3 * j + 1) * C]);
                    low = std::min(low, part[(3 * j + 2) * C]);
                }
                const i64 to = (b0 + b) * C + c;
                if (sum != sum) {
                    const T* R x = map(a.x, b0 + b) + c;
                    for (i64 p = 0; p < P; p++)
                        if (A v = static_cast<A>(x[p * C]); v != v) high = low = v;
                }
                avg[to] = sum / static_cast<A>(P);
                maximum[to] = high;
                minimum[to] = low;
            }
        });
    }

    void channel_gate(i64 b0, i64 b1) {
        std::unique_ptr<A[]> values(new A[2 * (b1 - b0) * C]);  // F's pooled, [b][avg, max][c]
        for (i64 b = b0; b < b1; b++)
            for (i64 c = 0; c < C; c++) {
                values[2 * (b - b0) * C + c] = pooled_avg(b, c);
                values[(2 * (b - b0) + 1) * C + c] = pooled_max(b, c);
            }
        par(HID, 65536 / (C * (b1 - b0)), [&](i64 s, i64 e) {
            for (i64 r = s; r < e; r++) {
                const A *R w = fc1 + r * C, start = fc1_bias ? fc1_bias[r] : 0;
                for (i64 b = b0; b < b1; b++) {
                    const A *R u = &values[2 * (b - b0) * C], *R v = u + C;
                    A t0 = 0, t1 = 0;
#pragma omp simd reduction(+ : t0, t1)
                    for (i64 c = 0; c < C; c++) {
                        t0 += w[c] * u[c];
                        t1 += w[c] * v[c];
                    }
                    hidden[b * HID + r] = t0 + start;
                    hidden[(B + b) * HID + r] = t1 + start;
                }
            }
        });
        std::unique_ptr<A[]> active(new A[(b1 - b0) * HID]);
        activate(b0, b1, active.get());
        par(C, 65536 / (HID * (b1 - b0)), [&](i64 s, i64 e) {
            for (i64 b = b0; b < b1; b++) {
                const A* R h = &active[(b - b0) * HID];
                for (i64 c = s; c < e; c++) {
                    const A* R w = fc2 + c * HID;
                    A t = 0;
#pragma omp simd reduction(+ : t)
                    for (i64 r = 0; r < HID; r++) t += w[r] * h[r];
                    mc[b * C + c] = fc2_bias ? t + 2 * fc2_bias[c] : t;
                }
                for (i64 c = s; c < e; c++) mc[b * C + c] = sigmoid(mc[b * C + c]);
            }
        });
    }
    void activate(i64 b0, i64 b1, A* R active) const {
        for (i64 i = 0; i < (b1 - b0) * HID; i++)
            active[i] = relu(hidden[b0 * HID + i]) + relu(hidden[(B + b0) * HID + i]);
    }

    void pool_channels(i64 b0, i64 b1) {
        if (!CL) return pool_channel_groups(b0, b1);
        const i64 size = chunk(), n = chunks();
        par((b1 - b0) * n, 1, [&](i64 s, i64 e) {
            for (i64 i = s; i < e; i++) {
                const i64 b = b0 + i / n, p0 = i % n * size, m = std::min(size, P - p0);
                A *R sum = pooled + 2 * b * P + p0, *R high = sum + P;
                const T* x = map(a.x, b) + p0 * C;
                i64 p = 0;
                for (; p + 4 <= m; p += 4) pool_pixels<4>(x + p * C, mc + b * C, sum + p, high + p);
                for (; p < m; p++) pool_pixels<1>(x + p * C, mc + b * C, sum + p, high + p);
                finish_pixels(b, p0, p0 + m);
            }
        });
    }
    void finish_pixels(i64 b, i64 p0, i64 p1) {
        A *R sum = pooled + 2 * b * P, *R high = sum + P;
        for (i64 p = p0; p < p1; p++) {
            if (sum[p] != sum[p]) high[p] = largest(b, p);
            sum[p] /= static_cast<A>(C);
        }
    }

    // NCHW: groups of channels, so that a thread gets those that it has in its cache from the pooling over space.
    void pool_channel_groups(i64 b0, i64 b1) {
        constexpr i64 SIZE = 1024;  // pixels at a time
        const i64 groups = std::max<i64>(1, 8 / B), per_group = (C + 4 * groups - 1) / (4 * groups) * 4;
        const i64 n = (C + per_group - 1) / per_group;
        std::unique_ptr<A[]> parts(new A[n > 1 ? (b1 - b0) * n * 2 * P : 0]);
        par((b1 - b0) * n, 1, [&](i64 s, i64 e) {
            for (i64 i = s; i < e; i++) {
                const i64 b = b0 + i / n, c0 = i % n * per_group, c1 = std::min(C, c0 + per_group);
                A* all = n > 1 ? &parts[i * 2 * P] : pooled + 2 * b * P;
                for (i64 p = 0; p < P; p += SIZE)
                    pool_group(b, c0, c1, p, std::min(SIZE, P - p), all + p, all + P + p);
                if (n == 1) finish_pixels(b, 0, P);
            }
        });
        if (n == 1) return;
        par((b1 - b0) * P, 8192, [&](i64 s, i64 e) {
            for (i64 i = s; i < e; i++) {
                const i64 b = i / P, p = i % P;
                const A* R part = &parts[b * n * 2 * P + p];
                A sum = 0, high = -INF;
                for (i64 j = 0; j < n; j++) {
                    sum += part[2 * j * P];
                    high = std::max(high, part[(2 * j + 1) * P]);
                }
                pooled[2 * (b0 + b) * P + p] = sum;
                pooled[(2 * (b0 + b) + 1) * P + p] = high;
                finish_pixels(b0 + b, p, p + 1);
            }
        });
    }
    void pool_group(i64 b, i64 c0, i64 c1, i64 p0, i64 m, A* R sum, A* R high) const {
        for (i64 p = 0; p < m; p++) sum[p] = 0, high[p] = -INF;
        const T* R x = map(a.x, b) + p0;
        const A* R gate = mc + b * C;
        i64 c = c0;
        for (; c + 4 <= c1; c += 4) {
            const T *R x0 = x + c * P, *R x1 = x0 + P, *R x2 = x1 + P, *R x3 = x2 + P;
            const A *R k = scale + c, *R d = shift + c, *R q = gate + c;
#pragma omp simd
            for (i64 p = 0; p < m; p++) {
                A v0 = norm(static_cast<A>(x0[p]), k[0], d[0]) * q[0];
                A v1 = norm(static_cast<A>(x1[p]), k[1], d[1]) * q[1];
                A v2 = norm(static_cast<A>(x2[p]), k[2], d[2]) * q[2];
                A v3 = norm(static_cast<A>(x3[p]), k[3], d[3]) * q[3];
                sum[p] += (v0 + v1) + (v2 + v3);
                A u = v0 > v1 ? v0 : v1, v = v2 > v3 ? v2 : v3, h = u > v ? u : v;
                high[p] = high[p] > h ? high[p] : h;
            }
        }
        for (; c < c1; c++) {
#pragma omp simd
            for (i64 p = 0; p < m; p++) {
                A v = norm(static_cast<A>(x[c * P + p]), scale[c], shift[c]) * gate[c];
                sum[p] += v;
                high[p] = high[p] > v ? high[p] : v;
            }
        }
    }
    // Channels-last: N pixels at a time, which share what is loaded per channel and the sums over the lanes at the end
    template <int N>
    void pool_pixels(const T* R x, const A* R gate, A* R sum, A* R high) const {
        A t[N][LANES] = {}, h[N][LANES];
        for (int n = 0; n < N; n++)
            for (i64 l = 0; l < LANES; l++) h[n][l] = -INF;
        auto add = [&](i64 c, i64 lanes) {
            for (int n = 0; n < N; n++) {
#pragma omp simd
                for (i64 l = 0; l < lanes; l++) {
                    const A v = norm(static_cast<A>(x[n * C + c + l]), scale[c + l], shift[c + l]) * gate[c + l];
                    t[n][l] += v;
                    h[n][l] = h[n][l] > v ? h[n][l] : v;
                }
            }
        };
        i64 c = 0;
        for (; c + LANES <= C; c += LANES) add(c, LANES);
        if (c < C) add(c, C - c);
        for (int n = 0; n < N; n++) {
            sum[n] = reduce(t[n], [](A u, A v) { return u + v; });
            high[n] = reduce(h[n], [](A u, A v) { return u > v ? u : v; });
        }
    }
    // By halves, which the compiler does with few instructions
    template <i64 N = LANES, class F>
    static A reduce(A* lanes, F&& f) {
        for (i64 half = N / 2; half; half /= 2)
            for (i64 l = 0; l < half; l++) lanes[l] = f(lanes[l], lanes[l + half]);
        return lanes[0];
    }

    // The maximum over the channels where there may be NaN
    A largest(i64 b, i64 p) const {
        A high = -INF;
        for (i64 c = 0; c < C; c++) {
            A x = static_cast<A>(map(a.x, b)[CL ? p * C + c : c * P + p]);
            high = larger(norm(x, scale[c], shift[c]) * mc[b * C + c], high);
        }
        return high;
    }

    // Rows y0 - Q .. y1 + Q of an image between zeros, width `stride` with its first column at Q
    void pad(const A* R image, A* R to, i64 y0, i64 y1, i64 stride) const {
        std::fill(to, to + (y1 - y0 + 2 * Q) * stride, A(0));
        for (i64 y = std::max<i64>(0, y0 - Q); y < std::min(H, y1 + Q); y++)
            std::copy(image + y * W, image + (y + 1) * W, to + (y - y0 + Q) * stride + Q);
    }
    i64 stride() const { return padded(W) + padded(2 * Q); }

    // N times LANES pixels at a time: one addition waits for the one before, and they share what is loaded of the kernel.
    void convolve(i64 b0, i64 b1) {
        constexpr int N = 4;
        const i64 rows = std::min<i64>(H, 8), n = (H + rows - 1) / rows, plane = (rows + 2 * Q) * stride();
        par((b1 - b0) * n, 1, [&](i64 s, i64 e) {
            std::unique_ptr<A[]> images(new A[2 * plane]);
            for (i64 i = s; i < e; i++) {
                const i64 b = b0 + i / n, y0 = i % n * rows, y1 = std::min(H, y0 + rows);
                for (i64 ch = 0; ch < 2; ch++) pad(pooled + (2 * b + ch) * P, &images[ch * plane], y0, y1, stride());
                const i64 groups = padded(W) / LANES, blocks = (y1 - y0) * groups;
                for (i64 j = 0; j < blocks; j += N) {
                    const A* start[N];
                    for (int u = 0; u < N; u++) {
                        const i64 block = std::min(j + u, blocks - 1);
                        start[u] = &images[block / groups * stride() + block % groups * LANES];
                    }
                    A sum[N][LANES] = {};
                    for (i64 ch = 0; ch < 2; ch++)
                        for (i64 ky = 0; ky < K; ky++)
                            for (i64 kx = 0; kx < K; kx++) {
                                const A k = kernel[(ch * K + ky) * K + kx];
                                const i64 at = ch * plane + ky * stride() + kx;
                                for (int u = 0; u < N; u++)
                                    for (i64 l = 0; l < LANES; l++) sum[u][l] = mad(k, start[u][at + l], sum[u][l]);
                            }
                    for (int u = 0; u < N && j + u < blocks; u++) {
                        const i64 v = (j + u) % groups * LANES;
                        A* to = conv + b * P + (y0 + (j + u) / groups) * W + v;
                        std::copy(sum[u], sum[u] + std::min(LANES, W - v), to);
                    }
                }
                if (!a.bn_training) spatial_gate(b, y0 * W, y1 * W);
            }
        });
    }

    void collect_bn() {
        double sum = 0, square = 0;
        for (i64 i = 0; i < B * P; i++) sum += conv[i];
        const double m = sum / (B * P);
        for (i64 i = 0; i < B * P; i++) square += (conv[i] - m) * (conv[i] - m);
        bn_stats[0] = static_cast<A>(m);
        bn_stats[1] = static_cast<A>(square / (B * P));
    }
    A bn_invstd() const { return static_cast<A>(1 / std::sqrt(static_cast<double>(bn_stats[1]) + a.bn_eps)); }

    struct Affine {  // (z - mean) * scale + bias
        A mean, scale, bias;
    };
    Affine spatial_norm() const {
        if (!a.bn_weight) return {A(0), A(1), A(0)};
        return {bn_stats[0], bn_invstd() * bn_stats[2], bn_stats[3]};
    }

    // ms of some pixels of a sample, scaled by stochastic depth
    void spatial_gate(i64 b, i64 p0, i64 p1) {
        const A* R z = conv + b * P;
        A* R ms = gates + b * P;
        const A f = factor ? factor[b] : A(1);
        const Affine bn = spatial_norm();
#pragma omp simd
        for (i64 p = p0; p < p1; p++) ms[p] = sigmoid(mad(z[p] - bn.mean, bn.scale, bn.bias)) * f;
    }

    void gate_add(i64 b0, i64 b1) {
        lines(b0, b1, [&](i64 b, i64 j, i64 at) {
            const A *R gate = mc + b * C, *R ms = &gates[b * P];
            const T *x = static_cast<const T*>(a.x) + at, *shortcut = static_cast<const T*>(a.shortcut) + at;
            T* out = static_cast<T*>(a.out) + at;  // may be x
            if (CL) {
                const A m = ms[j];
#pragma omp simd
                for (i64 c = 0; c < C; c++) {
                    const A f = norm(static_cast<A>(x[c]), scale[c], shift[c]) * gate[c];
                    out[c] = relu(mad(f, m, static_cast<A>(shortcut[c])));
                }
            } else {
                const A k = scale[j], d = shift[j], q = gate[j];
#pragma omp simd
                for (i64 p = 0; p < P; p++) {
                    const A f = norm(static_cast<A>(x[p]), k, d) * q;
                    out[p] = relu(mad(f, ms[p], static_cast<A>(shortcut[p])));
                }
            }
        });
    }

    // f(sample, channel or pixel, offset) for all contiguous lines of maps: a channel's pixels or a pixel's channels
    template <class F>
    void lines(i64 b0, i64 b1, F&& f) {
        const i64 n = CL ? P : C, size = CL ? C : P;
        par((b1 - b0) * n, 16384 / size, [&](i64 s, i64 e) {
            i64 b = b0 + s / n, j = s % n;
            for (i64 i = s; i < e; i++) {
                f(b, j, (b0 * n + i) * size);
                if (++j == n) j = 0, b++;
            }
        });
    }

    void forward() {
        read_norms();
        if (a.collect) collect();
        prepare();
        auto first = [&](i64 b0, i64 b1) {
            if (!a.collect) pool_space(b0, b1);
            channel_gate(b0, b1);
            pool_channels(b0, b1);
            convolve(b0, b1);
        };
        auto second = [&](i64 b0, i64 b1) { gate_add(b0, b1); };
        if (a.bn_training) {
            samples(first);
            collect_bn();
            for (i64 b = 0; b < B; b++) spatial_gate(b, 0, P);
            samples(second);
        } else {
            samples([&](i64 b0, i64 b1) { first(b0, b1), second(b0, b1); });
        }
    }

    // ---- backward; names are those of tail.py

    struct Pixels {  // (B, P) each
        A *dms, *ties, *davg, *dmax;
    };
    struct Sums {  // over space, (B, C) each: of dF', of dF' * (x - mean), pixels at the maximum
        A *s0, *s1, *ties;
    };

    // g, dms and, as far as they do not depend on the gates' gradients, the sums
    void backward_a(i64 b0, i64 b1, const Pixels& px, const Sums& sums, A* parts) {
        const i64 size = chunk(), n = chunks();
        for (i64 b = b0; b < b1; b++) spatial_gate(b, 0, P);
        par((b1 - b0) * n, 1, [&](i64 s, i64 e) {
            for (i64 i = s; i < e; i++) {
                const i64 b = b0 + i / n, j = i % n, p0 = j * size, m = std::min(size, P - p0);
                const A *R gate = mc + b * C, *R ms = &gates[b * P] + p0, *R high = pooled + (2 * b + 1) * P + p0;
                A *R dms = px.dms + b * P + p0, *R ties = px.ties + b * P + p0;
                A *R s0 = parts + (b * n + j) * 3 * C, *R s1 = s0 + C, *R at_top = s1 + C;
                if (CL) {
                    const i64 at = p0 * C;
                    const T *R x = map(a.x, b) + at, *R grad = map(a.grad, b) + at;
                    const T* R out = map(static_cast<const void*>(a.out), b) + at;
                    T* R g = map(a.g, b) + at;
                    std::unique_ptr<A[]> tops(new A[C]);
                    A* R top_f = tops.get();
                    for (i64 c = 0; c < C; c++) s0[c] = s1[c] = at_top[c] = 0, top_f[c] = pooled_max(b, c);
                    const Channels channels{gate, top_f, s0, s1, at_top};
                    i64 p = 0;
                    for (; p + 4 <= m; p += 4) pixels_a<4>(p, x, grad, out, g, channels, ms, high, dms, ties);
                    for (; p < m; p++) pixels_a<1>(p, x, grad, out, g, channels, ms, high, dms, ties);
                } else {
                    for (i64 p = 0; p < m; p++) dms[p] = ties[p] = 0;
                    for (i64 c = 0; c < C; c++) {
                        const i64 at = c * P + p0;
                        const T *R x = map(a.x, b) + at, *R grad = map(a.grad, b) + at;
                        const T* R out = map(static_cast<const void*>(a.out), b) + at;
                        T* R g = map(a.g, b) + at;
                        const A k = scale[c], d = shift[c], q = gate[c], centre = mean[c], top_f = pooled_max(b, c);
                        A t0 = 0, t1 = 0, count = 0;
#pragma omp simd reduction(+ : t0, t1, count)
                        for (i64 p = 0; p < m; p++) {
                            const A v = static_cast<A>(x[p]);
                            const A u = static_cast<A>(out[p]) <= 0 ? A(0) : static_cast<A>(grad[p]);
                            g[p] = u;
                            const A f = norm(v, k, d), gated = f * q;
                            dms[p] += u * gated;
                            ties[p] += gated == high[p] ? A(1) : A(0);
                            t0 += u * ms[p];
                            t1 += u * ms[p] * (v - centre);
                            count += f == top_f ? A(1) : A(0);
                        }
                        s0[c] = t0, s1[c] = t1, at_top[c] = count;
                    }
                }
            }
        });
        par((b1 - b0) * C, 4096, [&](i64 s, i64 e) {
            for (i64 i = s; i < e; i++) {
                const i64 b = b0 + i / C, c = i % C;
                const A* R part = parts + b * n * 3 * C + c;
                A t0 = 0, t1 = 0, count = 0;
                for (i64 j = 0; j < n; j++) {
                    t0 += part[3 * j * C];
                    t1 += part[(3 * j + 1) * C];
                    count += part[(3 * j + 2) * C];
                }
                sums.s0[b * C + c] = t0, sums.s1[b * C + c] = t1, sums.ties[b * C + c] = count;
            }
        });
    }

    struct Channels {  // of one sample, (C,)
        const A *gate, *top_f;
        A *s0, *s1, *at_top;
    };

    // Channels-last: N pixels at a time, from the p-th on, as in pool_pixels
    template <int N>
    void pixels_a(
            i64 p, const T* R x, const T* R grad, const T* R out, T* R g, const Channels& channels, const A* R ms,
            const A* R high, A* R dms, A* R ties) const {
        x += p * C, grad += p * C, out += p * C, g += p * C, ms += p, high += p, dms += p, ties += p;
        A t[N][LANES] = {}, count[N][LANES] = {};
        const A *R gate = channels.gate, *R top_f = channels.top_f;
        A *R s0 = channels.s0, *R s1 = channels.s1, *R at_top = channels.at_top;
        auto add = [&](i64 c0, i64 lanes) {
#pragma omp simd
            for (i64 l = 0; l < lanes; l++) {
                const i64 c = c0 + l;
                A sum0 = 0, sum1 = 0, tops = 0;
                for (int n = 0; n < N; n++) {
                    const A v = static_cast<A>(x[n * C + c]);
                    const A q = static_cast<A>(out[n * C + c]) <= 0 ? A(0) : static_cast<A>(grad[n * C + c]);
                    g[n * C + c] = q;
                    const A f = norm(v, scale[c], shift[c]), gated = f * gate[c];
                    t[n][l] += q * gated;
                    count[n][l] += gated == high[n] ? A(1) : A(0);
                    sum0 += q * ms[n];
                    sum1 += q * ms[n] * (v - mean[c]);
                    tops += f == top_f[c] ? A(1) : A(0);
                }
                s0[c] += sum0;
                s1[c] += sum1;
                at_top[c] += tops;
            }
        };
        i64 c = 0;
        for (; c + LANES <= C; c += LANES) add(c, LANES);
        if (c < C) add(c, C - c);
        for (int n = 0; n < N; n++) {
            dms[n] = reduce(t[n], [](A u, A v) { return u + v; });
            ties[n] = reduce(count[n], [](A u, A v) { return u + v; });
        }
    }

    // dms to the gradient of the spatial batch-norm's output, in place
    void backward_sigmoid(i64 b0, i64 b1, const Pixels& px) {
        for (i64 b = b0; b < b1; b++) {
            const A f = factor ? factor[b] : A(1);
            A *R dms = px.dms + b * P;
            const A* R z = conv + b * P;
            const Affine bn = spatial_norm();
#pragma omp simd
            for (i64 p = 0; p < P; p++) {
                const A gate = sigmoid(mad(z[p] - bn.mean, bn.scale, bn.bias));
                dms[p] = dms[p] * f * gate * (1 - gate);
            }
        }
    }

    void backward_bn(const Pixels& px) {
        const A m = bn_stats[0], inv = bn_invstd();
        double s0 = 0, s1 = 0;
        for (i64 i = 0; i < B * P; i++) s0 += px.dms[i], s1 += px.dms[i] * ((conv[i] - m) * inv);
        A* dbn = static_cast<A*>(a.dbn);
        dbn[0] = static_cast<A>(s1), dbn[1] = static_cast<A>(s0);
        const A k = *small(a.bn_weight) * inv, n = static_cast<A>(B * P);
        const A k0 = a.bn_training ? static_cast<A>(s0) / n : A(0), k1 = a.bn_training ? static_cast<A>(s1) / n : A(0);
        for (i64 i = 0; i < B * P; i++) px.dms[i] = k * (px.dms[i] - k0 - (conv[i] - m) * inv * k1);
    }

    // Gradients of the 7x7 convolution's input (as davg, dmax: what each channel, each tied channel, gets) and kernel
    void backward_conv(i64 b0, i64 b1, const Pixels& px, A* dkernels) {
        const i64 wide = stride(), plane = (H + 2 * Q) * wide, taps = 2 * K * K;
        par(b1 - b0, 1, [&](i64 s, i64 e) {
            std::unique_ptr<A[]> memory(new A[3 * plane + taps * LANES]);
            A *dz = memory.get(), *images = dz + plane, *sums = images + 2 * plane;
            for (i64 b = b0 + s; b < b0 + e; b++) {
                pad(px.dms + b * P, dz, 0, H, wide);
                for (i64 ch = 0; ch < 2; ch++) pad(pooled + (2 * b + ch) * P, images + ch * plane, 0, H, wide);
                std::fill(sums, sums + taps * LANES, A(0));
                for (i64 y = 0; y < H; y++)
                    for (i64 v = 0; v < W; v += LANES) {
                        const i64 n = std::min(LANES, W - v);
                        A d[LANES] = {};  // zero behind the row, where `images` may have the padding only
                        std::copy(px.dms + b * P + y * W + v, px.dms + b * P + y * W + v + n, d);
                        for (i64 ch = 0; ch < 2; ch++) {
                            A back[LANES] = {};
                            for (i64 ky = 0; ky < K; ky++) {
                                const A* R row = images + ch * plane + (y + ky) * wide + v;
                                const A* R behind = dz + (y + 2 * Q - ky) * wide + v;
                                const A* R k = kernel + (ch * K + ky) * K;
                                A* R sum = sums + (ch * K + ky) * K * LANES;
                                for (i64 kx = 0; kx < K; kx++) {
                                    for (i64 l = 0; l < LANES; l++)
                                        back[l] = mad(k[kx], behind[2 * Q - kx + l], back[l]);
                                    for (i64 l = 0; l < LANES; l++)
                                        sum[kx * LANES + l] = mad(d[l], row[kx + l], sum[kx * LANES + l]);
                                }
                            }
                            std::copy(back, back + n, (ch ? px.dmax : px.davg) + b * P + y * W + v);
                        }
                    }
                for (i64 t = 0; t < taps; t++) {
                    A sum = 0;
                    for (i64 l = 0; l < LANES; l++) sum += sums[t * LANES + l];
                    dkernels[b * taps + t] = sum;
                }
                A *R davg = px.davg + b * P, *R dmax = px.dmax + b * P;
                const A* R ties = px.ties + b * P;
                for (i64 p = 0; p < P; p++) davg[p] /= static_cast<A>(C), dmax[p] /= ties[p];
            }
        });
    }

    // What pooling over the channels adds to the sums
    void backward_b(i64 b0, i64 b1, const Pixels& px, const Sums& sums, A* parts) {
        if (!CL) {
            par((b1 - b0) * C, 16384 / P, [&](i64 s, i64 e) {
                for (i64 i = b0 * C + s; i < b0 * C + e; i++) {
                    const i64 b = i / C, c = i % C;
                    const T* R x = static_cast<const T*>(a.x) + i * P;
                    const A *R davg = px.davg + b * P, *R dmax = px.dmax + b * P, *R high = pooled + (2 * b + 1) * P;
                    const A k = scale[c], d = shift[c], q = mc[i], centre = mean[c];
                    A t0 = 0, t1 = 0;
#pragma omp simd reduction(+ : t0, t1)
                    for (i64 p = 0; p < P; p++) {
                        const A v = static_cast<A>(x[p]);
                        const A u = davg[p] + (norm(v, k, d) * q == high[p] ? dmax[p] : A(0));
                        t0 += u;
                        t1 += u * (v - centre);
                    }
                    sums.s0[i] += t0, sums.s1[i] += t1;
                }
            });
            return;
        }
        const i64 size = chunk(), n = chunks();
        par((b1 - b0) * n, 1, [&](i64 s, i64 e) {
            for (i64 i = s; i < e; i++) {
                const i64 b = b0 + i / n, j = i % n, p0 = j * size, p1 = std::min(P, p0 + size);
                const A *R davg = px.davg + b * P, *R dmax = px.dmax + b * P, *R high = pooled + (2 * b + 1) * P;
                const A* R gate = mc + b * C;
                A *R s0 = parts + (b * n + j) * 3 * C, *R s1 = s0 + C;
                const T* R x = map(a.x, b) + p0 * C;
                for (i64 c = 0; c < C; c++) s0[c] = s1[c] = 0;
                i64 p = p0;
                for (; p + 4 <= p1; p += 4, x += 4 * C) pixels_b<4>(x, gate, davg + p, dmax + p, high + p, s0, s1);
                for (; p < p1; p++, x += C) pixels_b<1>(x, gate, davg + p, dmax + p, high + p, s0, s1);
            }
        });
        par((b1 - b0) * C, 4096, [&](i64 s, i64 e) {
            for (i64 i = s; i < e; i++) {
                const i64 b = b0 + i / C, c = i % C;
                for (i64 j = 0; j < n; j++) {
                    sums.s0[b * C + c] += parts[(b * n + j) * 3 * C + c];
                    sums.s1[b * C + c] += parts[((b * n + j) * 3 + 1) * C + c];
                }
            }
        });
    }

    template <int N>
    void pixels_b(
            const T* R x, const A* R gate, const A* R davg, const A* R dmax, const A* R high, A* R s0, A* R s1) const {
        A even[N], most[N], highest[N];  // loaded here, or else in each turn of the loop, which is not vectorised then
        for (int n = 0; n < N; n++) even[n] = davg[n], most[n] = dmax[n], highest[n] = high[n];
#pragma omp simd
        for (i64 c = 0; c < C; c++) {
            A sum0 = 0, sum1 = 0;
            for (int n = 0; n < N; n++) {
                const A v = static_cast<A>(x[n * C + c]);
                const A u = even[n] + (norm(v, scale[c], shift[c]) * gate[c] == highest[n] ? most[n] : A(0));
                sum0 += u;
                sum1 += u * (v - mean[c]);
            }
            s0[c] += sum0;
            s1[c] += sum1;
        }
    }

    // The gradients of the MLP's weights, and of F's average and maximum over space, (2, B, C)
    void backward_mlp(const Sums& sums, A* dpooled) {
        std::unique_ptr<A[]> memory(new A[B * C + 3 * B * HID + 2 * B * C]);
        A *dlogit = memory.get(), *active = dlogit + B * C, *dpre = active + B * HID, *values = dpre + 2 * B * HID;
        for (i64 b = 0; b < B; b++)
            for (i64 c = 0; c < C; c++) {
                const i64 i = b * C + c;
                dlogit[i] = (scale[c] * sums.s1[i] + bias[c] * sums.s0[i]) * mc[i] * (1 - mc[i]);
                values[i] = pooled_avg(b, c);
                values[B * C + i] = pooled_max(b, c);
            }
        activate(0, B, active);
        A *dfc1 = static_cast<A*>(a.dfc1), *dfc2 = static_cast<A*>(a.dfc2);
        par(B, 1, [&](i64 s, i64 e) {
            for (i64 b = s; b < e; b++) {
                A *R u = dpre + b * HID, *R v = dpre + (B + b) * HID;
                for (i64 r = 0; r < HID; r++) u[r] = 0;
                for (i64 c = 0; c < C; c++) {
                    const A d = dlogit[b * C + c];
                    const A* R w = fc2 + c * HID;
                    for (i64 r = 0; r < HID; r++) u[r] = mad(d, w[r], u[r]);
                }
                for (i64 r = 0; r < HID; r++) {
                    const A d = u[r];
                    u[r] = hidden[b * HID + r] <= 0 ? A(0) : d;
                    v[r] = hidden[(B + b) * HID + r] <= 0 ? A(0) : d;
                }
            }
        });
        par(C, 65536 / (HID * B), [&](i64 s, i64 e) {
            for (i64 c = s; c < e; c++) {
                A* R d = dfc2 + c * HID;
                for (i64 r = 0; r < HID; r++) d[r] = 0;
                A total = 0;
                for (i64 b = 0; b < B; b++) {
                    const A u = dlogit[b * C + c];
                    const A* R h = active + b * HID;
                    for (i64 r = 0; r < HID; r++) d[r] = mad(u, h[r], d[r]);
                    total += u;
                }
                static_cast<A*>(a.dfc2_bias)[c] = 2 * total;
            }
        });
        par(HID, 32768 / (C * B), [&](i64 s, i64 e) {
            for (i64 r = s; r < e; r++) {
                A* R d = dfc1 + r * C;
                for (i64 c = 0; c < C; c++) d[c] = 0;
                A total = 0;
                for (i64 i = 0; i < 2 * B; i++) {  // both poolings of all samples
                    const A u = dpre[i * HID + r];
                    const A* R value = values + i * C;
                    for (i64 c = 0; c < C; c++) d[c] = mad(u, value[c], d[c]);
                    total += u;
                }
                static_cast<A*>(a.dfc1_bias)[r] = total;
            }
        });
        par(2 * B, 1, [&](i64 s, i64 e) {
            for (i64 i = s; i < e; i++) {
                A* R d = dpooled + i * C;
                for (i64 c = 0; c < C; c++) d[c] = 0;
                for (i64 r = 0; r < HID; r++) {
                    const A u = dpre[i * HID + r];
                    const A* R w = fc1 + r * C;
                    for (i64 c = 0; c < C; c++) d[c] = mad(u, w[c], d[c]);
                }
            }
        });
    }

    struct Factors {  // dx = gate * dF' + [F at its maximum] * tie + centred * (x - mean) + rest; all (B, C)
        A *gate, *tie, *rest, *centred;
    };

    void backward_norm(const Sums& sums, const A* dpooled, const Factors& f) {
        A *dweight = static_cast<A*>(a.dweight), *dbias = static_cast<A*>(a.dbias);
        par(C, 4096 / B, [&](i64 s, i64 e) {
            for (i64 c = s; c < e; c++) {
                double s0 = 0, s1 = 0;
                for (i64 b = 0; b < B; b++) {
                    const i64 i = b * C + c;
                    // Where F is constant all pixels share the maximum, so that on average it is at the average.
                    const A x = scale[c] == 0 ? avg[i] : top(b, c), davg = dpooled[i], dmax = dpooled[B * C + i];
                    s0 += mc[i] * sums.s0[i] + davg + dmax;
                    s1 += mc[i] * sums.s1[i] + davg * (avg[i] - mean[c]) + dmax * (x - mean[c]);
                }
                dweight[c] = static_cast<A>(s1) * invstd[c];
                dbias[c] = static_cast<A>(s0);
                const A n = static_cast<A>(B * P);
                const A k = small(a.weight)[c] * invstd[c];  // as it is now
                const A k0 = a.training ? k * static_cast<A>(s0) / n : A(0);
                const A k1 = a.training ? k * invstd[c] * invstd[c] * static_cast<A>(s1) / n : A(0);
                for (i64 b = 0; b < B; b++) {
                    const i64 i = b * C + c;
                    f.gate[i] = k * mc[i];
                    f.tie[i] = k * dpooled[B * C + i] / sums.ties[i];
                    f.rest[i] = k * dpooled[i] / static_cast<A>(P) - k0;
                    f.centred[i] = -k1;
                }
            }
        });
    }

    void backward_c(const Pixels& px, const Factors& f) {
        std::unique_ptr<A[]> tops(new A[B * C]);
        for (i64 i = 0; i < B * C; i++) tops[i] = pooled_max(i / C, i % C);
        lines(0, B, [&](i64 b, i64 j, i64 at) {
            const T *R x = static_cast<const T*>(a.x) + at, *R g = static_cast<const T*>(a.g) + at;
            T* R dx = static_cast<T*>(a.dx) + at;
            const A *R ms = &gates[b * P], *R davg = px.davg + b * P, *R dmax = px.dmax + b * P;
            const A* R high = pooled + (2 * b + 1) * P;
            if (CL) {
                const A ms_p = ms[j], avg_p = davg[j], max_p = dmax[j], high_p = high[j];
                const A *R q = mc + b * C, *R top_f = &tops[b * C];
                const A *R kg = f.gate + b * C, *R kt = f.tie + b * C;
                const A *R k0 = f.rest + b * C, *R k1 = f.centred + b * C;
#pragma omp simd
                for (i64 c = 0; c < C; c++) {
                    const A v = static_cast<A>(x[c]), value = norm(v, scale[c], shift[c]);
                    const A u = mad(static_cast<A>(g[c]), ms_p, avg_p) + (value * q[c] == high_p ? max_p : A(0));
                    const A tie = value == top_f[c] ? kt[c] : A(0);
                    dx[c] = mad(kg[c], u, mad(k1[c], v - mean[c], k0[c])) + tie;
                }
            } else {
                const i64 i = b * C + j;
                const A k = scale[j], d = shift[j], q = mc[i], centre = mean[j], top_f = tops[i];
                const A kg = f.gate[i], kt = f.tie[i], k0 = f.rest[i], k1 = f.centred[i];
#pragma omp simd
                for (i64 p = 0; p < P; p++) {
                    const A v = static_cast<A>(x[p]), value = norm(v, k, d);
                    const A u = mad(static_cast<A>(g[p]), ms[p], davg[p]) + (value * q == high[p] ? dmax[p] : A(0));
                    dx[p] = mad(kg, u, mad(k1, v - centre, k0)) + (value == top_f ? kt : A(0));
                }
            }
        });
    }

    void backward() {
        prepare();
        const i64 taps = 2 * K * K, parts_size = B * chunks() * 3 * C;
        std::unique_ptr<A[]> scratch(new A[4 * B * P + 9 * B * C + B * taps + parts_size]);
        A* next = scratch.get();
        auto take = [&](i64 n) { return std::exchange(next, next + n); };
        const Pixels px{take(B * P), take(B * P), take(B * P), take(B * P)};
        const Sums sums{take(B * C), take(B * C), take(B * C)};
        const Factors f{take(B * C), take(B * C), take(B * C), take(B * C)};
        A *dpooled = take(2 * B * C), *dkernels = take(B * taps), *parts = take(parts_size);
        auto first = [&](i64 b0, i64 b1) {
            backward_a(b0, b1, px, sums, parts);
            backward_sigmoid(b0, b1, px);
        };
        auto second = [&](i64 b0, i64 b1) {
            backward_conv(b0, b1, px, dkernels);
            backward_b(b0, b1, px, sums, parts);
        };
        if (a.bn_weight) {
            samples(first);
            backward_bn(px);
            samples(second);
        } else {
            samples([&](i64 b0, i64 b1) { first(b0, b1), second(b0, b1); });
        }
        A* dkernel = static_cast<A*>(a.dkernel);
        for (i64 t = 0; t < taps; t++) {
            dkernel[t] = 0;
            for (i64 b = 0; b < B; b++) dkernel[t] += dkernels[b * taps + t];
        }
        backward_mlp(sums, dpooled);
        backward_norm(sums, dpooled, f);
        backward_c(px, f);
    }

    // Batch-norm in eval mode, and ReLU, in the place of the map
    void norm_relu(bool with_relu) {
        read_norms();
        prepare();
        lines(0, B, [&](i64, i64 j, i64 at) {
            T* R x = static_cast<T*>(a.out) + at;
            const A least = with_relu ? A(0) : -INF;  // here, or else it is loaded for each element
            if (CL) {
#pragma omp simd
                for (i64 c = 0; c < C; c++) {
                    const A v = norm(static_cast<A>(x[c]), scale[c], shift[c]);
                    x[c] = v <= least ? least : v;
                }
            } else {
                const A k = scale[j], d = shift[j];
#pragma omp simd
                for (i64 p = 0; p < P; p++) {
                    const A v = norm(static_cast<A>(x[p]), k, d);
                    x[p] = v <= least ? least : v;
                }
            }
        });
    }
};

template <class F>
int64_t dispatch(const Args& a, F&& f) {
    try {
        switch (a.dtype * 2 + (a.channels_last != 0)) {
            case 0: f(Tail<float, float, false>(a)); break;
            case 1: f(Tail<float, float, true>(a)); break;
            case 2: f(Tail<double, double, false>(a)); break;
            case 3: f(Tail<double, double, true>(a)); break;
            case 4: f(Tail<bfloat16, float, false>(a)); break;
            case 5: f(Tail<bfloat16, float, true>(a)); break;
            default: return 2;
        }
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

}  // namespace

EXPORT int64_t cbam_abi() { return 2; }
EXPORT void cbam_init(void* address) { parallel_for = reinterpret_cast<ParallelFor>(address); }
EXPORT int64_t cbam_forward(const Args* a) { return dispatch(*a, [](auto&& tail) { tail.forward(); }); }
EXPORT int64_t cbam_backward(const Args* a) { return dispatch(*a, [](auto&& tail) { tail.backward(); }); }
EXPORT int64_t cbam_norm_relu(
        i64 dtype, i64 channels_last, i64 b, i64 c, i64 h, i64 w, double eps, i64 relu, void* x, const void* weight,
        const void* bias, const void* mean, const void* var) {
    Args a{};
    a.dtype = dtype, a.channels_last = channels_last, a.b = b, a.c = c, a.h = h, a.w = w, a.eps = eps;
    a.out = x, a.weight = weight, a.bias = bias, a.mean = mean, a.var = var;
    return dispatch(a, [&](auto&& tail) { tail.norm_relu(relu != 0); });
}
