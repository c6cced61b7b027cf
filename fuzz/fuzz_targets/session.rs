//! Calls of the C interface in any order, on sessions of the model that comes with the project.
//! `cargo +nightly fuzz run session`.
//!
//! Every call answers with a status of the header. What a session holds at the end is computed again by a
//! fresh one, whose logits must have the same bits.
#![no_main]

use arbitrary::Arbitrary;
use nybl::ffi::*;
use std::ffi::c_void;
use std::ptr::{null, null_mut};
use std::sync::OnceLock;

#[derive(Arbitrary, Debug)]
enum Call {
    Create {
        slot: u8,
        context: u8,
        chunk: u8,
        kv: u8,
        sampled: bool,
        seed: u8,
        stream: bool,
        tight: bool,
    },
    Destroy(u8),
    Append(u8, Vec<u8>),
    AppendMany(u8, u8),
    Outside(u8, u32),
    Next(u8),
    Generate(u8, u8, u8),
    Truncate(u8, u8),
    Reset(u8),
    Logits(u8),
    Cancel(u8),
    Attach(u8, u8),
    Detach(u8),
    Share(u8, f32),
    Stats(u8),
    NewDrafter,
    DropDrafter,
    Tokenize(String, u8, u8),
    Detokenize(Vec<u16>, u8),
    Info,
    Heat(u8, f32),
    Nothing(u8),
    /// The sessions of these places, as many in a pass.
    Together(Vec<u8>, u8),
}

/// The model's handle: opened once, never released.
fn model() -> (*mut nybl_runtime, *mut nybl_model) {
    static MODEL: OnceLock<(usize, usize)> = OnceLock::new();
    let (runtime, model) = *MODEL.get_or_init(|| {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/nursery.nybl");
        let config = nybl_runtime_config { threads: 2, ..sized() };
        let (mut runtime, mut model) = (null_mut(), null_mut());
        // SAFETY: all pointers are to locals and to the path's bytes.
        unsafe {
            assert_eq!(nybl_runtime_create(&config, &mut runtime), NYBL_OK);
            let status = nybl_model_open(runtime, path.as_ptr().cast(), path.len(), &mut model);
            assert_eq!(status, NYBL_OK);
        }
        (runtime as usize, model as usize)
    });
    (runtime as *mut _, model as *mut _)
}

/// A struct of the header with its size and nothing else.
fn sized<T>() -> T {
    // SAFETY: every struct of the header may be all zeros and begins with its size.
    unsafe {
        let mut value: T = std::mem::zeroed();
        (&raw mut value).cast::<u32>().write(size_of::<T>() as u32);
        value
    }
}

struct Slot {
    session: *mut nybl_session,
    config: nybl_session_config,
    /// What it holds, as long as that is known.
    tokens: Option<Vec<u32>>,
}

const KV: [u32; 5] = [0, 1, 2, 3, 9];

/// What a callback has seen, and after how many events it stops.
struct Seen {
    tokens: Vec<u32>,
    left: u8,
}

unsafe extern "C" fn see(seen: *mut c_void, event: *const nybl_event) -> i32 {
    // SAFETY: the caller passes a `Seen`, the library an event.
    let (seen, event) = unsafe { (&mut *seen.cast::<Seen>(), &*event) };
    if event.kind == NYBL_EVENT_TOKEN {
        seen.tokens.push(event.token);
    }
    seen.left = seen.left.saturating_sub(1);
    i32::from(seen.left == 0)
}

fn known(status: nybl_status) -> bool {
    // SAFETY: it is a string that never goes away.
    let name = unsafe { std::ffi::CStr::from_ptr(nybl_status_name(status)) };
    name.to_bytes() != b"NYBL_ERR_UNKNOWN" && status != NYBL_ERR_INTERNAL
}

libfuzzer_sys::fuzz_target!(|calls: Vec<Call>| {
    let (runtime, model) = model();
    let mut slots: [Option<Slot>; 4] = Default::default();
    let mut drafters: Vec<*mut nybl_drafter> = Vec::new();
    // SAFETY: the handle is live. The last input's heat is over.
    assert_eq!(unsafe { nybl_runtime_report_heat(runtime, null()) }, NYBL_OK);
    for call in calls.iter().take(40) {
        // SAFETY: handles are live or NULL, and pointers to locals that are as long as said.
        let status = unsafe { one(call, runtime, model, &mut slots, &mut drafters) };
        assert!(known(status), "{call:?} gave {status}");
    }
    for slot in slots.into_iter().flatten() {
        // SAFETY: as above.
        unsafe { close(model, slot) };
    }
    for drafter in drafters {
        // SAFETY: it is live, and no session has it any more.
        unsafe { nybl_drafter_destroy(drafter) };
    }
});

