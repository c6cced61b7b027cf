/* nybl: an embeddable LLM inference kernel.
 *
 * Generated from src/ffi; `BLESS=1 cargo test --test header` writes it anew.
 *
 * Levels, each usable without those after it: kernels, KV cache, verifier, engine (runtime, model, session).
 *
 * Conventions
 * - A fallible function returns nybl_status. Results go through out-parameters, which are set to NULL or
 *   zero first and hold a result only after NYBL_OK. nybl_last_error() has the words for a failure.
 * - Ownership is in the name: _create, _open, _fork and _retain give the caller a handle; _destroy, _close and
 *   _release take it back and accept NULL; _get_ borrows for as long as the function says; what fills memory
 *   of the caller says how much of it. To use or give back a handle that was given back is undefined.
 * - Every struct starts with struct_size, which the caller sets to its sizeof. Zero in any other field is
 *   the default, so `= {0}` and the size make a valid config. A struct grows at its end: an older program's
 *   shorter one is understood, and so is a newer program's longer one, unless it sets what is not known.
 * - Text is UTF-8 with a length, never zero-terminated unless the function says so.
 * - Each handle says which threads may use it. Callbacks run on the thread that called, unless they say
 *   otherwise, and get back the context that was passed with them.
 * - No function unwinds into the caller, and nothing is global but the last error of a thread.
 * - Functions, fields at the end of structs, and codes are added; none is changed or removed within an
 *   NYBL_ABI_MAJOR.
 */

#ifndef NYBL_H
#define NYBL_H

#include <stddef.h>
#include <stdint.h>

/* Defined before this header as, say, app_: the library was given that prefix by
 * scripts/prefix.sh, so that two copies can live in one program. */
#ifdef NYBL_SYMBOL_PREFIX
#define NYBL_JOIN_(prefix, name) prefix##name
#define NYBL_JOIN(prefix, name) NYBL_JOIN_(prefix, name)
#define nybl_abi_version NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_abi_version)
#define nybl_version_string NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_version_string)
#define nybl_status_name NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_status_name)
#define nybl_last_error NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_last_error)
#define nybl_pack_size NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_pack_size)
#define nybl_pack NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_pack)
#define nybl_unpack_rows NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_unpack_rows)
#define nybl_matmul_scratch_size NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_matmul_scratch_size)
#define nybl_quantize_activations NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_quantize_activations)
#define nybl_matmul NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_matmul)
#define nybl_cpu_features NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_cpu_features)
#define nybl_kernel_name NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_kernel_name)
#define nybl_kv_create NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_kv_create)
#define nybl_kv_destroy NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_kv_destroy)
#define nybl_kv_get_stats NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_kv_get_stats)
#define nybl_kv_trim NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_kv_trim)
#define nybl_kv_sequence_create NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_kv_sequence_create)
#define nybl_kv_sequence_fork NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_kv_sequence_fork)
#define nybl_kv_sequence_destroy NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_kv_sequence_destroy)
#define nybl_kv_sequence_length NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_kv_sequence_length)
#define nybl_kv_sequence_truncate NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_kv_sequence_truncate)
#define nybl_kv_reserve NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_kv_reserve)
#define nybl_kv_write NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_kv_write)
#define nybl_kv_attend NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_kv_attend)
#define nybl_kv_commit NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_kv_commit)
#define nybl_kv_reuse NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_kv_reuse)
#define nybl_kv_share NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_kv_share)
#define nybl_kv_drop NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_kv_drop)
#define nybl_kv_save NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_kv_save)
#define nybl_kv_load NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_kv_load)
#define nybl_verify NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_verify)
#define nybl_drafter_create_ngram NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_drafter_create_ngram)
#define nybl_drafter_create_callback NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_drafter_create_callback)
#define nybl_drafter_destroy NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_drafter_destroy)
#define nybl_drafter_draft NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_drafter_draft)
#define nybl_drafter_rewind NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_drafter_rewind)
#define nybl_runtime_create NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_runtime_create)
#define nybl_runtime_destroy NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_runtime_destroy)
#define nybl_model_open NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_model_open)
#define nybl_model_retain NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_model_retain)
#define nybl_model_release NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_model_release)
#define nybl_model_get_info NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_model_get_info)
#define nybl_tokenize NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_tokenize)
#define nybl_detokenize NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_detokenize)
#define nybl_model_open_source NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_model_open_source)
#define nybl_model_open_sources NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_model_open_sources)
#define nybl_source_seal NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_source_seal)
#define nybl_model_lock_pages NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_model_lock_pages)
#define nybl_model_prefetch NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_model_prefetch)
#define nybl_model_wait NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_model_wait)
#define nybl_model_release_pages NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_model_release_pages)
#define nybl_chat_encode NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_chat_encode)
#define nybl_chat_render NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_chat_render)
#define nybl_session_create NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_session_create)
#define nybl_session_destroy NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_session_destroy)
#define nybl_session_append NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_session_append)
#define nybl_session_next NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_session_next)
#define nybl_session_generate NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_session_generate)
#define nybl_session_cancel NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_session_cancel)
#define nybl_session_truncate NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_session_truncate)
#define nybl_session_reset NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_session_reset)
#define nybl_session_get_logits NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_session_get_logits)
#define nybl_model_plan NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_model_plan)
#define nybl_session_set_sampler NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_session_set_sampler)
#define nybl_session_set_logit_bias NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_session_set_logit_bias)
#define nybl_session_set_logits_hook NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_session_set_logits_hook)
#define nybl_session_set_stop_strings NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_session_set_stop_strings)
#define nybl_session_set_logprobs NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_session_set_logprobs)
#define nybl_session_get_logprobs NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_session_get_logprobs)
#define nybl_session_fork NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_session_fork)
#define nybl_session_save NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_session_save)
#define nybl_session_restore NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_session_restore)
#define nybl_session_copy_tokens NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_session_copy_tokens)
#define nybl_session_get_metrics NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_session_get_metrics)
#define nybl_drafter_create_model NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_drafter_create_model)
#define nybl_spec_attach NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_spec_attach)
#define nybl_spec_detach NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_spec_detach)
#define nybl_spec_set_share NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_spec_set_share)
#define nybl_spec_get_stats NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_spec_get_stats)
#define nybl_batch_create NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_batch_create)
#define nybl_batch_decode NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_batch_decode)
#define nybl_batch_destroy NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_batch_destroy)
#define nybl_runtime_report_heat NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_runtime_report_heat)
#define nybl_runtime_set_power_mode NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_runtime_set_power_mode)
#define nybl_runtime_get_governor_state NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_runtime_get_governor_state)
#define nybl_session_set_small_model NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_session_set_small_model)
#define nybl_runtime_relieve NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_runtime_relieve)
#define nybl_get_api NYBL_JOIN(NYBL_SYMBOL_PREFIX, nybl_get_api)
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* -------------------------------------------------------------------------------------------------
 * Statuses, errors and versions
 *
 * What every call comes to, the words for a failure, and which library this is. Any thread, at any time.
 */

/**
 * Changes when a program built against an older header would break.
 */
#define NYBL_ABI_MAJOR 1

/**
 * Grows when something is added.
 */
#define NYBL_ABI_MINOR 0

/**
 * What a call came to: NYBL_OK or a code whose second byte is its class (1 the caller's mistake, 2 a
 * resource, 3 the data, 4 the state of a handle, 5 a bug in nybl). Codes are never reused; treat one
 * you do not know by its class.
 */
typedef int32_t nybl_status;

/**
 * Done.
 */
#define NYBL_OK 0

/**
 * An argument is NULL or outside what the function documents.
 */
#define NYBL_ERR_INVALID_ARGUMENT 0x0101

/**
 * Well formed, but this build cannot do it.
 */
#define NYBL_ERR_UNSUPPORTED 0x0102

/**
 * The caller's buffer is too small; the needed length has been stored.
 */
#define NYBL_ERR_BUFFER_TOO_SMALL 0x0103

/**
 * The system refused memory.
 */
#define NYBL_ERR_OUT_OF_MEMORY 0x0201

/**
 * The system refused to open, read, map or write a file.
 */
#define NYBL_ERR_IO 0x0202

/**
 * The KV cache has used its budget up; truncate or free a sequence.
 */
#define NYBL_ERR_KV_EXHAUSTED 0x0203

/**
 * A file contradicts its own format.
 */
#define NYBL_ERR_CORRUPT 0x0301

/**
 * The session holds as many tokens as its context allows.
 */
#define NYBL_ERR_CONTEXT_FULL 0x0401

/**
 * An earlier call on this session failed part-way; reset it.
 */
#define NYBL_ERR_POISONED 0x0402

/**
 * Another thread is inside a call on this handle.
 */
#define NYBL_ERR_BUSY 0x0403

/**
 * The call was cancelled; the session holds what it held before.
 */
#define NYBL_ERR_CANCELLED 0x0404

/**
 * The device is too hot to go on; nothing has changed. Try again later, after a new report.
 */
#define NYBL_ERR_THERMAL_PAUSE 0x0405

/**
 * A bug in nybl, caught before it could reach the caller.
 */
#define NYBL_ERR_INTERNAL 0x0501

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

/* -------------------------------------------------------------------------------------------------
 * Kernels
 *
 * The matrix kernels alone, for host runtimes that own memory and threads: stateless, no allocation, no I/O.
 * Any thread may call them, several at a time, on memory that nobody else writes.
 */

/**
 * nybl_layout.format: 32-bit floats.
 */
#define NYBL_FORMAT_F32 0

/**
 * nybl_layout.format: IEEE half-precision floats.
 */
#define NYBL_FORMAT_F16 1

/**
 * nybl_layout.format: bfloat16.
 */
#define NYBL_FORMAT_BF16 2

/**
 * nybl_layout.format: signed bytes in groups, w = scale * q.
 */
#define NYBL_FORMAT_Q8 3

/**
 * nybl_layout.format: four bits in groups, w = scale * (q - 8).
 */
#define NYBL_FORMAT_Q4 4

/**
 * nybl_layout.format: four bits in groups, w = scale * (q - zero), zero an int16.
 */
#define NYBL_FORMAT_Q4Z 5

/**
 * nybl_layout.format: four bits in groups, w = scale * q + minimum, minimum an f16.
 */
#define NYBL_FORMAT_Q4M 6

/**
 * nybl_layout.format: three bits in groups, w = scale * (q - 4).
 */
#define NYBL_FORMAT_Q3 7

/**
 * nybl_layout.format: three bits in groups, w = scale * (q - zero), zero an int16.
 */
