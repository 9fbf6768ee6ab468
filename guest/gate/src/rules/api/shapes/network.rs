//! Networks, and a container's end of one.

use super::{BOOL, FREE, FREE_LIST, FREE_MAP, INTEGER, NAME, NAME_LIST};
use crate::rules::api::{kind::Text, shape::Shape};

/// `POST /networks/create`.
pub(in crate::rules::api) static CREATE: Shape = Shape::Object(&[&[
    ("Name", FREE),
    ("CheckDuplicate", BOOL),
    ("Driver", Shape::Text(Text::NetworkDriver)),
    ("Scope", FREE),
    ("EnableIPv6", BOOL),
    ("IPAM", ADDRESS_MANAGEMENT),
    ("Internal", BOOL),
    ("Attachable", BOOL),
    ("Ingress", BOOL),
    ("ConfigOnly", BOOL),
    ("ConfigFrom", Shape::Object(&[&[("Network", NAME)]])),
    ("Options", Shape::Map(Text::NetworkOption, &FREE)),
    ("Labels", FREE_MAP),
]]);

/// `POST /networks/{id}/connect`.
pub(in crate::rules::api) static CONNECT: Shape =
    Shape::Object(&[&[("Container", NAME), ("EndpointConfig", ENDPOINT)]]);

/// `POST /networks/{id}/disconnect`.
pub(in crate::rules::api) static DISCONNECT: Shape = Shape::Object(&[&[("Container", NAME), ("Force", BOOL)]]);

const ADDRESS_MANAGEMENT: Shape = Shape::Object(&[&[
    ("Driver", Shape::Text(Text::AddressDriver)),
    // The engine's own drivers of addresses have no options.
    ("Options", FREE_MAP),
    ("Config", Shape::List(&POOL)),
]]);
const POOL: Shape = Shape::Object(&[&[
    ("Subnet", Shape::Text(Text::Subnet)),
    ("IPRange", Shape::Text(Text::Subnet)),
    ("Gateway", Shape::Text(Text::Subnet)),
    ("AuxiliaryAddresses", Shape::Map(Text::Free, &Shape::Text(Text::Subnet))),
]]);

/// `network.EndpointSettings`. The addresses are within the network, which was judged at its creation.
pub(super) const ENDPOINT: Shape = Shape::Object(&[&[
    ("IPAMConfig", Shape::Object(&[&[("IPv4Address", FREE), ("IPv6Address", FREE), ("LinkLocalIPs", FREE_LIST)]])),
    ("Links", NAME_LIST),
    ("Aliases", FREE_LIST),
    ("MacAddress", FREE),
    ("NetworkID", NAME),
    ("EndpointID", FREE),
    ("Gateway", FREE),
    ("IPAddress", FREE),
    ("IPPrefixLen", INTEGER),
    ("IPv6Gateway", FREE),
    ("GlobalIPv6Address", FREE),
    ("GlobalIPv6PrefixLen", INTEGER),
    ("DriverOpts", Shape::Map(Text::EndpointOption, &FREE)),
    ("DNSNames", FREE_LIST),
]]);
