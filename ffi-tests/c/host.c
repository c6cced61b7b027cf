/* What a host asks, sets and is told: plans, parts, choices, ends of texts, logarithms, forks, files, figures, messages,
 * memory that is wanted back, a smaller model, and threads of its own. */
#include "nybl.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures;

static void expect(const char *what, int holds)
{
    if (!holds) {
        char text[300] = "";

        nybl_last_error(text, sizeof text);
        fprintf(stderr, "not so: %s (last error: %s)\n", what, text);
        failures++;
    }
}
#define EXPECT(condition) expect(#condition, condition)

#define PROMPT "Once upon a time"

static uint32_t prompt[64];
static size_t prompt_count;

static nybl_session *start(const nybl_model *model)
{
    nybl_session *session;

    EXPECT(nybl_session_create(model, NULL, &session) == NYBL_OK);
    EXPECT(nybl_session_append(session, prompt, prompt_count) == NYBL_OK);
    return session;
}

/* Up to `most` tokens and their text; the kind of the last event. */
static int32_t run(nybl_session *session, size_t most, uint32_t *ids, size_t *count, char *text)
{
    nybl_event event = {0};

    event.struct_size = sizeof event;
    *count = 0;
    *text = 0;
    while (*count < most) {
        EXPECT(nybl_session_next(session, &event) == NYBL_OK);
        strncat(text, event.text, event.text_len);
        ids[(*count)++] = event.token;
        if (event.kind != NYBL_EVENT_TOKEN)
            break;
    }
    return event.kind;
}

static void plans(const char *path)
{
    nybl_source source = {0};
    nybl_plan plan = {0};
    nybl_session_config config = {0};
    uint64_t all;

    plan.struct_size = sizeof plan;
    config.struct_size = sizeof config;
    source.struct_size = sizeof source;
    source.kind = NYBL_SOURCE_PATH;
    source.path = path;
    source.path_len = strlen(path);
    EXPECT(nybl_model_plan(&source, 1, NULL, 1, 0, &plan) == NYBL_OK);
    EXPECT(plan.fits == 1 && plan.mapped_bytes > 500000 && plan.kv_1k_bytes > 0 && plan.scratch_bytes > 0);
    all = plan.dirty_bytes;
    EXPECT(all == plan.private_bytes + plan.tokenizer_bytes + plan.kv_bytes + plan.scratch_bytes);
    EXPECT(nybl_model_plan(&source, 1, NULL, 1, all - 1, &plan) == NYBL_OK);
    EXPECT(plan.fits == 0 && plan.remedy_bytes > 0 && plan.remedy_bytes < all);
    config.prefill_chunk = plan.remedy_prefill_chunk;
    config.kv_format = plan.remedy_kv_format;
    config.context = plan.remedy_context;
    EXPECT(nybl_model_plan(&source, 1, &config, 1, all - 1, &plan) == NYBL_OK);
    EXPECT(plan.fits == 1 && plan.dirty_bytes < all);
    EXPECT(nybl_model_plan(&source, 1, NULL, 1, plan.least_bytes - 1, &plan) == NYBL_OK);
    EXPECT(plan.fits == 0 && plan.remedy_bytes == 0);
    EXPECT(nybl_model_plan(NULL, 1, NULL, 1, 0, &plan) == NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_model_plan(&source, 0, NULL, 1, 0, &plan) == NYBL_ERR_INVALID_ARGUMENT);
    source.path_len--;
    EXPECT(nybl_model_plan(&source, 1, NULL, 1, 0, &plan) == NYBL_ERR_IO);
}

static void choices(const nybl_model *model, const uint32_t *want)
{
    nybl_session *session = start(model);
    nybl_sampler sampler = {0};
    float bias = -INFINITY;
    uint32_t ids[20];
    size_t count;
    char text[1000];

    EXPECT(nybl_session_set_logit_bias(session, &want[2], &bias, 1) == NYBL_OK);
    run(session, 3, ids, &count, text);
    EXPECT(ids[0] == want[0] && ids[1] == want[1] && ids[2] != want[2]);
    EXPECT(nybl_session_set_logit_bias(session, NULL, NULL, 0) == NYBL_OK);
    EXPECT(nybl_session_truncate(session, prompt_count) == NYBL_OK);
    run(session, 20, ids, &count, text);
    EXPECT(memcmp(ids, want, sizeof ids) == 0);
    bias = NAN;
    EXPECT(nybl_session_set_logit_bias(session, want, &bias, 1) == NYBL_ERR_INVALID_ARGUMENT);

    sampler.struct_size = sizeof sampler;
    sampler.presence_penalty = 1000;
    EXPECT(nybl_session_set_sampler(session, &sampler) == NYBL_OK);
    EXPECT(nybl_session_truncate(session, prompt_count) == NYBL_OK);
    run(session, 20, ids, &count, text);
    for (count = 1; count < 20; count++) {
        size_t before;

        for (before = 0; before < count; before++)
            EXPECT(ids[before] != ids[count]);
    }
    EXPECT(nybl_session_set_sampler(session, NULL) == NYBL_OK);
    sampler.temperature = -1;
    EXPECT(nybl_session_set_sampler(session, &sampler) == NYBL_ERR_INVALID_ARGUMENT);
    nybl_session_destroy(session);
}

