//! Connections: how many, how long their headers may take, and how they end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

/// A client has so long for the head of a request; a connection may be idle for as long.
const HEADERS: Duration = Duration::from_secs(30);
/// Time for clients to take the rest of their answers, after the engine has ended.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Serves until SIGINT or SIGTERM; then `stop` is called with the time until which requests may go on. A second signal ends the
/// process.
///
/// # Errors
/// Signals that cannot be watched.
pub async fn serve(listener: TcpListener, router: Router, most: usize, grace: Duration, stop: impl FnOnce(Instant)) -> Result<()> {
    let graceful = GracefulShutdown::new();
    let room = Arc::new(Semaphore::new(most));
    let mut signals = Signals::new().context("cannot watch for signals")?;
    loop {
        // Those that do not fit wait in the system's queue.
        let permit = tokio::select! {
            permit = room.clone().acquire_owned() => permit.expect("is never closed"),
            () = signals.next() => break,
        };
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                // Too many open files, say: those who have connections go on.
                Err(_) => {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
            () = signals.next() => break,
        };
        // Tokens should not wait for more of them.
        let _ = stream.set_nodelay(true);
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(HEADERS);
        let service = TowerToHyperService::new(router.clone());
        let connection = graceful.watch(http.serve_connection(TokioIo::new(stream), service));
        tokio::spawn(async move {
            // What goes wrong with a connection is the client's affair.
            let _ = connection.await;
            drop(permit);
        });
    }
    drop(listener);
    let deadline = Instant::now() + grace;
    stop(deadline);
    tokio::select! {
        () = graceful.shutdown() => {}
        () = tokio::time::sleep(grace + LAST_WORDS) => {}
        () = signals.next() => std::process::exit(130),
    }
    Ok(())
}

/// SIGINT and SIGTERM; elsewhere than on Unix Ctrl-C.
struct Signals {
    #[cfg(unix)]
    both: [tokio::signal::unix::Signal; 2],
}

impl Signals {
    fn new() -> std::io::Result<Signals> {
        #[cfg(unix)]
        {
            use tokio::signal::unix::{SignalKind, signal};
            Ok(Signals { both: [signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?] })
        }
        #[cfg(not(unix))]
        Ok(Signals {})
    }

    async fn next(&mut self) {
        #[cfg(unix)]
        {
            let [int, term] = &mut self.both;
            tokio::select! {
                _ = int.recv() => {}
                _ = term.recv() => {}
            }
        }
        #[cfg(not(unix))]
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
