/* Opens the library at run time, asks for the table of functions and generates through it.
 *
 *   cc table.c -ldl && ./a.out /path/to/libnybl.so MODEL
 */
#include "nybl.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

typedef const nybl_api *(*get_api_fn)(uint32_t, uint32_t);

/* A member beyond the library's table does not exist, and one of a level it lacks is NULL. */
#define HAS(api, member) \
    (offsetof(nybl_api, member) + sizeof(api)->member <= (api)->struct_size && (api)->member)

static int32_t print(void *context, const nybl_event *event)
{
    *(int *)context += event->kind == NYBL_EVENT_TOKEN;
    fwrite(event->text, 1, event->text_len, stdout);
    return 0;
}

int main(int argc, char **argv)
{
    const char *prompt = "Once upon a time";
    nybl_runtime *runtime;
    nybl_model *model;
    nybl_session *session;
    const nybl_api *api;
    get_api_fn get_api;
    void *library, *symbol;
    uint32_t ids[64];
    size_t count;
    int tokens = 0;

    if (argc < 3)
        return fprintf(stderr, "usage: %s LIBRARY MODEL\n", argv[0]), 2;
    library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
    if (!library || !(symbol = dlsym(library, "nybl_get_api")))
        return fprintf(stderr, "%s\n", dlerror()), 1;
    memcpy(&get_api, &symbol, sizeof get_api); /* ISO C has no cast from an object to a function */
    if (get_api(NYBL_ABI_MAJOR + 1, 0) || get_api(NYBL_ABI_MAJOR, NYBL_ABI_MINOR + 1))
        return fprintf(stderr, "the library promises what it cannot know\n"), 1;
    api = get_api(NYBL_ABI_MAJOR, NYBL_ABI_MINOR);
    if (!api || !HAS(api, session_generate))
        return fprintf(stderr, "%s cannot generate\n", argv[1]), 1;

    if (api->runtime_create(NULL, &runtime) != NYBL_OK ||
        api->model_open(runtime, argv[2], strlen(argv[2]), &model) != NYBL_OK ||
        api->session_create(model, NULL, &session) != NYBL_OK ||
        api->tokenize(model, prompt, strlen(prompt), NYBL_TOKENIZE_ADD_SPECIAL, ids, 64, &count) != NYBL_OK ||
        api->session_append(session, ids, count) != NYBL_OK)
        return fprintf(stderr, "no session\n"), 1;
    printf("%s", prompt);
    if (api->session_generate(session, 30, print, &tokens) != NYBL_OK || tokens != 30)
        return fprintf(stderr, "%d tokens\n", tokens), 1;
    printf("\n");
    api->session_destroy(session);
    api->model_release(model);
    api->runtime_destroy(runtime);
    return 0;
}
