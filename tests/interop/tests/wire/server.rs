//! A `quarrel serve` process, on a free port.

use std::{
    env,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
};

use tonic::transport::{Channel, Endpoint};

/// A server process. Dropped, it is killed.
pub struct Server {
    process: Child,
    /// `HOST:PORT`.
    address: String,
    /// Held, so that the server never writes into a closed pipe.
    _stdout: BufReader<ChildStdout>,
}

impl Server {
    /// Returns when it listens.
    pub fn start() -> Server {
        let binary = binary();
        assert!(binary.is_file(), "no server at `{}`: run `make build`", binary.display());
        let mut command = Command::new(&binary);
        // Settings of whoever runs the tests are not the tests'.
        for (name, _) in env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("QUARREL_")) {
            command.env_remove(name);
        }
        command.args(["serve", "--listen", "127.0.0.1:0", "--log", "warn"]);
        // Its standard input ends with this process, however that ends.
        command.arg("--stop-with-stdin").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let mut stdout = BufReader::new(process.stdout.take().unwrap());
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        let address = line.trim_end().strip_prefix("listening grpc://");
        let address = address.unwrap_or_else(|| panic!("`{line}`: expected `listening grpc://HOST:PORT`")).to_owned();
        Server { process, address, _stdout: stdout }
    }

    /// A connection with tonic's own settings: messages over 4 MiB are refused.
    pub async fn connect(&self) -> Channel {
        Endpoint::from_shared(format!("http://{}", self.address)).unwrap().connect().await.unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // A server that has ended already was missed by the test.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn binary() -> PathBuf {
    let built = || Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap().join("target/release/quarrel");
    env::var_os("QUARREL_BINARY").map_or_else(built, PathBuf::from)
}