#define NYBL_FORMAT_Q3Z 8

/**
 * nybl_layout.format: three bits in groups, w = scale * q + minimum, minimum an f16.
 */
#define NYBL_FORMAT_Q3M 9

/**
 * nybl_layout.format: two bits in groups, w = scale * (q - 2).
 */
#define NYBL_FORMAT_Q2 10

/**
 * nybl_layout.format: two bits in groups, w = scale * (q - zero), zero an int16.
 */
#define NYBL_FORMAT_Q2Z 11

/**
 * nybl_layout.format: two bits in groups, w = scale * q + minimum, minimum an f16.
 */
#define NYBL_FORMAT_Q2M 12

/**
 * nybl_weights.kind: n rows of k floats; the quantised formats round them to nearest.
 */
#define NYBL_WEIGHTS_F32 0

/**
 * nybl_weights.kind: n rows of k halves, for NYBL_FORMAT_F16.
 */
#define NYBL_WEIGHTS_F16 1

/**
 * nybl_weights.kind: n rows of k bfloat16, for NYBL_FORMAT_BF16.
 */
#define NYBL_WEIGHTS_BF16 2

/**
 * nybl_weights.kind: n rows of k codes, a byte each (0 to 15 for four bits, 0 to 7, 0 to 3, int8 for Q8), with
 * scales and offsets by row and group.
 */
#define NYBL_WEIGHTS_CODES 3

/**
 * nybl_weights.kind: the arrays of a GPTQ checkpoint for Q4Z, Q3Z or Q2Z (or Q4, Q3, Q2 where all zero
 * points are the middle): `values` qweight `int32[k * bits / 32][n]`, `offsets` qzeros
 * `int32[groups][n * bits / 32]`, `scales` `f16[groups][n]`. Groups are of neighbouring columns: with desc_act sort
 * columns and activations by g_idx first. Zero points are stored less one, unless the checkpoint says gptq_v2.
 */
#define NYBL_WEIGHTS_GPTQ 4

/**
 * nybl_weights.kind: as NYBL_WEIGHTS_GPTQ, zero points as they are.
 */
#define NYBL_WEIGHTS_GPTQ_V2 5

/**
 * nybl_weights.kind: the arrays of an AWQ checkpoint (GEMM version) for Q4Z or Q4: `values` qweight
 * `int32[k][n / 8]`, `offsets` qzeros `int32[groups][n / 8]`, `scales` `f16[groups][n]`.
 */
#define NYBL_WEIGHTS_AWQ 6

/**
 * nybl_weights.kind: `values` are the bytes of GGUF blocks, row after row, group 32: Q4_0 for Q4, Q4_1 for Q4M,
 * Q8_0 for Q8.
 */
#define NYBL_WEIGHTS_GGUF 7

/**
 * A CPU feature: fixed-width vectors of the target's baseline.
 */
#define NYBL_CPU_PORTABLE 1

/**
 * A CPU feature: AVX2 with FMA and F16C.
 */
#define NYBL_CPU_AVX2 2

/**
 * A CPU feature: AVX-512 F, BW, DQ, VL and VNNI.
 */
#define NYBL_CPU_AVX512 4

/**
 * A CPU feature: Arm's Advanced SIMD.
 */
#define NYBL_CPU_NEON 8

/**
 * A CPU feature: SDOT and UDOT.
 */
#define NYBL_CPU_DOTPROD 16

/**
 * A CPU feature: SMMLA.
 */
#define NYBL_CPU_I8MM 32

/**
 * A CPU feature: scalable vectors.
 */
#define NYBL_CPU_SVE 64

/**
 * A CPU feature: AVX-VNNI, dots of four bytes on 256 bits.
 */
#define NYBL_CPU_AVXVNNI 128

/**
 * Format and shape of a matrix W[n, k]: n outputs, k inputs.
 */
typedef struct nybl_layout {
    /**
     * sizeof(nybl_layout).
     */
    uint32_t struct_size;
    /**
     * One of NYBL_FORMAT_*.
     */
    int32_t format;
    /**
     * Values of k that share a scale: 16, 32, 64 or 128, or 0 for one scale a row (NYBL_FORMAT_Q8 only);
     * ignored for floats.
     */
    uint32_t group;
    /**
     * Outputs.
     */
    uint32_t n;
    /**
     * Inputs. Rows that are no whole number of groups are padded.
     */
    uint32_t k;
} nybl_layout;

/**
 * Weights to be packed, row after row.
 */
typedef struct nybl_weights {
    /**
     * sizeof(nybl_weights).
     */
    uint32_t struct_size;
    /**
     * One of NYBL_WEIGHTS_*.
     */
    int32_t kind;
    /**
     * n * k values of that kind, or what the kind says.
     */
    const void *values;
    /**
     * Number of values: floats, codes, int32 words or, for GGUF, bytes.
     */
    size_t values_count;
    /**
     * For codes: one f16 for each row and group, ceil(k / group) of them a row. GPTQ and AWQ: by group and row.
     */
    const uint16_t *scales;
    /**
     * Number of scales.
     */
    size_t scales_count;
    /**
     * For codes of Q4Z, Q3Z and Q2Z one int16 zero point, of Q4M, Q3M and Q2M one f16 minimum, for each row
     * and group; for GPTQ and AWQ the int32 words of qzeros; else NULL.
     */
    const void *offsets;
    /**
     * Number of offsets, or of words.
     */
    size_t offsets_count;
} nybl_weights;

/**
 * Arguments of nybl_matmul(): y[m, n] = x[m, k] * W[n, k]^T for the outputs n0 to n1.
 */
typedef struct nybl_matmul_args {
    /**
     * sizeof(nybl_matmul_args).
     */
    uint32_t struct_size;
    /**
     * CPU features the kernel may use, a sum of NYBL_CPU_*; 0 for all this CPU has.
     */
    uint32_t features;
    /**
     * The packed weights: nybl_pack_size() bytes, at a multiple of 4 (64 is best).
     */
    const void *weights;
    /**
     * Their number of bytes.
     */
    size_t weights_len;
    /**
     * What nybl_quantize_activations() wrote for m rows.
     */
    const void *activations;
    /**
     * Its number of bytes: nybl_matmul_scratch_size().
     */
    size_t activations_len;
    /**
     * Activation rows.
     */
    size_t m;
    /**
     * First output, a multiple of 32; of 64 for two bits and of 128 for three.
     */
    size_t n0;
    /**
     * One past the last output: such a multiple, or n.
     */
    size_t n1;
    /**
     * m rows of outputs; output i of a row is at index i whatever n0 is.
     */
    float *y;
    /**
     * Elements from one row of outputs to the next, at least n.
     */
    size_t y_stride;
    /**
     * n floats that are added to every row, or NULL.
     */
    const float *bias;
    /**
     * The least and the largest output after the bias; both 0 for no bounds.
     */
    float clamp_low;
    /**
     * See clamp_low.
     */
    float clamp_high;
    /**
     * Where outputs go as halves (f16 bits), laid out like y, which is then not used; or NULL.
     */
    uint16_t *y_f16;
} nybl_matmul_args;

/**
 * Stores the bytes that nybl_pack() writes for a matrix of this layout.
 */
nybl_status nybl_pack_size(const struct nybl_layout *layout, size_t *bytes);

/**
 * Packs a matrix into `packed`, which has room for nybl_pack_size() bytes. The result is the same for
 * every CPU: it may be kept in a file and mapped.
 */
nybl_status nybl_pack(const struct nybl_layout *layout,
                      const struct nybl_weights *weights,
                      void *packed,
                      size_t packed_len);

/**
 * Writes rows `row` to `row + count` of a packed matrix as floats, k for each.
 */
nybl_status nybl_unpack_rows(const struct nybl_layout *layout,
                             const void *packed,
                             size_t packed_len,
                             size_t row,
                             size_t count,
                             float *out);

/**
 * Stores the bytes that nybl_quantize_activations() writes for m rows; 64 bytes are a good alignment, 4 the
 * least.
 */
nybl_status nybl_matmul_scratch_size(const struct nybl_layout *layout,
                                     size_t m,
                                     size_t *bytes);

/**
 * Prepares m rows of k floats, `x_stride` floats apart, for products with matrices of this k, group and
 * kind of format: int8 groups for quantised formats, a copy for floats. One call serves all matrices that
 * share an input (query, key and value; gate and up).
 */
nybl_status nybl_quantize_activations(const struct nybl_layout *layout,
                                      const float *x,
                                      size_t x_stride,
                                      size_t m,
                                      void *scratch,
                                      size_t scratch_len);

/**
 * Multiplies the outputs n0 to n1 on the calling thread. Several threads may call it for different
 * ranges of one product at the same time. The result does not depend on the ranges, on m or on the CPU.
 */
nybl_status nybl_matmul(const struct nybl_layout *layout,
                        const struct nybl_matmul_args *args);

/**
 * The features of this CPU that kernels use, a sum of NYBL_CPU_*.
 */
uint32_t nybl_cpu_features(void);

/**
 * Copies the name of the kernel that nybl_matmul() would use, such as "q4-matmul-dotprod", into `buffer`,
 * zero-terminated and cut to `capacity`.
 */
nybl_status nybl_kernel_name(const struct nybl_layout *layout,
                             uint32_t features,
                             char *buffer,
                             size_t capacity);

/* -------------------------------------------------------------------------------------------------
 * The KV cache alone, for hosts that compute keys, values and queries themselves.
 */

/**
 * Keys and values as they are given.
 */
#define NYBL_KV_F32 0

/**
 * Rounded to half precision: half the memory.
 */
#define NYBL_KV_F16 1

/**
 * Eight bits and a scale for each token and head: about a quarter of the memory.
 */
#define NYBL_KV_I8 2

/**
 * Keys of eight bits, values of four; the first 64 tokens of a sequence stay in half precision.
 */
#define NYBL_KV_I4 3

/**
 * A cache: blocks of keys and values that sequences share. Any thread may call; calls on one cache run
 * one after the other.
 */
typedef struct nybl_kv nybl_kv;

/**
 * One sequence of tokens in a cache. One thread at a time; a second one gets NYBL_ERR_BUSY.
 */
typedef struct nybl_kv_sequence nybl_kv_sequence;

/**
 * Settings of a cache. Zero is the default where one is named.
 */
