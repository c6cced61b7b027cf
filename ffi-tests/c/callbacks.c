/* Callbacks and threads: stop and go on, re-enter, destroy from inside, two threads at one session, many at one
 * model. */
#include "nybl.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures;

static void expect(const char *what, int holds)
{
    if (!holds) {
        fprintf(stderr, "not so: %s\n", what);
        failures++;
    }
}
#define EXPECT(condition) expect(#condition, condition)

static nybl_session *new_session(const nybl_model *model, const char *prompt)
{
    nybl_session *session;
    uint32_t ids[64];
    size_t count;

    if (nybl_session_create(model, NULL, &session) != NYBL_OK ||
        nybl_tokenize(model, prompt, strlen(prompt), NYBL_TOKENIZE_ADD_SPECIAL, ids, 64, &count) != NYBL_OK ||
        nybl_session_append(session, ids, count) != NYBL_OK)
        exit(1);
    return session;
}

struct story {
    char text[4000];
    size_t length;
    int events, stop_after, last_kind;
    nybl_session *session;
    int destroy, entered;
};

static int32_t collect(void *context, const nybl_event *event)
{
    struct story *story = context;

    if (event->struct_size < sizeof *event || story->length + event->text_len > sizeof story->text)
        exit(1);
    memcpy(story->text + story->length, event->text, event->text_len);
    story->length += event->text_len;
    story->last_kind = event->kind;
    if (story->session && !story->entered++) {
        /* Every call on the session that generates is answered, none waits or harms it. */
        nybl_event inner = {0};
        const float *logits;
        size_t count;

        inner.struct_size = sizeof inner;
        EXPECT(nybl_session_next(story->session, &inner) == NYBL_ERR_BUSY);
        EXPECT(nybl_session_append(story->session, &inner.token, 1) == NYBL_ERR_BUSY);
        EXPECT(nybl_session_truncate(story->session, 0) == NYBL_ERR_BUSY);
        EXPECT(nybl_session_reset(story->session) == NYBL_ERR_BUSY);
        EXPECT(nybl_session_get_logits(story->session, &logits, &count) == NYBL_ERR_BUSY);
        EXPECT(nybl_session_generate(story->session, 1, collect, story) == NYBL_ERR_BUSY);
    }
    if (story->destroy)
        nybl_session_destroy(story->session);
    return ++story->events == story->stop_after;
}

static void callbacks(const nybl_model *model)
{
    static struct story whole, parts, inside;
    nybl_session *session = new_session(model, "Once upon a time");

    EXPECT(nybl_session_generate(session, 0, NULL, NULL) == NYBL_ERR_INVALID_ARGUMENT);
    EXPECT(nybl_session_generate(session, 40, collect, &whole) == NYBL_OK);
    EXPECT(whole.events == 40 && whole.last_kind == NYBL_EVENT_TOKEN);
    nybl_session_destroy(session);

    session = new_session(model, "Once upon a time");
    parts.stop_after = 7;
    EXPECT(nybl_session_generate(session, 0, collect, &parts) == NYBL_OK);
    EXPECT(parts.events == 7);
    parts.session = session;
    EXPECT(nybl_session_generate(session, 33, collect, &parts) == NYBL_OK);
    EXPECT(parts.events == 40 && parts.entered == 33);
    EXPECT(parts.length == whole.length && memcmp(parts.text, whole.text, whole.length) == 0);
    /* To the end of the text or of the context. */
    EXPECT(nybl_session_generate(session, 0, collect, &parts) == NYBL_OK);
    EXPECT(parts.last_kind == NYBL_EVENT_END || parts.last_kind == NYBL_EVENT_CONTEXT_FULL);
    nybl_session_destroy(session);

    inside.session = new_session(model, "Once upon a time");
    inside.destroy = 1;
    EXPECT(nybl_session_generate(inside.session, 0, collect, &inside) == NYBL_OK);
    EXPECT(inside.events == 1);
}

struct job {
    const nybl_model *model;
    nybl_session *session;
    struct story story;
    int done, busy;
};

static void *hammer(void *argument)
{
    struct job *job = argument;
    nybl_event event = {0};

    event.struct_size = sizeof event;
    while (job->done < 20) {
        nybl_status status = nybl_session_next(job->session, &event);
        if (status == NYBL_OK)
            job->done++;
        else if (status == NYBL_ERR_BUSY)
            job->busy++;
        else
            exit(1);
    }
    return NULL;
}

static void *tell(void *argument)
{
    struct job *job = argument;
    nybl_session *session = new_session(job->model, "Once upon a time");

    EXPECT(nybl_session_generate(session, 40, collect, &job->story) == NYBL_OK);
    nybl_session_destroy(session);
    return NULL;
}

static void threads(const nybl_model *model)
{
    static struct job jobs[4];
    pthread_t ids[4];
    int i;

    jobs[0].session = jobs[1].session = new_session(model, "Once upon a time");
    for (i = 0; i < 2; i++)
        pthread_create(&ids[i], NULL, hammer, &jobs[i]);
    for (i = 0; i < 2; i++)
        pthread_join(ids[i], NULL);
    EXPECT(jobs[0].done == 20 && jobs[1].done == 20);
    nybl_session_destroy(jobs[0].session);

    for (i = 0; i < 4; i++) {
        jobs[i].model = model;
        pthread_create(&ids[i], NULL, tell, &jobs[i]);
    }
    for (i = 0; i < 4; i++)
        pthread_join(ids[i], NULL);
    for (i = 1; i < 4; i++)
        EXPECT(jobs[i].story.length == jobs[0].story.length &&
               memcmp(jobs[i].story.text, jobs[0].story.text, jobs[0].story.length) == 0);
    EXPECT(jobs[0].story.length > 50);
}

int main(int argc, char **argv)
{
    nybl_runtime *runtime;
    nybl_model *model;

    if (argc < 2 || nybl_runtime_create(NULL, &runtime) != NYBL_OK ||
        nybl_model_open(runtime, argv[1], strlen(argv[1]), &model) != NYBL_OK)
        return fprintf(stderr, "usage: %s MODEL\n", argv[0]), 2;
    callbacks(model);
    threads(model);
    nybl_model_release(model);
    nybl_runtime_destroy(runtime);
    if (failures == 0)
        puts("all as documented");
    return failures != 0;
}
