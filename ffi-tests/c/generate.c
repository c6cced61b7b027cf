/* Streams the continuation of a prompt, greedily: the main job in C.
 *
 *   cc generate.c -lnybl && ./a.out MODEL PROMPT [TOKENS]
 */
#include "nybl.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void check(nybl_status status)
{
    char why[512];
    if (status == NYBL_OK)
        return;
    nybl_last_error(why, sizeof why);
    fprintf(stderr, "%s: %s\n", nybl_status_name(status), why);
    exit(1);
}

int main(int argc, char **argv)
{
    nybl_runtime *runtime;
    nybl_model *model;
    nybl_session *session;
    nybl_event event = {0};
    uint32_t ids[256];
    size_t count;
    long left;

    if (argc < 3)
        return fprintf(stderr, "usage: %s MODEL PROMPT [TOKENS]\n", argv[0]), 2;
    left = argc > 3 ? atol(argv[3]) : -1;
    event.struct_size = sizeof event;

    check(nybl_runtime_create(NULL, &runtime));
    check(nybl_model_open(runtime, argv[1], strlen(argv[1]), &model));
    check(nybl_session_create(model, NULL, &session));
    check(nybl_tokenize(model, argv[2], strlen(argv[2]), NYBL_TOKENIZE_ADD_SPECIAL, ids, 256, &count));
    check(nybl_session_append(session, ids, count));

    printf("%s", argv[2]);
    while (left-- != 0) {
        check(nybl_session_next(session, &event));
        fwrite(event.text, 1, event.text_len, stdout);
        fflush(stdout);
        if (event.kind != NYBL_EVENT_TOKEN)
            break;
    }
    printf("\n");

    nybl_session_destroy(session);
    nybl_model_release(model);
    nybl_runtime_destroy(runtime);
    return 0;
}
