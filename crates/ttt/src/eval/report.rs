//! What an evaluation found, by position: constant memory in the number and the length of documents.

use serde::{Deserialize, Serialize};

use super::judge::Judged;
use super::{ClusteredMean, Evaluation};

/// Equal parts of a bucket that count as one cluster each where documents are too few.
const PARTS: usize = 16;
/// Documents that an interval over documents needs, and clusters that any interval needs.
const ENOUGH: u64 = 8;
const FEWEST: u64 = 4;

/// What the clusters of an interval are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Clusters {
    /// Whole documents: the interval is about other documents of the same kind.
    Documents,
    /// Sixteenths of a bucket in a document: the interval is about the text that was read, of which there are fewer than 8 documents.
    Parts,
}

/// Mean loss of tokens.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossRow {
    /// Smallest position of the bucket. A token's position is the number of tokens that the state had read when it predicted it.
    pub from: u64,
    /// One past its largest position.
    pub to: u64,
    /// Tokens judged.
    pub tokens: u64,
    /// Mean negative log likelihood, in nats.
    pub loss: f64,
    /// Half the width of its 95 % interval; none of fewer than four clusters, of which it would say nothing.
    pub margin: Option<f64>,
    /// What the interval is from.
    pub clusters: Clusters,
}

/// Mean squared errors of a layer's inner models, as in the paper's Figure 4.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct InnerRow {
    /// Smallest position of the bucket, here of the last token of a mini-batch.
    pub from: u64,
    /// One past its largest.
    pub to: u64,
    /// Mini-batches measured.
    pub mini_batches: u64,
    /// Under the initial weights W0.
    pub initial: f64,
    /// Under the weights before the mini-batch's update.
    pub before: f64,
    /// Under the weights after it.
    pub after: f64,
}

/// Sums over documents, by position.
#[derive(Clone, Debug)]
pub struct Report {
    mini_batch: u64,
    /// First positions of the buckets, ascending from 1.
    edges: Vec<u64>,
    total: Evaluation,
    documents: Vec<ClusteredMean>,
    parts: Vec<ClusteredMean>,
    whole_documents: ClusteredMean,
    /// Sums and counts of the current document, a bucket each.
    current: Vec<[(f64, f64); PARTS]>,
    /// For each layer and bucket, sums of the three errors, and mini-batches.
    inner: Vec<Vec<([f64; 3], u64)>>,
}

impl Report {
    /// An empty report of a model with mini-batches of `mini_batch` tokens, with `per_octave` buckets from each power of two to the
    /// next (fewer where there are not as many positions).
    ///
    /// # Panics
    /// When one of them is 0.
    pub fn new(mini_batch: usize, per_octave: usize) -> Report {
        assert!(mini_batch > 0 && per_octave > 0, "mini-batches of {mini_batch}, {per_octave} buckets an octave");
        let edge = |i: usize| 2f64.powf(i as f64 / per_octave as f64).ceil() as u64;
        let mut edges: Vec<u64> = (0..=48 * per_octave).map(edge).collect();
        edges.dedup();
        Report {
            mini_batch: mini_batch as u64,
            edges,
            total: Evaluation::default(),
            documents: Vec::new(),
            parts: Vec::new(),
            whole_documents: ClusteredMean::default(),
            current: Vec::new(),
            inner: Vec::new(),
        }
    }

    /// Adds what a judge found out about tokens of the current document.
    pub fn add(&mut self, judged: &Judged<'_>) {
        for (i, nll) in judged.nll.iter().enumerate() {
            let position = judged.position + i as u64;
            let bucket = self.bucket(position);
            if self.current.len() <= bucket {
                self.current.resize(bucket + 1, [(0.0, 0.0); PARTS]);
            }
            let (from, to) = (self.edges[bucket], self.edges[bucket + 1]);
            let part = ((position - from) as u128 * PARTS as u128 / (to - from) as u128) as usize;
            let (sum, count) = &mut self.current[bucket][part];
            (*sum, *count) = (*sum + nll, *count + 1.0);
        }
        self.inner.resize(self.inner.len().max(judged.inner.len()), Vec::new());
        for (layer, errors) in judged.inner.iter().enumerate() {
            for (m, errors) in errors.iter().enumerate() {
                let bucket = self.bucket((judged.inner_position + (m as u64 + 1) * self.mini_batch - 1).max(1));
                let rows = &mut self.inner[layer];
                rows.resize(rows.len().max(bucket + 1), ([0.0; 3], 0));
                let (sums, count) = &mut rows[bucket];
                sums.iter_mut().zip(errors).for_each(|(sum, error)| *sum += error);
                *count += 1;
            }
        }
    }

