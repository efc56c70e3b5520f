//! Rounds in which contenders alternate, so that other load on the machine affects all alike.
//!
//! The figure to compare is the processor time per exchange. Exchanges per second depend on the
//! clients unless the server is busy all the time.

use std::io;
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use crate::clients::Client;
use crate::machine::{Server, own_processor_time};
use crate::{Result, Run};

/// Concurrent clients: enough to keep a server busy.
const CLIENTS: usize = 8;

/// A server to compare; the first of a group is the floor.
pub struct Contender {
    name: &'static str,
    server: Server,
    client: Box<dyn Fn() -> io::Result<Client>>,
    rounds: Vec<Round>,
}

impl Contender {
    pub fn new(
        name: &'static str,
        (server, address): (Server, SocketAddr),
        client: impl Fn(SocketAddr) -> io::Result<Client> + 'static,
    ) -> Self {
        Self { name, server, client: Box::new(move || client(address)), rounds: Vec::new() }
    }

    /// Runs all clients for a while and returns the number of exchanges: at least one per client.
    fn run_clients(&self, time: Duration) -> Result<f64> {
        let clients = (0..CLIENTS).map(|_| (self.client)()).collect::<io::Result<Vec<_>>>()?;
        let end = Instant::now() + time;
        let run = |mut client: Client| {
            let mut exchanges = 0;
            while exchanges == 0 || Instant::now() < end {
                exchanges += client()?;
            }
            Ok::<_, io::Error>(exchanges)
        };
        let exchanges: io::Result<usize> = thread::scope(|scope| {
            let clients: Vec<_> =
                clients.into_iter().map(|client| scope.spawn(move || run(client))).collect();
            clients.into_iter().map(|client| client.join().expect("a client panicked")).sum()
        });
        Ok(exchanges.map_err(|error| format!("{}: {error}", self.name))? as f64)
    }

    fn round(&self, time: Duration) -> Result<Round> {
        let before = self.server.processor_time()?;
        let clients_before = own_processor_time()?;
        let start = Instant::now();
        let exchanges = self.run_clients(time)?;
        let wall = start.elapsed();
        let processor = self.server.processor_time()?.saturating_sub(before);
        let clients = own_processor_time()?.saturating_sub(clients_before);
        Ok(Round { exchanges, wall, processor, clients })
    }

    fn median(&self, number: fn(&Round) -> f64) -> f64 {
        median(self.rounds.iter().map(number).collect())
    }
}

/// The measurements of a contender in one round.
struct Round {
    exchanges: f64,
    wall: Duration,
    processor: Duration,
    clients: Duration,
}

impl Round {
    fn per_second(&self) -> f64 {
        self.exchanges / self.wall.as_secs_f64()
    }

    /// Returns the processor time per exchange, in seconds.
    fn cost(&self) -> f64 {
        self.processor.as_secs_f64() / self.exchanges
    }

    /// Returns the utilisation of the server, in percent.
    fn server_busy(&self) -> f64 {
        self.processor.as_secs_f64() * 100.0 / self.wall.as_secs_f64()
    }

    /// Returns the utilisation of the clients, in percent.
    fn clients_busy(&self) -> f64 {
        self.clients.as_secs_f64() * 100.0 / self.wall.as_secs_f64()
    }
}

/// Runs the rounds, prints the measurements, and returns the processor time per exchange of each
/// contender, in seconds.
pub fn compare(run: &Run, title: &str, mut contenders: Vec<Contender>) -> Result<Vec<f64>> {
    let [warm_up, time] = run.choose([500, 250], [0, 20]).map(Duration::from_millis);
    for contender in &contenders {
        contender.run_clients(warm_up)?;
    }
    for _ in 0..run.choose(21, 1) {
        for contender in &mut contenders {
            contender.rounds.push(contender.round(time)?);
        }
    }
    println!(
        "\n{title:<32} {:>10} {:>12} {:>13} {:>10} {:>15} {:>8}",
        "per second", "server busy", "clients busy", "processor", "lowest-highest", "x first"
    );
    let costs: Vec<f64> =
        contenders.iter().map(|contender| contender.median(Round::cost)).collect();
    for (contender, cost) in contenders.iter().zip(&costs) {
        let all = contender.rounds.iter().map(|round| round.cost() * 1e6);
        let lowest = all.clone().fold(f64::INFINITY, f64::min);
        let highest = all.fold(0.0, f64::max);
        println!(
            "{:<32} {:>10.0} {:>10.0} % {:>11.0} % {:>7.1} µs {:>15} {:>8.2}",
            contender.name,
            contender.median(Round::per_second),
            contender.median(Round::server_busy),
            contender.median(Round::clients_busy),
            cost * 1e6,
            format!("{lowest:.1}-{highest:.1}"),
            cost / costs[0],
        );
    }
    Ok(costs)
}

pub fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}
