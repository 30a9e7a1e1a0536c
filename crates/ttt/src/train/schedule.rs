//! How the outer and the inner learning rate move over a run (paper Appendix C; the official code's optax schedule).

use std::f64::consts::PI;

/// Linear warm-up from 0 to `peak`, then a cosine down to `end`.
///
/// With `w` = warm-up steps and `T` = all steps, warm-up included, update `t` (counted from 0) uses `peak t / w` while `t < w`, then
/// `end + (peak - end) (1 + cos(pi (t - w) / (T - w))) / 2`. So the very first update changes nothing unless `w` is 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LearningRate {
    /// Largest value, reached at update `warmup`.
    pub peak: f64,
    /// Value from update `total` on.
    pub end: f64,
    /// Updates of the linear part, w.
    pub warmup: u64,
    /// All updates, T.
    pub total: u64,
}

impl LearningRate {
    /// The learning rate of the update that comes after `t` others.
    pub fn at(&self, t: u64) -> f64 {
        if t < self.warmup {
            return self.peak * t as f64 / self.warmup as f64;
        }
        if t >= self.total {
            return self.end;
        }
        let progress = (t - self.warmup) as f64 / (self.total - self.warmup) as f64;
        self.end + (self.peak - self.end) * 0.5 * (1.0 + (PI * progress).cos())
    }
}

/// Linear warm-up of the inner base learning rate, which TTT-MLP needs (`init` 0.01, `base` 0.1).
///
/// The official code holds the multiplier in bf16, so that it moves in steps (0.285625 becomes 0.28515625) and is 1 one update early;
/// here it is exact.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct InnerLearningRate {
    /// Base inner learning rate at the first update.
    pub init: f64,
    /// Base inner learning rate of the model, `ttt_base_lr`.
    pub base: f64,
    /// Updates from one to the other; 0 for no warm-up.
    pub warmup: u64,
}

impl InnerLearningRate {
    /// What the model's inner learning rates are multiplied by in the update that comes after `t` others:
    /// `(init + min(1, t / warmup) (base - init)) / base`. Evaluation uses 1.
    pub fn multiplier(&self, t: u64) -> f64 {
        if t >= self.warmup {
            return 1.0;
        }
        (self.init + t as f64 / self.warmup as f64 * (self.base - self.init)) / self.base
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: f64, b: f64, relative: f64) {
        assert!((a - b).abs() <= relative * b.abs(), "{a} is not {b}");
    }

    #[test]
    fn learning_rate_of_the_125m_recipe() {
        let lr = LearningRate { peak: 3e-3, end: 1e-5, warmup: 480, total: 4800 };
        assert_eq!(lr.at(0), 0.0);
        close(lr.at(1), 6.25e-6, 1e-12);
        close(lr.at(240), 1.5e-3, 1e-12);
        close(lr.at(479), 3e-3 * 479.0 / 480.0, 1e-12);
        assert_eq!(lr.at(480), 3e-3);
        // Halfway through the cosine: the mean of both ends. A quarter: (2 + sqrt 2) / 4 of the way up.
        close(lr.at(480 + 2160), (3e-3 + 1e-5) / 2.0, 1e-12);
        close(lr.at(480 + 1080), 1e-5 + 2.99e-3 * (2.0 + 2f64.sqrt()) / 4.0, 1e-12);
        // The published value of the last update.
        close(lr.at(4799), 1.00004e-5, 1e-6);
        assert!(lr.at(4799) > 1e-5);
        assert_eq!(lr.at(4800), 1e-5);
        assert_eq!(lr.at(1_000_000), 1e-5);
    }

    #[test]
    fn learning_rate_at_the_edges() {
        let none = LearningRate { peak: 1.0, end: 0.5, warmup: 0, total: 4 };
        assert_eq!(none.at(0), 1.0);
        close(none.at(2), 0.75, 1e-12);
        let all = LearningRate { peak: 1.0, end: 0.5, warmup: 4, total: 4 };
        assert_eq!((all.at(3), all.at(4)), (0.75, 0.5));
        let long = LearningRate { peak: 1.0, end: 0.5, warmup: 8, total: 4 };
        assert_eq!(long.at(6), 0.75);
    }

    #[test]
    fn inner_multiplier_and_its_official_rounding() {
        let inner = InnerLearningRate { init: 0.01, base: 0.1, warmup: 480 };
        let bf16 = |t| half::bf16::from_f64(inner.multiplier(t)).to_f64();
        close(inner.multiplier(0), 0.1, 1e-12);
        close(inner.multiplier(99), 0.285625, 1e-12);
        close(inner.multiplier(240), 0.55, 1e-12);
        assert!(inner.multiplier(479) < 1.0);
        assert_eq!(inner.multiplier(480), 1.0);
        assert_eq!(inner.multiplier(10_000), 1.0);
        // What the official code was seen to use.
        assert_eq!(bf16(0), 0.10009765625);
        assert_eq!(bf16(99), 0.28515625);
        assert_eq!(bf16(479), 1.0);
        assert!(bf16(478) < 1.0);
        assert_eq!(InnerLearningRate { init: 0.01, base: 1.0, warmup: 0 }.multiplier(0), 1.0);
    }
}