/* Only even tokens. */
static void even(void *user, const uint32_t *tokens, size_t n_tokens, size_t n_drafts, float *logits, size_t vocab)
{
    size_t i;

    ++*(int *)user;
    EXPECT(n_tokens >= prompt_count && n_drafts <= n_tokens && tokens[0] == prompt[0]);
    for (i = 1; i < vocab; i += 2)
        logits[i] = -INFINITY;
}

static void hooks(const nybl_model *model)
{
    nybl_session *session = start(model), *fork;
    uint32_t ids[20], again[20];
    size_t count, i;
    char text[1000];
    int calls = 0;

    EXPECT(nybl_session_set_logits_hook(session, even, &calls) == NYBL_OK);
    EXPECT(nybl_session_fork(session, &fork) == NYBL_OK);
    run(session, 20, ids, &count, text);
    for (i = 0; i < count; i++)
        EXPECT(ids[i] % 2 == 0);
    EXPECT(calls >= 20);
    run(fork, 20, again, &count, text);
    EXPECT(memcmp(ids, again, sizeof ids) == 0 && calls >= 40);
    EXPECT(nybl_session_set_logits_hook(fork, NULL, NULL) == NYBL_OK);
    nybl_session_destroy(session);
    calls = 0;
    run(fork, 1, again, &count, text);
    EXPECT(calls == 0);
    nybl_session_destroy(fork);
}

static void ends(const nybl_model *model, const char *story)
{
    nybl_session *session = start(model);
    const char *stops[2];
    size_t lengths[2], count;
    uint32_t ids[64];
    char text[1000], stop[8];

    memcpy(stop, story + 12, 5);
    stops[0] = "never";
    stops[1] = stop;
    lengths[0] = lengths[1] = 5;
    EXPECT(nybl_session_set_stop_strings(session, stops, lengths, 2) == NYBL_OK);
    EXPECT(run(session, 64, ids, &count, text) == NYBL_EVENT_STOP);
    EXPECT(strlen(text) <= 12 && strncmp(text, story, strlen(text)) == 0);
    EXPECT(nybl_session_set_stop_strings(session, NULL, NULL, 0) == NYBL_OK);
    EXPECT(run(session, 3, ids, &count, text) == NYBL_EVENT_TOKEN);
    lengths[0] = 0;
    EXPECT(nybl_session_set_stop_strings(session, stops, lengths, 1) == NYBL_ERR_INVALID_ARGUMENT);
    nybl_session_destroy(session);
}

static void logarithms(const nybl_model *model)
{
    nybl_session *session = start(model);
    nybl_event event = {0};
    nybl_logprob found[6];
    size_t count, i;

    event.struct_size = sizeof event;
    EXPECT(nybl_session_get_logprobs(session, found, 6, &count) == NYBL_OK && count == 0);
    EXPECT(nybl_session_set_logprobs(session, 1, 5) == NYBL_OK);
    for (i = 0; i < 10; i++) {
        EXPECT(nybl_session_next(session, &event) == NYBL_OK);
        EXPECT(nybl_session_get_logprobs(session, found, 6, &count) == NYBL_OK && count == 6);
        EXPECT(found[0].token == event.token && found[1].token == event.token);
        EXPECT(found[0].logprob == found[1].logprob && found[1].logprob <= 0);
        EXPECT(found[1].logprob >= found[2].logprob && found[4].logprob >= found[5].logprob);
    }
    EXPECT(nybl_session_get_logprobs(session, found, 2, &count) == NYBL_ERR_BUFFER_TOO_SMALL && count == 6);
    EXPECT(nybl_session_set_logprobs(session, 1, 100000) == NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_session_set_logprobs(session, 0, 0) == NYBL_OK);
    EXPECT(nybl_session_next(session, &event) == NYBL_OK);
    EXPECT(nybl_session_get_logprobs(session, found, 6, &count) == NYBL_OK && count == 0);
    nybl_session_destroy(session);
}

