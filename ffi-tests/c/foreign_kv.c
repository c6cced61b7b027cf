/* A runtime of its own uses nothing of nybl but the KV cache: it makes up keys, values and queries, and
 * holds what nybl_kv_attend() says against attention computed in the plainest way.
 *
 *   cc foreign_kv.c -lnybl -lm && ./a.out
 */
#include "nybl.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LAYERS = 2, KV_HEADS = 2, HEADS = 6, DIM = 20, MOST = 700 };

static int failures;

static void expect(int line, nybl_status got, nybl_status want)
{
    char why[512];
    if (got == want)
        return;
    nybl_last_error(why, sizeof why);
    fprintf(stderr, "line %d: %s where %s was expected: %s\n", line, nybl_status_name(got),
            nybl_status_name(want), why);
    failures++;
}
#define EXPECT(call, want) expect(__LINE__, call, want)
#define CHECK(call) EXPECT(call, NYBL_OK)

static void require(int line, int holds, const char *what)
{
    if (!holds) {
        fprintf(stderr, "line %d: not so: %s\n", line, what);
        failures++;
    }
}
#define REQUIRE(condition) require(__LINE__, condition, #condition)

/* What stands at a place: decided by the token there alone, so that any sequence can be written anew. */
static float noise(uint32_t a, uint32_t b)
{
    uint32_t x = a * 2654435761u + b * 40503u + 12345u;
    x ^= x >> 15;
    x *= 2246822519u;
    x ^= x >> 13;
    return (float)(x >> 8) / 8388608.0f - 1.0f;
}

static void rows_of(const uint32_t *ids, size_t count, uint32_t layer, float *keys, float *values)
{
    for (size_t t = 0; t < count; t++)
        for (uint32_t i = 0; i < KV_HEADS * DIM; i++) {
            keys[t * KV_HEADS * DIM + i] = noise(ids[t] * 8 + layer, i);
            values[t * KV_HEADS * DIM + i] = noise(ids[t] * 8 + 4 + layer, i);
        }
}

static void queries_of(uint32_t seed, size_t count, float *queries)
{
    for (size_t i = 0; i < count * HEADS * DIM; i++)
        queries[i] = 2 * noise(seed + 77, (uint32_t)i);
}

/* Attention of one row over the tokens of `ids`, in double precision. */
static void plain(const uint32_t *ids, size_t count, uint32_t layer, const float *query, double *out)
{
    for (int head = 0; head < HEADS; head++) {
        double total = 0, sum[DIM] = {0};
        int kv = head / (HEADS / KV_HEADS);
        for (size_t t = 0; t < count; t++) {
            double dot = 0;
            for (int i = 0; i < DIM; i++)
                dot += (double)query[head * DIM + i] *
                       noise(ids[t] * 8 + layer, (uint32_t)(kv * DIM + i));
            dot = exp(dot / sqrt(DIM));
            total += dot;
            for (int i = 0; i < DIM; i++)
                sum[i] += dot * noise(ids[t] * 8 + 4 + layer, (uint32_t)(kv * DIM + i));
        }
        for (int i = 0; i < DIM; i++)
            out[head * DIM + i] = sum[i] / total;
    }
}

/* Appends tokens: reserve, write every layer, commit. */
static nybl_status append(nybl_kv_sequence *sequence, const uint32_t *ids, size_t count)
{
    static float keys[MOST * KV_HEADS * DIM], values[MOST * KV_HEADS * DIM];
    nybl_status status = nybl_kv_reserve(sequence, count);
    for (uint32_t layer = 0; status == NYBL_OK && layer < LAYERS; layer++) {
        rows_of(ids, count, layer, keys, values);
        status = nybl_kv_write(sequence, layer, 0, count, keys, values);
    }
    return status == NYBL_OK ? nybl_kv_commit(sequence, NULL, count) : status;
}

