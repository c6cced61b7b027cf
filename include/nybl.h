/* nybl: an embeddable LLM inference kernel. https://crates.io/crates/nybl
 *
 * Generated from src/ffi by cbindgen; `BLESS=1 cargo test --test header` writes it anew.
 *
 * Conventions
 * - A fallible function returns nybl_status. Results go through out-parameters, which are set to NULL or
 *   zero first and hold a result only after NYBL_OK. nybl_last_error() has the words for a failure.
 * - Ownership is in the name: _create, _open and _retain give the caller a handle, _destroy and _release
 *   take it back and accept NULL, _get_ borrows for as long as the function says.
 * - Every struct starts with struct_size, which the caller sets to its sizeof. Zero in any other field is
 *   the default, so `= {0}` and the size make a valid config.
 * - Text is UTF-8 with a length, never zero-terminated unless the function says so.
 * - No function aborts or unwinds into the caller, and nothing is global but the last error of a thread.
 */

#ifndef NYBL_H
#define NYBL_H

#include <stddef.h>
#include <stdint.h>

/**
 * Changes when a program built against an older header would break.
 */
#define NYBL_ABI_MAJOR 1

/**
 * Grows when something is added.
 */
#define NYBL_ABI_MINOR 0

/**
 * For nybl_tokenize(): begin with the model's begin-of-sequence token if it wants one.
 */
#define NYBL_TOKENIZE_ADD_SPECIAL 1

/**
 * For nybl_tokenize(): text that names a special token becomes that token. Never set it for text from a
 * user, who could then write control tokens.
 */
#define NYBL_TOKENIZE_PARSE_SPECIAL 2

/**
 * nybl_event.kind: a token was generated.
 */
#define NYBL_EVENT_TOKEN 1

/**
 * nybl_event.kind: the model ended its text; `token` tells how and is no part of the sequence.
 */
#define NYBL_EVENT_END 2

/**
 * nybl_event.kind: the context is full.
 */
#define NYBL_EVENT_CONTEXT_FULL 3

/**
 * An opened model. Any thread may use it, several at a time.
 */
typedef struct nybl_model nybl_model;

/**
 * Threads and kernels; what would otherwise be global. Any thread may use it.
 */
typedef struct nybl_runtime nybl_runtime;

/**
 * One sequence of tokens on a model. One thread at a time; a second one gets NYBL_ERR_BUSY.
 */
typedef struct nybl_session nybl_session;

/**
 * What a call came to: NYBL_OK or a code whose second byte is its class (1 the caller's mistake, 2 a
 * resource, 3 the data, 4 the state of a handle, 5 a bug in nybl). Codes are never reused; treat one
 * you do not know by its class.
 */
typedef int32_t nybl_status;

/**
 * Settings of a runtime; all zeros is the default.
 */
typedef struct nybl_runtime_config {
    /**
     * sizeof(nybl_runtime_config).
     */
    uint32_t struct_size;
    /**
     * Threads to compute with, the calling one included; 0 for one on each available core.
     */
    uint32_t threads;
    /**
     * The strongest instruction set to use, such as "avx2", or NULL for all the CPU has.
     */
    const char *isa;
    /**
     * Length of isa in bytes.
     */
    size_t isa_len;
} nybl_runtime_config;

/**
 * What a model is.
 */
typedef struct nybl_model_info {
    /**
     * sizeof(nybl_model_info).
     */
    uint32_t struct_size;
    /**
     * Tokens in the vocabulary.
     */
    uint32_t vocab;
    /**
     * Tokens the model was trained to see.
     */
    uint32_t context;
    /**
     * Transformer blocks.
     */
    uint32_t n_layers;
    /**
     * Width of the residual stream.
     */
    uint32_t d_model;
    /**
     * Query heads.
     */
    uint32_t n_heads;
    /**
     * Heads of keys and values.
     */
    uint32_t n_kv_heads;
    /**
     * Floats in a head.
     */
    uint32_t head_dim;
    /**
     * Bytes that a token costs in the KV cache.
     */
    uint64_t kv_token_bytes;
    /**
     * Bytes of weights in the mapping of the file: clean, shared, reclaimable.
     */
    uint64_t mapped_bytes;
    /**
     * Bytes of weights in private memory.
     */
    uint64_t private_bytes;
} nybl_model_info;

