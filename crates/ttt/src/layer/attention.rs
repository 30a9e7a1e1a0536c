//! Causal self-attention: projections, rotary positions over the whole sequence, softmax attention, output projection; as in
//! Hugging Face's Llama, whose weights it holds as they are, and the paper's Transformer baseline.

use crate::Result;
use crate::config::Config;
use crate::device::view::{View, ViewMut};
use crate::layer::state::{KEYS, VALUES};
use crate::layer::{Carried, Pass};
use crate::ops::attention::{self, Cache, Grads, Inputs};
use crate::ops::rope::{self, Direction};
use crate::ops::{add, linear};
use crate::params::{AttentionIds, Params};
use crate::tensor::Tensor;
use crate::weights::Weights;

/// An attention layer's parameters and sizes.
#[derive(Clone, Debug)]
pub struct AttentionLayer {
    ids: AttentionIds,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

/// What an attention layer's backward pass needs.
#[derive(Debug)]
pub struct AttentionSaved {
    /// The projections `[q|k|v]`, q and k rotated.
    projected: Tensor,
    /// Output of the attention `[n, D]`.
    o: Tensor,
    /// Logarithms of the sums of each row's weights, `[n, h]`.
    log_sum: Tensor,
    /// Keys and values of what the sequences had read before, when they had.
    past: Option<Cache>,
}

impl AttentionSaved {
    /// Bytes held for the backward pass.
    pub fn bytes(&self) -> usize {
        let past = self.past.iter().flat_map(|past| [&past.keys, &past.values]);
        [&self.projected, &self.o, &self.log_sum].into_iter().chain(past).map(Tensor::bytes).sum()
    }
}

impl AttentionLayer {
    /// The layer of a model whose parameters are `ids`.
    pub fn new(config: &Config, ids: &AttentionIds) -> AttentionLayer {
        let (heads, kv_heads) = (config.num_attention_heads, config.key_value_heads());
        AttentionLayer { ids: ids.clone(), heads, kv_heads, head_dim: config.head_dim() }
    }

    /// Keys and values of `slots` sequences that have read nothing.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn cache(&self, weights: &Weights, slots: usize) -> Result<Cache> {
        Cache::empty(weights.device(), weights.dtype(), slots, self.kv_heads * self.head_dim)
    }

