//! The backoff of a listener after a fault of this machine, such as a lack of descriptors.

use std::io;
use std::time::Duration;

use rustix::io::Errno;

use crate::net::instance::ServiceInstance;
use crate::net::service::Service;

/// First and longest delay.
const DELAY: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));

/// A delay that doubles while a fault lasts.
#[derive(Debug, Default)]
pub(super) struct AcceptBackoff {
    next: Option<Duration>,
}

impl AcceptBackoff {
    pub(super) fn reset(&mut self) {
        self.next = None;
    }

    /// Logs the failure of `operation` with a remedy, at most once per minute, and waits.
    pub(super) async fn wait<S: Service>(
        &mut self,
        instance: &ServiceInstance<S>,
        operation: &'static str,
        error: &io::Error,
    ) {
        if instance.counts().note_fault() {
            let service = &**instance.name();
            let remedy = match Errno::from_io_error(error) {
                Some(Errno::MFILE) => "raise LimitNOFILE= (ulimit -n) or lower max-connections",
                Some(Errno::NFILE) => "raise the sysctl fs.file-max",
                Some(Errno::NOBUFS | Errno::NOMEM) => {
                    "provide more memory or lower max-connections"
                }
                Some(Errno::NOSPC) => "raise the sysctl fs.epoll.max_user_watches",
                _ => "the listener retries",
            };
            let message = format_args!("{service}: {operation}: {error}: {remedy}");
            tracing::error!(service, cause = %error, remedy, "{message}");
        }
        let delay = self.next.unwrap_or(DELAY.0);
        self.next = Some((delay * 2).min(DELAY.1));
        tokio::time::sleep(delay).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::connection::{Connection, ServeError, Shutdown};
    use crate::net::limits::Limits;
    use crate::net::stream::LazySocket;

    #[derive(Debug)]
    struct Silent;

    impl Service for Silent {
        async fn serve(&self, _: &mut Connection<LazySocket>) -> Result<(), ServeError> {
            Ok(())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn delays_grow_to_a_second_and_start_anew() {
        let mut backoff = AcceptBackoff::default();
        let error = Errno::MFILE.into();
        let limits = Limits::default();
        let instance = ServiceInstance::new("t".into(), Silent, limits, Shutdown::default());
        let start = tokio::time::Instant::now();
        for _ in 0..10 {
            backoff.wait(&instance, "cannot accept connections", &error).await;
        }
        let waited = start.elapsed();
        assert!((Duration::from_secs(4)..Duration::from_secs(5)).contains(&waited), "{waited:?}");
        backoff.reset();
        let start = tokio::time::Instant::now();
        backoff.wait(&instance, "cannot accept connections", &error).await;
        assert!(start.elapsed() < Duration::from_millis(20));
    }
}
