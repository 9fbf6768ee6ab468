use std::{
    net::{IpAddr, Ipv4Addr, TcpListener, TcpStream, UdpSocket},
    time::Duration,
};

use proptest::prelude::*;

use super::*;

const CONTAINER: IpAddr = IpAddr::V4(Ipv4Addr::new(172, 17, 0, 2));

fn mapping(transport: Transport, host_port: u16) -> PortMapping {
    PortMapping {
        transport,
        host_ip: Ipv4Addr::LOCALHOST.into(),
        host_port,
        container_ip: CONTAINER,
        container_port: 80,
    }
}

/// A port that was free a moment ago.
fn free() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn listed(ports: &Ports) -> Vec<PortMapping> {
    ports.list().into_iter().map(|one| one.port).collect()
}

fn connects(port: u16) -> bool {
    TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok()
}

fn numbers(changes: &[Change]) -> (Vec<u64>, Vec<u64>) {
    let (mut listen, mut forget) = (Vec::new(), Vec::new());
    for change in changes {
        match change {
            Change::Listen { id, .. } => listen.push(*id),
            Change::Forget { id } => forget.push(*id),
        }
    }
    (listen, forget)
}

#[tokio::test]
async fn a_port_listens_from_the_answer_on_until_the_guest_gives_it_up() {
    let ports = Ports::open(false);
    let port = free();
    ports.publish(7, mapping(Transport::Tcp, port)).await.unwrap();
    // Nobody accepts yet: the client waits in the backlog.
    assert!(connects(port));
    assert_eq!(listed(&ports), [mapping(Transport::Tcp, port)]);
    ports.unpublish(7);
    assert!(!connects(port));
    assert!(ports.list().is_empty());
    ports.unpublish(7);
}

#[tokio::test]
async fn a_network_process_is_told_each_change_once_and_its_successor_everything() {
    let ports = Ports::open(false);
    let mut known = BTreeSet::new();
    ports.publish(1, mapping(Transport::Tcp, free())).await.unwrap();
    ports.publish(2, mapping(Transport::Tcp, free())).await.unwrap();
    assert_eq!(numbers(&ports.changes(&mut known)), (vec![1, 2], vec![]));
    assert_eq!(numbers(&ports.changes(&mut known)), (vec![], vec![]));
    ports.unpublish(1);
    ports.publish(3, mapping(Transport::Tcp, free())).await.unwrap();
    assert_eq!(numbers(&ports.changes(&mut known)), (vec![3], vec![1]));
    let mut successor = BTreeSet::new();
    let changes = ports.changes(&mut successor);
    assert_eq!(numbers(&changes), (vec![2, 3], vec![]));
    let Change::Listen { transport, target, socket, .. } = &changes[0] else { panic!() };
    assert_eq!((*transport, *target), (Transport::Tcp, SocketAddr::new(CONTAINER, 80)));
    // The same socket, not another one on the same port.
    let listener = TcpListener::from(socket.try_clone().unwrap());
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (_, peer) = listener.accept().unwrap();
    assert_eq!(peer, client.local_addr().unwrap());
}

#[tokio::test]
async fn an_id_that_the_guest_uses_again_is_another_mapping_for_the_network_process() {
    let ports = Ports::open(false);
    let mut known = BTreeSet::new();
    ports.publish(1, mapping(Transport::Tcp, free())).await.unwrap();
    ports.changes(&mut known);
    assert!(matches!(ports.publish(1, mapping(Transport::Tcp, free())).await, Err(PublishError::Taken)));
    ports.clear();
    ports.publish(1, mapping(Transport::Tcp, free())).await.unwrap();
    assert_eq!(numbers(&ports.changes(&mut known)), (vec![2], vec![1]));
}

