//! Upper bounds of histogram buckets. A request on a loaded CPU takes minutes and a routed token
//! microseconds, so each quantity has bounds of its own.

/// Whole requests, queueing, time to first token: 1 ms to 10 min, in seconds.
pub const REQUEST_SECONDS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0,
    160.0, 320.0, 600.0,
];

/// One step or the gap between two tokens: 100 µs to 10 s, in seconds.
pub const TOKEN_SECONDS: &[f64] = &[
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2,
    0.3, 0.5, 1.0, 2.5, 5.0, 10.0,
];

/// Lengths of prompts and outputs, in tokens.
pub const TOKENS: &[f64] = &[
    1.0, 4.0, 16.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0,
    65536.0, 131072.0,
];

/// Image sizes after resizing, from one merge unit's neighbourhood to the published limit, in pixels.
pub const PIXELS: &[f64] = &[
    3136.0, 12544.0, 50176.0, 100352.0, 200704.0, 401408.0, 802816.0, 1605632.0, 3211264.0,
    6422528.0, 12845056.0, 51380224.0,
];

/// Payload sizes, in bytes.
pub const BYTES: &[f64] =
    &[1024.0, 4096.0, 16384.0, 65536.0, 262144.0, 1048576.0, 4194304.0, 16777216.0, 67108864.0];
