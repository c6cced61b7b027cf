/* One of two copies of the library in a program: compiled twice, with another NYBL_SYMBOL_PREFIX and RUN. */
#include "nybl.h"

#include <string.h>

size_t RUN(const char *path, char *story, size_t capacity, char *error, size_t error_capacity);

/* Continues a prompt, leaves an error of its own behind, and returns the length of the story, 0 for a failure. */
size_t RUN(const char *path, char *story, size_t capacity, char *error, size_t error_capacity)
{
    nybl_runtime *runtime;
    nybl_model *model;
    nybl_session *session;
    nybl_event event = {0};
    uint32_t id = 1;
    size_t length = 0;

    event.struct_size = sizeof event;
    if (nybl_runtime_create(NULL, &runtime) != NYBL_OK)
        return 0;
    if (nybl_model_open(runtime, path, strlen(path), &model) != NYBL_OK ||
        nybl_session_create(model, NULL, &session) != NYBL_OK ||
        nybl_session_append(session, &id, 1) != NYBL_OK)
        return 0;
    while (nybl_session_next(session, &event) == NYBL_OK && event.kind == NYBL_EVENT_TOKEN &&
           length + event.text_len < capacity) {
        memcpy(story + length, event.text, event.text_len);
        length += event.text_len;
    }
    nybl_session_destroy(session);
    nybl_model_release(model);
    if (nybl_model_open(runtime, error, strlen(error), &model) == NYBL_OK)
        return 0;
    nybl_last_error(error, error_capacity);
    nybl_runtime_destroy(runtime);
    return length;
}