/// Compares a session's logits with those of a fresh one, and destroys it.
unsafe fn close(model: *mut nybl_model, slot: Slot) {
    // SAFETY: handles are live, pointers are to locals.
    unsafe {
        let (mut logits, mut count) = (null(), 0);
        let tokens = slot.tokens.unwrap_or_default();
        if !tokens.is_empty()
            && nybl_session_get_logits(slot.session, &mut logits, &mut count) == NYBL_OK
        {
            let got: Vec<u32> =
                std::slice::from_raw_parts(logits, count).iter().map(|x| x.to_bits()).collect();
            let mut fresh = null_mut();
            assert_eq!(nybl_session_create(model, &slot.config, &mut fresh), NYBL_OK);
            let status = nybl_session_append(fresh, tokens.as_ptr(), tokens.len());
            if status == NYBL_OK
                && nybl_session_get_logits(fresh, &mut logits, &mut count) == NYBL_OK
            {
                let want: Vec<u32> =
                    std::slice::from_raw_parts(logits, count).iter().map(|x| x.to_bits()).collect();
                assert!(got == want, "other logits for {tokens:?}");
            }
            nybl_session_destroy(fresh);
        }
        nybl_session_destroy(slot.session);
    }
}

/// The session in a place, or NULL.
fn session_of(slots: &[Option<Slot>; 4], slot: u8) -> *mut nybl_session {
    slots[usize::from(slot % 4)].as_ref().map_or(null_mut(), |slot| slot.session)
}

/// What the session in a place is known to hold.
fn tokens_of(slots: &mut [Option<Slot>; 4], slot: u8) -> Option<&mut Option<Vec<u32>>> {
    Some(&mut slots[usize::from(slot % 4)].as_mut()?.tokens)
}

/// Changes what the session in a place is known to hold.
fn change(slots: &mut [Option<Slot>; 4], slot: u8, change: impl FnOnce(&mut Vec<u32>)) {
    if let Some(Some(tokens)) = tokens_of(slots, slot) {
        change(tokens);
    }
}