static void keeping(const nybl_model *model, const char *folder, const uint32_t *want)
{
    nybl_session *session = start(model), *other, *fork;
    nybl_session_metrics metrics = {0};
    uint32_t ids[64], copied[64];
    size_t count, length;
    char text[1000], path[1000];

    sprintf(path, "%s/host.session", folder);
    run(session, 7, ids, &count, text);
    EXPECT(nybl_session_copy_tokens(session, copied, 64, &length) == NYBL_OK && length == prompt_count + 7);
    EXPECT(memcmp(copied + prompt_count, want, 7 * sizeof *want) == 0);
    EXPECT(nybl_session_copy_tokens(session, copied, 3, &length) == NYBL_ERR_BUFFER_TOO_SMALL);
    EXPECT(nybl_session_save(session, path, strlen(path)) == NYBL_OK);
    EXPECT(nybl_session_fork(session, &fork) == NYBL_OK);
    EXPECT(nybl_session_create(model, NULL, &other) == NYBL_OK);
    EXPECT(nybl_session_restore(other, path, strlen(path)) == NYBL_OK);
    run(session, 13, ids, &count, text);
    EXPECT(memcmp(ids, want + 7, 13 * sizeof *want) == 0);
    run(fork, 13, ids, &count, text);
    EXPECT(memcmp(ids, want + 7, 13 * sizeof *want) == 0);
    run(other, 13, ids, &count, text);
    EXPECT(memcmp(ids, want + 7, 13 * sizeof *want) == 0);
    EXPECT(nybl_session_restore(other, "/nowhere", 8) == NYBL_ERR_IO);
    EXPECT(nybl_session_save(other, "/nowhere/at/all", 15) == NYBL_ERR_IO);
    remove(path);

    EXPECT(nybl_session_get_metrics(session, &metrics) == NYBL_ERR_INVALID_ARGUMENT);
    metrics.struct_size = sizeof metrics;
    EXPECT(nybl_session_get_metrics(session, &metrics) == NYBL_OK);
    EXPECT(metrics.prompt_tokens == prompt_count && metrics.decoded_tokens == 19);
    EXPECT(metrics.prompt_seconds > 0 && metrics.decode_seconds > 0 && metrics.first_token_seconds > 0);
    EXPECT(metrics.effort == 1 && metrics.retry_ms == 0 && metrics.small_model_tokens == 0);
    EXPECT(metrics.mapped_bytes > 500000 && metrics.kv_bytes > 0 && metrics.scratch_bytes > 0);
    nybl_session_destroy(session);
    nybl_session_destroy(other);
    nybl_session_destroy(fork);
}

static void relief(nybl_runtime *runtime, const nybl_model *model, const char *folder, const uint32_t *want)
{
    nybl_session *session;
    nybl_session_config config = {0};
    nybl_freed freed = {0};
    uint32_t ids[64];
    size_t count;
    char text[1000];

    config.struct_size = sizeof config;
    config.kv_budget = config.kv_spill_budget = 64 << 20;
    config.kv_spill_folder = folder;
    config.kv_spill_folder_len = strlen(folder);
    EXPECT(nybl_session_create(model, &config, &session) == NYBL_OK);
    EXPECT(nybl_session_append(session, prompt, prompt_count) == NYBL_OK);
    EXPECT(nybl_runtime_relieve(runtime, NYBL_PRESSURE_CRITICAL, &freed) == NYBL_ERR_INVALID_ARGUMENT);
    freed.struct_size = sizeof freed;
    EXPECT(nybl_runtime_relieve(runtime, 9, &freed) == NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_runtime_relieve(runtime, NYBL_PRESSURE_MODERATE, NULL) == NYBL_OK);
    EXPECT(nybl_runtime_relieve(runtime, NYBL_PRESSURE_HIGH, &freed) == NYBL_OK);
    EXPECT(freed.spilled_bytes > 0 && freed.page_bytes == 0 && freed.deferred == 0);
    EXPECT(nybl_runtime_relieve(runtime, NYBL_PRESSURE_CRITICAL, &freed) == NYBL_OK);
    EXPECT(freed.page_bytes > 500000);
    run(session, 20, ids, &count, text);
    EXPECT(memcmp(ids, want, 20 * sizeof *want) == 0);

    /* The same model stands in for itself; nothing is hot, so it is not asked. */
    EXPECT(nybl_session_set_small_model(session, model) == NYBL_OK);
    EXPECT(nybl_session_truncate(session, prompt_count) == NYBL_OK);
    run(session, 20, ids, &count, text);
    EXPECT(memcmp(ids, want, 20 * sizeof *want) == 0);
    EXPECT(nybl_session_set_small_model(session, NULL) == NYBL_OK);
    nybl_session_destroy(session);
}

