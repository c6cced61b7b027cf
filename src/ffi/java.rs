//! The native half of `bindings/kotlin`: the functions of the C interface, one to one, for a JVM.
//!
//! `JNI_OnLoad` registers them with `io.nybl.Native`, so that nothing else needs to be exported. A status other
//! than NYBL_OK becomes an `io.nybl.NyblException`. Handles travel as `long`; `io.nybl` keeps them alive while a
//! call uses them, which is what makes these calls safe.

use super::*;
use crate::error::Error;
use jni::objects::{JClass, JIntArray, JObject, JString, JValue};
use jni::sys::{JNI_ERR, JNI_VERSION_1_6, jfloat, jint, jlong};
use jni::{JNIEnv, JavaVM, NativeMethod};
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Called by the JVM when the library is loaded.
///
/// # Safety
/// `vm` is the JVM's.
#[unsafe(export_name = "JNI_OnLoad")]
unsafe extern "system" fn on_load(vm: *mut jni::sys::JavaVM, _reserved: *mut c_void) -> jint {
    // SAFETY: the JVM vouches for the pointer.
    let registered = unsafe { JavaVM::from_raw(vm) }.and_then(|vm| register(&mut vm.get_env()?));
    if registered.is_ok() { JNI_VERSION_1_6 } else { JNI_ERR }
}

fn register(env: &mut JNIEnv<'_>) -> jni::errors::Result<()> {
    let methods = [
        ("version", "()Ljava/lang/String;", version as *mut c_void),
        ("runtimeCreate", "(ILjava/lang/String;)J", runtime_create as *mut c_void),
        ("runtimeDestroy", "(J)V", runtime_destroy as *mut c_void),
        ("runtimeReportHeat", "(JIFF)V", runtime_report_heat as *mut c_void),
        ("runtimeSetPowerMode", "(JI)V", runtime_set_power_mode as *mut c_void),
        ("runtimeRelieve", "(JI)J", runtime_relieve as *mut c_void),
        ("modelOpen", "(JLjava/lang/String;)J", model_open as *mut c_void),
        ("modelRelease", "(J)V", model_release as *mut c_void),
        ("modelContext", "(J)I", model_context as *mut c_void),
        ("tokenize", "(JLjava/lang/String;I)[I", tokenize as *mut c_void),
        ("detokenize", "(J[I)Ljava/lang/String;", detokenize as *mut c_void),
        ("sessionCreate", "(JIFIFFJ)J", session_create as *mut c_void),
        ("sessionDestroy", "(J)V", session_destroy as *mut c_void),
        ("sessionAppend", "(J[I)V", session_append as *mut c_void),
        ("sessionNext", "(J[I)Ljava/lang/String;", session_next as *mut c_void),
        ("sessionTruncate", "(JI)V", session_truncate as *mut c_void),
        ("sessionReset", "(J)V", session_reset as *mut c_void),
        ("sessionLogits", "(J)Ljava/nio/ByteBuffer;", session_logits as *mut c_void),
    ];
    let methods = methods.map(|(name, signature, fn_ptr)| NativeMethod {
        name: name.into(),
        sig: signature.into(),
        fn_ptr,
    });
    env.register_native_methods("io/nybl/Native", &methods)
}

/// Why there is no result.
enum Refused {
    /// A status of the C interface; its words are the thread's last error.
    Status(nybl_status),
    /// A call into the JVM failed, which has most often left an exception pending there.
    Jvm(jni::errors::Error),
}

impl From<jni::errors::Error> for Refused {
    fn from(error: jni::errors::Error) -> Self {
        Self::Jvm(error)
    }
}

type Outcome<T> = Result<T, Refused>;

fn check(status: nybl_status) -> Outcome<()> {
    if status == NYBL_OK { Ok(()) } else { Err(Refused::Status(status)) }
}