typedef struct nybl_kv_config {
    /**
     * sizeof(nybl_kv_config).
     */
    uint32_t struct_size;
    /**
     * One of NYBL_KV_*: how keys and values are kept.
     */
    uint32_t format;
    /**
     * Layers that have a cache.
     */
    uint32_t n_layers;
    /**
     * KV heads in a layer.
     */
    uint32_t n_kv_heads;
    /**
     * Floats in a head.
     */
    uint32_t head_dim;
    /**
     * Tokens in a block: a multiple of 16 from 16 to 256 (16, 32 or 64 for NYBL_KV_I4); 0 for 64. Does
     * not change a result.
     */
    uint32_t block_tokens;
    /**
     * Bytes of memory that blocks may take. They are taken when tokens need them.
     */
    uint64_t budget;
    /**
     * Threads for attention, the calling one included; 0 for one on each available core.
     */
    uint32_t threads;
    /**
     * Floats of a head that are rotated by position. Only compared with that of a saved sequence.
     */
    uint32_t rope_dim;
    /**
     * Base of the rotary wavelengths. Only compared with that of a saved sequence.
     */
    double rope_theta;
    /**
     * A number of your own for the model and adapter that keys and values come from: a saved sequence of
     * another one is refused.
     */
    uint64_t model;
    /**
     * A folder for a file that takes blocks of idle sequences when the budget is used up; NULL for none.
     */
    const char *spill_folder;
    /**
     * Length of spill_folder in bytes.
     */
    size_t spill_folder_len;
    /**
     * Bytes that this file may take.
     */
    uint64_t spill_budget;
} nybl_kv_config;

/**
 * What a cache holds and could hold.
 */
typedef struct nybl_kv_stats {
    /**
     * sizeof(nybl_kv_stats).
     */
    uint32_t struct_size;
    /**
     * Tokens in a block.
     */
    uint32_t block_tokens;
    /**
     * Bytes of a block.
     */
    uint64_t block_bytes;
    /**
     * Bytes of a token in all layers, NYBL_KV_I4's first 64 tokens left aside.
     */
    uint64_t token_bytes;
    /**
     * Bytes of memory that blocks take.
     */
    uint64_t bytes;
    /**
     * Bytes of memory that they may take.
     */
    uint64_t budget;
    /**
     * Blocks in memory.
     */
    uint64_t resident;
    /**
     * Blocks that a sequence holds; shared ones count once.
     */
    uint64_t used;
    /**
     * Blocks that a sequence with the same beginning would find.
     */
    uint64_t cached;
    /**
     * Blocks in the spill file.
     */
    uint64_t spilled;
    /**
     * Bytes of the spill file that they take.
     */
    uint64_t spilled_bytes;
} nybl_kv_stats;

/**
 * What nybl_kv_attend() computes.
 */
typedef struct nybl_kv_attend_args {
    /**
     * sizeof(nybl_kv_attend_args).
     */
    uint32_t struct_size;
    /**
     * The layer.
     */
    uint32_t layer;
    /**
     * Query heads: a multiple of the KV heads, which they share in equal groups, neighbours together.
     */
    uint32_t n_heads;
    /**
     * Query rows.
     */
    uint32_t rows;
    /**
     * Where row 0 was written, counted from the end of the committed tokens: 0 for the first token behind
     * them. Rows follow each other from there, or are a tree.
     */
    uint32_t first;
    /**
     * Positions that a row sees, its own included; 0 for all before it.
     */
    uint32_t window;
    /**
     * First positions of the sequence that are seen besides the window (attention sinks).
     */
    uint32_t sinks;
    /**
     * Multiplied onto each score; 0 for 1 / sqrt(head_dim).
     */
    float scale;
    /**
     * Scores are bent to lie within this of zero by tanh, after the scale; 0 leaves them alone.
     */
    float softcap;
    /**
     * Not used; must be zero.
     */
    uint32_t reserved;
    /**
     * rows x n_heads x head_dim.
     */
    const float *queries;
    /**
     * Queries for the sinks of rows whose window has left them, rotated to position sinks + window - 1,
     * so that distances never exceed what the model was trained on; NULL to use queries.
     */
    const float *sink_queries;
    /**
     * For a tree of drafts: row i + 1 follows row `parents[i]` <= i, rows - 1 numbers, as for
     * nybl_verify(); a row sees the sequence, its ancestors and itself. NULL for rows that follow each
     * other. `first` must be 0.
     */
    const uint32_t *parents;
    /**
     * rows x n_heads x head_dim.
     */
    float *output;
} nybl_kv_attend_args;

/**
 * Makes an empty cache. Destroy it with nybl_kv_destroy().
 */
nybl_status nybl_kv_create(const struct nybl_kv_config *config, struct nybl_kv **out);

/**
 * Gives up a cache. Its memory goes with its last sequence. NULL is ignored.
 */
void nybl_kv_destroy(struct nybl_kv *kv);

/**
 * Fills `stats`, whose struct_size the caller has set.
 */
nybl_status nybl_kv_get_stats(const struct nybl_kv *kv, struct nybl_kv_stats *stats);

/**
 * Gives the memory of all blocks that no sequence holds back to the system, and with it what new
 * sequences could have found there. Stores the bytes in `freed`, which may be NULL.
 */
nybl_status nybl_kv_trim(struct nybl_kv *kv, uint64_t *freed);

/**
 * Makes an empty sequence in a cache. Destroy it with nybl_kv_sequence_destroy(); it keeps the cache
 * alive.
 */
nybl_status nybl_kv_sequence_create(struct nybl_kv *kv,
                                    struct nybl_kv_sequence **out);

/**
 * Makes a second sequence with the same committed tokens. The two share all blocks; one is copied when one
 * of the two writes into it. A reservation of `sequence` is dropped.
 */
nybl_status nybl_kv_sequence_fork(struct nybl_kv_sequence *sequence,
                                  struct nybl_kv_sequence **out);

/**
 * Ends a sequence and lets go of its blocks. No call on it may be in progress. NULL is ignored.
 */
void nybl_kv_sequence_destroy(struct nybl_kv_sequence *sequence);

/**
 * Stores how many tokens are committed.
 */
nybl_status nybl_kv_sequence_length(const struct nybl_kv_sequence *sequence, size_t *length);

/**
 * Keeps the first `length` tokens, and drops a reservation. Works within shared blocks. What is longer
 * than the sequence changes nothing else. A length inside what nybl_kv_drop() took becomes the length
 * before it; nybl_kv_sequence_length() tells.
 */
nybl_status nybl_kv_sequence_truncate(struct nybl_kv_sequence *sequence,
                                      size_t length);

/**
 * Makes room for `count` more tokens behind those committed, copies the last block if another sequence
 * shares it, and brings blocks back from the spill file. NYBL_ERR_KV_EXHAUSTED when the budget does not
 * allow it: nothing has changed then.
 */
nybl_status nybl_kv_reserve(struct nybl_kv_sequence *sequence,
                            size_t count);

/**
 * Writes the keys and values of one layer for `rows` tokens, the first of them `first` places behind the
 * committed ones. Room for them must have been reserved. `keys` and `values` are rows x n_kv_heads x
 * head_dim.
 */
nybl_status nybl_kv_write(struct nybl_kv_sequence *sequence,
                          uint32_t layer,
                          size_t first,
                          size_t rows,
                          const float *keys,
                          const float *values);

/**
 * Computes attention of query rows over a sequence: softmax(scale * q . k) . v, over the committed tokens
 * and what has been written behind them up to each row's own place. Equal bits whatever the block
 * size, the number of threads, and however the sequence came about.
 */
nybl_status nybl_kv_attend(struct nybl_kv_sequence *sequence,
                           const struct nybl_kv_attend_args *args);

/**
 * Holds tokens that were reserved and written in all layers: the first `count` of them, or, with `path`,
 * the rows that it names, ascending, whose keys and values move together (what nybl_verify() accepted of
 * a tree, with row 0 in front). The places of the others may be written again.
 */
nybl_status nybl_kv_commit(struct nybl_kv_sequence *sequence,
                           const uint32_t *path,
                           size_t count);

/**
 * Takes over blocks that hold the beginning of `ids`, the whole sequence as it is going to be: what
 * another sequence of the same cache has shared with nybl_kv_share(). At least one token is left to
 * compute. Stores in `length` how many tokens the sequence holds now.
 */
nybl_status nybl_kv_reuse(struct nybl_kv_sequence *sequence,
                          const uint32_t *ids,
                          size_t count,
                          size_t *length);

/**
 * Lets other sequences find the full blocks of this one. `ids` are its tokens from the start, as far as
 * they are committed. Never pass drafts.
 */
nybl_status nybl_kv_share(struct nybl_kv_sequence *sequence,
                          const uint32_t *ids,
                          size_t count);

/**
 * Gives back the blocks that lie wholly between the first `sinks` tokens and position `from`, which no
 * layer will look at again. They cannot come back.
 */
nybl_status nybl_kv_drop(struct nybl_kv_sequence *sequence,
                         size_t sinks,
                         size_t from);

/**
 * Writes the committed tokens with their keys and values to the file at `path`, which is replaced whole or
 * not at all. `ids` are the tokens, one for each.
 */
nybl_status nybl_kv_save(struct nybl_kv_sequence *sequence,
                         const uint32_t *ids,
                         size_t count,
                         const char *path,
                         size_t path_len);

/**
 * Fills an empty sequence from a file that nybl_kv_save() wrote, in this process or another one. Stores the
 * tokens in `ids` and their number in `count`; with too little room there NYBL_ERR_BUFFER_TOO_SMALL, the
 * number, and an empty sequence. NYBL_ERR_CORRUPT for a damaged file, NYBL_ERR_UNSUPPORTED for one of
 * another model, shape or format; the text of the error has the reason.
 */
nybl_status nybl_kv_load(struct nybl_kv_sequence *sequence,
                         const char *path,
                         size_t path_len,
                         uint32_t *ids,
                         size_t capacity,
                         size_t *count);

/* -------------------------------------------------------------------------------------------------
 * Verifier
 *
 * Which drafted tokens stand, over plain arrays: for hosts that run their models elsewhere. Stateless; any thread.
 */

/**
 * How a token is chosen from logits; all zeros is greedy.
 */
typedef struct nybl_sampler {
    /**
     * sizeof(nybl_sampler).
     */
    uint32_t struct_size;
    /**
     * Divides the logits before they become probabilities; 0 takes the largest, the lowest id on ties.
     */
    float temperature;
    /**
     * Keep the top_k largest; 0 keeps all.
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
     * Divides the logit of a token of the history when positive, multiplies it otherwise; 0 for 1.
     */
    float repeat_penalty;
    /**
     * Taken from the logit of a token for every time it is in the history.
     */
    float frequency_penalty;
    /**
     * Taken once from the logit of a token that is in the history.
     */
    float presence_penalty;
    /**
     * How many of the last tokens of the history count; 0 for all.
     */
    uint32_t penalty_window;
    /**
     * Not used; must be zero.
     */
    uint32_t reserved;
} nybl_sampler;

