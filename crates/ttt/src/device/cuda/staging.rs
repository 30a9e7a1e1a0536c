//! Pinned memory that small uploads go through: from other memory the driver may wait for the GPU before it copies.

use std::sync::Arc;

use super::context::{Context, Mark, Pinned};
use crate::Result;

/// Bytes of a block.
const BLOCK: usize = 2 << 20;
/// Blocks: so many times [`BLOCK`] bytes may be under way.
const BLOCKS: usize = 4;

/// A ring of blocks of pinned memory.
pub(crate) struct Staging {
    blocks: [(Pinned, Mark); BLOCKS],
    current: usize,
    /// Bytes of the current block that are taken.
    taken: usize,
    context: Arc<Context>,
}

impl Staging {
    /// Nothing under way.
    ///
    /// # Errors
    /// When the system has not so much memory.
    pub(crate) fn new(context: &Arc<Context>) -> Result<Staging> {
        let block = || Ok((Pinned::new(context, BLOCK)?, Mark::new(context)?));
        Ok(Staging { blocks: [block()?, block()?, block()?, block()?], current: 0, taken: 0, context: context.clone() })
    }

    /// Queues a copy to the GPU; the host's memory may be used again at once. Waits only when more is under way than all blocks
    /// hold. What is larger than a block goes without.
    ///
    /// # Panics
    /// When the driver refuses.
    pub(crate) fn upload<T: bytemuck::Pod>(&mut self, pointer: u64, from: &[T]) {
        let bytes: &[u8] = bytemuck::cast_slice(from);
        if bytes.len() > BLOCK {
            return self.context.upload(pointer, from);
        }
        if self.taken + bytes.len() > BLOCK {
            self.blocks[self.current].1.set();
            self.current = (self.current + 1) % BLOCKS;
            self.taken = 0;
            // Its copies of the last time round.
            self.blocks[self.current].1.wait();
        }
        self.blocks[self.current].0.upload(self.taken, bytes, pointer);
        self.taken = (self.taken + bytes.len()).next_multiple_of(16);
    }
}
