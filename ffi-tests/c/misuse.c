/* What a host can get wrong: each call must answer with its status, and the handles go on working. */
#include "nybl.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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

static void expect_error_text(const char *part)
{
    char why[512];
    size_t length = nybl_last_error(why, sizeof why);
    if (length == 0 || length >= sizeof why || strlen(why) != length || !strstr(why, part)) {
        fprintf(stderr, "the last error is \"%s\", without \"%s\"\n", why, part);
        failures++;
    }
}

static void null_everywhere(void)
{
    EXPECT(nybl_runtime_create(NULL, NULL), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_model_open(NULL, NULL, 0, NULL), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_model_get_info(NULL, NULL), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_tokenize(NULL, NULL, 0, 0, NULL, 0, NULL), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_detokenize(NULL, NULL, 0, NULL, 0, NULL), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_session_create(NULL, NULL, NULL), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_session_append(NULL, NULL, 0), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_session_next(NULL, NULL), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_session_truncate(NULL, 0), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_session_reset(NULL), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_session_get_logits(NULL, NULL, NULL), NYBL_ERR_INVALID_ARGUMENT);
    nybl_runtime_destroy(NULL);
    nybl_model_release(NULL);
    nybl_session_destroy(NULL);
    if (nybl_model_retain(NULL) != NULL)
        failures++;
    nybl_last_error(NULL, 0);
}

static void versions(void)
{
    if (nybl_abi_version() != ((uint32_t)NYBL_ABI_MAJOR << 16 | NYBL_ABI_MINOR) ||
        strlen(nybl_version_string()) < 5 ||
        strcmp(nybl_status_name(NYBL_ERR_IO), "NYBL_ERR_IO") != 0 ||
        strcmp(nybl_status_name(12345), "NYBL_ERR_UNKNOWN") != 0) {
        fprintf(stderr, "versions or status names are wrong\n");
        failures++;
    }
}

static void configs(void)
{
    struct {
        nybl_runtime_config config;
        uint64_t later;
    } newer = {{0}, 0};
    nybl_runtime_config config = {0};
    nybl_runtime *runtime = (nybl_runtime *)&config;

    EXPECT(nybl_runtime_create(&config, &runtime), NYBL_ERR_INVALID_ARGUMENT);
    expect_error_text("struct_size");
    if (runtime != NULL)
        fprintf(stderr, "the out-parameter was not cleared\n"), failures++;
    config.struct_size = sizeof config;
    config.isa = "mmx";
    config.isa_len = 3;
    EXPECT(nybl_runtime_create(&config, &runtime), NYBL_ERR_INVALID_ARGUMENT);
    expect_error_text("mmx");
    config.isa_len = 0;
    config.threads = 1000000;
    EXPECT(nybl_runtime_create(&config, &runtime), NYBL_ERR_INVALID_ARGUMENT);

    newer.config.struct_size = sizeof newer;
    newer.later = 1;
    EXPECT(nybl_runtime_create(&newer.config, &runtime), NYBL_ERR_UNSUPPORTED);
    newer.later = 0;
    EXPECT(nybl_runtime_create(&newer.config, &runtime), NYBL_OK);
    nybl_runtime_destroy(runtime);
}

