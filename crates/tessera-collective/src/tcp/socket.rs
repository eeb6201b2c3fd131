//! Non-blocking sockets: connecting, and whole reads and writes of small structures.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use socket2::{Domain, Protocol, Socket, Type};

use super::waker::{Stop, Wait};

/// Pause between two attempts to reach an address.
const RETRY_PAUSE: Duration = Duration::from_millis(20);

/// A listener that never blocks, on `address` (port 0: any free one), and where it listens.
pub(super) fn listen(address: SocketAddr) -> io::Result<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

/// Sets up an accepted connection.
pub(super) fn accepted(stream: TcpStream) -> io::Result<TcpStream> {
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Connects to `address`. While the network has no way there it tries again until the deadline. A refused
/// connection fails at once: whoever announces an address listens on it already, so it has gone.
pub(super) fn connect(address: SocketAddr, wait: &Wait<'_>) -> Result<TcpStream, Stop> {
    loop {
        match connect_once(address, wait) {
            Err(Stop::Failed(error)) if is_worth_retrying(&error) => {
                let paused = wait.sleep(&mut Vec::new(), Some(Instant::now() + RETRY_PAUSE));
                match paused {
                    // What the network says is more than the deadline does.
                    Err(Stop::TimedOut) => return Err(Stop::Failed(error)),
                    paused => paused?,
                }
            }
            result => return result,
        }
    }
}

fn is_worth_retrying(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable)
}

fn connect_once(address: SocketAddr, wait: &Wait<'_>) -> Result<TcpStream, Stop> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    socket.set_tcp_nodelay(true)?;
    match socket.connect(&address.into()) {
        Ok(()) => return Ok(socket.into()),
        Err(error)
            if error.raw_os_error() == Some(rustix::io::Errno::INPROGRESS.raw_os_error()) => {}
        Err(error) => return Err(error.into()),
    }
    loop {
        wait.ready(&socket, PollFlags::OUT)?;
        if let Some(error) = socket.take_error()? {
            return Err(error.into());
        }
        match socket.peer_addr() {
            Ok(_) => return Ok(socket.into()),
            Err(error) if error.kind() == io::ErrorKind::NotConnected => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// What one attempt to move bytes came to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Progress {
    Moved(usize),
    NotReady,
}

/// Reads what is there into `buffer`, which is not empty. The end of the stream is an error.
pub(super) fn read_some(mut stream: &TcpStream, buffer: &mut [u8]) -> io::Result<Progress> {
    match stream.read(buffer) {
        Ok(0) => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it closed the connection")),
        result => progress(result),
    }
}

/// Writes what fits.
pub(super) fn write_some(
    mut stream: &TcpStream,
    parts: &[io::IoSlice<'_>],
) -> io::Result<Progress> {
    progress(stream.write_vectored(parts))
}

fn progress(result: io::Result<usize>) -> io::Result<Progress> {
    match result {
        Ok(moved) => Ok(Progress::Moved(moved)),
        Err(error) => match error.kind() {
            io::ErrorKind::WouldBlock => Ok(Progress::NotReady),
            io::ErrorKind::Interrupted => Ok(Progress::Moved(0)),
            _ => Err(error),
        },
    }
}

/// Fills `buffer`.
pub(super) fn read_exact(
    stream: &TcpStream,
    mut buffer: &mut [u8],
    wait: &Wait<'_>,
) -> Result<(), Stop> {
    while !buffer.is_empty() {
        match read_some(stream, buffer)? {
            Progress::Moved(moved) => buffer = &mut buffer[moved..],
            Progress::NotReady => wait.ready(stream, PollFlags::IN)?,
        }
    }
    Ok(())
}

/// Writes all of `bytes`.
pub(super) fn write_all(stream: &TcpStream, mut bytes: &[u8], wait: &Wait<'_>) -> Result<(), Stop> {
    while !bytes.is_empty() {
        match write_some(stream, &[io::IoSlice::new(bytes)])? {
            Progress::Moved(moved) => bytes = &bytes[moved..],
            Progress::NotReady => wait.ready(stream, PollFlags::OUT)?,
        }
    }
    Ok(())
}
