/* Sessions that speculate: whatever drafts, the tokens are those of the session alone, and the figures add up. */
#include "check.h"

#include <stdio.h>
#include <string.h>

enum { LENGTH = 60 };

static const uint32_t PROMPT[] = {1, 5, 9};

static nybl_session *start(nybl_model *model)
{
    nybl_session_config config = {0};
    nybl_session *session = NULL;

    config.struct_size = sizeof config;
    config.seed = 7;
    EXPECT(nybl_session_create(model, &config, &session), NYBL_OK);
    EXPECT(nybl_session_append(session, PROMPT, 3), NYBL_OK);
    return session;
}

/* Generates at most `most` tokens; how many there were. */
static size_t generate(nybl_session *session, uint32_t *tokens, size_t most)
{
    size_t count = 0;

    while (count < most) {
        nybl_event event = {0};
        event.struct_size = sizeof event;
        EXPECT(nybl_session_next(session, &event), NYBL_OK);
        if (event.kind != NYBL_EVENT_TOKEN)
            break;
        tokens[count++] = event.token;
    }
    return count;
}

/* A drafter that knows the text, and is wrong about every seventh token of it. */
struct prophet {
    const uint32_t *tokens;
    size_t count;
    nybl_session *session;
    size_t calls;
};

static size_t foretell(void *context, const uint32_t *tokens, size_t n_tokens, uint32_t *drafts, float *confidence,
                       size_t capacity)
{
    struct prophet *prophet = context;
    size_t at = n_tokens - 3, i;
    uint32_t id;

    CHECK(n_tokens >= 3 && memcmp(tokens, PROMPT, sizeof PROMPT) == 0);
    CHECK(memcmp(tokens + 3, prophet->tokens, at * sizeof *tokens) == 0);
    if (prophet->calls++ == 0)
        EXPECT(nybl_session_append(prophet->session, &id, 0), NYBL_ERR_BUSY);
    for (i = 0; i < capacity && at + i < prophet->count; i++) {
        drafts[i] = prophet->tokens[at + i] + ((at + i) % 7 == 6);
        confidence[i] = 0.9f;
    }
    return i;
}

static size_t say_too_much(void *context, const uint32_t *tokens, size_t n_tokens, uint32_t *drafts,
                           float *confidence, size_t capacity)
{
    (void)context, (void)tokens, (void)n_tokens, (void)drafts, (void)confidence;
    return capacity + 1;
}

static void stats_add_up(nybl_session *session, size_t tokens, int must_save_passes)
{
    nybl_spec_stats stats = {0};
    uint64_t rounds = 0, drafted = 0, accepted = 0, undrafted;
    size_t i;

    stats.struct_size = sizeof stats;
    EXPECT(nybl_spec_get_stats(session, &stats), NYBL_OK);
    for (i = 0; i < 8; i++) {
        rounds += stats.rounds[i];
        drafted += i * stats.rounds[i];
    }
    for (i = 0; i < 7; i++)
        accepted += stats.accepted_at[i];
    undrafted = stats.undrafted_measuring + stats.undrafted_limited + stats.undrafted_not_worth +
                stats.undrafted_overdrawn + stats.undrafted_not_found;
    CHECK(rounds == stats.passes && drafted == stats.drafted && accepted == stats.accepted);
    CHECK(undrafted == stats.rounds[0]);
    /* The last round may have given more than was asked for, and the first pass is the prompt's. */
    CHECK(stats.passes + stats.accepted + 1 >= tokens);
    if (must_save_passes)
        CHECK(stats.accepted > 0 && stats.passes < tokens);
}

static void every_drafter(nybl_model *model, const uint32_t *want, size_t count)
{
    static const char *NAMES[] = {"n-grams", "a model", "a function"};
    uint32_t got[LENGTH];
    size_t kind, mode;

    for (kind = 0; kind < 3; kind++) {
        for (mode = 0; mode < 2; mode++) {
            nybl_session *session = start(model);
            nybl_drafter *drafter = NULL;
            nybl_spec_config config = {0};
            struct prophet prophet = {want, count, session, 0};
            size_t half;

            if (kind == 0)
                EXPECT(nybl_drafter_create_ngram(&drafter), NYBL_OK);
            else if (kind == 1)
                EXPECT(nybl_drafter_create_model(model, model, &drafter), NYBL_OK);
            else
                EXPECT(nybl_drafter_create_callback(foretell, &prophet, &drafter), NYBL_OK);
            config.struct_size = sizeof config;
            config.mode = mode == 0 ? NYBL_SPEC_ALWAYS : NYBL_SPEC_AUTO;
            config.max_drafts = 5;
            EXPECT(nybl_spec_attach(session, drafter, &config), NYBL_OK);
            EXPECT(nybl_spec_attach(session, drafter, &config), NYBL_ERR_BUSY);
            EXPECT(nybl_drafter_rewind(drafter, 0), NYBL_ERR_BUSY);
            nybl_drafter_destroy(drafter);

            half = generate(session, got, 20);
            EXPECT(nybl_spec_set_share(session, 0.5f), NYBL_OK);
            half += generate(session, got + half, LENGTH - half);
            if (half != count || memcmp(got, want, count * sizeof *got) != 0) {
                fprintf(stderr, "%s, mode %d: other tokens\n", NAMES[kind], (int)mode);
                failures++;
            }
            stats_add_up(session, count, kind != 0 && mode == 0);

            /* What had been drafted beyond the tokens given out is gone. */
            EXPECT(nybl_session_truncate(session, 3 + 10), NYBL_OK);
            generate(session, got, 20);
            CHECK(memcmp(got, want + 10, 20 * sizeof *got) == 0);
            EXPECT(nybl_spec_detach(session), NYBL_OK);
            EXPECT(nybl_spec_detach(session), NYBL_OK);
            generate(session, got, 5);
            CHECK(memcmp(got, want + 30, 5 * sizeof *got) == 0);
            nybl_session_destroy(session);
        }
    }
}

