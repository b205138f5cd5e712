//! The model: packed weights, rows of keys and values, and the step that extends rows.

use crate::attention::{Heads, Row, Span, MAX_HEAD};
#[cfg(target_arch = "x86_64")]
use crate::bytes::{self, Split};
use crate::isa::Isa;
#[cfg(target_arch = "x86_64")]
use crate::matmul::BYTES_STEP;
use crate::matmul::{multiply, wants_bf16, Inputs, Kind, Matrix, Then};
use crate::memory::Shared;
use crate::options::{self, Options};
use crate::past::{existing, Attend, Rows};
use crate::pool::Pool;
#[cfg(target_arch = "x86_64")]
use crate::scratch::SplitRoom;
use crate::scratch::{room, Scratch};
use crate::stream::{copy, embed, norm_one};

/// Tasks of a product for each thread: enough to even out threads that are interrupted.
const TASKS_PER_THREAD: usize = 4;
const ATTENTION_TASKS_PER_THREAD: usize = 8;
/// One token's norm is not worth waking a thread for; 16 are a task.
const TOKENS_PER_TASK: usize = 16;

#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub vocabulary: usize,
    pub width: usize,
    pub heads: Heads,
    /// Positions of the rotary tables.
    pub positions: usize,
    pub token_shift: f32,
}

/// fp32 tables that the caller keeps alive and unchanged.
#[derive(Clone, Copy)]
pub struct Tables {
    /// (vocabulary, width)
    pub embedding: *const f32,
    /// (positions, head size / 2)
    pub cos: *const f32,
    pub sin: *const f32,
}

// SAFETY: only read.
unsafe impl Send for Tables {}
unsafe impl Sync for Tables {}

/// The matrices of one layer; the query, key and value projections are one.
pub struct Layer {
    pub projections: Matrix,
    pub attention_out: Matrix,
    /// With a gate: it, and below it what it gates.
    pub mlp_in: Matrix,
    pub mlp_out: Matrix,
}

/// Tokens for positions `start`, `start` + 1, ... of a row.
pub struct Chunk<'a> {
    pub row: usize,
    pub start: usize,
    pub tokens: &'a [u32],
    pub wants_logits: bool,
}

pub struct Model {
    isa: Isa,
    is_bf16: bool,
    sizes: Sizes,
    options: Options,
    tables: Tables,
    layers: Vec<Layer>,
    head: Matrix,
    rows: Rows,
    scratch: Scratch,
    pool: Pool,
}

