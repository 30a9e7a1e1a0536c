//! What a training step found: its loss, the norm of its gradient, and whether the update may be made. On a GPU all of it stays
//! there until the host asks, so that nothing inside a step waits: the update reads the scale of the gradient, and skips itself
//! where a number was not finite; so do all that follow, until the host has looked.

pub(crate) mod cuda;

/// Of one step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Found {
    /// Sum of the weighted negative log likelihoods.
    pub loss: f64,
    /// Sum of the negative log likelihoods of rows that count.
    pub nll: f64,
    /// Global norm of the gradient.
    pub norm: f64,
}

impl Found {
    /// Whether the update may be made.
    pub fn is_finite(&self) -> bool {
        self.loss.is_finite() && self.norm.is_finite()
    }

    /// Scale of a gradient whose norm is to be at most `clip`.
    pub fn scale(&self, clip: f64) -> f64 {
        if self.norm > clip { clip / self.norm } else { 1.0 }
    }
}