static void misuse(nybl_model *model, const uint32_t *want)
{
    nybl_session *session = start(model), *other = start(model);
    nybl_drafter *drafter = NULL;
    nybl_spec_config config = {0};
    nybl_spec_stats stats = {0};
    nybl_event event = {0};
    uint32_t got[5];

    event.struct_size = sizeof event;
    stats.struct_size = sizeof stats;
    EXPECT(nybl_spec_get_stats(session, &stats), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_spec_set_share(session, 0.5f), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_spec_attach(session, NULL, NULL), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_drafter_create_callback(NULL, NULL, &drafter), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_drafter_create_model(NULL, model, &drafter), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_drafter_create_ngram(NULL), NYBL_ERR_INVALID_ARGUMENT);
    CHECK(drafter == NULL);
    nybl_drafter_destroy(NULL);

    EXPECT(nybl_drafter_create_callback(say_too_much, NULL, &drafter), NYBL_OK);
    EXPECT(nybl_spec_attach(session, drafter, &config), NYBL_ERR_INVALID_ARGUMENT);
    config.struct_size = sizeof config;
    config.mode = 9;
    EXPECT(nybl_spec_attach(session, drafter, &config), NYBL_ERR_INVALID_ARGUMENT);
    config.mode = NYBL_SPEC_ALWAYS;
    EXPECT(nybl_spec_attach(session, drafter, &config), NYBL_OK);
    EXPECT(nybl_spec_attach(other, drafter, &config), NYBL_ERR_BUSY);
    EXPECT(nybl_spec_set_share(session, 1.5f), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_session_next(session, &event), NYBL_OK);
    CHECK(event.token == want[0]);
    /* A function that breaks its word stops the generation, and the session goes on without it. */
    EXPECT(nybl_session_next(session, &event), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_spec_detach(session), NYBL_OK);
    generate(session, got, 5);
    CHECK(memcmp(got, want + 1, sizeof got) == 0);

    /* Free again, for another session. */
    EXPECT(nybl_spec_attach(other, drafter, NULL), NYBL_OK);
    nybl_session_destroy(other);
    EXPECT(nybl_drafter_rewind(drafter, 0), NYBL_OK);
    nybl_drafter_destroy(drafter);
    nybl_session_destroy(session);
}

/* A host with its own models uses the drafters, too. */
static void without_a_session(void)
{
    static const uint32_t TEXT[] = {1, 2, 3, 4, 1, 2};
    static const uint32_t OTHER[] = {7, 8, 9, 7, 8, 5, 7};
    nybl_drafter *drafter = NULL;
    uint32_t drafts[4];
    float confidence[4];
    size_t count = 9;

    EXPECT(nybl_drafter_create_ngram(&drafter), NYBL_OK);
    EXPECT(nybl_drafter_draft(drafter, TEXT, 6, drafts, confidence, 2, &count), NYBL_OK);
    CHECK(count == 2 && drafts[0] == 3 && drafts[1] == 4 && confidence[0] == 0.5f);
    EXPECT(nybl_drafter_draft(drafter, TEXT, 4, drafts, NULL, 4, &count), NYBL_OK);
    CHECK(count == 0);
    EXPECT(nybl_drafter_rewind(drafter, 0), NYBL_OK);
    EXPECT(nybl_drafter_draft(drafter, OTHER, 7, drafts, NULL, 1, &count), NYBL_OK);
    CHECK(count == 1 && drafts[0] == 8);
    EXPECT(nybl_drafter_draft(drafter, OTHER, 7, NULL, NULL, 1, &count), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_drafter_draft(drafter, NULL, 7, drafts, NULL, 1, &count), NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_drafter_draft(NULL, OTHER, 7, drafts, NULL, 1, &count), NYBL_ERR_INVALID_ARGUMENT);
    nybl_drafter_destroy(drafter);
}

int main(int argc, char **argv)
{
    nybl_runtime *runtime = NULL;
    nybl_model *model = NULL;
    nybl_session *plain;
    uint32_t want[LENGTH];
    size_t count;

    if (argc < 2) {
        fprintf(stderr, "usage: speculate MODEL\n");
        return 2;
    }
    EXPECT(nybl_runtime_create(NULL, &runtime), NYBL_OK);
    EXPECT(nybl_model_open(runtime, argv[1], strlen(argv[1]), &model), NYBL_OK);
    plain = start(model);
    count = generate(plain, want, LENGTH);
    CHECK(count == LENGTH);
    nybl_session_destroy(plain);

    every_drafter(model, want, count);
    misuse(model, want);
    without_a_session();
    nybl_model_release(model);
    nybl_runtime_destroy(runtime);
    if (failures == 0)
        printf("all as documented\n");
    return failures != 0;
}
