//! Calls a row and looks at what it must leave as it was: the registers that a callee saves, the stack
//! pointer, and the rounding mode.
//!
//! A row in C or with `asm!` can break a caller that the compiler happened to lay out otherwise, far away
//! and much later. So every call of the harness goes through [`checked`], which loads known values first.
//! After KleidiAI's and dav1d's checkers.

use std::cell::Cell;

thread_local! {
    /// The row's function, and what it damaged since it was set. A trial runs on one thread.
    static TARGET: Cell<*const ()> = const { Cell::new(std::ptr::null()) };
    static DAMAGE: Cell<Option<&'static str>> = const { Cell::new(None) };
}

/// Makes [`checked`] stand for `function`.
pub(crate) fn watch<A>(function: unsafe extern "C" fn(*const A)) {
    TARGET.set(function as *const ());
    DAMAGE.set(None);
}

/// What the watched function left damaged.
pub(crate) fn verdict() -> Result<(), String> {
    match DAMAGE.get() {
        None => Ok(()),
        Some(name) => Err(format!("{name} came back changed")),
    }
}

/// Calls the watched function; [`verdict`] tells what became of the registers.
///
/// # Safety
/// As the function's own.
pub(crate) unsafe extern "C" fn checked<A>(args: *const A) {
    let target = TARGET.get();
    #[cfg(all(unix, not(miri), any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        let mut seen = [0_u64; saved::NAMES.len()];
        // SAFETY: `watch` got a function of this type, and `seen` has room for every register.
        unsafe { saved::call(target, args.cast(), seen.as_mut_ptr()) };
        let wrong = seen.iter().zip(saved::VALUES).position(|(got, want)| *got != want);
        if let Some(register) = wrong {
            DAMAGE.set(Some(saved::NAMES[register]));
        }
    }
    #[cfg(not(all(unix, not(miri), any(target_arch = "x86_64", target_arch = "aarch64"))))]
    {
        // SAFETY: `watch` got a function of this type.
        let function: unsafe extern "C" fn(*const A) = unsafe { std::mem::transmute(target) };
        // SAFETY: the caller's promise.
        unsafe { function(args) };
    }
}

#[cfg(all(unix, not(miri), target_arch = "x86_64"))]
mod saved {
    use std::arch::naked_asm;

    pub(super) const NAMES: [&str; 8] =
        ["rbx", "rbp", "r12", "r13", "r14", "r15", "rsp", "the mode of SSE (mxcsr)"];
    /// Registers hold these during the call; the last two are differences.
    pub(super) const VALUES: [u64; 8] = [0x5a00, 0x5a01, 0x5a02, 0x5a03, 0x5a04, 0x5a05, 0, 0];

    /// Calls `function(args)` and writes what the registers held afterwards.
    ///
    /// # Safety
    /// As the function's own; `seen` has room for eight words.
    #[unsafe(naked)]
    pub(super) unsafe extern "C" fn call(function: *const (), args: *const u8, seen: *mut u64) {
        naked_asm!(
            "push rbx",
            "push rbp",
            "push r12",
            "push r13",
            "push r14",
            "push r15",
            "sub rsp, 40",
            "mov [rsp], rdx",
            "mov [rsp + 8], rsp",
            "stmxcsr [rsp + 16]",
            "mov rax, rdi",
            "mov rdi, rsi",
            "mov ebx, 0x5a00",
            "mov ebp, 0x5a01",
            "mov r12d, 0x5a02",
            "mov r13d, 0x5a03",
            "mov r14d, 0x5a04",
            "mov r15d, 0x5a05",
            "call rax",
            "mov rdx, [rsp]",
            "mov [rdx], rbx",
            "mov [rdx + 8], rbp",
            "mov [rdx + 16], r12",
            "mov [rdx + 24], r13",
            "mov [rdx + 32], r14",
            "mov [rdx + 40], r15",
            "mov rax, rsp",
            "sub rax, [rsp + 8]",
            "mov [rdx + 48], rax",
            "stmxcsr [rsp + 24]",
            "mov eax, [rsp + 24]",
            "xor eax, [rsp + 16]",
            // The low bits are the exceptions seen so far.
            "and eax, 0xffc0",
            "mov [rdx + 56], rax",
            "add rsp, 40",
            "pop r15",
            "pop r14",
            "pop r13",
            "pop r12",
            "pop rbp",
            "pop rbx",
            "ret",
        )
    }

    /// Breaks the rule.
    #[unsafe(naked)]
    pub(super) unsafe extern "C" fn damage(_: *const u8) {
        naked_asm!("mov r13d, 1", "ret")
    }
}

