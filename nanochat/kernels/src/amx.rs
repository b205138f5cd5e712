//! The tile registers of AMX: permission, configuration, and a block of sums in them.
//!
//! Instructions are written as assembly, since their intrinsics are not in stable Rust.

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

use crate::blocks::{Left, TILE};
use crate::pairs;

/// Whether this processor multiplies tiles of bf16 and of bytes, and this process may use them.
pub fn is_there() -> bool {
    static THERE: OnceLock<bool> = OnceLock::new();
    *THERE.get_or_init(|| {
        if !(cfg!(target_os = "linux") && pairs::are_there()) {
            return false;
        }
        let leaf = __cpuid_count(7, 0);
        // amx-bf16, amx-tile, amx-int8 (Intel SDM, volume 2A, CPUID, leaf 7, sub-leaf 0, edx).
        [22, 24, 25].iter().all(|bit| leaf.edx >> bit & 1 == 1) && ask_permission()
    })
}

/// Linux hands out the tile registers, 8 KB a thread, on request (Documentation/arch/x86/xstate).
fn ask_permission() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
    const XFEATURE_XTILEDATA: i64 = 18;
    let mut result = ARCH_PRCTL;
    // SAFETY: a system call that changes nothing but this process's permission.
    unsafe {
        asm!("syscall", inlateout("rax") result, in("rdi") ARCH_REQ_XCOMP_PERM,
             in("rsi") XFEATURE_XTILEDATA, out("rcx") _, out("r11") _);
    }
    result == 0
}

#[repr(C, align(64))]
struct TileConfig([u8; 64]);

/// The tiles of this thread, all of full size, until it is dropped; then as they were.
pub struct Tiles {
    before: TileConfig,
}

impl Tiles {
    /// # Safety
    /// `is_there`.
    pub unsafe fn configure() -> Self {
        let mut before = TileConfig([0; 64]);
        asm!("sttilecfg [{}]", in(reg) before.0.as_mut_ptr());
        let mut full = TileConfig([0; 64]);
        full.0[0] = 1; // the only palette there is
        for tile in 0..8 {
            full.0[16 + 2 * tile] = 64;
            full.0[48 + tile] = 16;
        }
        asm!("ldtilecfg [{}]", in(reg) full.0.as_ptr());
        Self { before }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: what `configure` has read. Another library may rely on its own.
        unsafe {
            if self.before.0[0] == 0 {
                asm!("tilerelease");
            } else {
                asm!("ldtilecfg [{}]", in(reg) self.before.0.as_ptr());
            }
        }
    }
}

/// Add to the four tiles of sums what `steps` steps give.
macro_rules! sum_up {
    ($product:literal, $left:expr, $right:expr, $steps:expr) => {
        asm!(
            "2:",
            "tileloadd tmm4, [{a} + {ar}]",
            "tileloadd tmm6, [{b} + {br}]",
            "tileloadd tmm7, [{b} + {br} + 1024]",
            concat!($product, " tmm0, tmm4, tmm6"),
            "tileloadd tmm5, [{l} + {ar}]",
            concat!($product, " tmm1, tmm4, tmm7"),
            "add {a}, {step}",
            "add {l}, {step}",
            concat!($product, " tmm2, tmm5, tmm6"),
            "add {b}, 2048",
            concat!($product, " tmm3, tmm5, tmm7"),
            "dec {n}",
            "jnz 2b",
            a = inout(reg) $left.start => _,
            l = inout(reg) ($left.start as *const u8).wrapping_add($left.lower) => _,
            ar = in(reg) $left.row_bytes,
            step = in(reg) $left.step,
            b = inout(reg) $right => _,
            br = in(reg) 64usize,
            n = inout(reg) $steps => _,
            options(nostack),
        )
    };
}

/// `blocks::Unit::multiply` in tiles, or `multiply_bytes` with sums of 32 bits: two of the left
/// operand, two of the right, four of sums.
///
/// # Safety
/// Within `Tiles`; as there.
#[inline]
pub unsafe fn multiply<const BYTES: bool>(
    left: Left,
    right: *const u16,
    steps: usize,
    c: *mut f32,
    stride: usize,
    add: bool,
) {
    let (row, lower) = (4 * stride, 4 * TILE * stride);
    if add {
        asm!(
            "tileloadd tmm0, [{c} + {row}]",
            "tileloadd tmm1, [{c} + {row} + 64]",
            "tileloadd tmm2, [{l} + {row}]",
            "tileloadd tmm3, [{l} + {row} + 64]",
            c = in(reg) c, l = in(reg) (c as *mut u8).add(lower), row = in(reg) row,
            options(nostack),
        );
    } else {
        asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack));
    }
    if steps > 0 && BYTES {
        sum_up!("tdpbusd", left, right, steps); // unsigned bytes of the left operand
    } else if steps > 0 {
        sum_up!("tdpbf16ps", left, right, steps);
    }
    asm!(
        "tilestored [{c} + {row}], tmm0",
        "tilestored [{c} + {row} + 64], tmm1",
        "tilestored [{l} + {row}], tmm2",
        "tilestored [{l} + {row} + 64], tmm3",
        c = in(reg) c, l = in(reg) (c as *mut u8).add(lower), row = in(reg) row,
        options(nostack),
    );
}