#[tokio::test]
async fn a_port_that_the_network_process_still_holds_is_waited_for() {
    let ports = Arc::new(Ports::open(false));
    let port = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    ports.publish(1, mapping(Transport::Udp, port)).await.unwrap();
    let mut changes = ports.changes(&mut BTreeSet::new());
    ports.unpublish(1);
    let again = tokio::spawn({
        let ports = Arc::clone(&ports);
        async move { ports.publish(2, mapping(Transport::Udp, port)).await }
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!again.is_finished());
    changes.clear();
    again.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_port_of_another_program_is_refused_at_once() {
    let ports = Ports::open(false);
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let error = ports.publish(1, mapping(Transport::Tcp, port)).await.unwrap_err();
    assert_eq!(error.to_string(), format!("listen tcp4 127.0.0.1:{port}: bind: address already in use"));
    assert!(ports.changes(&mut BTreeSet::new()).is_empty());
}

#[tokio::test]
async fn the_guest_gets_no_more_ports_than_the_bound() {
    let ports = Ports::new(3, None);
    for id in 0..3 {
        ports.publish(id, mapping(Transport::Tcp, free())).await.unwrap();
    }
    let error = ports.publish(3, mapping(Transport::Tcp, free())).await.unwrap_err();
    assert_eq!(error.to_string(), "cannot publish more than 3 ports; stop a container or raise `ulimit -n`");
    ports.unpublish(1);
    ports.publish(3, mapping(Transport::Tcp, free())).await.unwrap();
}

#[tokio::test]
async fn without_a_network_the_reason_is_told() {
    let ports = Ports::closed("no network".to_owned());
    assert_eq!(ports.publish(1, mapping(Transport::Tcp, free())).await.unwrap_err().to_string(), "no network");
    let ports = Ports::open(false);
    let port = free();
    ports.publish(1, mapping(Transport::Tcp, port)).await.unwrap();
    ports.close("it is down");
    assert!(!connects(port));
    assert_eq!(ports.publish(2, mapping(Transport::Tcp, port)).await.unwrap_err().to_string(), "it is down");
}

#[tokio::test]
async fn a_change_is_noticed_whether_it_comes_before_or_after_the_wait() {
    let ports = Arc::new(Ports::open(false));
    ports.publish(1, mapping(Transport::Tcp, free())).await.unwrap();
    ports.changed().await;
    let waiter = tokio::spawn({
        let ports = Arc::clone(&ports);
        async move { ports.changed().await }
    });
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(!waiter.is_finished());
    ports.unpublish(1);
    waiter.await.unwrap();
}

#[test]
fn the_way_into_the_guest_leads_to_a_containers_address_only() {
    let mut port = mapping(Transport::Tcp, 8080);
    for address in ["127.0.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255", "::1", "::", "ff02::1", "::ffff:127.0.0.1"]
    {
        port.container_ip = address.parse().unwrap();
        assert!(matches!(policy::decide(port, false), Err(PublishError::Refused(..))), "{address}");
    }
    for address in ["172.17.0.2", "10.1.2.3", "fd00::2"] {
        port.container_ip = address.parse().unwrap();
        assert_eq!(policy::decide(port, false).unwrap().target, SocketAddr::new(port.container_ip, 80));
    }
}

#[tokio::test]
async fn on_the_loopback_only_every_address_is_the_loopback_of_its_family() {
    for (address, listens) in [
        ("0.0.0.0", "127.0.0.1"),
        ("203.0.113.1", "127.0.0.1"),
        ("127.0.0.2", "127.0.0.2"),
        ("::", "::1"),
        ("2001:db8::1", "::1"),
        ("::ffff:203.0.113.1", "127.0.0.1"),
    ] {
        let port = PortMapping { host_ip: address.parse().unwrap(), ..mapping(Transport::Tcp, 8080) };
        let expected: IpAddr = listens.parse().unwrap();
        assert_eq!(policy::decide(port, true).unwrap().listen.ip(), expected, "{address}");
    }
    let ports = Ports::open(true);
    let port = free();
    ports
        .publish(1, PortMapping { host_ip: Ipv4Addr::UNSPECIFIED.into(), ..mapping(Transport::Tcp, port) })
        .await
        .unwrap();
    assert!(connects(port) && TcpStream::connect(("127.0.0.2", port)).is_err());
    assert_eq!(listed(&ports), [mapping(Transport::Tcp, port)]);
}

#[test]
fn no_group_and_no_port_0_is_listened_on() {
    for (address, number) in [("224.0.0.1", 80), ("255.255.255.255", 80), ("ff02::1", 80), ("0.0.0.0", 0)] {
        let port = PortMapping { host_ip: address.parse().unwrap(), ..mapping(Transport::Udp, number) };
        assert!(matches!(policy::decide(port, false), Err(PublishError::Refused(..))), "{address}:{number}");
    }
}

#[tokio::test]
async fn ports_of_the_vm_are_exactly_those_that_are_wanted_and_outlive_the_agent() {
    let ports = Ports::open(false);
    // They are published in their order.
    let mut own = [mapping(Transport::Tcp, free()), mapping(Transport::Tcp, free())];
    own.sort();
    let [first, second] = own;
    let container = mapping(Transport::Tcp, free());
    // The guest's ids and the VM's ports do not meet.
    ports.publish(1, container).await.unwrap();
    assert!(ports.publish_vm(&[first, second].into()).await.is_empty());
    assert_eq!(listed(&ports).len(), 3);
    ports.clear();
    assert!(connects(first.host_port) && connects(second.host_port) && !connects(container.host_port));
    assert!(ports.list().iter().all(|one| one.of_vm));
    let mut known = BTreeSet::new();
    ports.changes(&mut known);
    // A port that stays is not touched: its clients keep their connections.
    assert!(ports.publish_vm(&[second].into()).await.is_empty());
    assert_eq!(numbers(&ports.changes(&mut known)), (vec![], vec![2]));
    assert!(!connects(first.host_port) && connects(second.host_port));
    ports.close("it is down");
    assert!(!connects(second.host_port));
    assert_eq!(ports.publish_vm(&[second].into()).await.first().unwrap().1.to_string(), "it is down");
}

#[tokio::test]
async fn a_port_of_the_vm_that_the_host_refuses_keeps_none_from_being_published() {
    let ports = Ports::open(false);
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let refused = mapping(Transport::Tcp, taken.local_addr().unwrap().port());
    let other = mapping(Transport::Udp, refused.host_port);
    let errors = ports.publish_vm(&[refused, other].into()).await;
    let expected = format!("listen tcp4 127.0.0.1:{}: bind: address already in use", refused.host_port);
    assert_eq!(
        errors.iter().map(|(port, error)| (*port, error.to_string())).collect::<Vec<_>>(),
        [(refused, expected)]
    );
    assert_eq!(listed(&ports), [other]);
    drop(taken);
    assert!(ports.publish_vm(&[refused, other].into()).await.is_empty());
    assert_eq!(listed(&ports).len(), 2);
}

/// A step of the guest, of the settings or of a network process.
#[derive(Clone, Debug)]
enum Step {
    Vm(usize),
    Publish(u64, bool),
    Unpublish(u64),
    Clear,
    HandOver,
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0_u64..6, any::<bool>()).prop_map(|(id, udp)| Step::Publish(id, udp)),
        3 => (0_u64..6).prop_map(Step::Unpublish),
        1 => Just(Step::Clear),
        2 => (0_usize..3).prop_map(Step::Vm),
        3 => Just(Step::HandOver),
        1 => Just(Step::Restart),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whatever_happens_the_network_process_ends_up_with_what_is_published(steps in prop::collection::vec(step(), 0..40)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let ports = Ports::new(4, None);
            // The sockets that a process holds: the mapping's number and its target.
            let (mut known, mut held) = (BTreeSet::new(), BTreeMap::new());
            let hand_over = |ports: &Ports, known: &mut BTreeSet<u64>, held: &mut BTreeMap<u64, SocketAddr>| {
                for change in ports.changes(known) {
                    match change {
                        Change::Listen { id, target, .. } => assert!(held.insert(id, target).is_none(), "told twice"),
                        // Forgetting a mapping without a socket would do no harm either, but must not happen.
                        Change::Forget { id } => assert!(held.remove(&id).is_some(), "never told"),
                    }
                }
            };
            for step in steps {
                match step {
                    Step::Publish(id, udp) => {
                        let transport = if udp { Transport::Udp } else { Transport::Tcp };
                        let _ = ports.publish(id, mapping(transport, free())).await;
                    }
                    Step::Unpublish(id) => ports.unpublish(id),
                    Step::Clear => ports.clear(),
                    Step::Vm(count) => {
                        let wanted = (0..count).map(|_| mapping(Transport::Tcp, free())).collect();
                        ports.publish_vm(&wanted).await;
                    }
                    Step::HandOver => hand_over(&ports, &mut known, &mut held),
                    Step::Restart => {
                        known.clear();
                        held.clear();
                    }
                }
                assert!(ports.list().len() <= 4);
            }
            hand_over(&ports, &mut known, &mut held);
            assert_eq!(held.len(), ports.list().len());
        });
    }
}