/// Runs the body of a native method; a failure or a panic becomes a pending exception and `T::default()`.
fn native<'a, T: Default>(
    env: &mut JNIEnv<'a>,
    body: impl FnOnce(&mut JNIEnv<'a>) -> Outcome<T>,
) -> T {
    let outcome = catch_unwind(AssertUnwindSafe(|| body(env)));
    let (status, text) = match outcome {
        Ok(Ok(value)) => return value,
        Ok(Err(Refused::Status(status))) => (status, last_error()),
        Ok(Err(Refused::Jvm(error))) => (NYBL_ERR_INVALID_ARGUMENT, error.to_string()),
        Err(_) => {
            (NYBL_ERR_INTERNAL, Error::Internal("a panic at the JVM's border".into()).to_string())
        }
    };
    // Whatever else goes wrong here ends as an exception of the JVM's own.
    if !env.exception_check().unwrap_or(true) {
        let _ = throw(env, status, &text);
    }
    T::default()
}

fn last_error() -> String {
    let mut text = vec![0_u8; 1024];
    // SAFETY: the buffer has that many bytes.
    let length = unsafe { nybl_last_error(text.as_mut_ptr().cast(), text.len()) };
    text.truncate(length.min(text.len() - 1));
    String::from_utf8_lossy(&text).into_owned()
}

fn throw(env: &mut JNIEnv<'_>, status: nybl_status, text: &str) -> jni::errors::Result<()> {
    let text = env.new_string(text)?;
    let arguments = [JValue::Int(status), JValue::Object(&text)];
    let signature = "(ILjava/lang/String;)V";
    let exception = env.new_object("io/nybl/NyblException", signature, &arguments)?;
    env.throw(jni::objects::JThrowable::from(exception))
}

fn text(env: &mut JNIEnv<'_>, string: &JString<'_>) -> Outcome<String> {
    Ok(if string.is_null() { String::new() } else { env.get_string(string)?.into() })
}

fn tokens(env: &mut JNIEnv<'_>, array: &JIntArray<'_>) -> Outcome<Vec<u32>> {
    let mut signed = vec![0; env.get_array_length(array)? as usize];
    env.get_int_array_region(array, 0, &mut signed)?;
    Ok(signed.into_iter().map(jint::cast_unsigned).collect())
}

extern "system" fn version<'a>(mut env: JNIEnv<'a>, _: JClass<'a>) -> JString<'a> {
    native(&mut env, |env| Ok(env.new_string(env!("CARGO_PKG_VERSION"))?))
}

extern "system" fn runtime_create<'a>(
    mut env: JNIEnv<'a>,
    _: JClass<'a>,
    threads: jint,
    isa: JString<'a>,
) -> jlong {
    native(&mut env, |env| {
        let isa = text(env, &isa)?;
        let config = nybl_runtime_config {
            struct_size: size_of::<nybl_runtime_config>() as u32,
            threads: threads.cast_unsigned(),
            isa: isa.as_ptr().cast(),
            isa_len: isa.len(),
            ..structs::Sized32::zero()
        };
        let mut runtime = std::ptr::null_mut();
        // SAFETY: pointers to what lives through the call.
        check(unsafe { nybl_runtime_create(&raw const config, &raw mut runtime) })?;
        Ok(runtime as jlong)
    })
}

extern "system" fn runtime_destroy<'a>(_: JNIEnv<'a>, _: JClass<'a>, runtime: jlong) {
    // SAFETY: `io.nybl` gives back what it was given, once.
    unsafe { nybl_runtime_destroy(runtime as *mut nybl_runtime) };
}

extern "system" fn runtime_report_heat<'a>(
    mut env: JNIEnv<'a>,
    _: JClass<'a>,
    runtime: jlong,
    level: jint,
    headroom: jfloat,
    celsius: jfloat,
) {
    native(&mut env, |_| {
        let struct_size = size_of::<nybl_heat>() as u32;
        let heat = nybl_heat { struct_size, level, headroom, celsius };
        // SAFETY: `io.nybl` passes live handles; the rest lives through the call.
        check(unsafe { nybl_runtime_report_heat(runtime as *const nybl_runtime, &raw const heat) })
    });
}

