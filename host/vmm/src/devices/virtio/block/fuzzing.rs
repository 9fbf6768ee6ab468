//! Entry points of the fuzz targets.
#![allow(clippy::unwrap_used, reason = "a target that cannot be set up has to fail")]

use std::fs::File;

use virtio_queue::QueueT;

use super::{disk::DiskFile, job::Job, perform, request::Request};
use bulkhead_queue::fuzzing;

/// Executes the requests in arbitrary guest memory, which starts with `bytes` and is laid out as in [`fuzzing`]. The
/// disk is `file`, whose length must not change.
pub fn requests(file: &File, readonly: bool, bytes: &[u8]) {
    let before = file.metadata().unwrap().len();
    let disk = DiskFile::new(file.try_clone().unwrap(), readonly, "fuzz").unwrap();
    let (memory, mut queue) = (fuzzing::memory(bytes), fuzzing::queue());
    for round in 0..fuzzing::SIZE {
        let Some(chain) = queue.pop_descriptor_chain(&memory) else { break };
        let head = chain.head_index();
        let written = Request::parse(chain, &memory).map_or(0, |request| {
            let mut job = Job::new(head, request, &disk, &memory, round % 2 == 0);
            perform::run(&disk, &mut job, &memory);
            job.finish(&memory)
        });
        let _ = queue.add_used(&memory, head, written);
    }
    assert_eq!(file.metadata().unwrap().len(), before);
}
