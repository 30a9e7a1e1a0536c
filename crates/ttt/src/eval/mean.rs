//! Means of tokens that come in clusters (documents, sequences), with their 95 % intervals.

/// A mean over tokens whose losses depend on each other inside clusters and not across them.
///
/// It is the ratio r = ΣS / ΣN of the clusters' sums and counts. Its variance is that of a ratio of two sums over independent
/// clusters, `G/(G-1) Σ(S - rN)² / (ΣN)²` (linearised; Cochran, Sampling Techniques, 6.4), and the interval is r ± t times its
/// root, t being the 97.5 % point of Student's distribution with G - 1 degrees of freedom. Needs the memory of six numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ClusteredMean {
    clusters: u64,
    sum: f64,
    count: f64,
    squares: f64,
    products: f64,
    counts: f64,
}

impl ClusteredMean {
    /// Adds a cluster of `count` tokens whose values add up to `sum`; one without tokens is none.
    pub fn add(&mut self, sum: f64, count: f64) {
        if count > 0.0 {
            self.clusters += 1;
            self.sum += sum;
            self.count += count;
            self.squares += sum * sum;
            self.products += sum * count;
            self.counts += count * count;
        }
    }

    /// Adds all clusters of another mean.
    pub fn merge(&mut self, other: &ClusteredMean) {
        self.clusters += other.clusters;
        self.sum += other.sum;
        self.count += other.count;
        self.squares += other.squares;
        self.products += other.products;
        self.counts += other.counts;
    }

    /// Number of clusters, G.
    pub fn clusters(&self) -> u64 {
        self.clusters
    }

    /// Number of tokens.
    pub fn count(&self) -> f64 {
        self.count
    }

    /// The mean; NaN without tokens.
    pub fn mean(&self) -> f64 {
        self.sum / self.count
    }

    /// Half the width of the 95 % interval; `None` for fewer than two clusters.
    pub fn margin(&self) -> Option<f64> {
        if self.clusters < 2 {
            return None;
        }
        let (g, r) = (self.clusters as f64, self.mean());
        let residuals = (self.squares - 2.0 * r * self.products + r * r * self.counts).max(0.0);
        Some(student(self.clusters - 1) * (g / (g - 1.0) * residuals).sqrt() / self.count)
    }
}

/// The 97.5 % point of Student's distribution: a table, then Fisher's expansion around the normal distribution, both to 0.001.
fn student(degrees: u64) -> f64 {
    const TABLE: [f64; 9] = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262];
    if let Some(t) = TABLE.get(degrees as usize - 1) {
        return *t;
    }
    let (z, n) = (1.959964f64, degrees as f64);
    let [z3, z5, z7] = [3, 5, 7].map(|power| z.powi(power));
    let terms = [(z3 + z) / 4.0, (5.0 * z5 + 16.0 * z3 + 3.0 * z) / 96.0, (3.0 * z7 + 19.0 * z5 + 17.0 * z3 - 15.0 * z) / 384.0];
    z + terms[0] / n + terms[1] / (n * n) + terms[2] / (n * n * n)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn student_is_that_of_the_tables() {
        for (degrees, t) in [(1, 12.706), (9, 2.262), (10, 2.228), (15, 2.131), (30, 2.042), (120, 1.980), (1_000_000, 1.960)] {
            assert!((student(degrees) - t).abs() < 1.1e-3, "{degrees}: {}", student(degrees));
        }
    }

    #[test]
    fn equal_clusters_give_the_interval_of_their_means() {
        let values = [1.0, 2.0, 4.0, 3.5, 2.5];
        let mut all = ClusteredMean::default();
        all.add(9.0, 0.0);
        values.iter().for_each(|v| all.add(v * 10.0, 10.0));
        let mean = values.iter().sum::<f64>() / 5.0;
        let deviation = (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / 4.0).sqrt();
        assert!((all.mean() - mean).abs() < 1e-12 && all.clusters() == 5 && all.count() == 50.0);
        assert!((all.margin().unwrap() - 2.776 * deviation / 5f64.sqrt()).abs() < 1e-9);
        let mut one = ClusteredMean::default();
        one.add(1.0, 3.0);
        assert_eq!(one.margin(), None);
    }

    #[test]
    fn the_interval_covers_the_truth_as_often_as_it_says() {
        // Clusters of unequal size with a common shift inside each; the truth is 0.
        let mut state = 1u64;
        let mut unit = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 11) as f64 / (1u64 << 53) as f64 - 0.5
        };
        let covered = (0..2000).filter(|_| {
            let mut mean = ClusteredMean::default();
            for i in 0..12 {
                let (shift, n) = (unit(), 5 + i % 4 * 5);
                mean.add((0..n).map(|_| shift + unit()).sum(), n as f64);
            }
            mean.mean().abs() <= mean.margin().unwrap()
        });
        let covered = covered.count() as f64 / 2000.0;
        assert!((0.92..0.975).contains(&covered), "{covered}");
    }
}