extern "system" fn runtime_set_power_mode<'a>(
    mut env: JNIEnv<'a>,
    _: JClass<'a>,
    runtime: jlong,
    mode: jint,
) {
    native(&mut env, |_| {
        // SAFETY: as for `runtime_report_heat`.
        check(unsafe { nybl_runtime_set_power_mode(runtime as *const nybl_runtime, mode) })
    });
}

/// The bytes given back.
extern "system" fn runtime_relieve<'a>(
    mut env: JNIEnv<'a>,
    _: JClass<'a>,
    runtime: jlong,
    pressure: jint,
) -> jlong {
    native(&mut env, |_| {
        let struct_size = size_of::<nybl_freed>() as u32;
        let mut freed = nybl_freed { struct_size, ..structs::Sized32::zero() };
        let runtime = runtime as *const nybl_runtime;
        // SAFETY: as for `runtime_report_heat`.
        check(unsafe { nybl_runtime_relieve(runtime, pressure, &raw mut freed) })?;
        let bytes = freed.prefix_bytes + freed.spilled_bytes + freed.page_bytes;
        Ok(jlong::try_from(bytes).unwrap_or(jlong::MAX))
    })
}

extern "system" fn model_open<'a>(
    mut env: JNIEnv<'a>,
    _: JClass<'a>,
    runtime: jlong,
    path: JString<'a>,
) -> jlong {
    native(&mut env, |env| {
        let path = text(env, &path)?;
        let (runtime, mut model) = (runtime as *const nybl_runtime, std::ptr::null_mut());
        // SAFETY: `io.nybl` passes live handles; the rest lives through the call.
        check(unsafe {
            nybl_model_open(runtime, path.as_ptr().cast(), path.len(), &raw mut model)
        })?;
        Ok(model as jlong)
    })
}

extern "system" fn model_release<'a>(_: JNIEnv<'a>, _: JClass<'a>, model: jlong) {
    // SAFETY: as for `runtime_destroy`.
    unsafe { nybl_model_release(model as *mut nybl_model) };
}

extern "system" fn model_context<'a>(mut env: JNIEnv<'a>, _: JClass<'a>, model: jlong) -> jint {
    native(&mut env, |_| {
        let struct_size = size_of::<nybl_model_info>() as u32;
        let mut info = nybl_model_info { struct_size, ..structs::Sized32::zero() };
        // SAFETY: as for `model_open`.
        check(unsafe { nybl_model_get_info(model as *const nybl_model, &raw mut info) })?;
        Ok(jint::try_from(info.context).unwrap_or(jint::MAX))
    })
}

extern "system" fn tokenize<'a>(
    mut env: JNIEnv<'a>,
    _: JClass<'a>,
    model: jlong,
    string: JString<'a>,
    flags: jint,
) -> JIntArray<'a> {
    native(&mut env, |env| {
        let string = text(env, &string)?;
        // No vocabulary has more tokens for a text than it has bytes, but for one at each end.
        let (mut ids, mut count) = (vec![0_i32; string.len() + 2], 0);
        // SAFETY: as for `model_open`; an `i32` has the size of a `u32`.
        check(unsafe {
            nybl_tokenize(
                model as *const nybl_model,
                string.as_ptr().cast(),
                string.len(),
                flags.cast_unsigned(),
                ids.as_mut_ptr().cast(),
                ids.len(),
                &raw mut count,
            )
        })?;
        let array = env.new_int_array(jint::try_from(count).unwrap_or(jint::MAX))?;
        env.set_int_array_region(&array, 0, &ids[..count])?;
        Ok(array)
    })
}

extern "system" fn detokenize<'a>(
    mut env: JNIEnv<'a>,
    _: JClass<'a>,
    model: jlong,
    ids: JIntArray<'a>,
) -> JString<'a> {
    native(&mut env, |env| {
        let ids = tokens(env, &ids)?;
        let (model, mut length) = (model as *const nybl_model, 0);
        let mut bytes: Vec<u8> = Vec::new();
        loop {
            let (buffer, room) = (bytes.as_mut_ptr().cast(), bytes.len());
            // SAFETY: as for `model_open`.
            let status = unsafe {
                nybl_detokenize(model, ids.as_ptr(), ids.len(), buffer, room, &raw mut length)
            };
            if status == NYBL_ERR_BUFFER_TOO_SMALL && length > room {
                bytes.resize(length, 0);
                continue;
            }
            check(status)?;
            return Ok(env.new_string(String::from_utf8_lossy(&bytes[..length]))?);
        }
    })
}

