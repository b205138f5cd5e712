//! The model: packed weights, rows of keys and values, and the step that extends rows.

use crate::attention::{self, Cached, Heads, Row, Span, MAX_HEAD};
use crate::isa::Isa;
use crate::math::{rms_norm, Number};
use crate::matmul::{multiply, wants_bf16, Inputs, Kind, Matrix, Then};
use crate::memory::{Buffer, Shared};
use crate::pool::Pool;

/// Tasks of a product for each thread: enough to even out threads that are interrupted.
const TASKS_PER_THREAD: usize = 4;
const ATTENTION_TASKS_PER_THREAD: usize = 8;

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

/// Rows in the precision that goes with the weights.
enum Rows {
    F32(Vec<Option<Row<f32>>>),
    Bf16(Vec<Option<Row<u16>>>),
}

/// Activations of a step, kept from one to the next.
#[derive(Default)]
struct Scratch {
    residual: Option<Buffer<f32>>,
    projected: Option<Buffer<f32>>,
    normed: Activations,
    mixed: Activations,
    inner: Activations,
}

/// A product's inputs, in whichever precision it reads.
#[derive(Default)]
struct Activations {
    single: Option<Buffer<f32>>,
    brain: Option<Buffer<u16>>,
}

impl Activations {
    fn reserve(&mut self, len: usize, is_bf16: bool) -> Inputs {
        if is_bf16 {
            Inputs::Bf16(Shared::new(room(&mut self.brain, len)))
        } else {
            Inputs::F32(Shared::new(room(&mut self.single, len)))
        }
    }
}

fn room<T: Copy>(buffer: &mut Option<Buffer<T>>, len: usize) -> *mut T {
    let buffer = buffer.get_or_insert_with(|| Buffer::zeroed(0));
    buffer.reserve(len);
    buffer.mut_ptr()
}

pub struct Model {
    isa: Isa,
    is_bf16: bool,
    sizes: Sizes,
    tables: Tables,
    layers: Vec<Layer>,
    head: Matrix,
    rows: Rows,
    scratch: Scratch,
    pool: Pool,
}

