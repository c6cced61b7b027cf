/* Where models come from, what is read when, heat, power and cancelling: as a host on a phone uses them. */
#define _POSIX_C_SOURCE 200112L
#include "nybl.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

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

/* The ids of ten tokens after the prompt. */
static void story(const nybl_model *model, uint32_t ids[10])
{
    nybl_session *session;
    nybl_event event = {0};
    int i;

    event.struct_size = sizeof event;
    EXPECT(nybl_session_create(model, NULL, &session) == NYBL_OK);
    EXPECT(nybl_session_append(session, prompt, prompt_count) == NYBL_OK);
    for (i = 0; i < 10; i++) {
        EXPECT(nybl_session_next(session, &event) == NYBL_OK);
        ids[i] = event.token;
    }
    nybl_session_destroy(session);
}

static int32_t count_bytes(void *user, uint64_t bytes, uint64_t total)
{
    uint64_t *last = user;

    *last = bytes == total ? total : 0;
    return 0;
}

/* The same model by path, by descriptor, out of the middle of a file, and from memory. */
static void sources(nybl_runtime *runtime, const char *path, const uint32_t want[10])
{
    nybl_source source = {0};
    nybl_model *model;
    uint32_t got[10];
    uint64_t read_bytes = 0, freed = 0;
    int32_t ready = 0;
    FILE *file = fopen(path, "rb"), *package = tmpfile();
    long length;
    char *memory;
    int kind;

    fseek(file, 0, SEEK_END);
    length = ftell(file);
    rewind(file);
    memory = malloc((size_t)length + 64);
    source.data = memory + (64 - (size_t)memory % 64);
    if (fread((void *)source.data, 1, (size_t)length, file) != (size_t)length)
        exit(1);
    for (kind = 0; kind < 4096; kind++)
        fputc('x', package);
    fwrite(source.data, 1, (size_t)length, package);
    fputs("and more", package);
    fflush(package);

    source.struct_size = sizeof source;
    for (kind = NYBL_SOURCE_PATH; kind <= NYBL_SOURCE_MEMORY; kind++) {
        source.kind = kind;
        source.path = kind == NYBL_SOURCE_PATH ? path : "asset";
        source.path_len = strlen(source.path);
        source.fd = fileno(package);
        source.offset = kind == NYBL_SOURCE_FD ? 4096 : 0;
        source.length = (uint64_t)length;
        EXPECT(nybl_model_open_source(runtime, &source, &model) == NYBL_OK);
        story(model, got);
        EXPECT(memcmp(got, want, sizeof got) == 0);
        EXPECT(nybl_model_prefetch(model, count_bytes, &read_bytes) == NYBL_OK);
        EXPECT(nybl_model_wait(model, 1000, 60000, &ready) == NYBL_OK && ready == 1);
        EXPECT((read_bytes > 0) == 1);
        EXPECT(nybl_model_release_pages(model, &freed) == NYBL_OK);
        EXPECT((freed > 0) == (kind != NYBL_SOURCE_MEMORY));
        story(model, got);
        EXPECT(memcmp(got, want, sizeof got) == 0);
        nybl_model_release(model);
    }

    source.kind = NYBL_SOURCE_FD;
    source.offset = 4097;
    source.length = 0;
    EXPECT(nybl_model_open_source(runtime, &source, &model) == NYBL_ERR_CORRUPT && model == NULL);
    source.offset = 1 << 30;
    EXPECT(nybl_model_open_source(runtime, &source, &model) == NYBL_ERR_CORRUPT);
    source.fd = -1;
    EXPECT(nybl_model_open_source(runtime, &source, &model) == NYBL_ERR_INVALID_ARGUMENT);
    source.fd = 9999;
    EXPECT(nybl_model_open_source(runtime, &source, &model) == NYBL_ERR_IO);
    source.kind = 77;
    EXPECT(nybl_model_open_source(runtime, &source, &model) == NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_model_open_source(runtime, NULL, &model) == NYBL_ERR_INVALID_ARGUMENT);
    free(memory);
    fclose(file);
    fclose(package);
}

