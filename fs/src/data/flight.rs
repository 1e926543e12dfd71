//! Single flight: concurrent wishes for the same thing share one fetch.
//!
//! Invariants:
//! - For one key at most one flight is in the air.
//! - A flight is driven by whoever waits for it: if one waiter is dropped the others carry on, and if all are it ends.
//! - No future is dropped while the lock is held, since dropping one takes the lock.

use std::{
    collections::{HashMap, hash_map::Entry},
    hash::Hash,
    sync::Arc,
};

use futures::{
    FutureExt,
    future::{BoxFuture, Shared, WeakShared},
};
use parking_lot::Mutex;

/// A fetch that others may wait for too.
pub(super) type Flight<V> = Shared<BoxFuture<'static, V>>;

/// The fetches under way.
pub(super) struct Flights<K, V: Clone> {
    air: Mutex<Air<K, V>>,
}

struct Air<K, V: Clone> {
    by_key: HashMap<K, (FlightId, WeakShared<BoxFuture<'static, V>>)>,
    next: FlightId,
}

type FlightId = u64;

impl<K, V> Flights<K, V>
where
    K: Hash + Eq + Clone + Send + 'static,
    V: Clone + Send + Sync + 'static,
{
    pub(super) fn new() -> Arc<Flights<K, V>> {
        Arc::new(Flights { air: Mutex::new(Air { by_key: HashMap::new(), next: 0 }) })
    }

    /// The flights that bring `keys`, each once. Keys that no flight brings are given to `launch`, which tells which of them
    /// it takes into which fetch; a key that it leaves out gets none.
    pub(super) fn board(
        self: &Arc<Self>,
        keys: impl IntoIterator<Item = K>,
        launch: impl FnOnce(Vec<K>) -> Vec<(Vec<K>, BoxFuture<'static, V>)>,
    ) -> Vec<Flight<V>> {
        let mut boarded: HashMap<FlightId, Flight<V>> = HashMap::new();
        let mut air = self.air.lock();
        let mut without = Vec::new();
        for key in keys {
            match air.by_key.get(&key) {
                Some((id, flight)) => match (boarded.entry(*id), flight.upgrade()) {
                    // The upgraded handle is dropped under the lock, but another one is held in the map.
                    (Entry::Occupied(_), _) => {}
                    (Entry::Vacant(seat), Some(flight)) => {
                        seat.insert(flight);
                    }
                    (Entry::Vacant(_), None) => without.push(key),
                },
                None => without.push(key),
            }
        }
        if !without.is_empty() {
            for (keys, fetch) in launch(without) {
                let id = air.next;
                air.next += 1;
                let landing = Landing { flights: Arc::clone(self), keys: keys.clone(), id };
                let fetch = async move {
                    let _landing = landing;
                    fetch.await
                };
                let flight = fetch.boxed().shared();
                if let Some(weak) = flight.downgrade() {
                    air.by_key.extend(keys.into_iter().map(|key| (key, (id, weak.clone()))));
                }
                boarded.insert(id, flight);
            }
        }
        drop(air);
        boarded.into_values().collect()
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.air.lock().by_key.is_empty()
    }
}

/// Takes the keys of a flight out of the air when it has landed or was abandoned.
struct Landing<K: Hash + Eq, V: Clone> {
    flights: Arc<Flights<K, V>>,
    keys: Vec<K>,
    id: FlightId,
}

impl<K: Hash + Eq, V: Clone> Drop for Landing<K, V> {
    fn drop(&mut self) {
        let mut air = self.flights.air.lock();
        for key in &self.keys {
            // Another flight may have been launched for the key after this one was abandoned.
            if air.by_key.get(key).is_some_and(|(id, _)| *id == self.id) {
                air.by_key.remove(key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn one(flights: &Arc<Flights<u8, u32>>, count: &Arc<AtomicU32>) -> Flight<u32> {
        let count = Arc::clone(count);
        let launch = move |keys: Vec<u8>| {
            let fetch = async move {
                tokio::task::yield_now().await;
                count.fetch_add(1, Ordering::SeqCst)
            };
            vec![(keys, fetch.boxed())]
        };
        flights.board([1], launch).pop().unwrap()
    }

    #[tokio::test]
    async fn waiters_share_one_fetch_and_the_next_one_starts_anew() {
        let (flights, count) = (Flights::new(), Arc::new(AtomicU32::new(0)));
        let (a, b) = (one(&flights, &count), one(&flights, &count));
        assert_eq!((a.await, b.await), (0, 0));
        assert!(flights.is_empty());
        assert_eq!(one(&flights, &count).await, 1);
    }

    #[tokio::test]
    async fn a_waiter_carries_on_when_the_one_who_began_goes_away() {
        let (flights, count) = (Flights::new(), Arc::new(AtomicU32::new(0)));
        let (mut began, waits) = (one(&flights, &count), one(&flights, &count));
        assert!((&mut began).now_or_never().is_none());
        drop(began);
        assert_eq!(waits.await, 0);
    }

    #[tokio::test]
    async fn an_abandoned_flight_does_not_block_its_key() {
        let (flights, count) = (Flights::new(), Arc::new(AtomicU32::new(0)));
        drop(one(&flights, &count));
        assert!(flights.is_empty());
        assert_eq!(one(&flights, &count).await, 0);
    }
}
