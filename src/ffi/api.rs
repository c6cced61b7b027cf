//! # Every function in one table
//!
//! For a host that opens the library with dlopen() and looks up one symbol. Members are only ever added, at the
//! end, so a table serves every program that was built against an older minor version of its ABI.

use super::status::{NYBL_ABI_MAJOR, NYBL_ABI_MINOR};

/// The functions above, by their names without the prefix, in the order in which they came to be. A member is
/// NULL when this build of the library lacks the level it belongs to.
pub struct nybl_api {
    _private: [u8; 0],
}

/// The table of functions, if this library serves programs that were built against `major`.`minor` (pass
/// NYBL_ABI_MAJOR and NYBL_ABI_MINOR); NULL otherwise. Static.
#[unsafe(no_mangle)]
#[allow(clippy::absurd_extreme_comparisons, reason = "the minor version does not stay 0")]
pub extern "C" fn nybl_get_api(major: u32, minor: u32) -> *const nybl_api {
    if major == NYBL_ABI_MAJOR && minor <= NYBL_ABI_MINOR {
        (&raw const TABLE).cast()
    } else {
        std::ptr::null()
    }
}

/// What nybl_api is in C.
#[repr(C)]
struct Table {
    struct_size: u32,
    abi_minor: u32,
    functions: [*const (); COUNT],
}

// SAFETY: addresses of functions, which never change.
unsafe impl Sync for Table {}

macro_rules! address {
    ($name:ident, $feature:literal) => {{
        #[cfg(feature = $feature)]
        let address = super::$name as *const ();
        #[cfg(not(feature = $feature))]
        let address = std::ptr::null();
        address
    }};
}

macro_rules! functions {
    ($($name:ident($($hole:tt),*) in $feature:literal,)*) => {
        const COUNT: usize = <[&str]>::len(&[$($feature),*]);

        static TABLE: Table = Table {
            struct_size: size_of::<Table>() as u32,
            abi_minor: NYBL_ABI_MINOR,
            functions: [$(address!($name, $feature)),*],
        };

        /// Calls every function with zeros and NULL, and passes its name and its status to `each`.
        #[cfg(test)]
        fn call_all(mut each: impl FnMut(&str, &dyn Fn() -> Option<i32>)) {
            use tests::Call;
            $(
                #[cfg(feature = $feature)]
                each(stringify!($name), &|| (super::$name as unsafe extern "C" fn($($hole),*) -> _).with_zeros());
            )*
        }
    };
}