static void heat(nybl_runtime *runtime, const nybl_model *model, const uint32_t want[10])
{
    nybl_heat report = {0};
    nybl_governor_state state = {0};
    nybl_session *session;
    uint32_t got[10];

    report.struct_size = sizeof report;
    state.struct_size = sizeof state;
    EXPECT(nybl_session_create(model, NULL, &session) == NYBL_OK);
    report.celsius = 52;
    EXPECT(nybl_runtime_report_heat(runtime, &report) == NYBL_OK);
    EXPECT(nybl_session_append(session, prompt, prompt_count) == NYBL_ERR_THERMAL_PAUSE);
    EXPECT(nybl_runtime_get_governor_state(runtime, &state) == NYBL_OK);
    EXPECT(state.retry_ms >= 5000 && state.effort < 0.7f);
    report.celsius = 44;
    report.level = NYBL_THERMAL_NOMINAL;
    EXPECT(nybl_runtime_report_heat(runtime, &report) == NYBL_OK);
    EXPECT(nybl_session_append(session, prompt, prompt_count) == NYBL_OK);
    nybl_session_destroy(session);

    report.celsius = NAN;
    EXPECT(nybl_runtime_report_heat(runtime, &report) == NYBL_ERR_INVALID_ARGUMENT);
    report.celsius = 0;
    report.level = 9;
    EXPECT(nybl_runtime_report_heat(runtime, &report) == NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_runtime_report_heat(runtime, NULL) == NYBL_OK);
    EXPECT(nybl_runtime_get_governor_state(runtime, &state) == NYBL_OK);
    EXPECT(state.effort == 1.0f && state.retry_ms == 0 && state.power_mode == NYBL_POWER_FOREGROUND);

    EXPECT(nybl_runtime_set_power_mode(runtime, NYBL_POWER_BACKGROUND) == NYBL_OK);
    story(model, got);
    EXPECT(memcmp(got, want, sizeof got) == 0);
    EXPECT(nybl_runtime_set_power_mode(runtime, 3) == NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_runtime_set_power_mode(runtime, NYBL_POWER_FOREGROUND) == NYBL_OK);
}

static void *cancel_later(void *session)
{
    struct timespec pause = {0, 300000};

    nanosleep(&pause, NULL);
    nybl_session_cancel(session);
    return NULL;
}

static void cancelling(const nybl_model *model)
{
    nybl_session *session;
    nybl_event event = {0};
    uint32_t many[200];
    pthread_t thread;
    nybl_status status;
    int i;

    event.struct_size = sizeof event;
    for (i = 0; i < 200; i++)
        many[i] = prompt[(size_t)i % prompt_count];
    EXPECT(nybl_session_create(model, NULL, &session) == NYBL_OK);
    EXPECT(nybl_session_cancel(session) == NYBL_OK);
    EXPECT(nybl_session_append(session, many, 200) == NYBL_ERR_CANCELLED);
    for (i = 0; i < 20; i++) {
        pthread_create(&thread, NULL, cancel_later, session);
        status = nybl_session_append(session, many, 200);
        pthread_join(thread, NULL);
        EXPECT(status == NYBL_OK || status == NYBL_ERR_CANCELLED);
        EXPECT(nybl_session_reset(session) == NYBL_OK);
    }
    while (nybl_session_append(session, many, 200) == NYBL_ERR_CANCELLED)
        ;
    EXPECT(nybl_session_next(session, &event) == NYBL_OK);
    EXPECT(nybl_session_cancel(NULL) == NYBL_ERR_INVALID_ARGUMENT);
    nybl_session_destroy(session);
}

int main(int argc, char **argv)
{
    nybl_runtime *runtime;
    nybl_model *model;
    uint32_t want[10];

    if (argc < 2 || nybl_runtime_create(NULL, &runtime) != NYBL_OK ||
        nybl_model_open(runtime, argv[1], strlen(argv[1]), &model) != NYBL_OK ||
        nybl_tokenize(model, PROMPT, strlen(PROMPT), NYBL_TOKENIZE_ADD_SPECIAL, prompt, 64, &prompt_count) !=
            NYBL_OK)
        return 1;
    story(model, want);
    sources(runtime, argv[1], want);
    heat(runtime, model, want);
    cancelling(model);
    nybl_model_release(model);
    nybl_runtime_destroy(runtime);
    if (failures == 0)
        puts("all as documented");
    return failures != 0;
}
