/* A host's allocator that refuses the n-th request, for every n until a whole run needs fewer: each refusal is a
 * status of the call that met it, nothing leaks, and what was open goes on afterwards.
 *
 *   ./allocation MODEL.nybl [MODEL.gguf]
 */
#include "nybl.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Requests since the last arm(), the one to refuse (0: none), and what is out. */
static struct {
    long requests, refuse, blocks;
    size_t bytes;
    int wrong;
} host;

static void arm(long refuse)
{
    host.requests = 0;
    host.refuse = refuse;
}

/* Plain malloc aligns to 16: the block begins at the next multiple of `align`, behind a note of where. */
static void *allocate(void *context, size_t size, size_t align)
{
    char *block, *data;

    if (context != &host || size == 0 || align == 0 || align > 64 || (align & (align - 1)) != 0)
        host.wrong++;
    if (++host.requests == host.refuse || !(block = malloc(size + align + sizeof block)))
        return NULL;
    data = block + sizeof block;
    data += (align - (uintptr_t)data % align) % align;
    memcpy(data - sizeof block, &block, sizeof block);
    memset(data, 0xA5, size); /* the library must not count on zeros */
    host.blocks++;
    host.bytes += size;
    return data;
}

static void release(void *context, void *data, size_t size, size_t align)
{
    char *block;

    (void)context, (void)align;
    memcpy(&block, (char *)data - sizeof block, sizeof block);
    host.blocks--;
    host.bytes -= size;
    free(block);
}

static int refused, failures;

/* Whether the call was made; a refusal may answer it, anything else is wrong. */
static int made(nybl_status status, const char *what)
{
    char why[256];

    if (status == NYBL_OK)
        return 1;
    nybl_last_error(why, sizeof why);
    if (status != NYBL_ERR_OUT_OF_MEMORY || host.refuse == 0 || host.requests < host.refuse) {
        fprintf(stderr, "%s: %s: %s\n", what, nybl_status_name(status), why);
        failures++;
    }
    refused++;
    return 0;
}

static const char PROMPT[] = "Once upon a time there was a little girl who wanted to see the sea.";

/* The main job, where each call that is refused is made once more with memory at hand. */
static size_t run(const char *path, long refuse, char *story, size_t capacity)
{
    nybl_allocator allocator = {0};
    nybl_runtime_config config = {0};
    nybl_session_config settings = {0};
    nybl_runtime *runtime = NULL;
    nybl_model *model = NULL;
    nybl_session *session = NULL;
    nybl_batch *batch = NULL;
    nybl_event event = {0};
    uint32_t ids[128];
    size_t count, length = 0;

    allocator.struct_size = sizeof allocator;
    allocator.context = &host;
    allocator.alloc = allocate;
    allocator.free = release;
    config.struct_size = sizeof config;
    config.threads = 2;
    config.allocator = &allocator;
    settings.struct_size = sizeof settings;
    settings.context = 100;
    event.struct_size = sizeof event;
    arm(refuse);
#define AGAIN(call) (made(call, #call) || (arm(0), made(call, #call)))
    if (AGAIN(nybl_runtime_create(&config, &runtime)) &&
        AGAIN(nybl_model_open(runtime, path, strlen(path), &model)) &&
        AGAIN(nybl_session_create(model, &settings, &session)) &&
        AGAIN(nybl_tokenize(model, PROMPT, sizeof PROMPT - 1, NYBL_TOKENIZE_ADD_SPECIAL, ids, 128, &count)) &&
        AGAIN(nybl_session_append(session, ids, count)) &&
        AGAIN(nybl_batch_create(session, 1, &batch))) {
        while (AGAIN(nybl_session_next(session, &event)) && event.kind == NYBL_EVENT_TOKEN &&
               length + event.text_len <= capacity) {
            memcpy(story + length, event.text, event.text_len);
            length += event.text_len;
            /* Every other token comes of a batch. */
            if (length % 2 && !AGAIN(nybl_batch_decode(batch, &session, 1, NULL)))
                break;
        }
    }
    nybl_batch_destroy(batch);
    nybl_session_destroy(session);
    nybl_model_release(model);
    nybl_runtime_destroy(runtime);
    if (host.blocks != 0 || host.bytes != 0) {
        fprintf(stderr, "%ld blocks of %zu bytes leak when request %ld is refused\n", host.blocks,
                host.bytes, refuse);
        failures++;
        host.blocks = 0, host.bytes = 0;
    }
    return length;
}

int main(int argc, char **argv)
{
    static char want[4000], story[4000];
    int file;

    if (argc < 2)
        return fprintf(stderr, "usage: %s MODEL...\n", argv[0]), 2;
    for (file = 1; file < argc; file++) {
        size_t length = run(argv[file], 0, want, sizeof want);
        long requests = host.requests, n;

        if (length < 50 || requests < 10)
            return fprintf(stderr, "%zu bytes of story from %ld requests\n", length, requests), 1;
        for (n = 1; n <= requests; n++) {
            refused = 0;
            if (run(argv[file], n, story, sizeof story) != length || memcmp(want, story, length) != 0) {
                fprintf(stderr, "another story when request %ld is refused\n", n);
                failures++;
            }
            if (refused != 1) {
                fprintf(stderr, "%d calls answered when request %ld was refused\n", refused, n);
                failures++;
            }
        }
        printf("%ld requests refused, one at a time: %s\n", requests, argv[file]);
    }
    if (failures == 0 && host.wrong == 0)
        puts("every refusal was a status");
    return failures != 0 || host.wrong != 0;
}