/**
 * Settings of a session; all zeros is the default: the model's context, greedy decoding.
 */
typedef struct nybl_session_config {
    /**
     * sizeof(nybl_session_config).
     */
    uint32_t struct_size;
    /**
     * Tokens the session can hold; 0 for as many as the model was trained for.
     */
    uint32_t context;
    /**
     * Prompt tokens that go through the model together; 0 for the default. Does not change a result.
     */
    uint32_t prefill_chunk;
    /**
     * Divides the logits before sampling; 0 always takes the likeliest token.
     */
    float temperature;
    /**
     * Keep the top_k likeliest tokens; 0 keeps all.
     */
    uint32_t top_k;
    /**
     * Keep the likeliest tokens that together reach this probability; 0 keeps all.
     */
    float top_p;
    /**
     * Keep tokens at least this much as probable as the likeliest; 0 keeps all.
     */
    float min_p;
    /**
     * Not used; must be zero.
     */
    uint32_t reserved;
    /**
     * Where the random numbers start: the same seed gives the same tokens on every device.
     */
    uint64_t seed;
} nybl_session_config;

/**
 * What nybl_session_next() came to.
 */
typedef struct nybl_event {
    /**
     * sizeof(nybl_event).
     */
    uint32_t struct_size;
    /**
     * One of NYBL_EVENT_*.
     */
    int32_t kind;
    /**
     * The token.
     */
    uint32_t token;
    /**
     * Not used.
     */
    uint32_t reserved;
    /**
     * Text that became certain with this event: whole UTF-8 characters, not zero-terminated, possibly
     * none. Valid until the next call on the session.
     */
    const char *text;
    /**
     * Length of text in bytes.
     */
    size_t text_len;
} nybl_event;

/**
 * Done.
 */
#define NYBL_OK 0

/**
 * An argument is NULL or outside what the function documents.
 */
#define NYBL_ERR_INVALID_ARGUMENT 257

/**
 * Well formed, but this build cannot do it.
 */
#define NYBL_ERR_UNSUPPORTED 258

/**
 * The caller's buffer is too small; the needed length has been stored.
 */
#define NYBL_ERR_BUFFER_TOO_SMALL 259

/**
 * The system refused memory.
 */
#define NYBL_ERR_OUT_OF_MEMORY 513

/**
 * The system refused to open, read, map or write a file.
 */
#define NYBL_ERR_IO 514

/**
 * The KV cache has used its budget up; truncate or free a sequence.
 */
#define NYBL_ERR_KV_EXHAUSTED 515

/**
 * A file contradicts its own format.
 */
#define NYBL_ERR_CORRUPT 769

/**
 * The session holds as many tokens as its context allows.
 */
#define NYBL_ERR_CONTEXT_FULL 1025

/**
 * An earlier call on this session failed part-way; reset it.
 */
#define NYBL_ERR_POISONED 1026

/**
 * Another thread is inside a call on this handle.
 */
#define NYBL_ERR_BUSY 1027

/**
 * A bug in nybl, caught before it could reach the caller.
 */
#define NYBL_ERR_INTERNAL 1281

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * The ABI version of the loaded library: major << 16 | minor. Compare the major with NYBL_ABI_MAJOR.
 */
uint32_t nybl_abi_version(void);

/**
 * The library's version as text, such as "0.1.0". Static.
 */
const char *nybl_version_string(void);

/**
 * The name of a status, such as "NYBL_ERR_IO"; "NYBL_ERR_UNKNOWN" for one this library does not have.
 * Static.
 */
const char *nybl_status_name(nybl_status status);

/**
 * Copies what the last failing call of this thread had to say into `buffer`, zero-terminated and cut to
 * `capacity`, and returns the length of the whole text without the zero. A call that succeeds leaves
 * the text alone. `buffer` may be NULL to ask for the length.
 */
