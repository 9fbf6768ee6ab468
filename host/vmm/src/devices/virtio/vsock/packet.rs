//! The header of a vsock packet (virtio 1.3, 5.10.6).

/// Length in bytes of the header that starts each packet.
pub(super) const HEADER_LEN: usize = 44;

/// The host's context ID (5.10.4).
pub(super) const HOST_CID: u64 = 2;

/// `VIRTIO_VSOCK_TYPE_STREAM`, the only socket type that this device offers.
pub(super) const TYPE_STREAM: u16 = 1;

/// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`: the sender will receive no more data.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;

/// `VIRTIO_VSOCK_SHUTDOWN_F_SEND`: the sender will send no more data.
pub(super) const SHUTDOWN_SEND: u32 = 2;

pub(super) const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// The operation of a packet (5.10.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    /// Opens a stream.
    Request,
    /// Accepts a stream.
    Response,
    /// Refuses or aborts a stream, or confirms its end.
    Rst,
    /// Announces the end of one or both directions.
    Shutdown,
    /// Carries data.
    Rw,
    /// Informs about the sender's buffer space.
    CreditUpdate,
    /// Requests an [`Op::CreditUpdate`].
    CreditRequest,
}

impl Op {
    /// Returns the operation with this number, if there is one.
    pub(super) fn from_wire(op: u16) -> Option<Self> {
        Some(match op {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Rst,
            4 => Self::Shutdown,
            5 => Self::Rw,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }

    /// Returns the number of the operation.
    pub(super) fn to_wire(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Rst => 3,
            Self::Shutdown => 4,
            Self::Rw => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
        }
    }
}

/// `struct virtio_vsock_hdr`, in the host's byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    /// Length of the payload in bytes.
    pub(super) len: u32,
    /// Socket type. From the guest it may be any number.
    pub(super) kind: u16,
    /// Operation. From the guest it may be any number, see [`Op::from_wire`].
    pub(super) op: u16,
    /// Flags; their meaning depends on the operation.
    pub(super) flags: u32,
    /// Size of the sender's buffer for this stream in bytes (5.10.6.3).
    pub(super) buf_alloc: u32,
    /// Bytes that left the sender's buffer so far, modulo 2^32 (5.10.6.3).
    pub(super) fwd_cnt: u32,
}

impl Header {
    /// Parses a header. Any bytes are a header; its fields are checked where they are used.
    pub(super) fn parse(bytes: &[u8; HEADER_LEN]) -> Self {
        let mut cursor = Cursor { bytes, at: 0 };
        Self {
            src_cid: u64::from_le_bytes(cursor.take()),
            dst_cid: u64::from_le_bytes(cursor.take()),
            src_port: u32::from_le_bytes(cursor.take()),
            dst_port: u32::from_le_bytes(cursor.take()),
            len: u32::from_le_bytes(cursor.take()),
            kind: u16::from_le_bytes(cursor.take()),
            op: u16::from_le_bytes(cursor.take()),
            flags: u32::from_le_bytes(cursor.take()),
            buf_alloc: u32::from_le_bytes(cursor.take()),
            fwd_cnt: u32::from_le_bytes(cursor.take()),
        }
    }

    /// Returns the header as it is in guest memory, all fields little-endian.
    pub(super) fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let mut at = 0;
        let mut put = |field: &[u8]| {
            bytes[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        };
        put(&self.src_cid.to_le_bytes());
        put(&self.dst_cid.to_le_bytes());
        put(&self.src_port.to_le_bytes());
        put(&self.dst_port.to_le_bytes());
        put(&self.len.to_le_bytes());
        put(&self.kind.to_le_bytes());
        put(&self.op.to_le_bytes());
        put(&self.flags.to_le_bytes());
        put(&self.buf_alloc.to_le_bytes());
        put(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}

/// Reads the fields of a header one after the other; their lengths add up to [`HEADER_LEN`].
struct Cursor<'a> {
    bytes: &'a [u8; HEADER_LEN],
    at: usize,
}

impl Cursor<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut field = [0; N];
        field.copy_from_slice(&self.bytes[self.at..self.at + N]);
        self.at += N;
        field
    }
}