impl Model {
    pub fn new(
        isa: Isa,
        kind: Kind,
        sizes: Sizes,
        tables: Tables,
        layers: Vec<Layer>,
        head: Matrix,
        num_threads: usize,
    ) -> Result<Self, String> {
        if sizes.heads.size > MAX_HEAD {
            return Err(format!("heads of {} features; at most {MAX_HEAD}", sizes.heads.size));
        }
        let rows = match kind {
            Kind::F32 => Rows::F32(Vec::new()),
            Kind::Bf16 | Kind::I8 => Rows::Bf16(Vec::new()),
        };
        Ok(Self {
            isa,
            is_bf16: wants_bf16(isa, kind),
            sizes,
            tables,
            layers,
            head,
            rows,
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
        let heads = self.sizes.heads;
        match &mut self.rows {
            Rows::F32(rows) => place(rows, Row::new(heads, capacity)),
            Rows::Bf16(rows) => place(rows, Row::new(heads, capacity)),
        }
    }

    pub fn close(&mut self, row: usize) -> Result<(), String> {
        match &mut self.rows {
            Rows::F32(rows) => close_row(rows, row),
            Rows::Bf16(rows) => close_row(rows, row),
        }
    }

    pub fn copy(&mut self, source: usize, target: usize, length: usize) -> Result<(), String> {
        let heads = self.sizes.heads;
        match &mut self.rows {
            Rows::F32(rows) => copy_row(rows, heads, source, target, length),
            Rows::Bf16(rows) => copy_row(rows, heads, source, target, length),
        }
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
        let inner_width = self.layers[0].mlp_in.outputs;
        let residual = Shared::new(room(&mut self.scratch.residual, num_tokens * width));
        let projected = room(&mut self.scratch.projected, num_tokens * projected_width);
        let projected = Shared::new(projected);
        let normed = self.scratch.normed.reserve(num_tokens * width, is_bf16);
        let mixed = self.scratch.mixed.reserve(num_tokens * width, is_bf16);
        let inner = self.scratch.inner.reserve(num_tokens * inner_width, is_bf16);
        self.embed(rows, chunks, residual);
        let layers = std::mem::take(&mut self.layers);
        for (index, layer) in layers.iter().enumerate() {
            self.norm(residual, normed, num_tokens);
            self.product(&layer.projections, normed, num_tokens, Then::Store(projected));
            self.attend(rows, chunks, index, projected, mixed);
            self.product(&layer.attention_out, mixed, num_tokens, Then::Add(residual));
            self.norm(residual, normed, num_tokens);
            let then = match inner {
                Inputs::Bf16(out) => Then::Relu2Bf16(out),
                Inputs::F32(out) => Then::Relu2F32(out),
            };
            self.product(&layer.mlp_in, normed, num_tokens, then);
            self.product(&layer.mlp_out, inner, num_tokens, Then::Add(residual));
        }
        self.layers = layers;
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
        let mut t = 0;
        for chunk in chunks {
            let row = rows[chunk.row].as_mut().expect("checked before");
            for (i, &token) in chunk.tokens.iter().enumerate() {
                let position = chunk.start + i;
                row.tokens[position] = token;
                let before =
                    (position > 0 && token_shift != 0.0).then(|| row.tokens[position - 1] as usize);
                // SAFETY: tokens are below the vocabulary, t below the step's number of tokens.
                unsafe {
                    let of = |token: usize| self.tables.embedding.add(token * width);
                    let before = before.map_or(std::ptr::null(), of);
                    let out = residual.at(t * width);
                    embed(self.isa, of(token as usize), before, token_shift, width, out);
                }
                t += 1;
            }
        }
    }

    fn norm(&mut self, residual: Shared<f32>, out: Inputs, num_tokens: usize) {
        let (isa, width) = (self.isa, self.sizes.width);
        // One token is not worth waking a thread for; 16 are a task.
        let tokens_per_task = 16;
        self.pool.run(num_tokens.div_ceil(tokens_per_task), &|task| {
            let last = num_tokens.min((task + 1) * tokens_per_task);
            for t in task * tokens_per_task..last {
                // SAFETY: each token has its own place.
                unsafe { norm_one(isa, residual, out, t, t, width) }
            }
        });
    }

    fn product(&mut self, matrix: &Matrix, x: Inputs, rows: usize, then: Then) {
        let isa = self.isa;
        let num_panels = matrix.num_panels();
        let num_tasks = num_panels.min(self.pool.num_threads() * TASKS_PER_THREAD);
        self.pool.run(num_tasks, &|task| {
            let first = task * num_panels / num_tasks;
            let last = (task + 1) * num_panels / num_tasks;
            // SAFETY: buffers have room for `rows` rows; each task has its own panels.
            unsafe { multiply(isa, matrix, x, rows, first..last, then) }
        });
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
            let then = Then::Softcap(Shared::new(logits.as_mut_ptr()));
            self.product(&head, normed, num_wanted, then);
            self.head = head;
        }
    }
}

/// Attention in a precision of keys and values.
pub trait Attend: Cached {
    /// # Safety
    /// As `attention::attend_f32`; `out` from `offset` on.
    unsafe fn attend(isa: Isa, span: &Span<Self>, out: Inputs, offset: usize);
}

impl Attend for f32 {
    unsafe fn attend(isa: Isa, span: &Span<f32>, out: Inputs, offset: usize) {
        match out {
            Inputs::F32(out) => attention::attend_f32(isa, span, Shared::new(out.at(offset))),
            Inputs::Bf16(_) => unreachable!("fp32 keys go with fp32 products"),
        }
    }
}

impl Attend for u16 {
    unsafe fn attend(isa: Isa, span: &Span<u16>, out: Inputs, offset: usize) {
        match out {
            Inputs::F32(out) => attention::attend_bf16(isa, span, Shared::new(out.at(offset))),
            #[cfg(target_arch = "x86_64")]
            Inputs::Bf16(out) => attention::attend_bf16_to_bf16(span, Shared::new(out.at(offset))),
            #[cfg(not(target_arch = "x86_64"))]
            Inputs::Bf16(_) => unreachable!("only AVX-512 multiplies bf16"),
        }
    }
}

crate::isa::versions! {
    fn embed(
        token: *const f32, before: *const f32, shift: f32, width: usize, out: *mut f32,
    ) = embed_body;
}

#[inline(always)]
unsafe fn embed_body(
    token: *const f32,
    before: *const f32,
    shift: f32,
    width: usize,
    out: *mut f32,
) {
    let out = std::slice::from_raw_parts_mut(out, width);
    rms_norm(std::slice::from_raw_parts(token, width), out);
    if !before.is_null() {
        let before = std::slice::from_raw_parts(before, width);
        let scale = crate::math::inverse_rms(before);
        let (first, second) = before.split_at(width / 2);
        for (o, &b) in out.iter_mut().zip(second.iter().chain(first)) {
            *o += shift * (b * scale);
        }
    }
}

crate::isa::versions! {
    /// Norm of token `from` of the residual stream, as row `to` of a product's inputs.
    fn norm_one(
        residual: Shared<f32>, out: Inputs, from: usize, to: usize, width: usize,
    ) = norm_one_body;
}

#[inline(always)]
unsafe fn norm_one_body(residual: Shared<f32>, out: Inputs, from: usize, to: usize, width: usize) {
    let x = std::slice::from_raw_parts(residual.at(from * width), width);
    match out {
        Inputs::F32(out) => {
            rms_norm(x, std::slice::from_raw_parts_mut(out.at(to * width), width));
        }
        Inputs::Bf16(out) => {
            rms_norm(x, std::slice::from_raw_parts_mut(out.at(to * width), width));
        }
    }
}

fn place<E: Number>(rows: &mut Vec<Option<Row<E>>>, row: Row<E>) -> usize {
    let free = rows.iter().position(Option::is_none).unwrap_or_else(|| {
        rows.push(None);
        rows.len() - 1
    });
    rows[free] = Some(row);
    free
}

fn existing<E: Number>(rows: &[Option<Row<E>>], row: usize) -> Result<&Row<E>, String> {
    rows.get(row).and_then(Option::as_ref).ok_or_else(|| format!("no row {row}"))
}

fn close_row<E: Number>(rows: &mut [Option<Row<E>>], row: usize) -> Result<(), String> {
    existing(rows, row)?;
    rows[row] = None;
    Ok(())
}

fn copy_row<E: Number>(
    rows: &mut [Option<Row<E>>],
    heads: Heads,
    source: usize,
    target: usize,
    length: usize,
) -> Result<(), String> {
    if existing(rows, source)?.capacity < length || existing(rows, target)?.capacity < length {
        return Err(format!("{length} tokens do not fit"));
    }
    if source == target {
        return Ok(());
    }
    let mut taken = rows[target].take().expect("exists");
    taken.copy_from(heads, rows[source].as_ref().expect("exists"), length);
    rows[target] = Some(taken);
    Ok(())
}
