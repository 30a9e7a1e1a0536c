//! Cases of attention, with and without a past, with heads that share keys and values; of the rotary positions before it.

use ttt::batch::Segment;
use ttt::ops::attention::{self, Cache, Grads, Inputs};
use ttt::ops::rope::{self, Direction, Table};
use ttt::tensor::Tensor;

use crate::case::{Case, tensor_of};

/// Sizes of one case.
#[derive(Clone)]
struct Sizes {
    /// Heads of queries, and of keys and values.
    heads: [usize; 2],
    /// Channels of a head.
    d: usize,
    /// Of each segment the tokens and the tokens before it.
    segments: Vec<[usize; 2]>,
}

impl Sizes {
    fn rows(&self) -> usize {
        self.segments.iter().map(|[len, _]| len).sum()
    }

    /// Rows of a slot, more than there ever are tokens.
    fn capacity(&self) -> usize {
        self.segments.iter().map(|[len, phase]| len + phase).max().unwrap() + 1
    }

    /// Packed, in slots of another order.
    fn segments(&self) -> Vec<Segment> {
        let mut first_row = 0;
        let slots = self.segments.len();
        let segment = |(i, [len, phase]): (usize, &[usize; 2])| {
            first_row += len;
            Segment { first_row: first_row - len, len: *len, slot: slots - 1 - i, phase: *phase }
        };
        self.segments.iter().enumerate().map(segment).collect()
    }

    fn cache(&self, keys: Tensor, values: Tensor) -> Cache {
        let [keys, values] = [keys, values].map(|x| x.reshape(&[self.segments.len(), self.capacity(), self.heads[1] * self.d]));
        Cache { keys, values }
    }
}

/// Outputs: o, and keys and values of every slot afterwards.
pub fn attention_case(heads: [usize; 2], d: usize, segments: &[[usize; 2]]) -> Case {
    let sizes = Sizes { heads, d, segments: segments.to_vec() };
    let (n, q, kv) = (sizes.rows(), heads[0] * d, heads[1] * d);
    let past = &[segments.len() * sizes.capacity(), kv];
    let again = sizes.clone();
    Case::new("attention", &[("q", &[n, q]), ("k", &[n, kv]), ("v", &[n, kv]), ("keys", past), ("values", past)])
        .forward(move |x| {
            let segments = sizes.segments();
            let mut cache = sizes.cache(tensor_of(x[3]), tensor_of(x[4]));
            // As in a model: what is appended is not read from the cache.
            cache.append(x[1], x[2], &segments).unwrap();
            let inputs = Inputs { q: x[0], k: x[1], v: x[2], head_dim: d, past: Some(&cache), segments: &segments };
            let [o, _] = attention::forward(&inputs).unwrap();
            vec![o, cache.keys, cache.values]
        })
        .backward(move |x, dy| {
            let segments = again.segments();
            let cache = again.cache(tensor_of(x[3]), tensor_of(x[4]));
            let inputs = Inputs { q: x[0], k: x[1], v: x[2], head_dim: d, past: Some(&cache), segments: &segments };
            let [o, log_sum] = attention::forward(&inputs).unwrap();
            let empty = |x: ttt::device::view::View| Tensor::empty(x.device(), &x.shape(), x.dtype()).unwrap();
            let [mut dq, mut dk, mut dv] = [empty(x[0]), empty(x[1]), empty(x[2])];
            let [mut dkeys, mut dvalues] = [dy[1].copy().unwrap(), dy[2].copy().unwrap()];
            let grads = Grads { dq: dq.view_mut(), dk: dk.view_mut(), dv: dv.view_mut() };
            let dpast = Some([&mut dkeys, &mut dvalues]);
            attention::backward(&inputs, [&o, &log_sum], dy[0].view(), dpast, grads).unwrap();
            vec![dq, dk, dv, dkeys, dvalues]
        })
}

/// Sequences that all begin here.
pub fn fresh_case(heads: [usize; 2], d: usize, lengths: &[usize]) -> Case {
    let sizes = Sizes { heads, d, segments: lengths.iter().map(|len| [*len, 0]).collect() };
    let (n, q, kv) = (sizes.rows(), heads[0] * d, heads[1] * d);
    let (segments, again) = (sizes.segments(), sizes.segments());
    Case::new("attention without past", &[("q", &[n, q]), ("k", &[n, kv]), ("v", &[n, kv])])
        .forward(move |x| {
            let inputs = Inputs { q: x[0], k: x[1], v: x[2], head_dim: d, past: None, segments: &segments };
            let [o, _] = attention::forward(&inputs).unwrap();
            vec![o]
        })
        .backward(move |x, dy| {
            let inputs = Inputs { q: x[0], k: x[1], v: x[2], head_dim: d, past: None, segments: &again };
            let [o, log_sum] = attention::forward(&inputs).unwrap();
            let [mut dq, mut dk, mut dv] = [x[0], x[1], x[2]].map(|x| Tensor::empty(x.device(), &x.shape(), x.dtype()).unwrap());
            let grads = Grads { dq: dq.view_mut(), dk: dk.view_mut(), dv: dv.view_mut() };
            attention::backward(&inputs, [&o, &log_sum], dy[0].view(), None, grads).unwrap();
            vec![dq, dk, dv]
        })
}

/// Few rows and many, spans of a long past, blocks that are cut short, any head size.
pub fn odd_cases() -> Vec<Case> {
    vec![
        attention_case([6, 2], 64, &[[0, 5], [1, 301], [3, 0], [150, 0], [70, 131], [0, 0], [17, 129], [16, 3]]),
        attention_case([3, 3], 10, &[[65, 1], [1, 0], [1, 40], [2, 700]]),
        attention_case([2, 1], 96, &[[129, 64]]),
        attention_case([1, 1], 2, &[[1, 9000]]),
        fresh_case([5, 1], 7, &[33, 1, 0, 200]),
        fresh_case([4, 4], 48, &[64, 128]),
    ]
}

/// The halves of each head turn; other positions than those of any other row.
pub fn halves_case(heads: usize, head_dim: usize) -> Case {
    let segments = Sizes { heads: [heads, heads], d: head_dim, segments: vec![[3, 7], [0, 1], [61, 0], [1, 40_000]] }.segments();
    let rows = segments.iter().map(|s| s.len).sum();
    let rotate = move |x: &mut Tensor, direction| {
        let table = Table::of_batch(x.device(), x.dtype(), &segments, head_dim, 10_000.0).unwrap();
        rope::rotate(x.view_mut(), &table, &segments, heads, direction);
    };
    let back = rotate.clone();
    Case::new("rope of halves", &[("x", &[rows, heads * head_dim])])
        .forward(move |v| {
            let mut y = tensor_of(v[0]);
            rotate(&mut y, Direction::Forward);
            vec![y]
        })
        .backward(move |_, dy| {
            let mut dx = dy[0].copy().unwrap();
            back(&mut dx, Direction::Backward);
            vec![dx]
        })
}
