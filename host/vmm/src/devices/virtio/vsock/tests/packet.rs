//! The wire format.

use proptest::prelude::*;

use crate::devices::virtio::vsock::packet::{HEADER_LEN, Header, Op};

#[test]
fn fields_lie_where_the_specification_puts_them_in_little_endian() {
    let mut bytes = [0; HEADER_LEN];
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = index as u8;
    }
    let header = Header::parse(&bytes);
    assert_eq!(header.src_cid, 0x0706_0504_0302_0100);
    assert_eq!(header.dst_cid, 0x0f0e_0d0c_0b0a_0908);
    assert_eq!(header.src_port, 0x1312_1110);
    assert_eq!(header.dst_port, 0x1716_1514);
    assert_eq!(header.len, 0x1b1a_1918);
    assert_eq!(header.kind, 0x1d1c);
    assert_eq!(header.op, 0x1f1e);
    assert_eq!(header.flags, 0x2322_2120);
    assert_eq!(header.buf_alloc, 0x2726_2524);
    assert_eq!(header.fwd_cnt, 0x2b2a_2928);
}

proptest! {
    #[test]
    fn every_header_is_written_back_as_it_was_read(bytes in prop::array::uniform32(any::<u8>()), tail in any::<[u8; 12]>()) {
        let mut all = [0; HEADER_LEN];
        all[..32].copy_from_slice(&bytes);
        all[32..].copy_from_slice(&tail);
        prop_assert_eq!(Header::parse(&all).to_bytes(), all);
    }

    #[test]
    fn an_operation_is_its_number_and_the_rest_are_none(number in any::<u16>()) {
        prop_assert_eq!(Op::from_wire(number).map(Op::to_wire), (1..=7).contains(&number).then_some(number));
    }
}
