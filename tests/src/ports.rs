//! Free loopback ports. They are taken from below the range that the kernel hands to outgoing
//! connections: a port inside it could be gone again before the server binds it.

use std::collections::HashSet;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::Mutex;

const FIRST: u16 = 10_000;
const LAST: u16 = 32_000;

/// Ports given out by this process; two tests never get the same one.
static GIVEN: Mutex<Option<HashSet<u16>>> = Mutex::new(None);

/// A loopback address that nobody listens on.
///
/// # Panics
/// When no port is free.
pub fn free() -> SocketAddr {
    let mut given = GIVEN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let given = given.get_or_insert_default();
    // Test binaries may run side by side; each starts its search elsewhere.
    let span = LAST - FIRST;
    let start = (std::process::id().wrapping_mul(7919) % u32::from(span)) as u16;
    for offset in 0..span {
        let port = FIRST + (start + offset) % span;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        if !given.contains(&port) && TcpListener::bind(address).is_ok() {
            given.insert(port);
            return address;
        }
    }
    panic!("no free port in {FIRST}..{LAST}");
}