static void listen(void *user, uint32_t level, const char *message, size_t length)
{
    char *heard = user;

    EXPECT(level >= NYBL_LOG_ERROR && level <= NYBL_LOG_INFO);
    if (strlen(heard) + length + 2 < 2000) {
        strncat(heard, message, length);
        strcat(heard, "\n");
    }
}

/* One thread, last tile first. */
static void backwards(void *user, size_t tiles, nybl_tile_fn tile, const void *job)
{
    ++*(size_t *)user;
    while (tiles-- > 0)
        tile(job, tiles);
}

static void runtimes(const char *path, const uint32_t *want)
{
    static char heard[2000];
    nybl_runtime_config config = {0};
    nybl_runtime *runtime;
    nybl_model *model;
    nybl_session *session;
    nybl_source sources[1] = {{0}};
    nybl_status status;
    uint32_t ids[20];
    size_t count, jobs = 0;
    int32_t fd = 0;
    char text[1000];

    config.struct_size = sizeof config;
    config.log = listen;
    config.log_user = heard;
    config.executor = backwards;
    config.executor_user = &jobs;
    EXPECT(nybl_runtime_create(&config, &runtime) == NYBL_ERR_INVALID_ARGUMENT);
    config.threads = 2;
    config.cores = 9;
    EXPECT(nybl_runtime_create(&config, &runtime) == NYBL_ERR_INVALID_ARGUMENT);
    config.cores = NYBL_CORES_MASK;
    EXPECT(nybl_runtime_create(&config, &runtime) == NYBL_ERR_INVALID_ARGUMENT);
    config.core_mask = 1;
    config.log_level = 5;
    EXPECT(nybl_runtime_create(&config, &runtime) == NYBL_ERR_INVALID_ARGUMENT);
    config.log_level = 0;
    config.target_celsius = 60;
    EXPECT(nybl_runtime_create(&config, &runtime) == NYBL_ERR_INVALID_ARGUMENT);
    config.critical_celsius = 70;
    config.read_sensors = 2;
    EXPECT(nybl_runtime_create(&config, &runtime) == NYBL_ERR_UNSUPPORTED);
    config.read_sensors = 1;
    EXPECT(nybl_runtime_create(&config, &runtime) == NYBL_OK);

    sources[0].struct_size = sizeof sources[0];
    sources[0].kind = NYBL_SOURCE_PATH;
    sources[0].path = path;
    sources[0].path_len = strlen(path);
    EXPECT(nybl_model_open_sources(runtime, sources, 1, &model) == NYBL_OK);
    status = nybl_model_lock_pages(model);
    EXPECT(status == NYBL_OK || status == NYBL_ERR_IO);
    session = start(model);
    run(session, 20, ids, &count, text);
    EXPECT(memcmp(ids, want, sizeof ids) == 0 && jobs > 20);
    EXPECT(strstr(heard, "2 threads") != NULL && strstr(heard, "nursery.nybl") != NULL);
    nybl_session_destroy(session);
    nybl_model_release(model);

    /* The same from a descriptor that could come from another process. */
    status = nybl_source_seal(&sources[0], &fd);
    EXPECT(status == NYBL_OK || status == NYBL_ERR_UNSUPPORTED);
    if (status == NYBL_OK) {
        sources[0].kind = NYBL_SOURCE_FD;
        sources[0].fd = fd;
        EXPECT(nybl_model_open_sources(runtime, sources, 1, &model) == NYBL_OK);
        session = start(model);
        run(session, 20, ids, &count, text);
        EXPECT(memcmp(ids, want, sizeof ids) == 0);
        nybl_session_destroy(session);
        nybl_model_release(model);
    }
    nybl_runtime_destroy(runtime);
}

int main(int argc, char **argv)
{
    nybl_runtime *runtime;
    nybl_model *model;
    nybl_session *session;
    uint32_t want[64];
    size_t count;
    char story[1000];

    if (argc < 3 || nybl_runtime_create(NULL, &runtime) != NYBL_OK ||
        nybl_model_open(runtime, argv[1], strlen(argv[1]), &model) != NYBL_OK ||
        nybl_tokenize(model, PROMPT, strlen(PROMPT), NYBL_TOKENIZE_ADD_SPECIAL, prompt, 64, &prompt_count) !=
            NYBL_OK)
        return 1;
    session = start(model);
    run(session, 40, want, &count, story);
    nybl_session_destroy(session);
    plans(argv[1]);
    choices(model, want);
    hooks(model);
    ends(model, story);
    logarithms(model);
    keeping(model, argv[2], want);
    relief(runtime, model, argv[2], want);
    runtimes(argv[1], want);
    nybl_model_release(model);
    nybl_runtime_destroy(runtime);
    if (failures == 0)
        puts("all as documented");
    return failures != 0;
}