/* Attention of the next token, which is written but not committed. */
static void look(nybl_kv_sequence *sequence, uint32_t id, uint32_t seed, float *out)
{
    static float keys[KV_HEADS * DIM], values[KV_HEADS * DIM], queries[HEADS * DIM];
    nybl_kv_attend_args args = {0};

    CHECK(nybl_kv_reserve(sequence, 1));
    rows_of(&id, 1, 1, keys, values);
    CHECK(nybl_kv_write(sequence, 1, 0, 1, keys, values));
    queries_of(seed, 1, queries);
    args.struct_size = sizeof args;
    args.layer = 1;
    args.n_heads = HEADS;
    args.rows = 1;
    args.queries = queries;
    args.output = out;
    CHECK(nybl_kv_attend(sequence, &args));
}

static nybl_kv_config settings(uint32_t format)
{
    nybl_kv_config config = {0};
    config.struct_size = sizeof config;
    config.format = format;
    config.n_layers = LAYERS;
    config.n_kv_heads = KV_HEADS;
    config.head_dim = DIM;
    config.budget = 4 << 20;
    config.threads = 2;
    config.model = 42;
    config.rope_theta = 10000;
    config.rope_dim = DIM;
    return config;
}

/* Every format against the definition, forks, rollback, prefixes, files, trees. */
static void runs(uint32_t format, double tolerance, const char *path)
{
    static const uint32_t parents[] = {0, 0, 1, 2}, right[] = {0, 2, 4};
    static float keys[5 * KV_HEADS * DIM], values[5 * KV_HEADS * DIM], queries[5 * HEADS * DIM];
    static float out[5 * HEADS * DIM];
    uint32_t ids[MOST], back[MOST];
    float first[HEADS * DIM], second[HEADS * DIM];
    double want[HEADS * DIM], worst = 0;
    nybl_kv_config config = settings(format);
    nybl_kv_attend_args args = {0};
    nybl_kv_stats stats = {0};
    nybl_kv_sequence *sequence, *fork, *other;
    nybl_kv *kv, *fresh;
    size_t length;
    uint64_t freed;

    for (uint32_t i = 0; i < MOST; i++)
        ids[i] = i * 7 % 501;
    CHECK(nybl_kv_create(&config, &kv));
    CHECK(nybl_kv_sequence_create(kv, &sequence));
    CHECK(append(sequence, ids, 300));
    look(sequence, ids[300], 5, first);
    queries_of(5, 1, queries);
    plain(ids, 301, 1, queries, want);
    for (int i = 0; i < HEADS * DIM; i++)
        worst = fmax(worst, fabs(first[i] - want[i]));
    REQUIRE(worst < tolerance);

    /* A fork costs nothing, and going another way in it leaves the first alone. */
    stats.struct_size = sizeof stats;
    CHECK(nybl_kv_sequence_fork(sequence, &fork));
    CHECK(nybl_kv_get_stats(kv, &stats));
    REQUIRE(stats.used == 5 && stats.token_bytes > 0 && stats.bytes <= stats.budget);
    CHECK(append(fork, ids + 50, 100));
    CHECK(nybl_kv_sequence_truncate(fork, 300));
    look(fork, ids[300], 5, second);
    REQUIRE(memcmp(first, second, sizeof first) == 0);
    CHECK(append(sequence, ids + 300, 100));
    CHECK(nybl_kv_sequence_truncate(sequence, 300));
    look(sequence, ids[300], 5, second);
    REQUIRE(memcmp(first, second, sizeof first) == 0);

    /* The same beginning again, taken over instead of written. */
    CHECK(nybl_kv_share(sequence, ids, 300));
    CHECK(nybl_kv_sequence_create(kv, &other));
    CHECK(nybl_kv_reuse(other, ids, 301, &length));
    REQUIRE(length == 256);
    CHECK(append(other, ids + 256, 44));
    look(other, ids[300], 5, second);
    REQUIRE(memcmp(first, second, sizeof first) == 0);
    nybl_kv_sequence_destroy(other);

    /* Out into a file and into another cache, with another block size. */
    CHECK(nybl_kv_save(sequence, ids, 300, path, strlen(path)));
    config.block_tokens = 16;
    CHECK(nybl_kv_create(&config, &fresh));
    CHECK(nybl_kv_sequence_create(fresh, &other));
    EXPECT(nybl_kv_load(other, path, strlen(path), back, 299, &length), NYBL_ERR_BUFFER_TOO_SMALL);
    REQUIRE(length == 300);
    CHECK(nybl_kv_load(other, path, strlen(path), back, MOST, &length));
    REQUIRE(length == 300 && memcmp(ids, back, 300 * sizeof *ids) == 0);
    look(other, ids[300], 5, second);
    REQUIRE(memcmp(first, second, sizeof first) == 0);
    nybl_kv_destroy(fresh);
    nybl_kv_sequence_destroy(other);

    /* A tree: row 0, its children 1 and 2, 3 behind 1, 4 behind 2. Its last row has the bits of a chain. */
    CHECK(nybl_kv_sequence_truncate(sequence, 300));
    CHECK(nybl_kv_reserve(sequence, 5));
    for (uint32_t layer = 0; layer < LAYERS; layer++) {
        rows_of(ids + 300, 5, layer, keys, values);
        CHECK(nybl_kv_write(sequence, layer, 0, 5, keys, values));
    }
    queries_of(9, 5, queries);
    args.struct_size = sizeof args;
    args.layer = 1;
    args.n_heads = HEADS;
    args.rows = 5;
    args.queries = queries;
    args.parents = parents;
    args.output = out;
    CHECK(nybl_kv_attend(sequence, &args));
    CHECK(nybl_kv_commit(sequence, right, 3));
    CHECK(nybl_kv_sequence_truncate(fork, 300));
    for (int i = 0; i < 3; i++) {
        CHECK(append(fork, ids + 300 + right[i], 1));
    }
    CHECK(nybl_kv_sequence_truncate(fork, 302));
    CHECK(nybl_kv_reserve(fork, 1));
    rows_of(ids + 304, 1, 1, keys, values);
    CHECK(nybl_kv_write(fork, 1, 0, 1, keys, values));
    args.rows = 1;
    args.parents = NULL;
    args.queries = queries + 4 * HEADS * DIM;
    args.output = second;
    CHECK(nybl_kv_attend(fork, &args));
    REQUIRE(memcmp(out + 4 * HEADS * DIM, second, sizeof second) == 0);
    look(sequence, 3, 6, first);
    CHECK(append(fork, ids + 304, 1));
    look(fork, 3, 6, second);
    REQUIRE(memcmp(first, second, sizeof first) == 0);

    nybl_kv_sequence_destroy(fork);
    nybl_kv_sequence_destroy(sequence);
    CHECK(nybl_kv_trim(kv, &freed));
    CHECK(nybl_kv_get_stats(kv, &stats));
    REQUIRE(freed > 0 && stats.bytes == 0 && stats.used == 0);
    nybl_kv_destroy(kv);
}

