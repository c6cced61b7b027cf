/* A foreign runtime that uses the kernels alone: its own weights, memory and ranges. */
#include "nybl.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N = 300, K = 172, M = 5 };

static int failures;

static void expect(const char *what, nybl_status got, nybl_status want)
{
    if (got != want) {
        fprintf(stderr, "%s: %s where %s was expected\n", what, nybl_status_name(got),
                nybl_status_name(want));
        failures++;
    }
}
#define EXPECT(call, want) expect(#call, call, want)

static float noise(uint32_t *state)
{
    *state = *state * 1664525u + 1013904223u;
    return (float)(int32_t)*state / 2147483648.0f;
}

static void *aligned(size_t bytes)
{
    /* The tests of the library itself place buffers against unmapped pages; here malloc will do. */
    void *memory = malloc(bytes);
    if (memory == NULL)
        exit(2);
    return memory;
}

/* The value of a half. */
static double half_value(uint16_t bits)
{
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    double value = exponent == 0 ? ldexp(fraction, -24) : ldexp(1024 + fraction, exponent - 25);
    return bits >> 15 ? -value : value;
}

/* Bias, bounds and halves: what they do to the outputs `plain`. */
static void finish(const nybl_layout *layout, nybl_matmul_args *args, const float *plain)
{
    static float y[M * N], bias[N];
    static uint16_t halves[M * N];
    float *before = args->y;
    int i;

    for (i = 0; i < N; i++)
        bias[i] = (float)i * 0.25f - 3.0f;
    args->bias = bias;
    args->clamp_low = -1.5f;
    args->clamp_high = 6.0f;
    args->y = y;
    EXPECT(nybl_matmul(layout, args), NYBL_OK);
    args->y = NULL;
    args->y_f16 = halves;
    EXPECT(nybl_matmul(layout, args), NYBL_OK);
    for (i = 0; i < M * N; i++) {
        float want = plain[i] + bias[i % N];
        want = want < -1.5f ? -1.5f : want > 6.0f ? 6.0f : want;
        if (y[i] != want || fabs(half_value(halves[i]) - want) > fabs(want) / 2048 + 1e-7) {
            fprintf(stderr, "format %d: output %d with bias is %g and %g, not %g\n",
                    (int)layout->format, i, (double)y[i], half_value(halves[i]), (double)want);
            failures++;
            break;
        }
    }
    args->clamp_low = 7.0f;
    EXPECT(nybl_matmul(layout, args), NYBL_ERR_INVALID_ARGUMENT);
    args->bias = NULL;
    args->clamp_low = args->clamp_high = 0;
    args->y_f16 = NULL;
    EXPECT(nybl_matmul(layout, args), NYBL_ERR_INVALID_ARGUMENT);
    args->y = before;
}