// In the order of the table; `BLESS=1 cargo test --test header` adds new functions at the end. Never move or
// remove a line: the position is the ABI.
#[rustfmt::skip]
functions! {
    nybl_abi_version() in "capi",
    nybl_version_string() in "capi",
    nybl_status_name(_) in "capi",
    nybl_last_error(_, _) in "capi",
    nybl_pack_size(_, _) in "capi",
    nybl_pack(_, _, _, _) in "capi",
    nybl_unpack_rows(_, _, _, _, _, _) in "capi",
    nybl_matmul_scratch_size(_, _, _) in "capi",
    nybl_quantize_activations(_, _, _, _, _, _) in "capi",
    nybl_matmul(_, _) in "capi",
    nybl_cpu_features() in "capi",
    nybl_kernel_name(_, _, _, _) in "capi",
    nybl_verify(_, _, _, _, _) in "capi",
    nybl_runtime_create(_, _) in "text",
    nybl_runtime_destroy(_) in "text",
    nybl_model_open(_, _, _, _) in "text",
    nybl_model_retain(_) in "text",
    nybl_model_release(_) in "text",
    nybl_model_get_info(_, _) in "text",
    nybl_tokenize(_, _, _, _, _, _, _) in "text",
    nybl_detokenize(_, _, _, _, _, _) in "text",
    nybl_session_create(_, _, _) in "text",
    nybl_session_destroy(_) in "text",
    nybl_session_append(_, _, _) in "text",
    nybl_session_next(_, _) in "text",
    nybl_session_generate(_, _, _, _) in "text",
    nybl_session_truncate(_, _) in "text",
    nybl_session_reset(_) in "text",
    nybl_session_get_logits(_, _, _) in "text",
    nybl_get_api(_, _) in "capi",
    nybl_drafter_create_ngram(_) in "capi",
    nybl_drafter_create_callback(_, _, _) in "capi",
    nybl_drafter_destroy(_) in "capi",
    nybl_drafter_draft(_, _, _, _, _, _, _) in "capi",
    nybl_drafter_rewind(_, _) in "capi",
    nybl_drafter_create_model(_, _, _) in "text",
    nybl_spec_attach(_, _, _) in "text",
    nybl_spec_detach(_) in "text",
    nybl_spec_set_share(_, _) in "text",
    nybl_spec_get_stats(_, _) in "text",
    nybl_model_open_source(_, _, _) in "text",
    nybl_model_prefetch(_, _, _) in "text",
    nybl_model_wait(_, _, _, _) in "text",
    nybl_model_release_pages(_, _) in "text",
    nybl_chat_encode(_, _, _, _, _) in "chat",
    nybl_chat_render(_, _, _, _, _) in "chat",
    nybl_session_cancel(_) in "text",
    nybl_runtime_report_heat(_, _) in "text",
    nybl_runtime_set_power_mode(_, _) in "text",
    nybl_runtime_get_governor_state(_, _) in "text",
    nybl_kv_create(_, _) in "capi",
    nybl_kv_destroy(_) in "capi",
    nybl_kv_get_stats(_, _) in "capi",
    nybl_kv_trim(_, _) in "capi",
    nybl_kv_sequence_create(_, _) in "capi",
    nybl_kv_sequence_fork(_, _) in "capi",
    nybl_kv_sequence_destroy(_) in "capi",
    nybl_kv_sequence_length(_, _) in "capi",
    nybl_kv_sequence_truncate(_, _) in "capi",
    nybl_kv_reserve(_, _) in "capi",
    nybl_kv_write(_, _, _, _, _, _) in "capi",
    nybl_kv_attend(_, _) in "capi",
    nybl_kv_commit(_, _, _) in "capi",
    nybl_kv_reuse(_, _, _, _) in "capi",
    nybl_kv_share(_, _, _) in "capi",
    nybl_kv_drop(_, _, _) in "capi",
    nybl_kv_save(_, _, _, _, _) in "capi",
    nybl_kv_load(_, _, _, _, _, _) in "capi",
    nybl_model_open_sources(_, _, _, _) in "text",
    nybl_model_lock_pages(_) in "text",
    nybl_model_plan(_, _, _, _, _, _) in "text",
    nybl_session_set_sampler(_, _) in "text",
    nybl_session_set_logit_bias(_, _, _, _) in "text",
    nybl_session_set_logits_hook(_, _, _) in "text",
    nybl_session_set_stop_strings(_, _, _, _) in "text",
    nybl_session_set_logprobs(_, _, _) in "text",
    nybl_session_get_logprobs(_, _, _, _) in "text",
    nybl_session_fork(_, _) in "text",
    nybl_session_save(_, _, _) in "text",
    nybl_session_restore(_, _, _) in "text",
    nybl_session_copy_tokens(_, _, _, _) in "text",
    nybl_session_get_metrics(_, _) in "text",
    nybl_session_set_small_model(_, _) in "text",
    nybl_runtime_relieve(_, _, _) in "text",
    nybl_source_seal(_, _) in "text",
    nybl_batch_create(_, _, _) in "text",
    nybl_batch_decode(_, _, _, _) in "text",
    nybl_batch_destroy(_) in "text",
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ffi::status::{NYBL_ERR_INTERNAL, PANIC_NEXT};

    /// Functions that a test can call without knowing their parameters: NULL and zero are values of all of them.
    pub(super) trait Call {
        /// The status, if it returns one.
        fn with_zeros(&self) -> Option<i32>;
    }

    trait Returned {
        fn status(&self) -> Option<i32> {
            None
        }
    }
    impl Returned for () {}
    impl Returned for u32 {}
    impl Returned for usize {}
    impl<T> Returned for *const T {}
    impl<T> Returned for *mut T {}
    impl Returned for i32 {
        fn status(&self) -> Option<i32> {
            Some(*self)
        }
    }

    macro_rules! call {
        ($($parameter:ident)*) => {
            impl<R: Returned, $($parameter),*> Call for unsafe extern "C" fn($($parameter),*) -> R {
                fn with_zeros(&self) -> Option<i32> {
                    // SAFETY: parameters are integers, floats, pointers and nullable functions, and every
                    // function accepts zero and NULL.
                    unsafe { self($(std::mem::zeroed::<$parameter>()),*) }.status()
                }
            }
        };
    }
    call!();
    call!(A);
    call!(A B);
    call!(A B C);
    call!(A B C D);
    call!(A B C D E);
    call!(A B C D E F);
    call!(A B C D E F G);
    call!(A B C D E F G H);
    call!(A B C D E F G H I);
    call!(A B C D E F G H I J);

    /// Those that compute nothing and so run outside the boundary.
    const CONSTANT: [&str; 6] = [
        "nybl_abi_version",
        "nybl_version_string",
        "nybl_status_name",
        "nybl_last_error",
        "nybl_cpu_features",
        "nybl_get_api",
    ];

    #[test]
    fn a_panic_behind_any_function_becomes_a_status() {
        let mut calls = 0;
        call_all(|name, call| {
            if CONSTANT.contains(&name) {
                return;
            }
            PANIC_NEXT.set(true);
            let status = call();
            assert!(!PANIC_NEXT.take(), "{name} does not run inside the boundary");
            assert!(status.is_none_or(|s| s == NYBL_ERR_INTERNAL), "{name}: {status:?}");
            calls += 1;
        });
        assert_eq!(calls + CONSTANT.len(), COUNT);
        eprintln!("injected: a panic: {calls}, survived: {calls}");
    }

    #[test]
    fn zeros_and_null_are_survived_by_every_function() {
        call_all(|name, call| {
            let status = call();
            assert!(status != Some(NYBL_ERR_INTERNAL), "{name}: {status:?}");
        });
    }

    #[test]
    fn the_table_is_whole_and_serves_its_own_major_only() {
        let api = nybl_get_api(NYBL_ABI_MAJOR, NYBL_ABI_MINOR);
        assert_eq!(api.cast(), &raw const TABLE);
        assert!(
            TABLE.functions.iter().all(|address| cfg!(not(feature = "text")) || !address.is_null())
        );
        assert!(nybl_get_api(NYBL_ABI_MAJOR + 1, 0).is_null());
        assert!(nybl_get_api(NYBL_ABI_MAJOR, NYBL_ABI_MINOR + 1).is_null());
    }
}