unsafe fn one(
    call: &Call,
    runtime: *mut nybl_runtime,
    model: *mut nybl_model,
    slots: &mut [Option<Slot>; 4],
    drafters: &mut Vec<*mut nybl_drafter>,
) -> nybl_status {
    // SAFETY: the caller's promise.
    unsafe {
        match call {
            Call::Create { slot, context, chunk, kv, sampled, seed, stream, tight } => {
                let place = usize::from(*slot % 4);
                if let Some(old) = slots[place].take() {
                    close(model, old);
                }
                let config = nybl_session_config {
                    context: u32::from(*context),
                    prefill_chunk: u32::from(*chunk),
                    temperature: if *sampled { 0.9 } else { 0.0 },
                    top_p: 1.0,
                    seed: u64::from(*seed),
                    kv_format: KV[usize::from(*kv) % KV.len()],
                    sinks: if *stream { 2 } else { 0 },
                    window: if *stream { 20 } else { 0 },
                    kv_budget: if *tight { 400_000 } else { 0 },
                    ..sized()
                };
                let mut session = null_mut();
                let status = nybl_session_create(model, &config, &mut session);
                assert_eq!(status == NYBL_OK, !session.is_null());
                if status == NYBL_OK {
                    // A window forgets as it goes, so what is held depends on how it came there.
                    let tokens = (!stream).then(Vec::new);
                    slots[place] = Some(Slot { session, config, tokens });
                }
                status
            }
            Call::Destroy(slot) => {
                if let Some(slot) = slots[usize::from(*slot % 4)].take() {
                    close(model, slot);
                }
                NYBL_OK
            }
            Call::Append(slot, bytes) => {
                let ids: Vec<u32> = bytes.iter().map(|byte| u32::from(*byte)).collect();
                append(slots, *slot, &ids)
            }
            Call::AppendMany(slot, count) => {
                let ids: Vec<u32> = (0..u32::from(*count)).map(|i| i % 7 + 3).collect();
                append(slots, *slot, &ids)
            }
            Call::Outside(slot, id) => append(slots, *slot, &[*id]),
            Call::Next(slot) => {
                let mut event: nybl_event = sized();
                let status = nybl_session_next(session_of(slots, *slot), &mut event);
                if status == NYBL_OK && event.kind == NYBL_EVENT_TOKEN {
                    let text = std::slice::from_raw_parts(event.text.cast::<u8>(), event.text_len);
                    assert!(std::str::from_utf8(text).is_ok());
                    change(slots, *slot, |tokens| tokens.push(event.token));
                }
                status
            }
            Call::Generate(slot, most, left) => {
                let mut seen = Seen { tokens: Vec::new(), left: left % 16 };
                let context = (&raw mut seen).cast();
                let status = nybl_session_generate(
                    session_of(slots, *slot),
                    usize::from(*most % 32),
                    Some(see),
                    context,
                );
                change(slots, *slot, |tokens| tokens.extend(&seen.tokens));
                status
            }
            Call::Truncate(slot, count) => {
                let status = nybl_session_truncate(session_of(slots, *slot), usize::from(*count));
                if status == NYBL_OK {
                    change(slots, *slot, |tokens| tokens.truncate(usize::from(*count)));
                }
                status
            }
            Call::Reset(slot) => {
                let status = nybl_session_reset(session_of(slots, *slot));
                if status == NYBL_OK {
                    change(slots, *slot, Vec::clear);
                }
                status
            }
            Call::Logits(slot) => {
                let (mut logits, mut count) = (null(), 0);
                let status =
                    nybl_session_get_logits(session_of(slots, *slot), &mut logits, &mut count);
                assert_eq!(status == NYBL_OK, !logits.is_null() && count > 0);
                status
            }
            Call::Cancel(slot) => nybl_session_cancel(session_of(slots, *slot)),
            Call::Attach(slot, drafter) => {
                let drafter = drafters.get(usize::from(*drafter)).copied().unwrap_or(null_mut());
                nybl_spec_attach(session_of(slots, *slot), drafter, null())
            }
            Call::Detach(slot) => nybl_spec_detach(session_of(slots, *slot)),
            Call::Share(slot, share) => nybl_spec_set_share(session_of(slots, *slot), *share),
            Call::Stats(slot) => nybl_spec_get_stats(session_of(slots, *slot), &mut sized()),
            Call::NewDrafter => {
                let mut drafter = null_mut();
                let status = nybl_drafter_create_ngram(&mut drafter);
                drafters.push(drafter);
                status
            }
            // While a session may still have it: it stays until that lets it go.
            Call::DropDrafter => {
                nybl_drafter_destroy(drafters.pop().unwrap_or(null_mut()));
                NYBL_OK
            }
            Call::Tokenize(text, flags, capacity) => {
                let (mut ids, mut count) = (vec![0; usize::from(*capacity)], 0);
                nybl_tokenize(
                    model,
                    text.as_ptr().cast(),
                    text.len(),
                    u32::from(*flags),
                    ids.as_mut_ptr(),
                    ids.len(),
                    &mut count,
                )
            }
            Call::Detokenize(ids, capacity) => {
                let ids: Vec<u32> = ids.iter().map(|id| u32::from(*id)).collect();
                let (mut text, mut len) = (vec![0; usize::from(*capacity)], 0);
                nybl_detokenize(
                    model,
                    ids.as_ptr(),
                    ids.len(),
                    text.as_mut_ptr(),
                    text.len(),
                    &mut len,
                )
            }
            Call::Together(places, most) => {
                let sessions: Vec<_> =
                    places.iter().take(6).map(|place| session_of(slots, *place)).collect();
                let like = sessions.first().copied().unwrap_or(null_mut());
                let (mut batch, mut computed) = (null_mut(), 9);
                let status = nybl_batch_create(like, u32::from(*most), &mut batch);
                assert_eq!(status == NYBL_OK, !batch.is_null());
                if status != NYBL_OK {
                    return status;
                }
                let status =
                    nybl_batch_decode(batch, sessions.as_ptr(), sessions.len(), &mut computed);
                assert!(computed <= sessions.len());
                nybl_batch_destroy(batch);
                status
            }
            Call::Info => nybl_model_get_info(model, &mut sized()),
            Call::Heat(level, celsius) => {
                let level = i32::from(*level);
                nybl_runtime_report_heat(
                    runtime,
                    &nybl_heat { level, celsius: *celsius, ..sized() },
                )
            }
            Call::Nothing(which) => match which % 4 {
                0 => nybl_session_next(null_mut(), null_mut()),
                1 => nybl_session_append(null_mut(), null(), 5),
                2 => nybl_tokenize(model, null(), 3, 0, null_mut(), 0, null_mut()),
                _ => nybl_session_create(model, null(), null_mut()),
            },
        }
    }
}

unsafe fn append(slots: &mut [Option<Slot>; 4], slot: u8, ids: &[u32]) -> nybl_status {
    // SAFETY: the handle is live or NULL, and the ids are as many as said.
    let status = unsafe { nybl_session_append(session_of(slots, slot), ids.as_ptr(), ids.len()) };
    match status {
        NYBL_OK => change(slots, slot, |tokens| tokens.extend(ids)),
        // It may have got part of the way.
        NYBL_ERR_CANCELLED | NYBL_ERR_POISONED => {
            if let Some(tokens) = tokens_of(slots, slot) {
                *tokens = None;
            }
        }
        _ => {}
    }
    status
}
