//! Which instructions this machine has, and functions compiled for each of them.

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// What follows, and tiles of bf16 and of bytes.
    Amx,
    /// AVX-512 with dot products of bf16 pairs and of bytes (VNNI).
    Avx512Bf16,
    Avx512,
    /// AVX2 with fused multiply-add.
    Avx2,
    /// What the target has by itself: NEON on aarch64.
    Base,
}

impl Isa {
    /// The best there is; None where a fused multiply-add would be a function call.
    pub fn detect() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            let wide = has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512dq");
            if wide && has!("avx512bf16") && has!("avx512vnni") {
                if crate::tiles::are_there() {
                    return Some(Self::Amx);
                }
                return Some(Self::Avx512Bf16);
            }
            if wide {
                return Some(Self::Avx512);
            }
            (has!("avx2") && has!("fma")).then_some(Self::Avx2)
        }
        #[cfg(target_arch = "aarch64")]
        return Some(Self::Base);
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        return None;
    }

    /// Whether there are dot products of bf16 pairs.
    pub fn multiplies_bf16(self) -> bool {
        matches!(self, Self::Amx | Self::Avx512Bf16)
    }

    /// Whether there are exact dot products of bytes.
    pub fn multiplies_bytes(self) -> bool {
        self.multiplies_bf16()
    }

    /// Whether there is AVX-512.
    pub fn is_wide(self) -> bool {
        matches!(self, Self::Amx | Self::Avx512Bf16 | Self::Avx512)
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Amx => "amx",
            Self::Avx512Bf16 => "avx512-bf16",
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::Base => "base",
        }
    }
}

/// `versions! { fn name(isa, argument: Type, ...) = body; }` compiles the inlined `body` once for
/// each instruction set and calls the one that `isa` names.
macro_rules! versions {
    ($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),* $(,)?) = $body:path;) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments)]
        pub unsafe fn $name(isa: crate::isa::Isa, $($arg: $type),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma,avx2")]
                #[allow(clippy::too_many_arguments)]
                unsafe fn wide($($arg: $type),*) { $body($($arg),*) }
                #[target_feature(enable = "fma,avx2")]
                #[allow(clippy::too_many_arguments)]
                unsafe fn narrow($($arg: $type),*) { $body($($arg),*) }
                if isa.is_wide() {
                    wide($($arg),*)
                } else {
                    narrow($($arg),*)
                }
            }
            #[cfg(not(target_arch = "x86_64"))]
            {
                let _ = isa;
                $body($($arg),*)
            }
        }
    };
}
pub(crate) use versions;
