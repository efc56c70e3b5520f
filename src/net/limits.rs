//! The limits of a service as configured in `[limits]` and overridden by each service.
//!
//! Enforced by [`crate::net::permits`], [`crate::net::client_limit`], [`crate::net::access`],
//! [`crate::net::udp_rate`] and the timeouts of a connection.

use std::num::NonZeroU32;
use std::time::Duration;

use ipnet::IpNet;

use crate::config_reader::{Reported, Table, values, values_of};
use crate::net::access::{Access, parse_network};
use crate::net::connection::Deadlines;

/// The limits of one service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Simultaneous connections. Further clients wait in the kernel's accept queue.
    pub max_connections: NonZeroU32,
    /// Simultaneous connections of one client. Further ones are reset.
    pub max_per_client: NonZeroU32,
    pub access: Access,
    /// Networks of the load balancers, whose connections must begin with a PROXY header.
    pub balancers: Vec<IpNet>,
    pub deadlines: Deadlines,
    pub datagrams: DatagramLimits,
}

/// Datagrams answered per second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DatagramLimits {
    /// To all clients together.
    pub total: NonZeroU32,
    /// To one IPv4 address or IPv6 /64. A fraction of further datagrams is still answered.
    pub per_client: NonZeroU32,
}

impl Default for Limits {
    fn default() -> Self {
        #[expect(clippy::unwrap_used, reason = "evaluated by the compiler")]
        const fn number(value: u32) -> NonZeroU32 {
            NonZeroU32::new(value).unwrap()
        }
        Self {
            max_connections: const { number(4096) },
            max_per_client: const { number(1024) },
            access: Access::default(),
            balancers: Vec::new(),
            deadlines: Deadlines { idle: Duration::from_secs(30), total: Duration::from_hours(1) },
            datagrams: DatagramLimits {
                total: const { number(10_000) },
                per_client: const { number(50) },
            },
        }
    }
}

impl Limits {
    /// Reads the keys of `[limits]`, which each service can override; `base` has the defaults.
    pub(crate) fn read(table: &mut Table<'_>, base: &Self) -> Result<Self, Reported> {
        let max_connections = table.number_or("max-connections", base.max_connections);
        let max_per_client = table.number_or("max-per-client", base.max_per_client);
        let allow = table.texts("allow", parse_network);
        let deny = table.texts("deny", parse_network);
        let idle = table.text("idle-timeout", values::duration);
        let total = table.text("max-duration", values::duration);
        let datagrams = table.number_or("max-datagrams", base.datagrams.total);
        let per_client = table.number_or("max-datagrams-per-client", base.datagrams.per_client);
        let networks = |set: Option<_>, base: &Vec<_>| match set {
            Some(set) => values_of(Some(set)),
            None => base.clone(),
        };
        Ok(Self {
            max_connections: max_connections?,
            max_per_client: max_per_client?,
            balancers: base.balancers.clone(),
            access: Access {
                allow: networks(allow?, &base.access.allow),
                deny: networks(deny?, &base.access.deny),
            },
            deadlines: Deadlines {
                idle: idle?.unwrap_or(base.deadlines.idle),
                total: total?.unwrap_or(base.deadlines.total),
            },
            datagrams: DatagramLimits { total: datagrams?, per_client: per_client? },
        })
    }
}
