/* Sessions that go through the model together: each comes to what it comes to alone, and misuse to a status. */
#include "check.h"

#include <stdio.h>
#include <string.h>

enum { LENGTH = 40, SESSIONS = 4 };

/* Session `i`: a prompt of its own, half of them with random numbers. */
static nybl_session *start(nybl_model *model, uint32_t i, uint32_t kv_format)
{
    uint32_t prompt[] = {1, 5, 9, 0};
    nybl_session_config config = {0};
    nybl_session *session = NULL;

    prompt[3] = 20 + i;
    config.struct_size = sizeof config;
    config.seed = i;
    config.temperature = i % 2 ? 0.8f : 0.0f;
    config.kv_format = kv_format;
    EXPECT(nybl_session_create(model, &config, &session), NYBL_OK);
    EXPECT(nybl_session_append(session, prompt, 4), NYBL_OK);
    return session;
}

/* The next token; 0 when there is none. */
static uint32_t next(nybl_session *session)
{
    nybl_event event = {0};
    event.struct_size = sizeof event;
    EXPECT(nybl_session_next(session, &event), NYBL_OK);
    return event.kind == NYBL_EVENT_TOKEN ? event.token : 0;
}

static void the_tokens_of_each_alone(nybl_model *model)
{
    nybl_session *sessions[SESSIONS];
    nybl_batch *batch = NULL;
    uint32_t got[SESSIONS][LENGTH], i, at;
    size_t computed = 9;

    for (i = 0; i < SESSIONS; i++)
        sessions[i] = start(model, i, NYBL_KV_F32);
    EXPECT(nybl_batch_create(sessions[0], SESSIONS, &batch), NYBL_OK);
    EXPECT(nybl_batch_decode(batch, sessions, SESSIONS, &computed), NYBL_OK);
    CHECK(computed == 0); /* The prompts have been computed, and nothing is missing. */
    for (at = 0; at < LENGTH; at++) {
        for (i = 0; i < SESSIONS; i++)
            got[i][at] = next(sessions[i]);
        EXPECT(nybl_batch_decode(batch, sessions, SESSIONS, &computed), NYBL_OK);
        CHECK(computed == SESSIONS);
    }
    for (i = 0; i < SESSIONS; i++) {
        nybl_session *alone = start(model, i, NYBL_KV_F32);
        const float *a = NULL, *b = NULL;
        size_t n = 0;
        for (at = 0; at < LENGTH; at++)
            CHECK(next(alone) == got[i][at] && got[i][at] != 0);
        EXPECT(nybl_session_get_logits(alone, &a, &n), NYBL_OK);
        EXPECT(nybl_session_get_logits(sessions[i], &b, &n), NYBL_OK);
        CHECK(memcmp(a, b, n * sizeof *a) == 0);
        nybl_session_destroy(alone);
        nybl_session_destroy(sessions[i]);
    }
    nybl_batch_destroy(batch);
}

static void misuse(nybl_model *model)
{
    nybl_session *all[3] = {NULL, NULL, NULL}, *twice[2], *hole[2];
    nybl_batch *batch = NULL;
    size_t computed = 9;

    all[0] = start(model, 0, NYBL_KV_F32);
    all[1] = start(model, 1, NYBL_KV_F32);
    all[2] = start(model, 2, NYBL_KV_I8);
    EXPECT(nybl_batch_create(NULL, 2, &batch), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_batch_create(all[0], 2, NULL), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_batch_create(all[0], 0, &batch), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_batch_create(all[0], 257, &batch), NYBL_ERR_INVALID_ARGUMENT);
    CHECK(batch == NULL);
    EXPECT(nybl_batch_create(all[0], 2, &batch), NYBL_OK);
    next(all[0]), next(all[1]), next(all[2]);

    EXPECT(nybl_batch_decode(NULL, all, 2, &computed), NYBL_ERR_INVALID_ARGUMENT);
    CHECK(computed == 0);
    EXPECT(nybl_batch_decode(batch, NULL, 2, &computed), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_batch_decode(batch, all, 3, &computed), NYBL_ERR_INVALID_ARGUMENT);
    twice[0] = twice[1] = all[0];
    EXPECT(nybl_batch_decode(batch, twice, 2, &computed), NYBL_ERR_BUSY);
    hole[0] = all[0], hole[1] = NULL;
    EXPECT(nybl_batch_decode(batch, hole, 2, &computed), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_session_cancel(all[1]), NYBL_OK);
    EXPECT(nybl_batch_decode(batch, all, 2, &computed), NYBL_ERR_CANCELLED);
    CHECK(computed == 0);
    EXPECT(nybl_batch_decode(batch, NULL, 0, NULL), NYBL_OK);
    EXPECT(nybl_batch_decode(batch, all, 2, &computed), NYBL_OK);
    CHECK(computed == 2);

    /* It outlives the session that it was made like, and keeps the model open. */
    nybl_session_destroy(all[0]);
    next(all[1]);
    EXPECT(nybl_batch_decode(batch, all + 1, 1, NULL), NYBL_OK);
    nybl_session_destroy(all[1]);
    nybl_session_destroy(all[2]);
    nybl_batch_destroy(batch);
    nybl_batch_destroy(NULL);
}

int main(int argc, char **argv)
{
    nybl_runtime *runtime = NULL;
    nybl_model *model = NULL;

    if (argc < 2) {
        fprintf(stderr, "usage: batch MODEL\n");
        return 2;
    }
    EXPECT(nybl_runtime_create(NULL, &runtime), NYBL_OK);
    EXPECT(nybl_model_open(runtime, argv[1], strlen(argv[1]), &model), NYBL_OK);
    the_tokens_of_each_alone(model);
    misuse(model);
    nybl_model_release(model);
    nybl_runtime_destroy(runtime);
    if (failures > 0)
        return 1;
    puts("all as documented");
    return 0;
}