extern "system" fn session_create<'a>(
    mut env: JNIEnv<'a>,
    _: JClass<'a>,
    model: jlong,
    context: jint,
    temperature: jfloat,
    top_k: jint,
    top_p: jfloat,
    min_p: jfloat,
    seed: jlong,
) -> jlong {
    native(&mut env, |_| {
        let config = nybl_session_config {
            struct_size: size_of::<nybl_session_config>() as u32,
            context: context.cast_unsigned(),
            temperature,
            top_k: top_k.cast_unsigned(),
            top_p,
            min_p,
            seed: seed.cast_unsigned(),
            ..structs::Sized32::zero()
        };
        let (model, mut session) = (model as *const nybl_model, std::ptr::null_mut());
        // SAFETY: as for `model_open`.
        check(unsafe { nybl_session_create(model, &raw const config, &raw mut session) })?;
        Ok(session as jlong)
    })
}

extern "system" fn session_destroy<'a>(_: JNIEnv<'a>, _: JClass<'a>, session: jlong) {
    // SAFETY: as for `runtime_destroy`.
    unsafe { nybl_session_destroy(session as *mut nybl_session) };
}

extern "system" fn session_append<'a>(
    mut env: JNIEnv<'a>,
    _: JClass<'a>,
    session: jlong,
    ids: JIntArray<'a>,
) {
    native(&mut env, |env| {
        let (session, ids) = (session as *mut nybl_session, tokens(env, &ids)?);
        // SAFETY: as for `model_open`.
        check(unsafe { nybl_session_append(session, ids.as_ptr(), ids.len()) })
    });
}

/// The text of the next event; its kind and its token go into `event`.
extern "system" fn session_next<'a>(
    mut env: JNIEnv<'a>,
    _: JClass<'a>,
    session: jlong,
    event: JIntArray<'a>,
) -> JString<'a> {
    native(&mut env, |env| {
        let struct_size = size_of::<nybl_event>() as u32;
        let mut made = nybl_event { struct_size, ..structs::Sized32::zero() };
        // SAFETY: as for `model_open`; the text is valid until the next call on the session.
        let text = unsafe {
            check(nybl_session_next(session as *mut nybl_session, &raw mut made))?;
            structs::text("event.text", made.text, made.text_len).unwrap_or_default()
        };
        env.set_int_array_region(&event, 0, &[made.kind, made.token.cast_signed()])?;
        Ok(env.new_string(text)?)
    })
}

extern "system" fn session_truncate<'a>(
    mut env: JNIEnv<'a>,
    _: JClass<'a>,
    session: jlong,
    count: jint,
) {
    native(&mut env, |_| {
        let count = usize::try_from(count).unwrap_or(0);
        // SAFETY: as for `model_open`.
        check(unsafe { nybl_session_truncate(session as *mut nybl_session, count) })
    });
}

extern "system" fn session_reset<'a>(mut env: JNIEnv<'a>, _: JClass<'a>, session: jlong) {
    native(&mut env, |_| {
        // SAFETY: as for `model_open`.
        check(unsafe { nybl_session_reset(session as *mut nybl_session) })
    });
}

/// The logits where they lie, as a direct buffer that is valid until the next call on the session.
extern "system" fn session_logits<'a>(
    mut env: JNIEnv<'a>,
    _: JClass<'a>,
    session: jlong,
) -> JObject<'a> {
    native(&mut env, |env| {
        let (mut logits, mut count) = (std::ptr::null(), 0);
        let session = session as *mut nybl_session;
        // SAFETY: as for `model_open`; `io.nybl` says how long the buffer may be used.
        unsafe {
            check(nybl_session_get_logits(session, &raw mut logits, &raw mut count))?;
            Ok(env.new_direct_byte_buffer(logits.cast_mut().cast(), count * 4)?.into())
        }
    })
}