/* Packs random weights, multiplies in two ranges, and compares with the unpacked weights. */
static void multiply(int32_t format, uint32_t group, double tolerance)
{
    static float w[N * K], x[M * K], back[N * K], y[M][N], again[M][N];
    nybl_layout layout = {sizeof layout, format, group, N, K};
    nybl_weights weights = {0};
    nybl_matmul_args args = {0};
    size_t packed_len, scratch_len;
    void *packed, *scratch;
    uint32_t seed = 7;
    int i, j, l;
    char name[64];

    for (i = 0; i < N * K; i++)
        w[i] = noise(&seed);
    for (i = 0; i < M * K; i++)
        x[i] = noise(&seed);
    weights.struct_size = sizeof weights;
    weights.kind = NYBL_WEIGHTS_F32;
    weights.values = w;
    weights.values_count = N * K;

    EXPECT(nybl_pack_size(&layout, &packed_len), NYBL_OK);
    packed = aligned(packed_len);
    EXPECT(nybl_pack(&layout, &weights, packed, packed_len - 1), NYBL_ERR_BUFFER_TOO_SMALL);
    EXPECT(nybl_pack(&layout, &weights, packed, packed_len), NYBL_OK);
    EXPECT(nybl_unpack_rows(&layout, packed, packed_len, 0, N, back), NYBL_OK);
    EXPECT(nybl_unpack_rows(&layout, packed, packed_len, N, 1, back), NYBL_ERR_INVALID_ARGUMENT);

    EXPECT(nybl_matmul_scratch_size(&layout, M, &scratch_len), NYBL_OK);
    scratch = aligned(scratch_len);
    EXPECT(nybl_quantize_activations(&layout, x, K, M, scratch, scratch_len), NYBL_OK);

    args.struct_size = sizeof args;
    args.weights = packed;
    args.weights_len = packed_len;
    args.activations = scratch;
    args.activations_len = scratch_len;
    args.m = M;
    args.y = &y[0][0];
    args.y_stride = N;
    args.n1 = 128;
    EXPECT(nybl_matmul(&layout, &args), NYBL_OK);
    args.n0 = 128;
    args.n1 = N;
    EXPECT(nybl_matmul(&layout, &args), NYBL_OK);

    /* The weakest kernel, all outputs at once: the same bits. */
    args.n0 = 0;
    args.y = &again[0][0];
    args.features = NYBL_CPU_PORTABLE;
    EXPECT(nybl_matmul(&layout, &args), NYBL_OK);
    if (memcmp(y, again, sizeof y) != 0)
        fprintf(stderr, "format %d: ranges or kernels differ\n", (int)format), failures++;

    finish(&layout, &args, &y[0][0]);
    args.y = &again[0][0];

    for (i = 0; i < M; i++)
        for (j = 0; j < N; j++) {
            double want = 0;
            for (l = 0; l < K; l++)
                want += (double)x[i * K + l] * back[j * K + l];
            if (fabs(want - y[i][j]) > tolerance) {
                fprintf(stderr, "format %d: y[%d, %d] is %g, not %g\n", (int)format, i, j,
                        (double)y[i][j], want);
                failures++;
                return;
            }
        }

    EXPECT(nybl_kernel_name(&layout, NYBL_CPU_PORTABLE, name, sizeof name), NYBL_OK);
    if (strstr(name, "-matmul-portable") == NULL)
        fprintf(stderr, "the kernel is called %s\n", name), failures++;

    args.n0 = 16;
    EXPECT(nybl_matmul(&layout, &args), NYBL_ERR_INVALID_ARGUMENT);
    args.n0 = 0;
    args.n1 = N + 1;
    EXPECT(nybl_matmul(&layout, &args), NYBL_ERR_INVALID_ARGUMENT);
    args.n1 = N;
    args.weights_len--;
    EXPECT(nybl_matmul(&layout, &args), NYBL_ERR_INVALID_ARGUMENT);
    args.weights_len++;
    args.activations_len--;
    EXPECT(nybl_matmul(&layout, &args), NYBL_ERR_INVALID_ARGUMENT);
    args.activations_len++;
    args.features = 1u << 30;
    EXPECT(nybl_matmul(&layout, &args), NYBL_ERR_UNSUPPORTED);
    free(packed);
    free(scratch);
}

/* The arrays of a GPTQ and of an AWQ checkpoint, and GGUF blocks: one row of 32 whose codes are known. */
static void checkpoints(void)
{
    static uint32_t gptq[4 * 8], awq[32], gptq_zeros, awq_zeros;
    static uint8_t blocks[8 * 18];
    static float back[8 * 32];
    uint16_t scales[8];
    nybl_layout layout = {sizeof layout, NYBL_FORMAT_Q4Z, 32, 8, 32};
    nybl_weights weights = {sizeof weights, NYBL_WEIGHTS_GPTQ, gptq, 32, scales, 8, &gptq_zeros, 1};
    static const int nibble[8] = {0, 4, 1, 5, 2, 6, 3, 7};
    size_t packed_len;
    void *packed;
    int n, k, kind;

    for (n = 0; n < 8; n++) {
        scales[n] = 0x3800; /* 0.5 */
        gptq_zeros |= (uint32_t)(n + 1 - 1) << (4 * n);
        awq_zeros |= (uint32_t)(n + 1) << (4 * nibble[n]);
        blocks[n * 18 + 1] = 0x38;
        for (k = 0; k < 32; k++) {
            uint32_t code = (uint32_t)(n + 3 * k) % 16;
            gptq[k / 8 * 8 + n] |= code << (k % 8 * 4);
            awq[k] |= code << (4 * nibble[n]);
            blocks[n * 18 + 2 + k % 16] |= (uint8_t)(code << (k < 16 ? 0 : 4));
        }
    }
    for (kind = 0; kind < 3; kind++) {
        if (kind == 1) {
            weights.kind = NYBL_WEIGHTS_AWQ;
            weights.values = awq;
            weights.offsets = &awq_zeros;
        } else if (kind == 2) {
            layout.format = NYBL_FORMAT_Q4;
            memset(&weights, 0, sizeof weights);
            weights.struct_size = sizeof weights;
            weights.kind = NYBL_WEIGHTS_GGUF;
            weights.values = blocks;
            weights.values_count = sizeof blocks;
        }
        EXPECT(nybl_pack_size(&layout, &packed_len), NYBL_OK);
        packed = aligned(packed_len);
        EXPECT(nybl_pack(&layout, &weights, packed, packed_len), NYBL_OK);
        EXPECT(nybl_unpack_rows(&layout, packed, packed_len, 0, 8, back), NYBL_OK);
        for (n = 0; n < 8; n++)
            for (k = 0; k < 32; k++) {
                int zero = kind == 2 ? 8 : n + 1;
                float want = 0.5f * (float)((n + 3 * k) % 16 - zero);
                if (back[n * 32 + k] != want) {
                    fprintf(stderr, "kind %d: weight %d, %d is %g, not %g\n", kind, n, k,
                            (double)back[n * 32 + k], (double)want);
                    failures++;
                    k = 32;
                }
            }
        weights.values_count--;
        EXPECT(nybl_pack(&layout, &weights, packed, packed_len), NYBL_ERR_INVALID_ARGUMENT);
        weights.values_count++;
        free(packed);
    }
}