/**
 * What nybl_verify() decides over. Rows are the tokens of one pass of the target model: row 0 is the last
 * token of the sequence, row i + 1 is draft i.
 */
typedef struct nybl_verify_args {
    /**
     * sizeof(nybl_verify_args).
     */
    uint32_t struct_size;
    /**
     * Tokens of the vocabulary.
     */
    uint32_t vocab;
    /**
     * The target's logits after each row: (n_drafts + 1) x vocab.
     */
    const float *logits;
    /**
     * The drafted tokens.
     */
    const uint32_t *drafts;
    /**
     * How many there are; may be 0.
     */
    size_t n_drafts;
    /**
     * The row that each draft follows, lower than the draft's own; NULL for a chain. Drafts that
     * follow the same row are alternatives. Compute the target so that a row sees itself and its
     * ancestors only.
     */
    const uint32_t *parents;
    /**
     * The distributions that the drafts were drawn from, n_drafts x vocab: row r is what the drafts that
     * follow row r were drawn from, without replacement and in their order, after all of the
     * drafter's own processing. NULL when the drafts were not drawn: greedy or looked up.
     */
    const float *draft_probabilities;
    /**
     * The sequence so far, for penalties; may be NULL.
     */
    const uint32_t *history;
    /**
     * Tokens in history.
     */
    size_t n_history;
    /**
     * The target's sampler; NULL for greedy.
     */
    const struct nybl_sampler *sampler;
} nybl_verify_args;

/**
 * Decides which drafts stand. What comes out is distributed exactly as if the target had been sampled
 * alone; a greedy target gives its own tokens, and so does a seed when the drafts were not drawn.
 *
 * Stores the number of accepted drafts in `accepted`, their rows in `path` (room for n_drafts, NULL if
 * not wanted; 1, 2, 3, ... for a chain) and the token after them in `next`. Keep the target's cache of
 * row 0 and of the rows in `path`; `next` has not been through the target yet.
 *
 * `random` is the state of the random numbers: any value to begin with, then what the last call left.
 * NULL if the sampler is greedy. NYBL_ERR_INVALID_ARGUMENT, and `random` is as before, for anything out
 * of range, for needed logits that are all NaN or minus infinity, and for probabilities that are no
 * distribution or could not have given their draft.
 */
nybl_status nybl_verify(const struct nybl_verify_args *args,
                        uint64_t *random,
                        uint32_t *path,
                        size_t *accepted,
                        uint32_t *next);

/* -------------------------------------------------------------------------------------------------
 * Drafters
 *
 * Where drafts come from: n-grams of the text, a function of the host, a smaller model. For a session of this
 * library (nybl_spec_attach()), or for a host that verifies with nybl_verify().
 */

/**
 * A source of drafts for one sequence. One thread at a time; a second one gets NYBL_ERR_BUSY.
 */
typedef struct nybl_drafter nybl_drafter;

/**
 * Proposes tokens to follow the `n_tokens` tokens of the sequence: stores at most `capacity` of them in
 * `drafts`, how sure it is of each, from 0 to 1, in `confidence` (which holds 0.5 before), and returns how many
 * there are; 0 when it has nothing to say. The pointers are valid during the call. It must not unwind or jump
 * out, and calls on the session that it drafts for get NYBL_ERR_BUSY.
 */
typedef size_t (*nybl_draft_fn)(void *context,
                                const uint32_t *tokens,
                                size_t n_tokens,
                                uint32_t *drafts,
                                float *confidence,
                                size_t capacity);

/**
 * Makes a drafter that looks up what followed the last one to four tokens when they were last seen in the
 * sequence. Costs next to nothing and pays where a text repeats itself or its prompt: summaries, code,
 * conversations. Destroy it with nybl_drafter_destroy().
 */
nybl_status nybl_drafter_create_ngram(struct nybl_drafter **out);

/**
 * Makes a drafter that calls `draft` with `context`, on the threads that ask for drafts. Destroy it with
 * nybl_drafter_destroy(); `context` must live as long, and as long as a session that it is attached to.
 */
nybl_status nybl_drafter_create_callback(nybl_draft_fn draft,
                                         void *context,
                                         struct nybl_drafter **out);

/**
 * Gives up a drafter. A session that it is attached to keeps it. NULL is ignored.
 */
void nybl_drafter_destroy(struct nybl_drafter *drafter);

/**
 * Drafts for a host that runs its target elsewhere: stores at most `capacity` tokens to follow the `n_tokens`
 * tokens of the sequence in `drafts`, how sure the drafter is of each in `confidence` (may be NULL), and their
 * number in `count`. Verify them with nybl_verify(), without draft_probabilities. The sequence may grow
 * between calls; when it has been cut or replaced, call nybl_drafter_rewind() first. NYBL_ERR_BUSY while a
 * session has the drafter.
 */
nybl_status nybl_drafter_draft(struct nybl_drafter *drafter,
                               const uint32_t *tokens,
                               size_t n_tokens,
                               uint32_t *drafts,
                               float *confidence,
                               size_t capacity,
                               size_t *count);

/**
 * Tells a drafter that its sequence has been cut to `len` tokens; 0 for another sequence.
 */
nybl_status nybl_drafter_rewind(struct nybl_drafter *drafter, size_t len);

/* -------------------------------------------------------------------------------------------------
 * Engine: runtime
 *
 * Threads, kernels and memory: what would otherwise be global. Two runtimes share nothing.
 */

/**
 * nybl_runtime_config.cores: the big ones where cores are unlike, otherwise where the system likes.
 */
#define NYBL_CORES_AUTO 0

/**
 * nybl_runtime_config.cores: wherever the system likes.
 */
#define NYBL_CORES_ALL 1

/**
 * nybl_runtime_config.cores: the small ones where cores are unlike: least heat, for what nobody waits for.
 */
#define NYBL_CORES_SMALL 2

/**
 * nybl_runtime_config.cores: those of core_mask.
 */
#define NYBL_CORES_MASK 3

/**
 * Something went wrong that no call reports.
 */
#define NYBL_LOG_ERROR 1

/**
 * Something is not as it should be, and work goes on.
 */
#define NYBL_LOG_WARN 2

/**
 * What was opened, and what changed.
 */
#define NYBL_LOG_INFO 3

/**
 * Details for whoever looks for a fault.
 */
#define NYBL_LOG_DEBUG 4

/**
 * A runtime. Any thread may use it, several at a time.
 */
typedef struct nybl_runtime nybl_runtime;

/**
 * Gives `size` bytes at a multiple of `align`, a power of two of at most 64, or NULL.
 */
typedef void *(*nybl_alloc_fn)(void *context, size_t size, size_t align);

/**
 * Takes back what the nybl_alloc_fn beside it gave for the same size and alignment.
 */
typedef void (*nybl_free_fn)(void *context, void *data, size_t size, size_t align);

/**
 * An allocator of the host. Both functions may be called by any thread, several at a time, until the runtime
 * and everything made with it are gone; they must not unwind.
 */
typedef struct nybl_allocator {
    /**
     * sizeof(nybl_allocator).
     */
    uint32_t struct_size;
    /**
     * Not used; must be zero.
     */
    uint32_t reserved;
    /**
     * Passed to both functions.
     */
    void *context;
    /**
     * Allocates.
     */
    nybl_alloc_fn alloc;
    /**
     * Frees.
     */
    nybl_free_fn free;
} nybl_allocator;

/**
 * Receives a message of one runtime, `length` bytes of UTF-8 that are valid until it returns, on whichever thread
 * has something to say. It must not unwind and must not call functions of the runtime.
 */
typedef void (*nybl_log_fn)(void *user, uint32_t level, const char *message, size_t length);

/**
 * A part of a job; must be called once for every index.
 */
typedef void (*nybl_tile_fn)(const void *job, size_t index);

/**
 * Calls tile(job, 0) to tile(job, tiles - 1), each once, on whichever threads of the host, and returns when all have
 * returned. It must not unwind; `tile` does not.
 */
typedef void (*nybl_executor_fn)(void *user, size_t tiles, nybl_tile_fn tile, const void *job);

/**
 * Settings of a runtime; all zeros is the default.
 */
typedef struct nybl_runtime_config {
    /**
     * sizeof(nybl_runtime_config).
     */
    uint32_t struct_size;
    /**
     * Threads to compute with, the calling one included; 0 for one on each available core, which is also the most.
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
    /**
     * Where buffers come from: weights that are not mapped, KV blocks, activations, logits. NULL for the
     * process's own allocator, which small things (handles, names, the tokenizer) always come from.
     */
    const struct nybl_allocator *allocator;
    /**
     * One of NYBL_CORES_*: where the threads run. The calling thread stays where the host has put it.
     */
    uint32_t cores;
    /**
     * The least important level of messages for `log`: one of NYBL_LOG_*; 0 for NYBL_LOG_INFO.
     */
    uint32_t log_level;
    /**
     * For NYBL_CORES_MASK: core i may be used when bit i is set.
     */
    uint64_t core_mask;
    /**
     * Where messages go; NULL for nowhere.
     */
    nybl_log_fn log;
    /**
     * Passed to log.
     */
    void *log_user;
    /**
     * The host's own threads, `threads` of them, which must then be given; NULL for threads of the runtime.
     */
    nybl_executor_fn executor;
    /**
     * Passed to executor.
     */
    void *executor_user;
    /**
     * Degrees Celsius that the governor holds; 0 for 45.
     */
    float target_celsius;
    /**
     * Degrees from which on nothing runs until the target is reached again; 0 for 50.
     */
    float critical_celsius;
    /**
     * 1 lets the runtime read the sensors of Linux and Android itself, every few seconds while it works, where the
     * system allows that; what the host reports counts instead as soon as it does.
     */
    uint32_t read_sensors;
    /**
     * Not used; must be zero.
     */
    uint32_t reserved;
} nybl_runtime_config;

/**
 * Starts a runtime. `config` may be NULL. Destroy it with nybl_runtime_destroy().
 */
nybl_status nybl_runtime_create(const struct nybl_runtime_config *config,
                                struct nybl_runtime **out);

/**
 * Gives up a runtime. Models opened with it stay usable. NULL is ignored.
 */
void nybl_runtime_destroy(struct nybl_runtime *runtime);