    /// `x [n, D]` (normed) to `[n, D]`. Without a cache every sequence starts at its beginning; with one there must be room for
    /// the rows of the batch, which are put into it.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn forward(&self, pass: &Pass<'_>, x: View<'_>, mut cache: Option<&mut Cache>) -> Result<(Tensor, Option<AttentionSaved>)> {
        let mut projected = linear::forward(x, pass.weights.matrices(self.ids.q_proj, self.ids.v_proj))?;
        let turning = self.heads + self.kv_heads;
        let q_and_k = projected.view_mut().col_range(0..turning * self.head_dim);
        rope::rotate(q_and_k, pass.rope(), pass.segments, turning, Direction::Forward);
        let [_, k, v] = self.blocks(&projected);
        if let Some(cache) = cache.as_deref_mut() {
            cache.append(k, v, pass.segments);
        }
        let [o, log_sum] = attention::forward(&self.inputs(pass, &projected, cache.as_deref()))?;
        let out = linear::forward(o.view(), pass.weights.matrix(self.ids.o_proj))?;
        let kept = pass.keep.activations();
        let past = cache.filter(|_| pass.segments.iter().any(|s| s.phase > 0)).cloned();
        Ok((out, kept.then_some(AttentionSaved { projected, o, log_sum, past })))
    }

    /// [`AttentionLayer::forward`] of which only some rows are wanted: keys and values are those of all tokens, but queries and
    /// outputs are computed for `rows` alone. Keeps nothing.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn forward_rows(&self, pass: &Pass<'_>, x: View<'_>, rows: &[usize], cache: &mut Cache) -> Result<Tensor> {
        let (w, rope) = (pass.weights, pass.rope());
        let mut kv = linear::forward(x, w.matrices(self.ids.k_proj, self.ids.v_proj))?;
        let width = self.kv_heads * self.head_dim;
        rope::rotate(kv.view_mut().col_range(0..width), rope, pass.segments, self.kv_heads, Direction::Forward);
        cache.append(kv.view().col_range(0..width), kv.view().col_range(width..2 * width), pass.segments);

        // Each wanted row is a sequence of one token, which has read what came before it.
        let segments: Vec<_> = rows.iter().enumerate().map(|(i, row)| pass.alone(*row, i)).collect();
        let mut q = linear::forward(add::gather(x, rows)?.view(), w.matrix(self.ids.q_proj))?;
        rope::rotate(q.view_mut(), &rope.gather(rows)?, &segments, self.heads, Direction::Forward);
        let kv = add::gather(kv.view(), rows)?;
        let (k, v) = (kv.view().col_range(0..width), kv.view().col_range(width..2 * width));
        let inputs = Inputs { q: q.view(), k, v, head_dim: self.head_dim, past: Some(cache), segments: &segments };
        let [o, _] = attention::forward(&inputs)?;
        linear::forward(o.view(), w.matrix(self.ids.o_proj))
    }

    /// Gradient of `x` from the gradient of the output. `dstate`, of one slot a sequence, holds the gradient of the keys and values
    /// that the sequences ended with and becomes that of those they began with; without it nothing follows them, and what they
    /// began with is a constant.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn backward(
        &self,
        pass: &Pass<'_>,
        x: View<'_>,
        saved: AttentionSaved,
        dout: View<'_>,
        dstate: Option<&mut Carried>,
        grads: &mut Params,
    ) -> Result<Tensor> {
        let (w, ids) = (pass.weights, &self.ids);
        let AttentionSaved { projected, o, log_sum, past } = saved;
        if grads.holds(ids.o_proj) {
            linear::backward_weight(dout, o.view(), grads.view_mut(ids.o_proj));
        }
        let d_o = linear::backward_input(dout, w.operand(ids.o_proj, ids.o_proj))?;
        let mut dprojected = Tensor::empty(projected.device(), projected.shape(), projected.dtype())?;
        let dpast = dstate.map(|carried| carried.some_mut([KEYS, VALUES]).map(|x| x.expect("keys and values are carried")));
        let [dq, dk, dv] = self.blocks_mut(dprojected.view_mut());
        let inputs = self.inputs(pass, &projected, past.as_ref());
        attention::backward(&inputs, [&o, &log_sum], d_o.view(), dpast, Grads { dq, dk, dv })?;
        drop((projected, o, log_sum, past, d_o));
        let turning = self.heads + self.kv_heads;
        let q_and_k = dprojected.view_mut().col_range(0..turning * self.head_dim);
        rope::rotate(q_and_k, pass.rope(), pass.segments, turning, Direction::Backward);
        if grads.holds(ids.q_proj) {
            linear::backward_weight(dprojected.view(), x, grads.fused_mut(ids.q_proj, ids.v_proj));
        }
        linear::backward_input(dprojected.view(), w.operand(ids.q_proj, ids.v_proj))
    }

    fn inputs<'a>(&self, pass: &Pass<'a>, projected: &'a Tensor, past: Option<&'a Cache>) -> Inputs<'a> {
        let [q, k, v] = self.blocks(projected);
        Inputs { q, k, v, head_dim: self.head_dim, past, segments: pass.segments }
    }

    /// q, k and v in the projections.
    fn blocks<'a>(&self, projected: &'a Tensor) -> [View<'a>; 3] {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        [0..q, q..q + kv, q + kv..q + 2 * kv].map(|cols| projected.view().col_range(cols))
    }

    fn blocks_mut<'a>(&self, projected: ViewMut<'a>) -> [ViewMut<'a>; 3] {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let (dq, rest) = projected.split_cols(q);
        let (dk, dv) = rest.split_cols(kv);
        [dq, dk, dv]
    }
}