int main(int argc, char **argv)
{
    nybl_runtime *runtime;
    nybl_model *model, *again;
    nybl_session *session;
    nybl_session_config config = {0};
    nybl_model_info info = {0};
    nybl_event event = {0};
    const float *logits;
    uint32_t ids[8], bad = 1u << 30;
    size_t count, length, i;
    char text[64];

    if (argc < 2)
        return fprintf(stderr, "usage: %s MODEL\n", argv[0]), 2;
    null_everywhere();
    versions();
    configs();

    EXPECT(nybl_runtime_create(NULL, &runtime), NYBL_OK);
    EXPECT(nybl_model_open(runtime, "/nowhere", 8, &model), NYBL_ERR_IO);
    expect_error_text("/nowhere");
    EXPECT(nybl_model_open(runtime, argv[0], strlen(argv[0]), &model), NYBL_ERR_CORRUPT);
    expect_error_text("magic");
    EXPECT(nybl_model_open(runtime, "\xff", 1, &model), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_model_open(runtime, argv[1], strlen(argv[1]), &model), NYBL_OK);
    nybl_runtime_destroy(runtime);
    again = nybl_model_retain(model);
    nybl_model_release(model);
    model = again;

    EXPECT(nybl_model_get_info(model, &info), NYBL_ERR_INVALID_ARGUMENT);
    info.struct_size = sizeof info;
    EXPECT(nybl_model_get_info(model, &info), NYBL_OK);
    if (info.vocab == 0 || info.mapped_bytes + info.private_bytes == 0)
        fprintf(stderr, "the model's info is empty\n"), failures++;

    EXPECT(nybl_tokenize(model, "Once upon", 9, 1, ids, 1, &count), NYBL_ERR_BUFFER_TOO_SMALL);
    if (count < 2 || count > 8)
        fprintf(stderr, "%zu tokens\n", count), failures++;
    EXPECT(nybl_tokenize(model, "Once upon", 9, 4, ids, 8, &count), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_tokenize(model, "Once upon", 9, 1, ids, 8, &count), NYBL_OK);
    EXPECT(nybl_detokenize(model, ids, count, NULL, 0, &length), NYBL_ERR_BUFFER_TOO_SMALL);
    EXPECT(nybl_detokenize(model, ids, count, text, sizeof text, &length), NYBL_OK);
    if (length != 9 || memcmp(text, "Once upon", 9) != 0)
        fprintf(stderr, "detokenized to %.*s\n", (int)length, text), failures++;
    EXPECT(nybl_detokenize(model, &bad, 1, text, sizeof text, &length), NYBL_ERR_INVALID_ARGUMENT);

    config.struct_size = sizeof config;
    config.temperature = -1;
    EXPECT(nybl_session_create(model, &config, &session), NYBL_ERR_INVALID_ARGUMENT);
    expect_error_text("temperature");
    config.temperature = 0;
    config.context = 1u << 31;
    EXPECT(nybl_session_create(model, &config, &session), NYBL_ERR_INVALID_ARGUMENT);
    config.context = 6;
    EXPECT(nybl_session_create(model, &config, &session), NYBL_OK);
    nybl_model_release(model);

    event.struct_size = sizeof event;
    EXPECT(nybl_session_next(session, &event), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_session_append(session, &bad, 1), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_session_append(session, NULL, 3), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_session_append(session, NULL, 0), NYBL_OK);
    EXPECT(nybl_session_append(session, ids, count), NYBL_OK);
    EXPECT(nybl_session_append(session, ids, 6), NYBL_ERR_CONTEXT_FULL);
    EXPECT(nybl_session_get_logits(session, &logits, &length), NYBL_OK);
    if (length != info.vocab)
        fprintf(stderr, "%zu logits\n", length), failures++;
    EXPECT(nybl_session_next(session, NULL), NYBL_ERR_INVALID_ARGUMENT);
    for (i = count; i < 6; i++) {
        EXPECT(nybl_session_next(session, &event), NYBL_OK);
        if (event.kind != NYBL_EVENT_TOKEN)
            fprintf(stderr, "event %d\n", (int)event.kind), failures++;
    }
    EXPECT(nybl_session_next(session, &event), NYBL_OK);
    if (event.kind != NYBL_EVENT_CONTEXT_FULL)
        fprintf(stderr, "event %d where the context is full\n", (int)event.kind), failures++;
    EXPECT(nybl_session_truncate(session, 3), NYBL_OK);
    EXPECT(nybl_session_next(session, &event), NYBL_OK);
    EXPECT(nybl_session_reset(session), NYBL_OK);
    EXPECT(nybl_session_next(session, &event), NYBL_ERR_INVALID_ARGUMENT);
    nybl_session_destroy(session);

    if (failures == 0)
        puts("all as documented");
    return failures != 0;
}