/* Codes with zero points, as GPTQ and AWQ leave them. */
static void codes(void)
{
    static uint8_t q[2 * 64];
    static float back[2 * 64];
    uint16_t scales[4] = {0x3c00, 0x3800, 0x3c00, 0x3c00}; /* 1, 0.5, 1, 1 */
    uint16_t zeros[4] = {8, 3, 0, 15};
    nybl_layout layout = {sizeof layout, NYBL_FORMAT_Q4Z, 32, 2, 64};
    nybl_weights weights = {sizeof weights, NYBL_WEIGHTS_CODES, q, 128, scales, 4, zeros, 4};
    size_t packed_len;
    void *packed;
    int i;

    for (i = 0; i < 128; i++)
        q[i] = (uint8_t)(i * 5 % 16);
    EXPECT(nybl_pack_size(&layout, &packed_len), NYBL_OK);
    packed = aligned(packed_len);
    EXPECT(nybl_pack(&layout, &weights, packed, packed_len), NYBL_OK);
    EXPECT(nybl_unpack_rows(&layout, packed, packed_len, 0, 2, back), NYBL_OK);
    for (i = 0; i < 128; i++) {
        float want = (i / 32 == 1 ? 0.5f : 1.0f) * (float)(q[i] - (int)zeros[i / 32]);
        if (back[i] != want)
            fprintf(stderr, "code %d became %g, not %g\n", i, (double)back[i], (double)want), failures++;
    }
    weights.offsets_count = 3;
    EXPECT(nybl_pack(&layout, &weights, packed, packed_len), NYBL_ERR_INVALID_ARGUMENT);
    weights.offsets_count = 4;
    q[77] = 16;
    EXPECT(nybl_pack(&layout, &weights, packed, packed_len), NYBL_ERR_INVALID_ARGUMENT);
    free(packed);
}

int main(void)
{
    nybl_layout layout = {0};
    size_t bytes = 1;

    EXPECT(nybl_pack_size(NULL, &bytes), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_pack_size(&layout, &bytes), NYBL_ERR_INVALID_ARGUMENT);
    layout.struct_size = sizeof layout;
    EXPECT(nybl_pack_size(&layout, &bytes), NYBL_ERR_INVALID_ARGUMENT);
    layout.n = layout.k = 8;
    EXPECT(nybl_pack_size(&layout, NULL), NYBL_ERR_INVALID_ARGUMENT);
    layout.format = 99;
    EXPECT(nybl_pack_size(&layout, &bytes), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_pack(NULL, NULL, NULL, 0), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_unpack_rows(NULL, NULL, 0, 0, 0, NULL), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_quantize_activations(NULL, NULL, 0, 0, NULL, 0), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_matmul_scratch_size(NULL, 0, NULL), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_matmul(NULL, NULL), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_kernel_name(NULL, 0, NULL, 0), NYBL_ERR_INVALID_ARGUMENT);
    if ((nybl_cpu_features() & NYBL_CPU_PORTABLE) == 0)
        failures++;

    /* Activations are rounded to a 127th of a group's largest: the sum of 172 such errors. */
    multiply(NYBL_FORMAT_Q4, 32, 0.35);
    multiply(NYBL_FORMAT_Q4Z, 128, 0.35);
    multiply(NYBL_FORMAT_Q8, 64, 0.35);
    multiply(NYBL_FORMAT_Q3, 64, 0.35);
    multiply(NYBL_FORMAT_Q3M, 16, 0.35);
    multiply(NYBL_FORMAT_Q2Z, 32, 0.35);
    multiply(NYBL_FORMAT_Q8, 0, 0.5);
    multiply(NYBL_FORMAT_F32, 0, 1e-4);
    codes();
    checkpoints();

    if (failures == 0)
        puts("all as documented");
    return failures != 0;
}