impl Model {
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        isa: Isa,
        kind: Kind,
        sizes: Sizes,
        options: Options,
        tables: Tables,
        layers: Vec<Layer>,
        head: Matrix,
        num_threads: usize,
    ) -> Result<Self, String> {
        if sizes.heads.size > MAX_HEAD {
            return Err(format!("heads of {} features; at most {MAX_HEAD}", sizes.heads.size));
        }
        Ok(Self {
            isa,
            is_bf16: wants_bf16(isa, kind),
            sizes,
            options,
            tables,
            layers,
            head,
            rows: Rows::new(kind),
            scratch: Scratch::default(),
            pool: Pool::new(num_threads),
        })
    }

    pub fn num_bytes(&self) -> usize {
        let of = |l: &Layer| {
            l.projections.num_bytes()
                + l.attention_out.num_bytes()
                + l.mlp_in.num_bytes()
                + l.mlp_out.num_bytes()
        };
        self.head.num_bytes() + self.layers.iter().map(of).sum::<usize>()
    }

    pub fn num_threads(&self) -> usize {
        self.pool.num_threads()
    }

    pub fn open(&mut self, capacity: usize) -> usize {
        self.rows.open(self.sizes.heads, capacity)
    }

    pub fn close(&mut self, row: usize) -> Result<(), String> {
        self.rows.close(row)
    }

    pub fn copy(&mut self, source: usize, target: usize, length: usize) -> Result<(), String> {
        self.rows.copy(self.sizes.heads, source, target, length)
    }

    /// Append the chunks' tokens to their rows; write the logits (chunks that want them,
    /// vocabulary) to `logits`.
    pub fn feed(&mut self, chunks: &[Chunk], logits: &mut [f32]) -> Result<(), String> {
        let num_wanted = chunks.iter().filter(|chunk| chunk.wants_logits).count();
        if logits.len() != num_wanted * self.sizes.vocabulary {
            return Err(format!("room for {} logits", logits.len()));
        }
        for (i, chunk) in chunks.iter().enumerate() {
            if chunks[..i].iter().any(|other| other.row == chunk.row) {
                return Err(format!("row {} is fed twice", chunk.row));
            }
            if chunk.tokens.is_empty() || chunk.start + chunk.tokens.len() > self.sizes.positions {
                return Err(format!("{} tokens from {}", chunk.tokens.len(), chunk.start));
            }
            if chunk.tokens.iter().any(|&token| token as usize >= self.sizes.vocabulary) {
                return Err("a token beyond the vocabulary".into());
            }
        }
        // Taken out for the step, so that rows and model can be borrowed side by side.
        let mut rows = std::mem::replace(&mut self.rows, Rows::F32(Vec::new()));
        let result = match &mut rows {
            Rows::F32(rows) => self.step(rows, chunks, logits),
            Rows::Bf16(rows) => self.step(rows, chunks, logits),
        };
        self.rows = rows;
        result
    }

    fn step<E: Attend>(
        &mut self,
        rows: &mut [Option<Row<E>>],
        chunks: &[Chunk],
        logits: &mut [f32],
    ) -> Result<(), String> {
        for chunk in chunks {
            let row = existing(rows, chunk.row)?;
            if chunk.start + chunk.tokens.len() > row.capacity {
                return Err(format!("row {} holds {} tokens", chunk.row, row.capacity));
            }
        }
        let num_tokens = chunks.iter().map(|chunk| chunk.tokens.len()).sum();
        let Sizes { width, heads, .. } = self.sizes;
        let is_bf16 = self.is_bf16;
        let projected_width = (heads.queries + 2 * heads.keys) * heads.size;
        let inner_width = self.layers[0].mlp_out.inputs;
        let residual = Shared::new(room(&mut self.scratch.residual, num_tokens * width));
        let projected = room(&mut self.scratch.projected, num_tokens * projected_width);
        let projected = Shared::new(projected);
        let normed = self.scratch.normed.reserve(num_tokens * width, is_bf16);
        let mixed = self.scratch.mixed.reserve(num_tokens * width, is_bf16);
        let inner = self.scratch.inner.reserve(num_tokens * inner_width, is_bf16);
        self.embed(rows, chunks, residual);
        let Scratch { gated, first, middle, .. } = &mut self.scratch;
        let of = |is_wanted: bool, buffer, width: usize| {
            Shared::new(room(buffer, if is_wanted { num_tokens * width } else { 0 }))
        };
        let gated = of(self.options.is_gated, gated, 2 * inner_width);
        let first = of(self.options.scalars.is_some(), first, width);
        let middle = of(self.options.backout.is_some(), middle, width);
        if self.options.scalars.is_some() {
            // SAFETY: both have room for all tokens; so below.
            unsafe { copy(residual, first, num_tokens * width) }
        }
        let layers = std::mem::take(&mut self.layers);
        for (index, layer) in layers.iter().enumerate() {
            if let Some(scalars) = &self.options.scalars {
                let (keep, back) = scalars[index];
                self.blend(residual, first, (keep, back), num_tokens);
            }
            self.norm(residual, normed, num_tokens);
            self.product(&layer.projections, normed, num_tokens, Then::Store(projected));
            self.add_values(chunks, index, normed, projected);
            self.attend(rows, chunks, index, projected, mixed);
            self.product(&layer.attention_out, mixed, num_tokens, Then::Add(residual));
            self.norm(residual, normed, num_tokens);
            let then = match inner {
                _ if self.options.is_gated => Then::Store(gated),
                Inputs::Bf16(out) => Then::Relu2Bf16(out),
                Inputs::F32(out) => Then::Relu2F32(out),
                #[cfg(target_arch = "x86_64")]
                Inputs::Split(_) => unreachable!("split only for a product"),
            };
            self.product(&layer.mlp_in, normed, num_tokens, then);
            if self.options.is_gated {
                self.gate(gated, inner, num_tokens, inner_width);
            }
            self.product(&layer.mlp_out, inner, num_tokens, Then::Add(residual));
            if self.options.backout.is_some() && index == heads.num_layers / 2 {
                // SAFETY: as above.
                unsafe { copy(residual, middle, num_tokens * width) }
            }
        }
        self.layers = layers;
        if let Some(share) = self.options.backout {
            self.blend(residual, middle, (1.0, -share), num_tokens);
        }
        self.logits(chunks, residual, normed, logits);
        Ok(())
    }

    /// The residual stream's first values: normed embeddings, and a share of each predecessor's.
    fn embed<E: Attend>(
        &mut self,
        rows: &mut [Option<Row<E>>],
        chunks: &[Chunk],
        residual: Shared<f32>,
    ) {
        let Sizes { width, token_shift, .. } = self.sizes;
        let smear = self.options.smear;
        let mut t = 0;
        for chunk in chunks {
            let row = rows[chunk.row].as_mut().expect("checked before");
            for (i, &token) in chunk.tokens.iter().enumerate() {
                let position = chunk.start + i;
                row.tokens[position] = token;
                let before = (position > 0 && (token_shift != 0.0 || smear.is_some()))
                    .then(|| row.tokens[position - 1] as usize);
                // SAFETY: tokens are below the vocabulary, t below the step's number of tokens.
                unsafe {
                    let of = |token: usize| self.tables.embedding.add(token * width);
                    let before = before.map_or(std::ptr::null(), of);
                    let out = residual.at(t * width);
                    let shifted = if smear.is_some() { std::ptr::null() } else { before };
                    embed(self.isa, of(token as usize), shifted, token_shift, width, out);
                    if let Some(smear) = smear.filter(|_| !before.is_null()) {
                        options::smear(self.isa, out, before, smear, width);
                    }
                }
                t += 1;
            }
        }
    }

    fn norm(&mut self, residual: Shared<f32>, out: Inputs, num_tokens: usize) {
        let (isa, width) = (self.isa, self.sizes.width);
        self.per_token(num_tokens, &|t| {
            // SAFETY: each token has its own place.
            unsafe { norm_one(isa, residual, out, t, t, width) }
        });
    }

    /// `x` = keep `x` + back `other`, of all tokens.
    fn blend(
        &mut self,
        x: Shared<f32>,
        other: Shared<f32>,
        (keep, back): (f32, f32),
        num_tokens: usize,
    ) {
        let (isa, width) = (self.isa, self.sizes.width);
        self.per_token(num_tokens, &|t| {
            // SAFETY: each token has its own place.
            unsafe { options::blend(isa, x.at(t * width), other.at(t * width), keep, back, width) }
        });
    }

    /// A layer's value embeddings, where it has them.
    fn add_values(
        &mut self,
        chunks: &[Chunk],
        layer: usize,
        normed: Inputs,
        projected: Shared<f32>,
    ) {
        let Some(embedding) = self.options.values[layer] else { return };
        let Sizes { width, heads, .. } = self.sizes;
        let (of_keys, size) = ((heads.keys, heads.size), heads.size);
        let all = heads.queries + 2 * heads.keys;
        let tokens = chunks.iter().flat_map(|chunk| chunk.tokens);
        for (t, &token) in tokens.enumerate() {
            // SAFETY: each token has its own place; tokens are below the vocabulary.
            unsafe {
                let values = projected.at((t * all + heads.queries + heads.keys) * size);
                let token = token as usize;
                let (isa, from) = (self.isa, t * width);
                match normed {
                    Inputs::F32(x) => {
                        options::add_values_f32(isa, x.at(from), token, embedding, of_keys, values)
                    }
                    Inputs::Bf16(x) => {
                        options::add_values_bf16(isa, x.at(from), token, embedding, of_keys, values)
                    }
                    #[cfg(target_arch = "x86_64")]
                    Inputs::Split(_) => unreachable!("split only for a product"),
                }
            }
        }
    }

    /// From both halves of a gated MLP to what its last matrix reads.
    fn gate(&mut self, both: Shared<f32>, out: Inputs, num_tokens: usize, width: usize) {
        let isa = self.isa;
        self.per_token(num_tokens, &|t| {
            // SAFETY: each token has its own place.
            unsafe {
                let both = both.at(t * 2 * width);
                match out {
                    Inputs::F32(out) => {
                        options::gate_f32(isa, both, width, Shared::new(out.at(t * width)))
                    }
                    Inputs::Bf16(out) => {
                        options::gate_bf16(isa, both, width, Shared::new(out.at(t * width)))
                    }
                    #[cfg(target_arch = "x86_64")]
                    Inputs::Split(_) => unreachable!("split only for a product"),
                }
            }
        });
    }

    /// Do something for each token, some of them to a task.
    fn per_token(&mut self, num_tokens: usize, work: &(dyn Fn(usize) + Sync)) {
        self.pool.run(num_tokens.div_ceil(TOKENS_PER_TASK), &|task| {
            let last = num_tokens.min((task + 1) * TOKENS_PER_TASK);
            (task * TOKENS_PER_TASK..last).for_each(work);
        });
    }

    fn product(&mut self, matrix: &Matrix, x: Inputs, rows: usize, then: Then) {
        let isa = self.isa;
        let x = if matrix.kind() == Kind::I8Split { self.split(matrix, x, rows) } else { x };
        let num_panels = matrix.num_panels();
        let num_tasks = num_panels.min(self.pool.num_threads() * TASKS_PER_THREAD);
        self.pool.run(num_tasks, &|task| {
            let first = task * num_panels / num_tasks;
            let last = (task + 1) * num_panels / num_tasks;
            // SAFETY: buffers have room for `rows` rows; each task has its own panels.
            unsafe { multiply(isa, matrix, x, rows, first..last, then) }
        });
    }

    /// The inputs of a product as it reads them when it multiplies bytes.
    #[cfg(target_arch = "x86_64")]
    fn split(&mut self, matrix: &Matrix, x: Inputs, rows: usize) -> Inputs {
        let Inputs::F32(x) = x else { unreachable!("bytes are split from fp32") };
        let inputs = matrix.inputs;
        let stride = inputs.next_multiple_of(BYTES_STEP);
        let SplitRoom { bytes, scales } = &mut self.scratch.split;
        let out = Split {
            bytes: Shared::new(room(bytes, 2 * rows * stride)),
            scales: Shared::new(room(scales, rows)),
            stride,
        };
        self.per_token(rows, &|row| {
            // SAFETY: this kind of weights is for machines with AVX-512; rows have places.
            unsafe { bytes::split(x.at(row * inputs), inputs, row, out) }
        });
        Inputs::Split(out)
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn split(&mut self, _matrix: &Matrix, x: Inputs, _rows: usize) -> Inputs {
        x
    }

    fn attend<E: Attend>(
        &mut self,
        rows: &mut [Option<Row<E>>],
        chunks: &[Chunk],
        layer: usize,
        projected: Shared<f32>,
        mixed: Inputs,
    ) {
        let (isa, heads, tables) = (self.isa, self.sizes.heads, self.tables);
        let group = heads.queries / heads.keys;
        let window = self.options.windows[layer];
        let scale = self.options.query_scale / (heads.size as f32).sqrt();
        let mut spans = Vec::with_capacity(chunks.len() * heads.keys);
        let mut t = 0;
        for chunk in chunks {
            let row = rows[chunk.row].as_mut().expect("checked before");
            for head in 0..heads.keys {
                let span = Span {
                    place: row.place(heads, layer, head),
                    start: chunk.start,
                    len: chunk.tokens.len(),
                    first_query: head * group,
                    num_queries: group,
                    head,
                    heads,
                    window,
                    scale,
                    // SAFETY: t is below the step's number of tokens.
                    projected: Shared::new(unsafe {
                        projected.at(t * (heads.queries + 2 * heads.keys) * heads.size)
                    }),
                    cos: tables.cos,
                    sin: tables.sin,
                    next_keys: std::ptr::null(),
                };
                spans.push((t * heads.queries * heads.size, span));
            }
            t += chunk.tokens.len();
        }
        for i in 1..spans.len() {
            spans[i - 1].1.next_keys = spans[i].1.place.first_key();
        }
        // Neighbours in one task, so that the keys that were asked for are met by who asked.
        let num_tasks = spans.len().min(self.pool.num_threads() * ATTENTION_TASKS_PER_THREAD);
        self.pool.run(num_tasks, &|task| {
            let first = task * spans.len() / num_tasks;
            let last = (task + 1) * spans.len() / num_tasks;
            for (offset, span) in &spans[first..last] {
                // SAFETY: each span has its own row and head, and its own part of `mixed`.
                unsafe { E::attend(isa, span, mixed, *offset) }
            }
        });
    }

    fn logits(
        &mut self,
        chunks: &[Chunk],
        residual: Shared<f32>,
        normed: Inputs,
        logits: &mut [f32],
    ) {
        let width = self.sizes.width;
        let (mut t, mut num_wanted) = (0, 0);
        for chunk in chunks {
            t += chunk.tokens.len();
            if chunk.wants_logits {
                // SAFETY: there are at least as many tokens as chunks.
                unsafe { norm_one(self.isa, residual, normed, t - 1, num_wanted, width) }
                num_wanted += 1;
            }
        }
        if num_wanted > 0 {
            let head = std::mem::replace(&mut self.head, Matrix::empty());
            let then = match self.options.softcap {
                0.0 => Then::Store(Shared::new(logits.as_mut_ptr())),
                cap => Then::Softcap(Shared::new(logits.as_mut_ptr()), cap),
            };
            self.product(&head, normed, num_wanted, then);
            self.head = head;
        }
    }
}
