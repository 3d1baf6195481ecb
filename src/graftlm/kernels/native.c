/* Loops over rows that PyTorch makes several passes of, for float32 and bfloat16 on a processor; see native.py.

   Everything is computed in float32 and rounded once. Row counts, widths and strides are in numbers, not bytes. */
#ifndef NUMBER

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;

static inline float bits_to_float(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
static inline uint32_t float_to_bits(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }
static inline float wide_bf16(bf16 x) { return bits_to_float((uint32_t)x << 16); }
/* To the nearest, ties to even. What is not a number stays so: operations and bfloat16 give it low bits of zero. */
static inline bf16 narrow_bf16(float f) {
    uint32_t bits = float_to_bits(f);
    return (bf16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/* Whole numbers in the order of floats, of which a highest is found many at a time; what is no number is above all. */
static inline int32_t ordered(float f) {
    int32_t bits = (int32_t)float_to_bits(f);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}
static inline float unordered(int32_t order) { return bits_to_float((uint32_t)(order ^ ((order >> 31) & 0x7fffffff))); }

/* exp to two units in the last place (Cephes' polynomial); 0 below -87, the largest at 88. */
static inline float exp_of(float x) {
    float to = x < -87.0f ? -87.0f : x;
    to = to > 88.0f ? 88.0f : to;
    float n = rintf(to * 1.44269504088896341f);
    float r = to - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    y = y * bits_to_float((uint32_t)((int32_t)n + 127) << 23);
    return x < -87.0f ? 0.0f : y;
}

/* A number of 32 bits that looks drawn, for position `at` of the stream `seed` (the finish of MurmurHash3, twice keyed). */
static inline uint32_t drawn(uint32_t at, uint32_t low, uint32_t high) {
    uint32_t h = (at ^ low) * 0x9e3779b9u + high;
    h ^= h >> 16;
    h *= 0x85ebca6bu;
    h ^= h >> 13;
    h *= 0xc2b2ae35u;
    h ^= h >> 16;
    h = (h ^ high) * 0x9e3779b9u;
    return h ^ (h >> 15);
}

#define SILU 0
#define GELU_TANH 1
/* a(x) and its slope. */
static inline float silu(float x) { return x / (1.0f + exp_of(-x)); }
static inline float silu_slope(float x) {
    float s = 1.0f / (1.0f + exp_of(-x));
    return s * (1.0f + x * (1.0f - s));
}
static inline float gelu_bend(float x) {
    float inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
    return 1.0f - 2.0f / (exp_of(2.0f * inner) + 1.0f); /* tanh */
}
static inline float gelu(float x) { return 0.5f * x * (1.0f + gelu_bend(x)); }
static inline float gelu_slope(float x) {
    float t = gelu_bend(x), along = 0.7978845608028654f * (1.0f + 3.0f * 0.044715f * x * x);
    return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * along;
}

#define PARALLEL _Pragma("omp parallel for num_threads(threads) if (threads > 1)")

#define NUMBER float
#define NAME(x) x##_f32
#define WIDE(x) (x)
#define NARROW(x) (x)
#include __FILE__
#undef NUMBER
#undef NAME
#undef WIDE
#undef NARROW
#define NUMBER bf16
#define NAME(x) x##_bf16
#define WIDE(x) wide_bf16(x)
#define NARROW(x) narrow_bf16(x)
#include __FILE__

#else

/* Scores [rows, keys] to chances in place: softmax(scale s), scale above 0. Row r is of query r % queries; it sees `start` + query + 1
   keys where start >= 0, else all, of these those that `mask` has (a byte a key) where there is one. `each` rows share
   one row of masks. */
void NAME(softmax)(NUMBER *scores, int64_t rows, int64_t keys, int64_t queries, int64_t start, float scale,
                   const uint8_t *mask, int64_t each, int64_t mask_row, int64_t mask_query, int64_t threads) {
    PARALLEL
    for (int64_t r = 0; r < rows; r++) {
        NUMBER *own = scores + r * keys;
        int64_t query = r % queries, seen = start < 0 ? keys : start + query + 1;
        if (seen > keys) seen = keys;
        float buffer[seen], highest, sum = 0.0f;
        int32_t top = INT32_MIN;
        if (mask) {
            const uint8_t *see = mask + r / each * mask_row + query * mask_query;
            for (int64_t i = 0; i < seen; i++) {
                buffer[i] = see[i] ? scale * WIDE(own[i]) : -INFINITY;
                int32_t order = ordered(buffer[i]);
                top = order > top ? order : top;
            }
            highest = unordered(top);
            for (int64_t i = 0; i < seen; i++) {
                buffer[i] = exp_of(buffer[i] - highest);
                sum += buffer[i];
            }
        } else {
            for (int64_t i = 0; i < seen; i++) {
                int32_t order = ordered(WIDE(own[i]));
                top = order > top ? order : top;
            }
            highest = scale * unordered(top);
            for (int64_t i = 0; i < seen; i++) {
                buffer[i] = exp_of(scale * WIDE(own[i]) - highest);
                sum += buffer[i];
            }
        }
        float inverse = 1.0f / sum;
        for (int64_t i = 0; i < seen; i++) own[i] = NARROW(buffer[i] * inverse);
        for (int64_t i = seen; i < keys; i++) own[i] = NARROW(0.0f);
    }
}

/* The gradient of chances to that of scores, in place: scale p (g - sum(g p)). */
void NAME(softmax_back)(NUMBER *above, const NUMBER *chances, int64_t rows, int64_t keys, int64_t queries,
                        int64_t start, float scale, int64_t threads) {
    PARALLEL
    for (int64_t r = 0; r < rows; r++) {
        NUMBER *g = above + r * keys;
        const NUMBER *p = chances + r * keys;
        int64_t seen = start < 0 ? keys : start + r % queries + 1;
        float sum = 0.0f;
        if (seen > keys) seen = keys;
        for (int64_t i = 0; i < seen; i++) sum += WIDE(g[i]) * WIDE(p[i]);
        for (int64_t i = 0; i < seen; i++) g[i] = NARROW(scale * WIDE(p[i]) * (WIDE(g[i]) - sum));
        for (int64_t i = seen; i < keys; i++) g[i] = NARROW(0.0f);
    }
}

/* The gradient of a norm's input, for its output h and its rate r a row; see norm.py. */
void NAME(norm_back)(const NUMBER *above, const NUMBER *h, const float *rate, const NUMBER *weight,
                     const NUMBER *bias, NUMBER *out, int64_t rows, int64_t width, int64_t centred, int64_t threads) {
    PARALLEL
    for (int64_t r = 0; r < rows; r++) {
        const NUMBER *g = above + r * width, *y = h + r * width;
        NUMBER *to = out + r * width;
        float share = 0.0f, mean = 0.0f;
        if (bias) {
            for (int64_t i = 0; i < width; i++) share += WIDE(g[i]) * (WIDE(y[i]) - WIDE(bias[i]));
        } else {
            for (int64_t i = 0; i < width; i++) share += WIDE(g[i]) * WIDE(y[i]);
        }
        if (centred)
            for (int64_t i = 0; i < width; i++) mean += WIDE(g[i]) * WIDE(weight[i]);
        share /= (float)width;
        mean /= (float)width;
        float own = rate[r];
        if (bias) {
            for (int64_t i = 0; i < width; i++)
                to[i] = NARROW(own * (WIDE(g[i]) * WIDE(weight[i]) - mean -
                                      (WIDE(y[i]) - WIDE(bias[i])) / WIDE(weight[i]) * share));
        } else {
            for (int64_t i = 0; i < width; i++)
                to[i] = NARROW(own * (WIDE(g[i]) * WIDE(weight[i]) - mean - WIDE(y[i]) / WIDE(weight[i]) * share));
        }
    }
}

/* h = w * (r x), r x rounded in between as the models' own norms do, and r = 1 / sqrt(mean(x^2) + eps). */
void NAME(rms_norm)(const NUMBER *x, const NUMBER *weight, NUMBER *h, float *rate, int64_t rows, int64_t width,
                    float eps, int64_t threads) {
    PARALLEL
    for (int64_t r = 0; r < rows; r++) {
        const NUMBER *from = x + r * width;
        NUMBER *to = h + r * width;
        float sum = 0.0f;
        for (int64_t i = 0; i < width; i++) sum += WIDE(from[i]) * WIDE(from[i]);
        float own = 1.0f / sqrtf(sum / (float)width + eps);
        rate[r] = own;
        for (int64_t i = 0; i < width; i++) to[i] = NARROW(WIDE(weight[i]) * WIDE(NARROW(WIDE(from[i]) * own)));
    }
}

/* act(gate) * up; act(gate) where up is null. */
void NAME(gated)(const NUMBER *gate, const NUMBER *up, NUMBER *out, int64_t count, int64_t kind, int64_t threads) {
    const int64_t piece = 4096;
    PARALLEL
    for (int64_t start = 0; start < count; start += piece) {
        int64_t stop = start + piece < count ? start + piece : count;
        if (kind == SILU && up) {
            for (int64_t i = start; i < stop; i++) out[i] = NARROW(silu(WIDE(gate[i])) * WIDE(up[i]));
        } else if (kind == SILU) {
            for (int64_t i = start; i < stop; i++) out[i] = NARROW(silu(WIDE(gate[i])));
        } else if (up) {
            for (int64_t i = start; i < stop; i++) out[i] = NARROW(gelu(WIDE(gate[i])) * WIDE(up[i]));
        } else {
            for (int64_t i = start; i < stop; i++) out[i] = NARROW(gelu(WIDE(gate[i])));
        }
    }
}

/* The gradients of gate and up for that of the product, `above`, which becomes that of gate; up and its may be null. */
void NAME(gated_back)(NUMBER *above, const NUMBER *gate, const NUMBER *up, NUMBER *above_up, int64_t count,
                      int64_t kind, int64_t threads) {
    const int64_t piece = 4096;
    PARALLEL
    for (int64_t start = 0; start < count; start += piece) {
        int64_t stop = start + piece < count ? start + piece : count;
        if (kind == SILU && up) {
            for (int64_t i = start; i < stop; i++) {
                float g = WIDE(gate[i]), u = WIDE(up[i]), d = WIDE(above[i]), s = 1.0f / (1.0f + exp_of(-g));
                above_up[i] = NARROW(d * g * s);
                above[i] = NARROW(d * u * s * (1.0f + g * (1.0f - s)));
            }
        } else if (kind == SILU) {
            for (int64_t i = start; i < stop; i++) above[i] = NARROW(WIDE(above[i]) * silu_slope(WIDE(gate[i])));
        } else if (up) {
            for (int64_t i = start; i < stop; i++) {
                float g = WIDE(gate[i]), d = WIDE(above[i]);
                above_up[i] = NARROW(d * gelu(g));
                above[i] = NARROW(d * WIDE(up[i]) * gelu_slope(g));
            }
        } else {
            for (int64_t i = start; i < stop; i++) above[i] = NARROW(WIDE(above[i]) * gelu_slope(WIDE(gate[i])));
        }
    }
}

/* losses[r] = logsumexp(scale z) - scale z[label], scale above 0; z becomes that loss's gradient where `needed`. */
void NAME(losses)(NUMBER *logits, const int64_t *labels, float *losses, int64_t rows, int64_t width, float scale,
                  int64_t needed, int64_t threads) {
    PARALLEL
    for (int64_t r = 0; r < rows; r++) {
        NUMBER *z = logits + r * width;
        float *buffer = malloc(sizeof(float) * (size_t)width), highest, at_label = scale * WIDE(z[labels[r]]);
        double total = 0.0;
        int32_t top = INT32_MIN;
        if (!buffer) { /* told by the loss */
            losses[r] = NAN;
            continue;
        }
        for (int64_t i = 0; i < width; i++) {
            int32_t order = ordered(WIDE(z[i]));
            top = order > top ? order : top;
        }
        highest = scale * unordered(top);
        for (int64_t start = 0; start < width; start += 2048) {
            int64_t stop = start + 2048 < width ? start + 2048 : width;
            float sum = 0.0f;
            for (int64_t i = start; i < stop; i++) {
                buffer[i] = exp_of(scale * WIDE(z[i]) - highest);
                sum += buffer[i];
            }
            total += sum;
        }
        losses[r] = (float)(highest - at_label + log(total));
        if (needed) {
            float times = (float)(scale / total), chance = buffer[labels[r]] * times;
            for (int64_t i = 0; i < width; i++) z[i] = NARROW(buffer[i] * times);
            z[labels[r]] = NARROW(chance - scale);
        }
        free(buffer);
    }
}

/* x where it is kept, times `times`, else 0. An entry of the first half is dropped where the low 16 bits of the number of
   its place are below `limit`, one of the second half where the high bits of its fellow's are. */
void NAME(drop)(const NUMBER *x, NUMBER *out, int64_t count, uint64_t seed, uint32_t limit, float times,
                int64_t threads) {
    const uint32_t low = (uint32_t)seed, high = (uint32_t)(seed >> 32);
    const int64_t piece = 4096, half = (count + 1) / 2, pairs = count - half;
    PARALLEL
    for (int64_t start = 0; start < half; start += piece) {
        int64_t stop = start + piece < pairs ? start + piece : pairs;
        uint32_t far = high + (uint32_t)(start >> 32);
        for (int64_t i = start; i < stop; i++) {
            uint32_t number = drawn((uint32_t)i, low, far);
            out[i] = NARROW((number & 0xffffu) < limit ? 0.0f : times * WIDE(x[i]));
            out[i + half] = NARROW((number >> 16) < limit ? 0.0f : times * WIDE(x[i + half]));
        }
        if (half > pairs && pairs >= start && pairs < start + piece)
            out[pairs] =
                NARROW((drawn((uint32_t)pairs, low, far) & 0xffffu) < limit ? 0.0f : times * WIDE(x[pairs]));
    }
}

/* y += x dropped alike. */
void NAME(add_dropped)(NUMBER *y, const NUMBER *x, int64_t count, uint64_t seed, uint32_t limit, float times,
                       int64_t threads) {
    const uint32_t low = (uint32_t)seed, high = (uint32_t)(seed >> 32);
    const int64_t piece = 4096, half = (count + 1) / 2, pairs = count - half;
    PARALLEL
    for (int64_t start = 0; start < half; start += piece) {
        int64_t stop = start + piece < pairs ? start + piece : pairs;
        uint32_t far = high + (uint32_t)(start >> 32);
        for (int64_t i = start; i < stop; i++) {
            uint32_t number = drawn((uint32_t)i, low, far);
            y[i] = NARROW(WIDE(y[i]) + ((number & 0xffffu) < limit ? 0.0f : times * WIDE(x[i])));
            y[i + half] = NARROW(WIDE(y[i + half]) + ((number >> 16) < limit ? 0.0f : times * WIDE(x[i + half])));
        }
        if (half > pairs && pairs >= start && pairs < start + piece) {
            float more = (drawn((uint32_t)pairs, low, far) & 0xffffu) < limit ? 0.0f : times * WIDE(x[pairs]);
            y[pairs] = NARROW(WIDE(y[pairs]) + more);
        }
    }
}

#endif