/* Two sequences that memory has room for one of: the idle one waits in a file. */
static void spills(const char *folder)
{
    nybl_kv_config config = settings(NYBL_KV_F16);
    nybl_kv_stats stats = {0};
    nybl_kv_sequence *a, *b;
    uint32_t ids[600];
    float first[HEADS * DIM], second[HEADS * DIM];
    nybl_kv *kv;

    for (uint32_t i = 0; i < 600; i++)
        ids[i] = i * 11 % 503;
    config.budget = 10 * 64 * 2 * LAYERS * KV_HEADS * 32 * 2;
    config.spill_folder = folder;
    config.spill_folder_len = strlen(folder);
    config.spill_budget = 8 << 20;
    CHECK(nybl_kv_create(&config, &kv));
    CHECK(nybl_kv_sequence_create(kv, &a));
    CHECK(nybl_kv_sequence_create(kv, &b));
    CHECK(append(a, ids, 599));
    look(a, ids[599], 3, first);
    CHECK(append(b, ids + 100, 450));
    stats.struct_size = sizeof stats;
    CHECK(nybl_kv_get_stats(kv, &stats));
    REQUIRE(stats.spilled > 0 && stats.bytes <= config.budget && stats.spilled_bytes > 0);
    look(a, ids[599], 3, second);
    REQUIRE(memcmp(first, second, sizeof first) == 0);
    /* One sequence alone must fit. */
    EXPECT(nybl_kv_reserve(b, 400), NYBL_ERR_KV_EXHAUSTED);
    nybl_kv_sequence_destroy(a);
    nybl_kv_sequence_destroy(b);
    nybl_kv_destroy(kv);
}