    /// Ends a document, whose judged tokens stand for `bytes` bytes of text; returns its own sums.
    pub fn end_document(&mut self, bytes: f64) -> Evaluation {
        let mut own = Evaluation { bytes, ..Evaluation::default() };
        self.documents.resize(self.documents.len().max(self.current.len()), ClusteredMean::default());
        self.parts.resize(self.documents.len(), ClusteredMean::default());
        for (bucket, parts) in std::mem::take(&mut self.current).into_iter().enumerate() {
            let [sum, count] = [parts.iter().map(|p| p.0).sum::<f64>(), parts.iter().map(|p| p.1).sum()];
            self.documents[bucket].add(sum, count);
            parts.iter().for_each(|(sum, count)| self.parts[bucket].add(*sum, *count));
            own.nll += sum;
            own.tokens += count as u64;
        }
        self.whole_documents.add(own.nll, own.tokens as f64);
        self.total.add(&own);
        own
    }

    /// Sums over all that was judged, the open document included, without its bytes.
    pub fn so_far(&self) -> Evaluation {
        let mut sums = self.total;
        for (sum, count) in self.current.iter().flatten() {
            sums.nll += sum;
            sums.tokens += *count as u64;
        }
        sums
    }

    /// Sums over all documents.
    pub fn total(&self) -> &Evaluation {
        &self.total
    }

    /// The mean over all tokens, with its interval; of one cluster where documents are too few and one bucket holds everything.
    pub fn overall(&self) -> LossRow {
        let to = self.edges[self.documents.len()];
        let mut parts = ClusteredMean::default();
        self.parts.iter().for_each(|bucket| parts.merge(bucket));
        self.row(1, to, &self.whole_documents, &parts)
    }

    /// The loss by position: the buckets that hold tokens.
    pub fn loss_by_position(&self) -> Vec<LossRow> {
        let rows = self.documents.iter().zip(&self.parts).zip(self.edges.windows(2));
        rows.filter(|((d, _), _)| d.count() > 0.0).map(|((d, p), edges)| self.row(edges[0], edges[1], d, p)).collect()
    }

    /// The inner models' errors by position, of each layer; no layers where nothing was measured.
    pub fn inner_by_position(&self) -> Vec<Vec<InnerRow>> {
        let layer = |rows: &Vec<([f64; 3], u64)>| {
            let rows = rows.iter().zip(self.edges.windows(2)).filter(|((_, n), _)| *n > 0);
            rows.map(|((sums, n), edges)| inner_row(edges[0], edges[1], sums, *n)).collect()
        };
        self.inner.iter().map(layer).collect()
    }

    /// Their means over all mini-batches, of each layer.
    pub fn inner(&self) -> Vec<InnerRow> {
        let layer = |rows: &Vec<([f64; 3], u64)>| {
            let (mut sums, mut n) = ([0.0; 3], 0);
            for (own, count) in rows {
                sums.iter_mut().zip(own).for_each(|(sum, own)| *sum += own);
                n += count;
            }
            inner_row(1, self.edges[rows.len()], &sums, n)
        };
        self.inner.iter().filter(|rows| !rows.is_empty()).map(layer).collect()
    }

    fn bucket(&self, position: u64) -> usize {
        self.edges.partition_point(|edge| *edge <= position) - 1
    }

    fn row(&self, from: u64, to: u64, documents: &ClusteredMean, parts: &ClusteredMean) -> LossRow {
        let enough = documents.clusters() >= ENOUGH;
        let (mean, clusters) = if enough { (documents, Clusters::Documents) } else { (parts, Clusters::Parts) };
        LossRow {
            from,
            to,
            tokens: documents.count() as u64,
            loss: documents.mean(),
            margin: mean.margin().filter(|_| mean.clusters() >= FEWEST),
            clusters,
        }
    }
}

fn inner_row(from: u64, to: u64, sums: &[f64; 3], mini_batches: u64) -> InnerRow {
    let [initial, before, after] = sums.map(|sum| sum / mini_batches as f64);
    InnerRow { from, to, mini_batches, initial, before, after }
}
