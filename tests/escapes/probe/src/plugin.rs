//! A container that answers as a plugin of the engine, at a socket of its own.

use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
};

/// Serves as a volume driver whose volume is the VM's `/etc`, and prints each request.
pub(crate) fn serve(socket: &str) {
    let Ok(listener) = UnixListener::bind(socket) else {
        println!("cannot listen on {socket}");
        return;
    };
    println!("ready");
    for stream in listener.incoming().flatten() {
        // A client that breaks off ends its own connection only.
        let _ = answer(&stream);
    }
}

fn answer(stream: &UnixStream) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let (mut head, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
            break;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap_or(0);
        }
        head.push_str(&line);
    }
    reader.take(length).read_to_end(&mut Vec::new())?;
    let path = head.split(' ').nth(1).unwrap_or_default().trim_start_matches('/').to_owned();
    println!("asked {path}");
    let body = match path.as_str() {
        "Plugin.Activate" => r#"{"Implements":["VolumeDriver","NetworkDriver","LogDriver","IpamDriver"]}"#,
        "VolumeDriver.Capabilities" => r#"{"Capabilities":{"Scope":"local"}}"#,
        "VolumeDriver.Get" => r#"{"Volume":{"Name":"plugged","Mountpoint":"/etc"},"Err":""}"#,
        "VolumeDriver.Mount" | "VolumeDriver.Path" => r#"{"Mountpoint":"/etc","Err":""}"#,
        _ => r#"{"Err":""}"#,
    };
    let mut stream = stream;
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Type: application/vnd.docker.plugins.v1.1+json\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n{body}",
        body.len()
    )
}
