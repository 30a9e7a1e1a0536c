//! The table of a model's parameters: names, shapes, places in the flat buffers, initial values. Which ones a model has is in
//! [`super::model`].

use std::collections::HashMap;
use std::ops::Range;

use super::init::Init;

/// Index of a parameter in its [`ParamTable`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ParamId(pub usize);

/// One parameter.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Official Hugging Face name.
    pub name: String,
    /// Official shape.
    pub shape: Vec<usize>,
    /// First element in the flat buffer.
    pub offset: usize,
    /// Initial values.
    pub init: Init,
    /// Whether it is part of the initial fast weights, W0.
    pub initial_state: bool,
    /// Whether weight decay pulls it to zero.
    pub decays: bool,
}

impl Entry {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Its elements in the flat buffer.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.elements()
    }

    /// Whether it is one of the large matrices, which a model for reading only may store narrow: a projection, the embedding or
    /// the output matrix.
    pub fn is_matrix(&self) -> bool {
        self.shape.len() == 2 && self.name.ends_with(".weight")
    }

    /// `[rows, cols]`: all axes but the last are rows.
    pub fn matrix_shape(&self) -> [usize; 2] {
        let cols = self.shape.last().copied().unwrap_or(1);
        [self.shape.iter().rev().skip(1).product(), cols]
    }
}

/// Elements that entries are aligned to: 256 bytes of f32.
const ALIGN: usize = 64;

/// Every parameter of a model, in the order of its flat buffers.
#[derive(Debug)]
pub struct ParamTable {
    entries: Vec<Entry>,
    by_name: HashMap<String, ParamId>,
    len: usize,
}

impl ParamTable {
    /// The initial fast weights alone, in this table's order.
    pub fn initial_state(&self) -> ParamTable {
        let mut t = ParamTable::empty();
        for entry in self.entries.iter().filter(|e| e.initial_state) {
            let id = t.add(&entry.name, &entry.shape, entry.init);
            t.mark_initial_state(id);
        }
        t.finished()
    }

    /// For gradients when the initial fast weights alone are learned: the same ids, but matrices that stay as they are have no
    /// rows, so that their gradients take neither memory nor work.
    pub fn gradients_of_initial_state(&self) -> ParamTable {
        let mut t = ParamTable::empty();
        for entry in &self.entries {
            // Norms and biases are small, start constant, and their gradients come with others'.
            let matrix = entry.shape.len() == 2 && matches!(entry.init, Init::Normal(_));
            let unwanted = matrix && !entry.initial_state;
            let shape = if unwanted { vec![0, entry.shape[1]] } else { entry.shape.clone() };
            // Matrices that are one in the model stay one.
            let id = if unwanted { t.join(&entry.name, &shape, entry.init) } else { t.add(&entry.name, &shape, entry.init) };
            t.entries[id.0].initial_state = entry.initial_state;
        }
        t.finished()
    }

    pub(super) fn empty() -> ParamTable {
        ParamTable { entries: Vec::new(), by_name: HashMap::new(), len: 0 }
    }

    /// Adds a parameter.
    pub(super) fn add(&mut self, name: &str, shape: &[usize], init: Init) -> ParamId {
        self.len = self.len.next_multiple_of(ALIGN);
        self.join(name, shape, init)
    }

    /// Adds a parameter directly behind the previous one.
    pub(super) fn join(&mut self, name: &str, shape: &[usize], init: Init) -> ParamId {
        let id = ParamId(self.entries.len());
        let entry =
            Entry { name: name.to_owned(), shape: shape.to_vec(), offset: self.len, init, initial_state: false, decays: true };
        self.len += entry.elements();
        self.by_name.insert(name.to_owned(), id);
        self.entries.push(entry);
        id
    }

    /// Says that a parameter is part of the initial fast weights.
    pub(super) fn mark_initial_state(&mut self, id: ParamId) {
        self.entries[id.0].initial_state = true;
    }

    /// Says that weight decay leaves a parameter alone.
    pub(super) fn mark_without_decay(&mut self, id: ParamId) {
        self.entries[id.0].decays = false;
    }

    /// The flat buffers cut where weight decay begins or ends, and whether it acts on each piece: from end to end, gaps included.
    pub fn decay_pieces(&self) -> Vec<(Range<usize>, bool)> {
        let mut pieces: Vec<(Range<usize>, bool)> = Vec::new();
        let ends = self.entries.iter().skip(1).map(|next| next.offset).chain([self.len]);
        for (entry, end) in self.entries.iter().zip(ends) {
            match pieces.last_mut() {
                Some((range, decays)) if *decays == entry.decays => range.end = end,
                _ => pieces.push((entry.offset..end, entry.decays)),
            }
        }
        pieces
    }

    /// The table, once all parameters are in it.
    pub(super) fn finished(mut self) -> ParamTable {
        self.len = self.len.next_multiple_of(ALIGN);
        self
    }

    /// All parameters, in order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// One parameter.
    pub fn entry(&self, id: ParamId) -> &Entry {
        &self.entries[id.0]
    }

    /// The parameter with this official name.
    pub fn find(&self, name: &str) -> Option<ParamId> {
        self.by_name.get(name).copied()
    }

    /// Elements of a flat buffer, gaps included.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Number of parameters, gaps not counted.
    pub fn parameters(&self) -> usize {
        self.entries.iter().map(Entry::elements).sum()
    }
}
