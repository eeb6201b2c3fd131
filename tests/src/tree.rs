//! What the kernel knows of processes: parents, command lines, listening ports. Read from `/proc`.

use std::collections::HashSet;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};

use rustix::process::{Pid, Signal, kill_process};

use crate::wait;

/// State of a listening socket in `/proc/net/tcp`.
const LISTEN: &str = "0A";

/// One process. Its start time tells it from a later process with the same number.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ProcessId {
    pub pid: u32,
    start_time: u64,
}

struct Stat {
    state: char,
    parent: u32,
    start_time: u64,
}

fn stat(pid: u32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; the fields follow its last parenthesis.
    let fields: Vec<&str> = text[text.rfind(')')? + 1..].split_whitespace().collect();
    Some(Stat {
        state: fields.first()?.chars().next()?,
        parent: fields.get(1)?.parse().ok()?,
        start_time: fields.get(19)?.parse().ok()?,
    })
}

impl ProcessId {
    /// The process with this number, if there is one.
    pub fn of(pid: u32) -> Option<Self> {
        stat(pid).map(|stat| Self { pid, start_time: stat.start_time })
    }

    /// Whether it still runs. One that only waits for its parent to notice its end does not.
    pub fn is_running(&self) -> bool {
        stat(self.pid)
            .is_some_and(|now| now.start_time == self.start_time && !matches!(now.state, 'Z' | 'X'))
    }

    /// Arguments, the program first.
    pub fn arguments(&self) -> Vec<String> {
        let bytes = fs::read(format!("/proc/{}/cmdline", self.pid)).unwrap_or_default();
        let words = bytes.split(|&byte| byte == 0).filter(|word| !word.is_empty());
        words.map(|word| String::from_utf8_lossy(word).into_owned()).collect()
    }

    /// The value of a flag in its arguments.
    pub fn flag(&self, name: &str) -> Option<String> {
        let arguments = self.arguments();
        let at = arguments.iter().position(|argument| argument == name)?;
        arguments.get(at + 1).cloned()
    }

    /// Sends a signal; a process that is already gone is left alone.
    pub fn signal(&self, signal: Signal) {
        if !self.is_running() {
            return;
        }
        if let Some(pid) = Pid::from_raw(self.pid.cast_signed()) {
            // It may end between the check and the signal.
            let _ = kill_process(pid, signal);
        }
    }
}

/// Running children of a process.
pub fn children(parent: u32) -> Vec<ProcessId> {
    let entries = fs::read_dir("/proc").expect("/proc is mounted");
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    let mut children: Vec<ProcessId> = pids
        .filter_map(|pid| {
            let stat = stat(pid)?;
            let ours = stat.parent == parent && !matches!(stat.state, 'Z' | 'X');
            ours.then_some(ProcessId { pid, start_time: stat.start_time })
        })
        .collect();
    children.sort_by_key(|child| child.pid);
    children
}

/// Running children, their children, and so on; without the process itself.
pub fn descendants(ancestor: u32) -> Vec<ProcessId> {
    let mut found = Vec::new();
    let mut parents = vec![ancestor];
    while let Some(parent) = parents.pop() {
        let children = children(parent);
        parents.extend(children.iter().map(|child| child.pid));
        found.extend(children);
    }
    found
}

/// Loopback ports on which any of the processes listens.
pub fn listening_ports(processes: &[ProcessId]) -> Vec<u16> {
    let sockets: HashSet<String> =
        processes.iter().flat_map(|process| sockets(process.pid)).collect();
    let table = fs::read_to_string("/proc/net/tcp").expect("/proc/net is mounted");
    let mut ports: Vec<u16> = table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let (_, port) = fields.get(1)?.split_once(':')?;
            let listens = *fields.get(3)? == LISTEN && sockets.contains(*fields.get(9)?);
            listens.then(|| u16::from_str_radix(port, 16).ok()).flatten()
        })
        .collect();
    ports.sort_unstable();
    ports
}

/// Inode numbers of a process's sockets.
fn sockets(pid: u32) -> Vec<String> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { return Vec::new() };
    let links = entries.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    links
        .filter_map(|link| {
            let inode = link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?;
            Some(inode.to_owned())
        })
        .collect()
}

/// Waits until none of the processes runs.
pub fn assert_gone(processes: &[ProcessId]) {
    let still = || processes.iter().filter(|process| process.is_running()).collect::<Vec<_>>();
    let name = |process: &&ProcessId| format!("{} {:?}", process.pid, process.arguments());
    let names = || still().iter().map(name).collect::<Vec<_>>().join("; ");
    let before = names();
    wait::until(&format!("these processes end: {before}"), || still().is_empty());
}

/// Asserts that each port can be listened on again.
pub fn assert_free(ports: &[u16]) {
    for &port in ports {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let what = format!("{address} is free again");
        wait::until(&what, || TcpListener::bind(address).is_ok());
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_tree_is_seen_signalled_and_gone() {
        let mut shell = Command::new("/bin/sh")
            .args(["-c", "sleep 600 & wait"])
            .stdin(Stdio::null())
            .spawn()
            .expect("a shell");
        let pid = shell.id();
        wait::until("the shell starts its child", || descendants(pid).len() == 1);
        let sleep = descendants(pid).remove(0);
        wait::until("the child runs its program", || sleep.arguments() == ["sleep", "600"]);
        assert_eq!(sleep.flag("sleep").as_deref(), Some("600"));
        sleep.signal(Signal::KILL);
        assert_gone(&[sleep]);
        shell.wait().expect("the shell ends with its child");
    }

    #[test]
    fn listening_ports_of_a_process_are_seen() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let port = listener.local_addr().expect("bound").port();
        let this = ProcessId::of(std::process::id()).expect("this process");
        assert!(listening_ports(std::slice::from_ref(&this)).contains(&port));
        drop(listener);
        assert!(!listening_ports(&[this]).contains(&port));
        assert_free(&[port]);
    }
}
