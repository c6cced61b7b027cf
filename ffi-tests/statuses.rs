//! Every status that the header names is reached, through the functions that the header declares.

mod programs;

use nybl::ffi::*;
use programs::{model, root};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::ptr::{null, null_mut};

/// The statuses of the header, by code.
fn listed() -> BTreeMap<i32, String> {
    let header = std::fs::read_to_string(root().join("include/nybl.h")).unwrap();
    let defined = header.lines().filter_map(|line| line.strip_prefix("#define "));
    let statuses = defined.filter_map(|line| {
        let (name, code) = line.split_once(' ')?;
        let code = code.trim();
        let code = match code.strip_prefix("0x") {
            Some(digits) => i32::from_str_radix(digits, 16).ok()?,
            None => code.parse().ok()?,
        };
        (name == "NYBL_OK" || name.starts_with("NYBL_ERR_")).then(|| (code, name.to_owned()))
    });
    statuses.collect()
}

/// All zeros but for its size.
fn sized<T>() -> T {
    // SAFETY: all zeros is a value of every struct of the header.
    let mut value: T = unsafe { std::mem::zeroed() };
    // SAFETY: each begins with its size.
    unsafe { (&raw mut value).cast::<u32>().write(size_of::<T>() as u32) };
    value
}

/// Leaves out a tile as long as it is told to.
unsafe extern "C" fn careless(
    user: *mut c_void,
    tiles: usize,
    tile: nybl_tile_fn,
    job: *const c_void,
) {
    // SAFETY: the test passes a `Cell<bool>` that outlives the runtime; the rest as the header says.
    unsafe {
        let skips = (*user.cast::<Cell<bool>>()).get();
        (usize::from(skips)..tiles).for_each(|index| tile.unwrap()(job, index));
    }
}

unsafe extern "C" fn refuses(_: *mut c_void, _: usize, _: usize) -> *mut c_void {
    null_mut()
}

unsafe extern "C" fn takes_back(_: *mut c_void, _: *mut c_void, _: usize, _: usize) {}

/// Calls the session that it was called by.
unsafe extern "C" fn reenters(context: *mut c_void, _: *const nybl_event) -> i32 {
    // SAFETY: the test passes the two.
    let (session, status) = unsafe { &mut *context.cast::<(*mut nybl_session, i32)>() };
    // SAFETY: a live handle.
    *status = unsafe { nybl_session_reset(*session) };
    1
}

#[test]
fn every_status_is_reached() {
    let listed = listed();
    assert!(listed.len() >= 14, "the header is not read any more: {listed:?}");
    let mut reached: BTreeMap<i32, &str> = BTreeMap::new();
    let path = model();
    let path = path.to_str().unwrap();
    let skips = Cell::new(false);
    let many = [9_u32; 300];
    // SAFETY: handles are live, sizes are stated, pointers lead to what lives through each call.
    unsafe {
        let mut reach = |what: &'static str, status: i32| {
            reached.insert(status, what);
            status
        };
        let mut config = nybl_runtime_config {
            threads: 2,
            executor: Some(careless),
            executor_user: (&raw const skips).cast_mut().cast(),
            ..sized()
        };
        let (mut runtime, mut model) = (null_mut(), null_mut());
        let mut other: *mut nybl_session = null_mut();
        reach("a runtime", nybl_runtime_create(&raw const config, &raw mut runtime));
        reach("nothing to create", nybl_runtime_create(null(), null_mut()));
        config.reserved = 1;
        let mut none = null_mut();
        reach("a reserved member", nybl_runtime_create(&raw const config, &raw mut none));
        reach("no file", nybl_model_open(runtime, c"/nowhere".as_ptr(), 8, &raw mut model));
        let bytes = [7_u64; 64];
        let start = bytes.as_ptr().cast::<u8>();
        let source = nybl_source {
            kind: NYBL_SOURCE_MEMORY,
            data: start.add(start.align_offset(64)).cast(),
            length: 64,
            ..sized()
        };
        reach("no model", nybl_model_open_source(runtime, &raw const source, &raw mut model));
        let opened = nybl_model_open(runtime, path.as_ptr().cast(), path.len(), &raw mut model);
        assert_eq!(opened, NYBL_OK);
        let (mut id, mut count) = (0, 0);
        let text = c"Once upon a time".as_ptr();
        reach("a small buffer", nybl_tokenize(model, text, 16, 0, &raw mut id, 1, &raw mut count));

        let allocator = nybl_allocator { alloc: Some(refuses), free: Some(takes_back), ..sized() };
        let poor = nybl_runtime_config { allocator: &raw const allocator, ..sized() };
        let (mut poor_runtime, mut poor_model) = (null_mut(), null_mut());
        nybl_runtime_create(&raw const poor, &raw mut poor_runtime);
        nybl_model_open(poor_runtime, path.as_ptr().cast(), path.len(), &raw mut poor_model);
        reach("no memory", nybl_session_create(poor_model, null(), &raw mut other));
        nybl_model_release(poor_model);
        nybl_runtime_destroy(poor_runtime);

        let mut info = sized::<nybl_model_info>();
        nybl_model_get_info(model, &raw mut info);
        let small = nybl_session_config {
            kv_budget: 64 * info.kv_token_bytes,
            // A cache of its own.
            window: 200,
            context: 1000,
            ..sized()
        };
        assert_eq!(nybl_session_create(model, &raw const small, &raw mut other), NYBL_OK);
        reach("a small budget", nybl_session_append(other, many.as_ptr(), 180));
        nybl_session_destroy(other);

        let mut session = null_mut();
        assert_eq!(nybl_session_create(model, null(), &raw mut session), NYBL_OK);
        reach("too many tokens", nybl_session_append(session, many.as_ptr(), 300));
        nybl_session_cancel(session);
        reach("a cancellation", nybl_session_append(session, many.as_ptr(), 5));
        let heat = nybl_heat { celsius: 60.0, ..sized() };
        nybl_runtime_report_heat(runtime, &raw const heat);
        reach("heat", nybl_session_append(session, many.as_ptr(), 5));
        nybl_runtime_report_heat(runtime, null());
        assert_eq!(nybl_session_append(session, many.as_ptr(), 5), NYBL_OK);
        let mut context = (session, NYBL_OK);
        let user = (&raw mut context).cast();
        assert_eq!(nybl_session_generate(session, 1, Some(reenters), user), NYBL_OK);
        reach("a call from inside", context.1);
        skips.set(true);
        reach("an executor that leaves a tile out", nybl_session_append(session, many.as_ptr(), 5));
        skips.set(false);
        reach("the session afterwards", nybl_session_append(session, many.as_ptr(), 5));
        assert_eq!(nybl_session_reset(session), NYBL_OK);
        assert_eq!(nybl_session_append(session, many.as_ptr(), 5), NYBL_OK);
        nybl_session_destroy(session);
        nybl_model_release(model);
        nybl_runtime_destroy(runtime);
    }
    let missing: Vec<_> = listed.iter().filter(|(code, _)| !reached.contains_key(code)).collect();
    assert!(missing.is_empty(), "not reached: {missing:?}; reached: {reached:?}");
    let unknown: Vec<_> = reached.iter().filter(|(code, _)| !listed.contains_key(code)).collect();
    assert!(unknown.is_empty(), "not in the header: {unknown:?}");
}