/* -------------------------------------------------------------------------------------------------
 * Engine: models and their text
 *
 * An opened file, and the text that its vocabulary makes of tokens.
 */

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
 * An opened model. Any thread may use it, several at a time.
 */
typedef struct nybl_model nybl_model;

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
 * Opens the .nybl or GGUF file at `path` (UTF-8, `path_len` bytes). The weights of a .nybl file stay
 * in the mapping, so the file must not be truncated while it is open; replace it by renaming. Release
 * the model with nybl_model_release().
 */
nybl_status nybl_model_open(const nybl_runtime *runtime,
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

/* -------------------------------------------------------------------------------------------------
 * Engine: where models come from
 *
 * A part of an open file (an asset of an Android package), memory, and what is read when.
 */

/**
 * nybl_source.kind: the file at `path`.
 */
#define NYBL_SOURCE_PATH 1

/**
 * nybl_source.kind: `length` bytes of the open file `fd`, from `offset` on. `path` is what errors call it.
 */
#define NYBL_SOURCE_FD 2

/**
 * nybl_source.kind: the `length` bytes at `data`, which stay there until the model and its sessions are gone.
 * `path` is what errors call them.
 */
#define NYBL_SOURCE_MEMORY 3

/**
 * Where a model comes from.
 */
typedef struct nybl_source {
    /**
     * sizeof(nybl_source).
     */
    uint32_t struct_size;
    /**
     * One of NYBL_SOURCE_*.
     */
    int32_t kind;
    /**
     * A path or a name, UTF-8.
     */
    const char *path;
    /**
     * Length of path in bytes.
     */
    size_t path_len;
    /**
     * Where the model begins in the file: a multiple of 64. Android's zipalign does that for what is stored
     * uncompressed.
     */
    uint64_t offset;
    /**
     * Bytes of the model; 0 for all that follow, in a file.
     */
    uint64_t length;
    /**
     * The bytes of NYBL_SOURCE_MEMORY: at a multiple of 64.
     */
    const void *data;
    /**
     * The open file of NYBL_SOURCE_FD; it stays the caller's and may be closed afterwards.
     */
    int32_t fd;
    /**
     * Not used; must be zero.
     */
    uint32_t reserved;
} nybl_source;

/**
 * Told by a background thread how many bytes of how many have been read; 0 goes on, anything else ends the
 * reading ahead. Must not unwind.
 */
typedef int32_t (*nybl_progress_fn)(void *user, uint64_t bytes, uint64_t total);

/**
 * As nybl_model_open(), from any source.
 */
nybl_status nybl_model_open_source(const nybl_runtime *runtime,
                                   const struct nybl_source *source,
                                   nybl_model **out);

/**
 * As nybl_model_open_source(), from all parts of a model that was split, in order: the shards of a .nybl or GGUF
 * file. One source of the kind NYBL_SOURCE_PATH finds its other parts by their names, as nybl_model_open() does.
 */
nybl_status nybl_model_open_sources(const nybl_runtime *runtime,
                                    const struct nybl_source *sources,
                                    size_t count,
                                    nybl_model **out);

/**
 * Copies the bytes of `source` into memory and stores in `fd` a descriptor of them that the caller closes: a file without
 * a name that nobody can change any more (a sealed memfd on Linux and Android, ASharedMemory on Android 8 to 10;
 * NYBL_ERR_UNSUPPORTED elsewhere). A service hands it to other processes, which open it as NYBL_SOURCE_FD and share its
 * memory.
 */
nybl_status nybl_source_seal(const struct nybl_source *source,
                             int32_t *fd);

/**
 * Keeps all pages of the weights in memory until the model is closed. Needs a right that phones seldom give:
 * NYBL_ERR_IO without it.
 */
nybl_status nybl_model_lock_pages(const nybl_model *model);

/**
 * Reads the weights into memory in the background, in the order of the layers. Sessions may work meanwhile:
 * they wait only for the layer that they have come to. `progress` may be NULL; it and `user` stay valid until
 * all has been read or the model is closed. Does nothing the second time.
 */
nybl_status nybl_model_prefetch(const nybl_model *model,
                                nybl_progress_fn progress,
                                void *user);

/**
 * Whether the first `layers` layers are in memory, in `ready` (0 or 1), after waiting up to `timeout_ms`; the
 * number of layers and one more stands for everything. Without nybl_model_prefetch() nothing is ever waited
 * for: what is not there is read when it is used.
 */
nybl_status nybl_model_wait(const nybl_model *model,
                            uint32_t layers,
                            uint32_t timeout_ms,
                            int32_t *ready);

/**
 * Gives the memory of the weights back to the system, which reads them again when they are used; for a
 * host that is asked for memory. `bytes` gets how much it was at most; it may be NULL.
 */
nybl_status nybl_model_release_pages(const nybl_model *model,
                                     uint64_t *bytes);

/* -------------------------------------------------------------------------------------------------
 * Engine: conversations
 *
 * A conversation is JSON, as chat interfaces have it: an array of objects with `role` and `content`, and
 * `tool_calls` or whatever else the model's own template reads.
 */

/**
 * A conversation. Texts are UTF-8 JSON.
 */
typedef struct nybl_conversation {
    /**
     * sizeof(nybl_conversation).
     */
    uint32_t struct_size;
    /**
     * Not 0: ends with the beginning of the model's turn, for it to go on.
     */
    uint32_t add_generation_prompt;
    /**
     * An array of messages.
     */
    const char *messages;
    /**
     * Length of messages in bytes.
     */
    size_t messages_len;
    /**
     * An array of tools, or NULL.
     */
    const char *tools;
    /**
     * Length of tools in bytes.
     */
    size_t tools_len;
    /**
     * An object whose members are variables of the template, or NULL.
     */
    const char *variables;
    /**
     * Length of variables in bytes.
     */
    size_t variables_len;
} nybl_conversation;

/**
 * The token ids of a conversation, by the model's chat template. Control tokens come from the template alone:
 * what a message spells stays text. Stores the number of ids in `count` and as many as fit in `ids`;
 * NYBL_ERR_BUFFER_TOO_SMALL when that is not all of them. `ids` may be NULL with `capacity` 0 to ask for the
 * number. NYBL_ERR_UNSUPPORTED when the model has no template.
 */
nybl_status nybl_chat_encode(const nybl_model *model,
                             const struct nybl_conversation *conversation,
                             uint32_t *ids,
                             size_t capacity,
                             size_t *count);

/**
 * The text of a conversation, by the model's chat template. Stores the length in `text_len` and as many bytes
 * as fit in `buffer`; NYBL_ERR_BUFFER_TOO_SMALL when that is not all of them. `buffer` may be NULL with `capacity` 0
 * to ask for the length. No terminating zero is written.
 */
nybl_status nybl_chat_render(const nybl_model *model,
                             const struct nybl_conversation *conversation,
                             char *buffer,
                             size_t capacity,
                             size_t *text_len);

/* -------------------------------------------------------------------------------------------------
 * Engine: sessions
 *
 * Tokens in, tokens and text out. nybl_session_next() is the primitive; nybl_session_generate() is a loop over it.
 */

/**
 * nybl_session_config.flags: nobody waits for this session. It uses a quarter of the threads and half the time,
 * and lets other sessions of the model go first between chunks of its prompts, which are of 16 tokens unless
 * prefill_chunk says otherwise.
 */
#define NYBL_SESSION_BACKGROUND 1

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
 * nybl_event.kind: a token was generated and with it a stop string is complete: see
 * nybl_session_set_stop_strings().
 */
#define NYBL_EVENT_STOP 4

/**
 * One sequence of tokens on a model. One thread at a time; a second one, or a call from inside a callback of
 * the same session, gets NYBL_ERR_BUSY.
 */
typedef struct nybl_session nybl_session;

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
    /**
     * One of NYBL_KV_*: how keys and values are kept. All but NYBL_KV_F32 take less memory and round them.
     */
    uint32_t kv_format;
    /**
     * With `window`: the first tokens that are looked at and kept for good; 4 is usual.
     */
    uint32_t sinks;
    /**
     * When not 0, every token looks at the first `sinks` and the last `window` tokens alone, and only those
     * are kept: `context` may then be longer than what the model was trained for, `sinks` and `window`
     * together may not.
     */
    uint32_t window;
    /**
     * 0, or NYBL_SESSION_BACKGROUND.
     */
    uint32_t flags;
    /**
     * Bytes of memory for the keys and values of all sessions of the model that agree in the settings
     * above; 0 for as many as their contexts need.
     */
    uint64_t kv_budget;
    /**
     * A folder for a file that takes those of idle sessions when this is used up; NULL for none.
     */
    const char *kv_spill_folder;
    /**
     * Length of kv_spill_folder in bytes.
     */
    size_t kv_spill_folder_len;
    /**
     * Bytes that this file may take.
     */
    uint64_t kv_spill_budget;
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
 * Receives the events of nybl_session_generate(), on the thread that called it. `event` is valid until it
 * returns. Return 0 to go on, anything else to stop. It must not unwind or jump out. On the session that
 * generates it may call nybl_session_destroy(); other calls get NYBL_ERR_BUSY.
 */
typedef int32_t (*nybl_event_fn)(void *context, const struct nybl_event *event);

/**
 * Starts an empty session. `config` may be NULL. Destroy it with nybl_session_destroy(); it keeps the
 * model open.
 */
nybl_status nybl_session_create(const nybl_model *model,
                                const struct nybl_session_config *config,
                                struct nybl_session **out);

/**
 * Ends a session. No call on it may be in progress, but for the nybl_session_generate() whose callback this
 * is called from: generation ends there. NULL is ignored. A handle that was destroyed is gone: to use or destroy
 * it once more is as undefined as it is for free().
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
 * Chooses the next token and fills `event`, whose struct_size the caller has set. After NYBL_EVENT_END and
 * NYBL_EVENT_STOP the session may go on, with nybl_session_append() or without.
 */
nybl_status nybl_session_next(struct nybl_session *session,
                              struct nybl_event *event);

/**
 * Calls nybl_session_next() and passes each event to `each`, until an event is no token, `max_tokens` tokens
 * have been made (0: no limit) or `each` returns other than 0. NYBL_OK then; generation may go on with another
 * call. A failure comes after the events before it.
 */
nybl_status nybl_session_generate(struct nybl_session *session,
                                  size_t max_tokens,
                                  nybl_event_fn each,
                                  void *context);

/**
 * Cancels, from any thread and from callbacks too: the call in progress on the session, or when there is none
 * the next one, ends with NYBL_ERR_CANCELLED within a step of a layer and has then changed nothing. The call after
 * it goes on as if nothing had been.
 */
nybl_status nybl_session_cancel(const struct nybl_session *session);

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

/* -------------------------------------------------------------------------------------------------
 * Engine: what a model will take
 *
 * Asked before it is opened, so that no system has to end the process for it.
 */

/**
 * What a model and its sessions take, in bytes, and what would make them fit.
 */
typedef struct nybl_plan {
    /**
     * sizeof(nybl_plan).
     */
    uint32_t struct_size;
    /**
     * 1 when the dirty bytes stay within the budget, or when there is none; 0 otherwise.
     */
    int32_t fits;
    /**
     * Weights in the mapping of the file: clean, shared, taken back by the system when it needs memory.
     */
    uint64_t mapped_bytes;
    /**
     * Weights in private memory: all of them where the file has to be packed first.
     */
    uint64_t private_bytes;
    /**
     * The tokenizer, an estimate.
     */
    uint64_t tokenizer_bytes;
    /**
     * Keys and values of all sessions when their contexts are full.
     */
    uint64_t kv_bytes;
    /**
     * Keys and values for every thousand tokens of one session.
     */
    uint64_t kv_1k_bytes;
    /**
     * Buffers of all sessions.
     */
    uint64_t scratch_bytes;
    /**
     * All that counts against the process: every member above but mapped_bytes and kv_1k_bytes.
     */
    uint64_t dirty_bytes;
    /**
     * What is left of it with every change that is known: no budget below can be met.
     */
    uint64_t least_bytes;
    /**
     * When it does not fit: the dirty bytes with the change below that harms least; 0 when none helps.
     */
    uint64_t remedy_bytes;
    /**
     * 1 when a part of the change is to convert the file to .nybl.
     */
    uint32_t remedy_convert;
    /**
     * Another nybl_session_config.prefill_chunk; 0 for no change.
     */
    uint32_t remedy_prefill_chunk;
    /**
     * Another nybl_session_config.kv_format; that of the settings for no change.
     */
    uint32_t remedy_kv_format;
    /**
     * Another nybl_session_config.context; 0 for no change.
     */
    uint32_t remedy_context;
} nybl_plan;

/**
 * Plans for the model at `sources`, as nybl_model_open_sources() takes them, and for `sessions` sessions with
 * the settings `config`, which may be NULL. `budget` is what may be dirty; 0 for no limit. Reads the head of the
 * file and nothing else. A model that does not fit is NYBL_OK with `fits` 0.
 */
nybl_status nybl_model_plan(const nybl_source *sources,
                            size_t count,
                            const nybl_session_config *config,
                            uint32_t sessions,
                            uint64_t budget,
                            struct nybl_plan *out);

/* -------------------------------------------------------------------------------------------------
 * Engine: how tokens are chosen and texts end
 *
 * Samplers with penalties, biases, a hook on the logits, strings that end a text, and what the model thought.
 * All of it also with speculation, which changes nothing of it.
 */

/**
 * Changes `logits`, one for each of the `vocab` tokens, before a token is chosen from them: the mask of a grammar,
 * for example, minus infinity for what it forbids. `tokens` is the sequence before that token, followed by
 * `n_drafts` drafts at its end that are only supposed: the same text may be asked for more than once, and texts
 * that do not come to pass. What it does may depend on `tokens` and on nothing else. It is called by the thread
 * that asks for a token, must not unwind, and must not call functions of the session.
 */
typedef void (*nybl_logits_fn)(void *user,
                               const uint32_t *tokens,
                               size_t n_tokens,
                               size_t n_drafts,
                               float *logits,
                               size_t vocab);

/**
 * A token and the natural logarithm of its probability.
 */
typedef struct nybl_logprob {
    /**
     * The token.
     */
    uint32_t token;
    /**
     * Minus infinity for a token that cannot come.
     */
    float logprob;
} nybl_logprob;

/**
 * Changes how tokens are chosen, from the next one on. The random numbers go on where they were. NULL is
 * greedy without penalties.
 */
nybl_status nybl_session_set_sampler(nybl_session *session,
                                     const nybl_sampler *config);

/**
 * Adds `biases[i]` to the logit of token `tokens[i]` before anything else, from the next token on and instead of
 * the biases before; minus infinity forbids a token. `count` 0 ends it.
 */
nybl_status nybl_session_set_logit_bias(nybl_session *session,
                                        const uint32_t *tokens,
                                        const float *biases,
                                        size_t count);

/**
 * Lets logits go through `hook` from the next token on, after the biases; NULL for none. Forks keep it: `user` stays
 * valid until they have ended, too.
 */
nybl_status nybl_session_set_logits_hook(nybl_session *session,
                                         nybl_logits_fn hook,
                                         void *user);

/**
 * Ends texts at any of these strings: NYBL_EVENT_STOP then comes with the token that completes one. Neither the string
 * nor what follows it in that token is in the text of an event, and no part of it either: text that could be the
 * beginning of one is held back until it is known not to be, at the latest until the text ends otherwise. `count` 0
 * ends it.
 */
nybl_status nybl_session_set_stop_strings(nybl_session *session,
                                          const char *const *strings,
                                          const size_t *lengths,
                                          size_t count);

/**
 * Has nybl_session_get_logprobs() tell about every token from the next one on: about the token itself and the `top`
 * likeliest, at most 1024. Costs a pass over the logits for each token. `enabled` 0 ends it.
 */
nybl_status nybl_session_set_logprobs(nybl_session *session,
                                      int32_t enabled,
                                      uint32_t top);

/**
 * What the model itself, before biases, penalties and everything else, thought of the token of the last event, which
 * comes first, and of the likeliest ones in its place, which follow, likeliest first. Stores their number in
 * `count`, 0 where there is nothing to tell, and as many as fit in `logprobs`; NYBL_ERR_BUFFER_TOO_SMALL when that
 * is not all of them.
 */
nybl_status nybl_session_get_logprobs(nybl_session *session,
                                      struct nybl_logprob *logprobs,
                                      size_t capacity,
                                      size_t *count);

/* -------------------------------------------------------------------------------------------------
 * Engine: what sessions share and keep
 *
 * Forks, files, and the figures of a session.
 */

/**
 * What a session has done since it began, and what it takes. Times are those that a caller waits.
 */
typedef struct nybl_session_metrics {
    /**
     * sizeof(nybl_session_metrics).
     */
    uint32_t struct_size;
    /**
     * Milliseconds for which heat pauses the runtime; 0 when it does not.
     */
    uint32_t retry_ms;
    /**
     * Tokens appended.
     */
    uint64_t prompt_tokens;
    /**
     * Of these, and of tokens that were run again, those found in the cache.
     */
    uint64_t reused_tokens;
    /**
     * Seconds in nybl_session_append().
     */
    double prompt_seconds;
    /**
     * Seconds from the beginning of the last append to the token after it; 0 before the first one.
     */
    double first_token_seconds;
    /**
     * Tokens made, but for those that came right after an append and took no pass.
     */
    uint64_t decoded_tokens;
    /**
     * The seconds for these.
     */
    double decode_seconds;
    /**
     * Drafts that were checked since the drafter was attached, and of these those that were accepted.
     */
    uint64_t drafted;
    /**
     * See above.
     */
    uint64_t accepted;
    /**
     * Tokens of the smaller model: see nybl_session_set_small_model().
     */
    uint64_t small_model_tokens;
    /**
     * Bytes of weights in the mapping of the file.
     */
    uint64_t mapped_bytes;
    /**
     * Bytes of weights in private memory.
     */
    uint64_t private_bytes;
    /**
     * Bytes of keys and values, those of all sessions that share the cache.
     */
    uint64_t kv_bytes;
    /**
     * Bytes of the session's other buffers.
     */
    uint64_t scratch_bytes;
    /**
     * The share of full effort that heat allows, 0 to 1.
     */
    float effort;
    /**
     * Not used.
     */
    uint32_t reserved;
} nybl_session_metrics;

/**
 * A second session with the same tokens, settings, hook and random numbers. The two share all keys and values until
 * one of them writes, and compute one after the other. It has no drafter. Destroy it with nybl_session_destroy().
 */
nybl_status nybl_session_fork(nybl_session *session,
                              nybl_session **out);

/**
 * Writes tokens, keys and values to the file at `path` (UTF-8), replacing it whole or not at all. The random numbers
 * are no part of it.
 */
nybl_status nybl_session_save(nybl_session *session,
                              const char *path,
                              size_t path_len);

/**
 * Replaces the sequence by that in a file of nybl_session_save(), written by this process or another one with the same
 * model and the same settings of the KV cache. On failure nothing has changed: NYBL_ERR_CORRUPT or
 * NYBL_ERR_UNSUPPORTED for a file that cannot be used, NYBL_ERR_CONTEXT_FULL when it holds too many tokens. Makes a
 * session usable again that answered NYBL_ERR_POISONED.
 */
nybl_status nybl_session_restore(nybl_session *session,
                                 const char *path,
                                 size_t path_len);

/**
 * Copies the tokens of the sequence. Stores their number in `count` and as many as fit in `ids`;
 * NYBL_ERR_BUFFER_TOO_SMALL when that is not all of them.
 */
nybl_status nybl_session_copy_tokens(nybl_session *session,
                                     uint32_t *ids,
                                     size_t capacity,
                                     size_t *count);

/**
 * Fills `metrics`, whose struct_size the caller has set.
 */
nybl_status nybl_session_get_metrics(nybl_session *session, struct nybl_session_metrics *metrics);

/* -------------------------------------------------------------------------------------------------
 * Speculation
 *
 * A session that speculates: a drafter foretells tokens and the model checks several of them in one pass. The
 * tokens are those of the session alone, greedy or with a seed; drafts change how long a text takes. A
 * controller measures passes and drafts and goes without where they do not pay.
 */

/**
 * nybl_spec_config.mode: as many drafts as pay, none when none do.
 */
#define NYBL_SPEC_AUTO 0

/**
 * nybl_spec_config.mode: every draft there is, for comparisons.
 */
#define NYBL_SPEC_ALWAYS 1

/**
 * Settings of speculation; all zeros is the default.
 */
typedef struct nybl_spec_config {
    /**
     * sizeof(nybl_spec_config).
     */
    uint32_t struct_size;
    /**
     * One of NYBL_SPEC_*.
     */
    uint32_t mode;
    /**
     * The most drafts in a round; 0 for as many as can be, which is 7.
     */
    uint32_t max_drafts;
    /**
     * Not used; must be zero.
     */
    uint32_t reserved;
} nybl_spec_config;

/**
 * What speculation has come to since the drafter was attached. A round is one pass of the model.
 */
typedef struct nybl_spec_stats {
    /**
     * sizeof(nybl_spec_stats).
     */
    uint32_t struct_size;
    /**
     * The most drafts that a round may have now.
     */
    uint32_t limit;
    /**
     * Drafts of the last round.
     */
    uint32_t current;
    /**
     * Not used.
     */
    uint32_t reserved;
    /**
     * Passes of the model. Every pass gives one token more than it accepted drafts.
     */
    uint64_t passes;
    /**
     * Drafts that were checked.
     */
    uint64_t drafted;
    /**
     * Drafts that were accepted.
     */
    uint64_t accepted;
    /**
     * Drafts checked at each place of a round, those before them having been accepted.
     */
    uint64_t tried_at[7];
    /**
     * And accepted there.
     */
    uint64_t accepted_at[7];
    /**
     * Rounds of 0, 1, ... drafts.
     */
    uint64_t rounds[8];
    /**
     * Rounds without drafts, because a plain pass had to be measured.
     */
    uint64_t undrafted_measuring;
    /**
     * Because the limit or the end of the context left no room.
     */
    uint64_t undrafted_limited;
    /**
     * Because drafts were not expected to pay.
     */
    uint64_t undrafted_not_worth;
    /**
     * Because drafts have cost as much as they may.
     */
    uint64_t undrafted_overdrawn;
    /**
     * Because the drafter had nothing to say.
     */
    uint64_t undrafted_not_found;
    /**
     * Rounds that only served to look whether drafts pay again.
     */
    uint64_t probes;
    /**
     * Drafts that ended early because the drafter was not sure enough.
     */
    uint64_t early_stops;
    /**
     * Measured seconds of a pass over 1, 2, ... rows; 0 where there is no measurement.
     */
    double pass_seconds[8];
    /**
     * Measured seconds of drafting one token.
     */
    double draft_seconds;
    /**
     * Seconds that the drafter took to make good times without drafts.
     */
    double catch_up_seconds;
    /**
     * Seconds that drafts are reckoned to have saved; negative when they have cost some.
     */
    double saved_seconds;
} nybl_spec_stats;

/**
 * Makes a drafter of a smaller model, for sessions of `target`. It keeps `model` open and has KV cache and buffers
 * of its own. The vocabularies are the same, or have at least half of the tokens of `model` in common by their text;
 * NYBL_ERR_INVALID_ARGUMENT otherwise. Destroy it with nybl_drafter_destroy().
 */
nybl_status nybl_drafter_create_model(const nybl_model *model,
                                      const nybl_model *target,
                                      nybl_drafter **out);

/**
 * Lets `session` speculate with `drafter` from now on, instead of with the one before. `config` may be NULL. A
 * drafter serves one session at a time: NYBL_ERR_BUSY when it is attached. On failure the session is as before.
 */
nybl_status nybl_spec_attach(nybl_session *session,
                             nybl_drafter *drafter,
                             const struct nybl_spec_config *config);

/**
 * Lets the session go on without a drafter; no error when it has none. The drafter is free for another one.
 */
nybl_status nybl_spec_detach(nybl_session *session);

/**
 * Shortens drafts to `share`, 0 to 1, of what they may be, as for heat or to save energy; 0 is no drafts. The
 * less is left, the likelier a draft must be to stand. NYBL_ERR_INVALID_ARGUMENT when no drafter is attached.
 */
nybl_status nybl_spec_set_share(nybl_session *session,
                                float share);

/**
 * Fills `stats`, whose struct_size the caller has set. NYBL_ERR_INVALID_ARGUMENT when no drafter is attached.
 */
nybl_status nybl_spec_get_stats(nybl_session *session,
                                struct nybl_spec_stats *stats);

/* -------------------------------------------------------------------------------------------------
 * Engine: several sessions in one pass
 *
 * Decoding is bound by the reading of the weights. A batch reads them once for all its sessions, so that four sequences
 * take hardly longer than one. Nothing of it changes a token.
 */

/**
 * The buffers of passes over several sessions. One thread at a time; a second one gets NYBL_ERR_BUSY.
 */
typedef struct nybl_batch nybl_batch;

/**
 * Makes a batch for up to `max_sessions` sessions in a pass, 1 to 256, that are of the same model as `like` and
 * agree with it in kv_format, sinks and window. It keeps the model open, not the session. Destroy it with
 * nybl_batch_destroy().
 */
nybl_status nybl_batch_create(nybl_session *like,
                              uint32_t max_sessions,
                              struct nybl_batch **out);

/**
 * Computes in one pass what the next call of nybl_session_next(), or of nybl_session_get_logits(), on each of the
 * `count` sessions would compute in one of its own: those calls then take no pass, and come to the same bits. More
 * sessions than the batch has room for go in several passes. A session that has nothing to compute or cannot go on is
 * left as it is, and its own call says why. Sessions with a drafter go without drafts here. Stores in `computed`,
 * which may be NULL, how many took part.
 *
 * NYBL_ERR_CANCELLED when one of them was cancelled, NYBL_ERR_INVALID_ARGUMENT for a session that does not agree with
 * that of nybl_batch_create(), NYBL_ERR_BUSY when one is in another call or given twice; nothing has changed then.
 */
nybl_status nybl_batch_decode(struct nybl_batch *batch,
                              nybl_session *const *sessions,
                              size_t count,
                              size_t *computed);

/**
 * Ends a batch; NULL is ignored.
 */
void nybl_batch_destroy(struct nybl_batch *batch);

/* -------------------------------------------------------------------------------------------------
 * Engine: heat, power and memory
 *
 * The host tells what it knows of heat and of who is waiting; the runtime shortens drafts, uses fewer threads,
 * rests between tokens and, when nothing else helps, pauses. It never changes a token, unless the host has named a
 * smaller model to go on with. When the system wants memory, what costs least to get again goes first.
 */

/**
 * nybl_heat.level: not known.
 */
#define NYBL_THERMAL_UNKNOWN 0

/**
 * nybl_heat.level: no limit. ProcessInfo's `nominal`; Android's THERMAL_STATUS_NONE.
 */
#define NYBL_THERMAL_NOMINAL 1

/**
 * nybl_heat.level: no more than now. ProcessInfo's `fair`; Android's LIGHT.
 */
#define NYBL_THERMAL_FAIR 2

/**
 * nybl_heat.level: less than now. ProcessInfo's `serious`; Android's MODERATE.
 */
#define NYBL_THERMAL_SERIOUS 3

/**
 * nybl_heat.level: stop. ProcessInfo's `critical`; Android's SEVERE and worse.
 */
#define NYBL_THERMAL_CRITICAL 4

/**
 * nybl_runtime_set_power_mode(): somebody is waiting for the text.
 */
#define NYBL_POWER_FOREGROUND 0

/**
 * nybl_runtime_set_power_mode(): nobody is waiting: a quarter of the threads, half the time.
 */
#define NYBL_POWER_BACKGROUND 1

/**
 * nybl_runtime_set_power_mode(): the battery is low: half the threads, no drafts.
 */
#define NYBL_POWER_LOW 2

/**
 * nybl_runtime_relieve(): cached keys and values that no session holds go. Android's TRIM_MEMORY_RUNNING_LOW.
 */
#define NYBL_PRESSURE_MODERATE 1

/**
 * nybl_runtime_relieve(): keys and values of sessions go to their spill files as well. Apple's memory warning.
 */
#define NYBL_PRESSURE_HIGH 2

/**
 * nybl_runtime_relieve(): the pages of weights as well. Android's TRIM_MEMORY_COMPLETE.
 */
#define NYBL_PRESSURE_CRITICAL 3

/**
 * What is known of heat. What is zero is not known; of the rest the worst counts.
 */
typedef struct nybl_heat {
    /**
     * sizeof(nybl_heat).
     */
    uint32_t struct_size;
    /**
     * One of NYBL_THERMAL_*.
     */
    int32_t level;
    /**
     * Android's getThermalHeadroom(): 1 is where the system throttles severely.
     */
    float headroom;
    /**
     * Degrees Celsius of the skin or the battery. 45 is held; at 50 nothing runs until 45 is reached again.
     */
    float celsius;
} nybl_heat;

/**
 * What the governor does at present.
 */
typedef struct nybl_governor_state {
    /**
     * sizeof(nybl_governor_state).
     */
    uint32_t struct_size;
    /**
     * One of NYBL_POWER_*.
     */
    int32_t power_mode;
    /**
     * The share of full effort that heat allows, 0 to 1.
     */
    float effort;
    /**
     * Milliseconds after which another report and another try make sense; 0 when nothing is paused.
     */
    uint32_t retry_ms;
} nybl_governor_state;

/**
 * What was given back, in bytes.
 */
typedef struct nybl_freed {
    /**
     * sizeof(nybl_freed).
     */
    uint32_t struct_size;
    /**
     * Caches that a session is working in; it gives back what they have when its pass is over.
     */
    uint32_t deferred;
    /**
     * Cached keys and values that no session held.
     */
    uint64_t prefix_bytes;
    /**
     * Keys and values that went to spill files.
     */
    uint64_t spilled_bytes;
    /**
     * Weights, at most: those of pages that were there.
     */
    uint64_t page_bytes;
} nybl_freed;

/**
 * Reports heat, every few seconds while the runtime works. A report with nothing known, or NULL, ends the
 * governing of heat: full effort again.
 */
nybl_status nybl_runtime_report_heat(const nybl_runtime *runtime,
                                     const struct nybl_heat *heat);

/**
 * Sets how much of the machine may be used: one of NYBL_POWER_*.
 */
nybl_status nybl_runtime_set_power_mode(const nybl_runtime *runtime, int32_t mode);

/**
 * Fills `state`, whose struct_size the caller has set.
 */
nybl_status nybl_runtime_get_governor_state(const nybl_runtime *runtime,
                                            struct nybl_governor_state *state);

/**
 * Names a model that goes on in place of the session's own where it is too hot for that, or none with NULL. Its tokens
 * are its own; the session's model sees them as if they had been appended when it is cool again. The vocabularies
 * are as for nybl_drafter_create_model().
 */
nybl_status nybl_session_set_small_model(nybl_session *session,
                                         const nybl_model *model);

/**
 * Gives memory of all models of the runtime back, as much as `pressure`, one of NYBL_PRESSURE_*, asks for. Waits for
 * no session, so it may be called by the thread that the system's warning comes to. `freed` may be NULL.
 */
nybl_status nybl_runtime_relieve(const nybl_runtime *runtime,
                                 int32_t pressure,
                                 struct nybl_freed *freed);

/* -------------------------------------------------------------------------------------------------
 * Every function in one table
 *
 * For a host that opens the library with dlopen() and looks up one symbol. Members are only ever added, at the
 * end, so a table serves every program that was built against an older minor version of its ABI.
 */

/**
 * The functions above, by their names without the prefix, in the order in which they came to be. A member is
 * NULL when this build of the library lacks the level it belongs to.
 */
typedef struct nybl_api {
    /**
     * Bytes of this library's table: a member beyond them does not exist.
     */
    uint32_t struct_size;
    /**
     * The library's NYBL_ABI_MINOR.
     */
    uint32_t abi_minor;
    uint32_t (*abi_version)(void);
    const char *(*version_string)(void);
    const char *(*status_name)(nybl_status status);
    size_t (*last_error)(char *buffer, size_t capacity);
    nybl_status (*pack_size)(const struct nybl_layout *layout, size_t *bytes);
    nybl_status (*pack)(const struct nybl_layout *layout, const struct nybl_weights *weights,
        void *packed, size_t packed_len);
    nybl_status (*unpack_rows)(const struct nybl_layout *layout, const void *packed,
        size_t packed_len, size_t row, size_t count, float *out);
    nybl_status (*matmul_scratch_size)(const struct nybl_layout *layout, size_t m, size_t *bytes);
    nybl_status (*quantize_activations)(const struct nybl_layout *layout, const float *x,
        size_t x_stride, size_t m, void *scratch, size_t scratch_len);
    nybl_status (*matmul)(const struct nybl_layout *layout, const struct nybl_matmul_args *args);
    uint32_t (*cpu_features)(void);
    nybl_status (*kernel_name)(const struct nybl_layout *layout, uint32_t features, char *buffer,
        size_t capacity);
    nybl_status (*verify)(const struct nybl_verify_args *args, uint64_t *random, uint32_t *path,
        size_t *accepted, uint32_t *next);
    nybl_status (*runtime_create)(const struct nybl_runtime_config *config,
        struct nybl_runtime **out);
    void (*runtime_destroy)(struct nybl_runtime *runtime);
    nybl_status (*model_open)(const nybl_runtime *runtime, const char *path, size_t path_len,
        struct nybl_model **out);
    struct nybl_model *(*model_retain)(const struct nybl_model *model);
    void (*model_release)(struct nybl_model *model);
    nybl_status (*model_get_info)(const struct nybl_model *model, struct nybl_model_info *info);
    nybl_status (*tokenize)(const struct nybl_model *model, const char *text_utf8, size_t text_len,
        uint32_t flags, uint32_t *ids, size_t capacity, size_t *count);
    nybl_status (*detokenize)(const struct nybl_model *model, const uint32_t *ids, size_t count,
        char *buffer, size_t capacity, size_t *text_len);
    nybl_status (*session_create)(const nybl_model *model, const struct nybl_session_config *config,
        struct nybl_session **out);
    void (*session_destroy)(struct nybl_session *session);
    nybl_status (*session_append)(struct nybl_session *session, const uint32_t *ids, size_t count);
    nybl_status (*session_next)(struct nybl_session *session, struct nybl_event *event);
    nybl_status (*session_generate)(struct nybl_session *session, size_t max_tokens,
        nybl_event_fn each, void *context);
    nybl_status (*session_truncate)(struct nybl_session *session, size_t count);
    nybl_status (*session_reset)(struct nybl_session *session);
    nybl_status (*session_get_logits)(struct nybl_session *session, const float **logits,
        size_t *count);
    const struct nybl_api *(*get_api)(uint32_t major, uint32_t minor);
    nybl_status (*drafter_create_ngram)(struct nybl_drafter **out);
    nybl_status (*drafter_create_callback)(nybl_draft_fn draft, void *context,
        struct nybl_drafter **out);
    void (*drafter_destroy)(struct nybl_drafter *drafter);
    nybl_status (*drafter_draft)(struct nybl_drafter *drafter, const uint32_t *tokens,
        size_t n_tokens, uint32_t *drafts, float *confidence, size_t capacity, size_t *count);
    nybl_status (*drafter_rewind)(struct nybl_drafter *drafter, size_t len);
    nybl_status (*drafter_create_model)(const nybl_model *model, const nybl_model *target,
        nybl_drafter **out);
    nybl_status (*spec_attach)(nybl_session *session, nybl_drafter *drafter,
        const struct nybl_spec_config *config);
    nybl_status (*spec_detach)(nybl_session *session);
    nybl_status (*spec_set_share)(nybl_session *session, float share);
    nybl_status (*spec_get_stats)(nybl_session *session, struct nybl_spec_stats *stats);
    nybl_status (*model_open_source)(const nybl_runtime *runtime, const struct nybl_source *source,
        nybl_model **out);
    nybl_status (*model_prefetch)(const nybl_model *model, nybl_progress_fn progress, void *user);
    nybl_status (*model_wait)(const nybl_model *model, uint32_t layers, uint32_t timeout_ms,
        int32_t *ready);
    nybl_status (*model_release_pages)(const nybl_model *model, uint64_t *bytes);
    nybl_status (*chat_encode)(const nybl_model *model,
        const struct nybl_conversation *conversation, uint32_t *ids, size_t capacity,
        size_t *count);
    nybl_status (*chat_render)(const nybl_model *model,
        const struct nybl_conversation *conversation, char *buffer, size_t capacity,
        size_t *text_len);
    nybl_status (*session_cancel)(const struct nybl_session *session);
    nybl_status (*runtime_report_heat)(const nybl_runtime *runtime, const struct nybl_heat *heat);
    nybl_status (*runtime_set_power_mode)(const nybl_runtime *runtime, int32_t mode);
    nybl_status (*runtime_get_governor_state)(const nybl_runtime *runtime,
        struct nybl_governor_state *state);
    nybl_status (*kv_create)(const struct nybl_kv_config *config, struct nybl_kv **out);
    void (*kv_destroy)(struct nybl_kv *kv);
    nybl_status (*kv_get_stats)(const struct nybl_kv *kv, struct nybl_kv_stats *stats);
    nybl_status (*kv_trim)(struct nybl_kv *kv, uint64_t *freed);
    nybl_status (*kv_sequence_create)(struct nybl_kv *kv, struct nybl_kv_sequence **out);
    nybl_status (*kv_sequence_fork)(struct nybl_kv_sequence *sequence,
        struct nybl_kv_sequence **out);
    void (*kv_sequence_destroy)(struct nybl_kv_sequence *sequence);
    nybl_status (*kv_sequence_length)(const struct nybl_kv_sequence *sequence, size_t *length);
    nybl_status (*kv_sequence_truncate)(struct nybl_kv_sequence *sequence, size_t length);
    nybl_status (*kv_reserve)(struct nybl_kv_sequence *sequence, size_t count);
    nybl_status (*kv_write)(struct nybl_kv_sequence *sequence, uint32_t layer, size_t first,
        size_t rows, const float *keys, const float *values);
    nybl_status (*kv_attend)(struct nybl_kv_sequence *sequence,
        const struct nybl_kv_attend_args *args);
    nybl_status (*kv_commit)(struct nybl_kv_sequence *sequence, const uint32_t *path, size_t count);
    nybl_status (*kv_reuse)(struct nybl_kv_sequence *sequence, const uint32_t *ids, size_t count,
        size_t *length);
    nybl_status (*kv_share)(struct nybl_kv_sequence *sequence, const uint32_t *ids, size_t count);
    nybl_status (*kv_drop)(struct nybl_kv_sequence *sequence, size_t sinks, size_t from);
    nybl_status (*kv_save)(struct nybl_kv_sequence *sequence, const uint32_t *ids, size_t count,
        const char *path, size_t path_len);
    nybl_status (*kv_load)(struct nybl_kv_sequence *sequence, const char *path, size_t path_len,
        uint32_t *ids, size_t capacity, size_t *count);
    nybl_status (*model_open_sources)(const nybl_runtime *runtime,
        const struct nybl_source *sources, size_t count, nybl_model **out);
    nybl_status (*model_lock_pages)(const nybl_model *model);
    nybl_status (*model_plan)(const nybl_source *sources, size_t count,
        const nybl_session_config *config, uint32_t sessions, uint64_t budget,
        struct nybl_plan *out);
    nybl_status (*session_set_sampler)(nybl_session *session, const nybl_sampler *config);
    nybl_status (*session_set_logit_bias)(nybl_session *session, const uint32_t *tokens,
        const float *biases, size_t count);
    nybl_status (*session_set_logits_hook)(nybl_session *session, nybl_logits_fn hook, void *user);
    nybl_status (*session_set_stop_strings)(nybl_session *session, const char *const *strings,
        const size_t *lengths, size_t count);
    nybl_status (*session_set_logprobs)(nybl_session *session, int32_t enabled, uint32_t top);
    nybl_status (*session_get_logprobs)(nybl_session *session, struct nybl_logprob *logprobs,
        size_t capacity, size_t *count);
    nybl_status (*session_fork)(nybl_session *session, nybl_session **out);
    nybl_status (*session_save)(nybl_session *session, const char *path, size_t path_len);
    nybl_status (*session_restore)(nybl_session *session, const char *path, size_t path_len);
    nybl_status (*session_copy_tokens)(nybl_session *session, uint32_t *ids, size_t capacity,
        size_t *count);
    nybl_status (*session_get_metrics)(nybl_session *session, struct nybl_session_metrics *metrics);
    nybl_status (*session_set_small_model)(nybl_session *session, const nybl_model *model);
    nybl_status (*runtime_relieve)(const nybl_runtime *runtime, int32_t pressure,
        struct nybl_freed *freed);
    nybl_status (*source_seal)(const struct nybl_source *source, int32_t *fd);
    nybl_status (*batch_create)(nybl_session *like, uint32_t max_sessions, struct nybl_batch **out);
    nybl_status (*batch_decode)(struct nybl_batch *batch, nybl_session *const *sessions,
        size_t count, size_t *computed);
    void (*batch_destroy)(struct nybl_batch *batch);
} nybl_api;

/**
 * The table of functions, if this library serves programs that were built against `major`.`minor` (pass
 * NYBL_ABI_MAJOR and NYBL_ABI_MINOR); NULL otherwise. Static.
 */
const struct nybl_api *nybl_get_api(uint32_t major,
                                    uint32_t minor);

#ifdef __cplusplus
}
#endif

#endif /* NYBL_H */
