//! The ways to the host's network and how each is started with the same guest.

use std::{
    fs,
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command as Process},
    thread,
    time::{Duration, Instant},
};

use bulkhead_net::{
    addresses::{Addresses, MTU},
    api::{Command as NetCommand, Setup as NetSetup},
};
use bulkhead_protocol::Transport;
use support::control;

use crate::comparison::Setup;
use crate::{Result, launch, process};

/// Port on which the guest serves connections from outside.
const PUBLISHED: u16 = 5001;
/// Time for a helper to listen.
const HELPER_TIMEOUT: Duration = Duration::from_secs(30);

/// A way from a guest to the host's network that needs no privileges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// `bulkhead vmm` and `bulkhead net`.
    Bulkhead,
    /// QEMU with its built-in user network (libslirp).
    Slirp,
    /// QEMU and gvproxy over a stream socket.
    Gvproxy,
    /// QEMU and passt over vhost-user.
    Passt,
}

/// The guest's network as the way makes it.
struct Plan {
    guest: Ipv4Addr,
    gateway: Ipv4Addr,
    /// The host's loopback.
    host: Ipv4Addr,
    mtu: u16,
}

impl Way {
    /// All, in the order of a round.
    pub const ALL: [Self; 4] = [Self::Bulkhead, Self::Slirp, Self::Gvproxy, Self::Passt];

    /// The least ratio to this peer that is good enough.
    pub fn goal(self) -> f64 {
        match self {
            Self::Passt => 0.7,
            _ => 1.0,
        }
    }

    /// The reason if it cannot be measured.
    pub fn missing(self) -> Option<String> {
        let programs: &[&str] = match self {
            Self::Bulkhead => &[],
            Self::Slirp => &["qemu-system-x86_64"],
            Self::Gvproxy => &["qemu-system-x86_64", "gvproxy"],
            Self::Passt => &["qemu-system-x86_64", "passt"],
        };
        let path = std::env::var_os("PATH").unwrap_or_default();
        let found = |program: &&&str| std::env::split_paths(&path).any(|directory| directory.join(program).exists());
        programs.iter().find(|program| !found(program)).map(|program| format!("there is no {program} here"))
    }

    fn plan(self) -> Plan {
        let [guest, gateway, host] = match self {
            Self::Bulkhead => {
                let ours = Addresses::new(&NetSetup::default());
                ours.map_or([Ipv4Addr::UNSPECIFIED; 3], |ours| [ours.guest, ours.gateway, ours.host])
            }
            Self::Slirp => [[10, 0, 2, 15], [10, 0, 2, 2], [10, 0, 2, 2]].map(Ipv4Addr::from),
            Self::Gvproxy => [[192, 168, 127, 2], [192, 168, 127, 1], [192, 168, 127, 254]].map(Ipv4Addr::from),
            Self::Passt => [[10, 97, 0, 2], [10, 97, 0, 1], [10, 97, 0, 1]].map(Ipv4Addr::from),
        };
        // The default of each.
        let mtu = if matches!(self, Self::Bulkhead | Self::Passt) { MTU } else { 1500 };
        Plan { guest, gateway, host, mtu }
    }

    fn cmdline(self, control: u16) -> String {
        let Plan { guest, gateway, host, mtu } = self.plan();
        let base = launch::endpoint_command_line();
        format!(
            "{base} bench.address={guest} bench.prefix=24 bench.gateway={gateway} bench.mtu={mtu} \
             bench.control={host}:{control}"
        )
    }
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Bulkhead => "bulkhead",
            Self::Slirp => "qemu user",
            Self::Gvproxy => "gvproxy",
            Self::Passt => "passt",
        })
    }
}

/// A running guest with its network; killed when dropped.
pub struct Running {
    machine: Child,
    helper: Option<Child>,
    /// Ours end with their control sockets.
    _controls: Vec<OwnedFd>,
    /// The host's address that leads to the guest's [`PUBLISHED`].
    pub published: SocketAddr,
    /// File with the guest's output.
    console: PathBuf,
    /// Files to be removed.
    sockets: Vec<PathBuf>,
}

impl Running {
    /// Starts it; the guest connects to the host's loopback at `control`.
    pub fn start(setup: &Setup, way: Way, control: u16) -> Result<Self> {
        let console = setup.machine.directory.join(format!("console-{way}").replace(' ', "-"));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let published = listener.local_addr()?;
        if way == Way::Bulkhead {
            return start_bulkhead(setup, console, way.cmdline(control), listener);
        }
        // The helper listens there itself.
        drop(listener);
        let mut running = Starting { setup, published, helper: None, sockets: Vec::new() };
        let network = running.network(way)?;
        let mut qemu = setup.machine.endpoint_qemu(&way.cmdline(control), &console);
        qemu.args(network);
        qemu.args(["-device", "virtio-net-pci,netdev=net,romfile=,mac=5a:94:ef:e4:0c:ee"]);
        let machine = launch::spawn(qemu, None)?;
        let (helper, sockets) = (running.helper.take(), std::mem::take(&mut running.sockets));
        Ok(Self { machine, helper, _controls: Vec::new(), published, console, sockets })
    }

    /// The end of its console.
    pub fn last_words(&self) -> String {
        let console = fs::read(&self.console).unwrap_or_default();
        String::from_utf8_lossy(&console[console.len().saturating_sub(2000)..]).into_owned()
    }