size_t nybl_last_error(char *buffer,
                       size_t capacity);

/**
 * Starts a runtime. `config` may be NULL. Destroy it with nybl_runtime_destroy().
 */
nybl_status nybl_runtime_create(const struct nybl_runtime_config *config,
                                struct nybl_runtime **out);

/**
 * Gives up a runtime. Models opened with it stay usable. NULL is ignored.
 */
void nybl_runtime_destroy(struct nybl_runtime *runtime);

/**
 * Opens the .nybl or GGUF file at `path` (UTF-8, `path_len` bytes). The weights of a .nybl file stay
 * in the mapping, so the file must not be truncated while it is open; replace it by renaming. Release
 * the model with nybl_model_release().
 */
nybl_status nybl_model_open(const struct nybl_runtime *runtime,
                            const char *path,
                            size_t path_len,
                            struct nybl_model **out);

/**
 * Another handle to the same model, to be released on its own; NULL for NULL.
 */
struct nybl_model *nybl_model_retain(const struct nybl_model *model);

/**
 * Gives up a handle; the model is closed when its last handle and its last session are gone. NULL is
 * ignored.
 */
void nybl_model_release(struct nybl_model *model);

/**
 * Fills `info`, whose struct_size the caller has set.
 */
nybl_status nybl_model_get_info(const struct nybl_model *model, struct nybl_model_info *info);

/**
 * Turns UTF-8 text into token ids. Stores the number of ids in `count` and as many as fit in `ids`;
 * NYBL_ERR_BUFFER_TOO_SMALL when that is not all of them. `ids` may be NULL with `capacity` 0 to ask for the
 * number. `flags` is a sum of NYBL_TOKENIZE_*.
 */
nybl_status nybl_tokenize(const struct nybl_model *model,
                          const char *text_utf8,
                          size_t text_len,
                          uint32_t flags,
                          uint32_t *ids,
                          size_t capacity,
                          size_t *count);

/**
 * Turns token ids into UTF-8 text (special tokens are left out). Stores the length in `text_len` and as
 * many bytes as fit in `buffer`; NYBL_ERR_BUFFER_TOO_SMALL when that is not all of them. `buffer` may be
 * NULL with `capacity` 0 to ask for the length. No terminating zero is written.
 */
nybl_status nybl_detokenize(const struct nybl_model *model,
                            const uint32_t *ids,
                            size_t count,
                            char *buffer,
                            size_t capacity,
                            size_t *text_len);

/**
 * Starts an empty session. `config` may be NULL. Destroy it with nybl_session_destroy(); it keeps the
 * model open.
 */
nybl_status nybl_session_create(const struct nybl_model *model,
                                const struct nybl_session_config *config,
                                struct nybl_session **out);

/**
 * Ends a session. No call on it may be in progress. NULL is ignored.
 */
void nybl_session_destroy(struct nybl_session *session);

/**
 * Adds tokens to the sequence and runs them through the model. NYBL_ERR_CONTEXT_FULL when they do not
 * fit: nothing has changed then.
 */
nybl_status nybl_session_append(struct nybl_session *session,
                                const uint32_t *ids,
                                size_t count);

/**
 * Chooses the next token and fills `event`, whose struct_size the caller has set. After
 * NYBL_EVENT_END the session may go on with nybl_session_append().
 */
nybl_status nybl_session_next(struct nybl_session *session, struct nybl_event *event);

/**
 * Keeps the first `count` tokens of the sequence; more than it has is no error.
 */
nybl_status nybl_session_truncate(struct nybl_session *session, size_t count);

/**
 * Forgets all tokens and makes a session usable again that answered NYBL_ERR_POISONED.
 */
nybl_status nybl_session_reset(struct nybl_session *session);

/**
 * Borrows the logits after the last token: one float for each token of the vocabulary, valid until the
 * next call on the session.
 */
nybl_status nybl_session_get_logits(struct nybl_session *session,
                                    const float **logits,
                                    size_t *count);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* NYBL_H */