#[cfg(all(unix, not(miri), target_arch = "aarch64"))]
mod saved {
    use std::arch::naked_asm;

    #[rustfmt::skip] // one kind a line
    pub(super) const NAMES: [&str; 21] = [
        "x19", "x20", "x21", "x22", "x23", "x24", "x25", "x26", "x27", "x28", "x29",
        "d8", "d9", "d10", "d11", "d12", "d13", "d14", "d15",
        "sp", "the floating-point mode (fpcr)",
    ];
    /// Registers hold these during the call; the last two are differences.
    #[rustfmt::skip] // as above
    pub(super) const VALUES: [u64; 21] = [
        0x5a00, 0x5a01, 0x5a02, 0x5a03, 0x5a04, 0x5a05, 0x5a06, 0x5a07, 0x5a08, 0x5a09, 0x5a0a,
        0x5a00, 0x5a01, 0x5a02, 0x5a03, 0x5a04, 0x5a05, 0x5a06, 0x5a07,
        0, 0,
    ];

    /// Calls `function(args)` and writes what the registers held afterwards.
    ///
    /// # Safety
    /// As the function's own; `seen` has room for 21 words.
    #[unsafe(naked)]
    pub(super) unsafe extern "C" fn call(function: *const (), args: *const u8, seen: *mut u64) {
        naked_asm!(
            "stp x29, x30, [sp, -192]!",
            "stp x19, x20, [sp, 16]",
            "stp x21, x22, [sp, 32]",
            "stp x23, x24, [sp, 48]",
            "stp x25, x26, [sp, 64]",
            "stp x27, x28, [sp, 80]",
            "stp d8, d9, [sp, 96]",
            "stp d10, d11, [sp, 112]",
            "stp d12, d13, [sp, 128]",
            "stp d14, d15, [sp, 144]",
            "mov x9, sp",
            "stp x2, x9, [sp, 160]",
            "mrs x9, fpcr",
            "str x9, [sp, 176]",
            "mov x9, x0",
            "mov x0, x1",
            "mov x19, 0x5a00",
            "mov x20, 0x5a01",
            "mov x21, 0x5a02",
            "mov x22, 0x5a03",
            "mov x23, 0x5a04",
            "mov x24, 0x5a05",
            "mov x25, 0x5a06",
            "mov x26, 0x5a07",
            "mov x27, 0x5a08",
            "mov x28, 0x5a09",
            "mov x29, 0x5a0a",
            "fmov d8, x19",
            "fmov d9, x20",
            "fmov d10, x21",
            "fmov d11, x22",
            "fmov d12, x23",
            "fmov d13, x24",
            "fmov d14, x25",
            "fmov d15, x26",
            "blr x9",
            "ldp x2, x10, [sp, 160]",
            "stp x19, x20, [x2]",
            "stp x21, x22, [x2, 16]",
            "stp x23, x24, [x2, 32]",
            "stp x25, x26, [x2, 48]",
            "stp x27, x28, [x2, 64]",
            "str x29, [x2, 80]",
            "stp d8, d9, [x2, 88]",
            "stp d10, d11, [x2, 104]",
            "stp d12, d13, [x2, 120]",
            "stp d14, d15, [x2, 136]",
            "mov x9, sp",
            "sub x9, x9, x10",
            "str x9, [x2, 152]",
            "mrs x9, fpcr",
            "ldr x10, [sp, 176]",
            "eor x9, x9, x10",
            "str x9, [x2, 160]",
            "ldp d14, d15, [sp, 144]",
            "ldp d12, d13, [sp, 128]",
            "ldp d10, d11, [sp, 112]",
            "ldp d8, d9, [sp, 96]",
            "ldp x27, x28, [sp, 80]",
            "ldp x25, x26, [sp, 64]",
            "ldp x23, x24, [sp, 48]",
            "ldp x21, x22, [sp, 32]",
            "ldp x19, x20, [sp, 16]",
            "ldp x29, x30, [sp], 192",
            "ret",
        )
    }

    /// Breaks the rule.
    #[unsafe(naked)]
    pub(super) unsafe extern "C" fn damage(_: *const u8) {
        naked_asm!("fmov d11, xzr", "ret")
    }
}

/// Whether a function that breaks the rule is found out.
pub(crate) fn finds_damage() -> Result<(), String> {
    #[cfg(all(unix, not(miri), any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        watch(saved::damage);
        // SAFETY: the function reads nothing, and what it breaks is mended by the call.
        unsafe { checked::<u8>(std::ptr::null()) };
        let found = verdict();
        if found.is_ok() {
            return Err("a changed register went unnoticed".into());
        }
    }
    Ok(())
}