    /// CPU time of all its processes up to now.
    pub fn cpu(&self) -> Result<process::Cpu> {
        let mut sum = process::Cpu::read(self.machine.id())?;
        if let Some(helper) = &self.helper {
            sum += process::Cpu::read(helper.id())?;
        }
        Ok(sum)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        for child in [Some(&mut self.machine), self.helper.as_mut()].into_iter().flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
        for file in self.sockets.iter().chain([&self.console]) {
            let _ = fs::remove_file(file);
        }
    }
}

fn start_bulkhead(setup: &Setup, console: PathBuf, cmdline: String, published: TcpListener) -> Result<Running> {
    let address = published.local_addr()?;
    let (frontend, backend) = UnixStream::pair()?;
    let (net_ours, net_theirs) = control::pair()?;
    let say = |command: &NetCommand, fd: OwnedFd| -> Result<()> {
        Ok(control::send(&net_ours, &serde_json::to_vec(command)?, Some(&fd))?)
    };
    say(&NetCommand::Setup(NetSetup::default()), backend.into())?;
    let target = SocketAddr::from((Way::Bulkhead.plan().guest, PUBLISHED));
    say(&NetCommand::Listen { id: 1, transport: Transport::Tcp, target }, published.into())?;
    let mut net = Process::new(&setup.machine.bulkhead);
    net.arg("net");
    let helper = launch::spawn(net, Some(&net_theirs))?;

    let config = setup.machine.config(cmdline, vec![launch::disk(&setup.machine.rootfs, true, "root")], &console);
    let (machine, ours) = setup.machine.boot(config, control::pair()?, Some(&frontend.into()))?;
    let (controls, sockets) = (vec![ours, net_ours], Vec::new());
    Ok(Running { machine, helper: Some(helper), _controls: controls, published: address, console, sockets })
}

/// QEMU's network, before QEMU; a helper that nobody takes out is killed.
struct Starting<'a> {
    setup: &'a Setup,
    published: SocketAddr,
    helper: Option<Child>,
    sockets: Vec<PathBuf>,
}

impl Drop for Starting<'_> {
    fn drop(&mut self) {
        if let Some(mut helper) = self.helper.take() {
            let _ = helper.kill();
            let _ = helper.wait();
        }
        for socket in &self.sockets {
            let _ = fs::remove_file(socket);
        }
    }
}

impl Starting<'_> {
    /// Starts what the way needs and returns QEMU's arguments for it.
    fn network(&mut self, way: Way) -> Result<Vec<String>> {
        let published = self.published;
        let (port, guest) = (published.port(), way.plan().guest);
        Ok(match way {
            Way::Bulkhead => Vec::new(),
            Way::Slirp => {
                ["-netdev".to_owned(), format!("user,id=net,ipv6=off,hostfwd=tcp:127.0.0.1:{port}-:{PUBLISHED}")].into()
            }
            Way::Gvproxy => {
                let (frames, api) = (self.socket("frames.sock"), self.socket("api.sock"));
                let mut helper = Process::new("gvproxy");
                helper.arg("-listen-qemu").arg(format!("unix://{}", frames.display()));
                helper.arg("-listen").arg(format!("unix://{}", api.display()));
                helper.args(["-mtu", "1500", "-ssh-port", "-1"]).arg("-log-file").arg("/dev/null");
                self.help(helper, &api)?;
                expose(&api, published, SocketAddr::from((guest, PUBLISHED)))?;
                let path = frames.display();
                ["-netdev".to_owned(), format!("stream,id=net,server=off,addr.type=unix,addr.path={path}")].into()
            }
            Way::Passt => {
                let frames = self.socket("passt.sock");
                let mut helper = Process::new("passt");
                helper.args(["--foreground", "--quiet", "--one-off", "--vhost-user", "--ipv4-only"]);
                helper.args(["--runas", "nobody"]);
                helper.arg("--socket").arg(&frames);
                helper.args(["--address", &guest.to_string(), "--netmask", "24"]);
                helper.args(["--gateway", &way.plan().gateway.to_string(), "--udp-ports", "none"]);
                helper.args(["--tcp-ports", &format!("127.0.0.1/{port}:{PUBLISHED}")]);
                self.help(helper, &frames)?;
                let socket = format!("socket,id=passt,path={}", frames.display());
                ["-chardev", &socket, "-netdev", "vhost-user,id=net,chardev=passt"].map(str::to_owned).into()
            }
        })
    }

    fn socket(&mut self, name: &str) -> PathBuf {
        let path = self.setup.machine.directory.join(name);
        self.sockets.push(path.clone());
        path
    }

    /// Starts a helper and waits for its socket.
    fn help(&mut self, process: Process, socket: &Path) -> Result<()> {
        let helper = self.helper.insert(launch::spawn(process, None)?);
        let deadline = Instant::now() + HELPER_TIMEOUT;
        while !socket.exists() {
            if let Some(status) = helper.try_wait()? {
                return Err(format!("the helper ended early: {status}").into());
            }
            if Instant::now() > deadline {
                return Err("the helper does not listen".into());
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

/// Asks gvproxy to forward a port.
fn expose(api: &Path, local: SocketAddr, remote: SocketAddr) -> Result<()> {
    let body = format!(r#"{{"local":"{local}","remote":"{remote}","protocol":"tcp"}}"#);
    let mut stream = UnixStream::connect(api)?;
    stream.set_read_timeout(Some(HELPER_TIMEOUT))?;
    write!(
        stream,
        "POST /services/forwarder/expose HTTP/1.1\r\nHost: gvproxy\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    if answer.split(' ').nth(1) == Some("200") {
        Ok(())
    } else {
        Err(format!("gvproxy does not forward the port: {answer}").into())
    }
}
