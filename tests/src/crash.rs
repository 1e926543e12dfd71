//! A whole node on a faulty disk: log, index, block store and volume, cut off at any moment, opened again and judged by the reference.
//!
//! Invariants:
//! - A run happens once and is recorded; every moment of it is judged, after a kill and after power cuts.
//! - What is found is named by its LSN: the log says at which step of the program the node has come back, and there it must equal the
//!   reference, no earlier than what was acknowledged and no later than what had begun.

mod index_copy;
mod node;
mod run;
mod seen;
mod shortage;

pub use index_copy::IndexCopy;
pub use node::{CrashNode, NodeRules};
pub use run::{CrashRun, Damaged, Ending, Verdicts};
pub use shortage::{Shortage, ShortageRun};