/* What a host can get wrong. */
static void misuse(const char *path)
{
    static float rows[HEADS * DIM];
    static const uint32_t late[] = {1}, down[] = {1, 0};
    nybl_kv_config config = settings(NYBL_KV_I4);
    nybl_kv_attend_args args = {0};
    nybl_kv_stats stats = {0};
    nybl_kv_sequence *sequence;
    nybl_kv *kv = (nybl_kv *)&config;
    uint32_t ids[64] = {0};
    size_t length = 9;
    FILE *file;

    EXPECT(nybl_kv_create(NULL, &kv), NYBL_ERR_INVALID_ARGUMENT);
    REQUIRE(kv == NULL);
    EXPECT(nybl_kv_create(&config, NULL), NYBL_ERR_INVALID_ARGUMENT);
    config.struct_size = 0;
    EXPECT(nybl_kv_create(&config, &kv), NYBL_ERR_INVALID_ARGUMENT);
    config.struct_size = sizeof config;
    config.format = 9;
    EXPECT(nybl_kv_create(&config, &kv), NYBL_ERR_INVALID_ARGUMENT);
    config.format = NYBL_KV_I4;
    config.block_tokens = 128;
    EXPECT(nybl_kv_create(&config, &kv), NYBL_ERR_INVALID_ARGUMENT);
    config.block_tokens = 0;
    config.n_layers = 0;
    EXPECT(nybl_kv_create(&config, &kv), NYBL_ERR_INVALID_ARGUMENT);
    config.n_layers = LAYERS;
    config.budget = 100;
    EXPECT(nybl_kv_create(&config, &kv), NYBL_ERR_INVALID_ARGUMENT);
    config.budget = 1 << 20;
    config.spill_folder = "/nonexistent/folder";
    config.spill_folder_len = strlen(config.spill_folder);
    config.spill_budget = 1 << 20;
    EXPECT(nybl_kv_create(&config, &kv), NYBL_ERR_IO);
    config.spill_folder_len = 0;
    CHECK(nybl_kv_create(&config, &kv));
    EXPECT(nybl_kv_get_stats(kv, &stats), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_kv_sequence_create(NULL, &sequence), NYBL_ERR_INVALID_ARGUMENT);
    REQUIRE(sequence == NULL);
    EXPECT(nybl_kv_sequence_fork(NULL, &sequence), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_kv_sequence_truncate(NULL, 0), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_kv_sequence_length(NULL, &length), NYBL_ERR_INVALID_ARGUMENT);
    REQUIRE(length == 0);
    EXPECT(nybl_kv_reserve(NULL, 1), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_kv_write(NULL, 0, 0, 0, NULL, NULL), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_kv_attend(NULL, NULL), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_kv_commit(NULL, NULL, 0), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_kv_trim(NULL, NULL), NYBL_ERR_INVALID_ARGUMENT);

    CHECK(nybl_kv_sequence_create(kv, &sequence));
    EXPECT(nybl_kv_commit(sequence, NULL, 1), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_kv_write(sequence, 0, 0, 1, rows, rows), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_kv_reserve(sequence, SIZE_MAX), NYBL_ERR_KV_EXHAUSTED);
    EXPECT(nybl_kv_reserve(sequence, 1 << 30), NYBL_ERR_KV_EXHAUSTED);
    CHECK(nybl_kv_reserve(sequence, 2));
    EXPECT(nybl_kv_write(sequence, LAYERS, 0, 1, rows, rows), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_kv_write(sequence, 0, SIZE_MAX, 2, rows, rows), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_kv_write(sequence, 0, 0, 1, NULL, rows), NYBL_ERR_INVALID_ARGUMENT);
    CHECK(nybl_kv_write(sequence, 0, 0, 1, rows, rows));
    EXPECT(nybl_kv_commit(sequence, down, 2), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_kv_attend(sequence, NULL), NYBL_ERR_INVALID_ARGUMENT);
    args.struct_size = sizeof args;
    args.rows = 1;
    args.queries = rows;
    args.output = rows;
    args.n_heads = 3;
    EXPECT(nybl_kv_attend(sequence, &args), NYBL_ERR_INVALID_ARGUMENT);
    args.n_heads = HEADS;
    args.rows = 3;
    EXPECT(nybl_kv_attend(sequence, &args), NYBL_ERR_INVALID_ARGUMENT);
    args.rows = 2;
    args.parents = late;
    EXPECT(nybl_kv_attend(sequence, &args), NYBL_ERR_INVALID_ARGUMENT);
    args.rows = 1;
    EXPECT(nybl_kv_attend(sequence, &args), NYBL_ERR_UNSUPPORTED);
    args.parents = NULL;
    args.queries = NULL;
    EXPECT(nybl_kv_attend(sequence, &args), NYBL_ERR_INVALID_ARGUMENT);

    /* Files that are not what they should be. */
    EXPECT(nybl_kv_save(sequence, ids, 5, path, strlen(path)), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_kv_load(sequence, "/nonexistent", 12, ids, 64, &length), NYBL_ERR_IO);
    CHECK(append(sequence, ids, 20));
    CHECK(nybl_kv_save(sequence, ids, 20, path, strlen(path)));
    EXPECT(nybl_kv_load(sequence, path, strlen(path), ids, 64, &length), NYBL_ERR_INVALID_ARGUMENT);
    nybl_kv_sequence_destroy(sequence);
    nybl_kv_destroy(kv);
    config.model = 43;
    CHECK(nybl_kv_create(&config, &kv));
    CHECK(nybl_kv_sequence_create(kv, &sequence));
    EXPECT(nybl_kv_load(sequence, path, strlen(path), ids, 64, &length), NYBL_ERR_UNSUPPORTED);
    file = fopen(path, "r+b");
    fseek(file, 400, SEEK_SET);
    fputc(0x5a, file);
    fclose(file);
    nybl_kv_sequence_destroy(sequence);
    nybl_kv_destroy(kv);
    config.model = 42;
    CHECK(nybl_kv_create(&config, &kv));
    CHECK(nybl_kv_sequence_create(kv, &sequence));
    EXPECT(nybl_kv_load(sequence, path, strlen(path), ids, 64, &length), NYBL_ERR_CORRUPT);
    CHECK(nybl_kv_sequence_length(sequence, &length));
    REQUIRE(length == 0);
    nybl_kv_sequence_destroy(sequence);
    nybl_kv_destroy(kv);
    nybl_kv_sequence_destroy(NULL);
    nybl_kv_destroy(NULL);
}

int main(int argc, char **argv)
{
    char path[1024];
    const char *folder = argc > 1 ? argv[1] : ".";

    snprintf(path, sizeof path, "%s/foreign_kv-%p.nyblkv", folder, (void *)path);
    runs(NYBL_KV_F32, 1e-5, path);
    runs(NYBL_KV_F16, 1e-3, path);
    runs(NYBL_KV_I8, 1e-2, path);
    runs(NYBL_KV_I4, 1e-1, path);
    spills(folder);
    misuse(path);
    remove(path);
    if (failures == 0)
        puts("all as documented");
    return failures != 0;
}
