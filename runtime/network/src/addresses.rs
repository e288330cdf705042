//! Address allocation: one small file per address, with the id of its sandbox.
//!
//! ```text
//! <directory>/10.88.0.2             content: the sandbox id, nothing else
//! <directory>/fd62:6572:7468::2     the same
//! ```
//!
//! The file name is the claim: it is created with `O_EXCL`, so that not even two processes can
//! assign an address twice. The files are authoritative; a map in memory saves reading them again.
//! Nothing is synced to the disk: after a power cut no sandbox lives. A crash can leave a file
//! without content, or one whose sandbox was never finished; the first kind is removed when the
//! store is opened, the second by [`AddressStore::reconcile`]. A record that cannot be read keeps
//! its address taken. A lost record is restored from what the sandbox itself knows
//! ([`AddressStore::restore`]).
//!
//! Addresses are assigned in a circle, so that a freed one is reused as late as possible: peers and
//! load balancers may still hold connections and neighbour entries of its last owner. After a
//! restart the circle continues after the newest record.
//!
//! One daemon owns the directory; its mode (0700) keeps others out.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use crate::identity;

/// The range of assignable addresses: first and last, of one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Range {
    /// IPv4, both ends included.
    Ipv4(Ipv4Addr, Ipv4Addr),
    /// IPv6, both ends included.
    Ipv6(Ipv6Addr, Ipv6Addr),
}

impl Range {
    fn first(self) -> IpAddr {
        match self {
            Self::Ipv4(first, _) => IpAddr::V4(first),
            Self::Ipv6(first, _) => IpAddr::V6(first),
        }
    }

    fn contains(self, address: IpAddr) -> bool {
        match (self, address) {
            (Self::Ipv4(first, last), IpAddr::V4(address)) => (first..=last).contains(&address),
            (Self::Ipv6(first, last), IpAddr::V6(address)) => (first..=last).contains(&address),
            _ => false,
        }
    }

    /// The next address, and the first one after the last.
    fn after(self, address: IpAddr) -> IpAddr {
        let next = match address {
            IpAddr::V4(address) => u32::from(address).checked_add(1).map(|next| IpAddr::V4(next.into())),
            IpAddr::V6(address) => u128::from(address).checked_add(1).map(|next| IpAddr::V6(next.into())),
        };
        next.filter(|next| self.contains(*next)).unwrap_or_else(|| self.first())
    }
}

/// Why addresses could not be assigned or freed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or directory of the store could not be used.
    #[error("cannot {operation} {}", path.display())]
    File {
        /// The operation.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// The error.
        #[source]
        source: io::Error,
    },
    /// All addresses of a family are taken.
    #[error("no free address from {} on: {taken} are allocated", first)]
    Exhausted {
        /// First address of the range.
        first: IpAddr,
        /// Number of addresses taken in it.
        taken: usize,
    },
    /// The sandbox already has addresses.
    #[error("sandbox {sandbox_id} already has the address {address}")]
    Owned {
        /// The sandbox.
        sandbox_id: String,
        /// One of its addresses.
        address: IpAddr,
    },
    /// Not a sandbox id ([`identity::is_sandbox_id`]).
    #[error("{text:?} is not a sandbox id")]
    SandboxId {
        /// The refused text.
        text: String,
    },
}

/// The addresses of one bridge and their owners.
#[derive(Debug)]
pub struct AddressStore {
    directory: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    owners: BTreeMap<IpAddr, String>,
    /// Addresses whose records could not be read. They are taken, by unknown sandboxes.
    unread: BTreeSet<IpAddr>,
    /// Addresses that the node has itself, or keeps for pods of earlier ranges.
    reserved: BTreeSet<IpAddr>,
    /// What is assigned: of each range one address, and the one to try first.
    ranges: Vec<(Range, IpAddr)>,
}

impl AddressStore {
    /// Opens the store, creating the directory where it is absent. Records outside the ranges (of
    /// an earlier configuration) stay until their sandboxes go. Files whose names are not addresses
    /// are left alone.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn open(directory: &Path, ranges: &[Range]) -> Result<Self, Error> {
        let fail = |operation, path: &Path, source| Error::File { operation, path: path.to_owned(), source };
        let made = DirBuilder::new().recursive(true).mode(0o700).create(directory);
        made.map_err(|source| fail("create the directory", directory, source))?;
        let (mut owners, mut unread) = (BTreeMap::new(), BTreeSet::new());
        let mut newest: Vec<Option<(SystemTime, IpAddr)>> = vec![None; ranges.len()];
        let entries =
            fs::read_dir(directory).map_err(|source| fail("list the directory", directory, source))?;
        for entry in entries {
            let entry = entry.map_err(|source| fail("list the directory", directory, source))?;
            let Some(address) = entry.file_name().to_str().and_then(canonical_address) else { continue };
            let path = entry.path();
            let (owner, written) = match read_owner(&path) {
                Ok(Some(read)) => read,
                Ok(None) => {
                    fs::remove_file(&path)
                        .map_err(|source| fail("remove the broken record", &path, source))?;
                    continue;
                }
                Err(source) if source.kind() == io::ErrorKind::NotFound => continue,
                Err(_) => {
                    unread.insert(address);
                    (String::new(), SystemTime::UNIX_EPOCH)
                }
            };
            owners.insert(address, owner);
            for (range, newest) in ranges.iter().zip(&mut newest) {
                if range.contains(address) {
                    *newest = (*newest).max(Some((written, address)));
                }
            }
        }
        let ranges = ranges
            .iter()
            .zip(newest)
            .map(|(range, newest)| {
                (*range, newest.map_or(range.first(), |(_, address)| range.after(address)))
            })
            .collect();
        let state = Mutex::new(State { owners, unread, reserved: BTreeSet::new(), ranges });
        Ok(Self { directory: directory.to_owned(), state })
    }

    /// Assigns addresses of other ranges from now on. Those that are taken stay so.
    pub fn change_ranges(&self, ranges: &[Range]) {
        self.lock().ranges = ranges.iter().map(|range| (*range, range.first())).collect();
    }

    /// The addresses that are not assigned, in place of those named before.
    pub fn reserve(&self, addresses: impl IntoIterator<Item = IpAddr>) {
        self.lock().reserved = addresses.into_iter().collect();
    }

    /// Assigns a sandbox one address of each range, in the order of the ranges. Either all are
    /// taken or none.
    ///
    /// # Errors
    /// [`Error::Exhausted`], [`Error::Owned`], [`Error::SandboxId`], [`Error::File`].
    pub fn allocate(&self, sandbox_id: &str) -> Result<Vec<IpAddr>, Error> {
        if !identity::is_sandbox_id(sandbox_id) {
            return Err(Error::SandboxId { text: sandbox_id.to_owned() });
        }
        let mut state = self.lock();
        if let Some(address) = state.of(sandbox_id).first() {
            return Err(Error::Owned { sandbox_id: sandbox_id.to_owned(), address: *address });
        }
        let mut taken = Vec::with_capacity(state.ranges.len());
        for position in 0..state.ranges.len() {
            match self.take(&mut state, position, sandbox_id) {
                Ok(address) => taken.push(address),
                Err(error) => {
                    for address in taken {
                        // What cannot be removed here stays in the map, and is freed with its
                        // sandbox or by reconcile.
                        let _ = self.release(&mut state, address);
                    }
                    return Err(error);
                }
            }
        }
        Ok(taken)
    }

    /// Frees all addresses of a sandbox and returns them; it may have none.
    ///
    /// # Errors
    /// [`Error::File`]; everything else is freed all the same.
    pub fn free(&self, sandbox_id: &str) -> Result<Vec<IpAddr>, Error> {
        let mut state = self.lock();
        let addresses = state.of(sandbox_id);
        self.release_all(&mut state, addresses)
    }

    /// Frees the addresses of every sandbox that is not among the living, and returns them. A
    /// sandbox that is being created must be among them.
    ///
    /// # Errors
    /// [`Error::File`]; everything else is freed all the same.
    pub fn reconcile(&self, living: &HashSet<&str>) -> Result<Vec<IpAddr>, Error> {
        let mut state = self.lock();
        let dead = state
            .owners
            .iter()
            .filter(|(address, owner)| !living.contains(owner.as_str()) && !state.unread.contains(address))
            .map(|(address, _)| *address)
            .collect();
        self.release_all(&mut state, dead)
    }

    /// The addresses whose records could not be read, and whose sandboxes are unknown.
    pub fn unread(&self) -> Vec<IpAddr> {
        self.lock().unread.iter().copied().collect()
    }

    /// The sandboxes that have addresses and are not among the living. Those whose records could
    /// not be read are not among them.
    pub fn dead(&self, living: &HashSet<&str>) -> BTreeMap<String, Vec<IpAddr>> {
        let mut owners = self.owners();
        let unread = self.lock().unread.clone();
        owners.retain(|owner, addresses| {
            addresses.retain(|address| !unread.contains(address));
            !living.contains(owner.as_str()) && !addresses.is_empty()
        });
        owners
    }

    /// Frees those of these addresses that `owner` still owns, and returns them.
    ///
    /// # Errors
    /// [`Error::File`]; everything else is freed all the same.
    pub fn free_of(&self, owner: &str, addresses: &[IpAddr]) -> Result<Vec<IpAddr>, Error> {
        let mut state = self.lock();
        let own = |address: &&IpAddr| state.owners.get(*address).is_some_and(|found| found == owner);
        let addresses = addresses.iter().filter(own).copied().collect();
        self.release_all(&mut state, addresses)
    }

    /// Restores the address records of a sandbox, and returns the addresses that had none. An
    /// address that belongs to another of the `known` sandboxes stays with that one.
    ///
    /// # Errors
    /// [`Error::File`], [`Error::SandboxId`].
    pub fn restore(
        &self,
        sandbox_id: &str,
        addresses: &[IpAddr],
        known: impl Fn(&str) -> bool,
    ) -> Result<Vec<IpAddr>, Error> {
        if !identity::is_sandbox_id(sandbox_id) {
            return Err(Error::SandboxId { text: sandbox_id.to_owned() });
        }
        let mut state = self.lock();
        let mut restored = Vec::new();
        for address in addresses {
            match state.owners.get(address) {
                Some(owner) if owner == sandbox_id || known(owner) => continue,
                _ => {}
            }
            let path = self.path(*address);
            // In one step, over a record without an owner.
            let partial = self.directory.join(format!("{address}.partial"));
            let written = write_owner(&partial, sandbox_id).and_then(|()| fs::rename(&partial, &path));
            written.map_err(|source| Error::File { operation: "write the record", path, source })?;
            state.owners.insert(*address, sandbox_id.to_owned());
            state.unread.remove(address);
            restored.push(*address);
        }
        Ok(restored)
    }

    /// The addresses of a sandbox, IPv4 first.
    pub fn of(&self, sandbox_id: &str) -> Vec<IpAddr> {
        self.lock().of(sandbox_id)
    }

    /// All sandboxes that have addresses, each with them.
    pub fn owners(&self) -> BTreeMap<String, Vec<IpAddr>> {
        let mut owners: BTreeMap<String, Vec<IpAddr>> = BTreeMap::new();
        for (address, owner) in &self.lock().owners {
            owners.entry(owner.clone()).or_default().push(*address);
        }
        owners
    }

    /// How many addresses are taken, of all families.
    pub fn taken(&self) -> usize {
        self.lock().owners.len()
    }

    /// Removes the directory of a store without taken addresses.
    ///
    /// # Errors
    /// [`Error::File`], also when the directory holds something else.
    pub fn remove(self) -> Result<(), Error> {
        match fs::remove_dir(&self.directory) {
            Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(source) => {
                Err(Error::File { operation: "remove the directory", path: self.directory, source })
            }
            Ok(()) => Ok(()),
        }
    }

    /// A panic elsewhere leaves the map as it was before or after one whole change, so it remains
    /// usable.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Claims the next free address of a range.
    fn take(&self, state: &mut State, position: usize, sandbox_id: &str) -> Result<IpAddr, Error> {
        let (range, mut candidate) = state.ranges[position];
        let mut taken = state.owners.keys().filter(|address| range.contains(**address)).count();
        let reserved = state.reserved.iter().filter(|address| range.contains(**address)).count();
        let mut tried = 0;
        // Among one more addresses than are taken one is free, unless the circle is shorter than
        // that.
        while tried <= taken + reserved {
            if !state.reserved.contains(&candidate)
                && let Entry::Vacant(vacant) = state.owners.entry(candidate)
            {
                let owner = self.claim(candidate, sandbox_id)?;
                let ours = owner == sandbox_id;
                vacant.insert(owner);
                if ours {
                    state.ranges[position].1 = range.after(candidate);
                    return Ok(candidate);
                }
                taken += 1;
            }
            candidate = range.after(candidate);
            tried += 1;
        }
        Err(Error::Exhausted { first: range.first(), taken })
    }

    /// Creates the record of an address and returns its owner: the sandbox, or the owner in an
    /// existing record that is not in the map.
    fn claim(&self, address: IpAddr, sandbox_id: &str) -> Result<String, Error> {
        let path = self.path(address);
        let fail = |operation, source| Error::File { operation, path: path.clone(), source };
        let mut file = match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path) {
            Ok(file) => file,
            Err(source) if source.kind() == io::ErrorKind::AlreadyExists => {
                // No sandbox is called "", so a record without an owner is removed at the next
                // reconcile.
                let read = read_owner(&path).map_err(|source| fail("read the record", source))?;
                return Ok(read.map(|(owner, _)| owner).unwrap_or_default());
            }
            Err(source) => return Err(fail("create the record", source)),
        };
        file.write_all(sandbox_id.as_bytes()).map_err(|source| {
            // The write's failure (a full disk) is the one to report; a broken record is removed at
            // the next start anyway.
            let _ = fs::remove_file(&path);
            fail("write the record", source)
        })?;
        Ok(sandbox_id.to_owned())
    }

    fn release_all(&self, state: &mut State, addresses: Vec<IpAddr>) -> Result<Vec<IpAddr>, Error> {
        let mut failure = None;
        let mut freed = Vec::with_capacity(addresses.len());
        for address in addresses {
            match self.release(state, address) {
                Ok(()) => freed.push(address),
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        failure.map_or(Ok(freed), Err)
    }

    /// Removes a record from the disk, then from the map.
    fn release(&self, state: &mut State, address: IpAddr) -> Result<(), Error> {
        let path = self.path(address);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(Error::File { operation: "remove the record", path, source })
            }
            _ => {
                state.owners.remove(&address);
                state.unread.remove(&address);
                Ok(())
            }
        }
    }

    fn path(&self, address: IpAddr) -> PathBuf {
        self.directory.join(address.to_string())
    }
}

impl State {
    fn of(&self, sandbox_id: &str) -> Vec<IpAddr> {
        self.owners.iter().filter(|(_, owner)| *owner == sandbox_id).map(|(address, _)| *address).collect()
    }
}

/// Parses an address in the one spelling that the store itself uses, so that no two files mean the
/// same address.
fn canonical_address(name: &str) -> Option<IpAddr> {
    name.parse::<IpAddr>().ok().filter(|address| address.to_string() == name)
}

fn write_owner(path: &Path, owner: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(owner.as_bytes())
}

/// The owner in a record and the time it was written; `None` when the content is not a sandbox id.
fn read_owner(path: &Path) -> io::Result<Option<(String, SystemTime)>> {
    // A longer file is not a record; reading one byte more than the longest record detects it.
    const BOUND: u64 = identity::MAX_SANDBOX_ID as u64 + 1;
    let file = File::open(path)?;
    let written = file.metadata()?.modified()?;
    let mut bytes = Vec::new();
    file.take(BOUND).read_to_end(&mut bytes)?;
    let owner = String::from_utf8(bytes).ok().filter(|owner| identity::is_sandbox_id(owner));
    Ok(owner.map(|owner| (owner, written)))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const SMALL: Range = Range::Ipv4(Ipv4Addr::new(10, 0, 0, 2), Ipv4Addr::new(10, 0, 0, 6));
    const WIDE: Range = Range::Ipv6(
        Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2),
        Ipv6Addr::new(0xfd00, 0, 0, 0, 0xffff, 0xffff, 0xffff, 0xffff),
    );

    fn id(number: usize) -> String {
        format!("{number:064x}")
    }

    fn files(directory: &Path) -> BTreeSet<String> {
        fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    #[test]
    fn a_record_that_was_lost_is_made_again_and_one_that_cannot_be_read_keeps_its_address() {
        let directory = tempfile::tempdir().unwrap();
        let [lost, flipped, taken] = [2, 3, 4].map(|last| IpAddr::from([10, 0, 0, last]));
        fs::write(directory.path().join(flipped.to_string()), id(99)).unwrap();
        fs::write(directory.path().join(taken.to_string()), id(8)).unwrap();
        fs::create_dir(directory.path().join("10.0.0.5")).unwrap();
        let store = AddressStore::open(directory.path(), &[SMALL]).unwrap();
        assert_eq!(store.unread(), [IpAddr::from([10, 0, 0, 5])]);
        let known = |owner: &str| [id(7), id(8)].contains(&owner.to_owned());
        assert_eq!(store.restore(&id(7), &[lost, flipped, taken], known).unwrap(), [lost, flipped]);
        assert!(store.restore(&id(7), &[lost, flipped, taken], known).unwrap().is_empty());
        let living = [id(7), id(8)];
        let living: HashSet<&str> = living.iter().map(String::as_str).collect();
        assert!(store.dead(&living).is_empty() && store.reconcile(&living).unwrap().is_empty());
        let again = AddressStore::open(directory.path(), &[SMALL]).unwrap();
        assert_eq!((again.of(&id(7)), again.of(&id(8))), (vec![lost, flipped], vec![taken]));
        // One address is left, since the owner of the unreadable one is unknown.
        assert_eq!(again.allocate(&id(10)).unwrap(), [IpAddr::from([10, 0, 0, 6])]);
        assert!(matches!(again.allocate(&id(11)), Err(Error::Exhausted { .. })));
        let dead = again.dead(&HashSet::new());
        assert_eq!(dead.len(), 3);
        assert_eq!(again.free_of(&id(7), &dead[&id(7)]).unwrap(), [lost, flipped]);
        assert!(again.free_of(&id(7), &dead[&id(8)]).unwrap().is_empty(), "it is another's");
    }

    #[test]
    fn each_sandbox_gets_one_address_of_each_family_and_gives_both_back() {
        let directory = tempfile::tempdir().unwrap();
        let store = AddressStore::open(directory.path(), &[SMALL, WIDE]).unwrap();
        let addresses = store.allocate(&id(1)).unwrap();
        assert_eq!(addresses, ["10.0.0.2", "fd00::2"].map(|text| text.parse::<IpAddr>().unwrap()));
        assert_eq!(fs::read_to_string(directory.path().join("fd00::2")).unwrap(), id(1));
        assert_eq!(store.of(&id(1)), addresses);
        assert_eq!(store.free(&id(1)).unwrap(), addresses);
        assert_eq!(store.free(&id(1)).unwrap(), Vec::<IpAddr>::new());
        assert!(files(directory.path()).is_empty());
    }

    #[test]
    fn a_freed_address_rests_until_the_circle_comes_round() {
        let directory = tempfile::tempdir().unwrap();
        let store = AddressStore::open(directory.path(), &[SMALL]).unwrap();
        let mut seen = Vec::new();
        for number in 0..6 {
            seen.push(store.allocate(&id(number)).unwrap()[0].to_string());
            store.free(&id(number)).unwrap();
        }
        assert_eq!(seen, ["10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.6", "10.0.0.2"]);
    }

    #[test]
    fn when_one_family_is_exhausted_nothing_of_the_other_is_kept() {
        let directory = tempfile::tempdir().unwrap();
        let store = AddressStore::open(directory.path(), &[WIDE, SMALL]).unwrap();
        for number in 0..5 {
            store.allocate(&id(number)).unwrap();
        }
        let error = store.allocate(&id(5)).unwrap_err();
        assert!(matches!(error, Error::Exhausted { taken: 5, .. }), "{error}");
        assert_eq!(files(directory.path()).len(), 10);
        store.free(&id(3)).unwrap();
        assert_eq!(store.allocate(&id(5)).unwrap()[1].to_string(), "10.0.0.5");
    }

    #[test]
    fn a_sandbox_cannot_take_a_second_pair() {
        let directory = tempfile::tempdir().unwrap();
        let store = AddressStore::open(directory.path(), &[SMALL]).unwrap();
        store.allocate(&id(1)).unwrap();
        assert!(matches!(store.allocate(&id(1)), Err(Error::Owned { .. })));
        assert_eq!(store.taken(), 1);
    }

    #[test]
    fn odd_ids_touch_no_file() {
        let directory = tempfile::tempdir().unwrap();
        let store = AddressStore::open(directory.path(), &[SMALL]).unwrap();
        for text in ["", " ", "../../../../etc", "0123456789\0", "0123456789ABCDEF", &"a".repeat(1 << 20)] {
            assert!(matches!(store.allocate(text), Err(Error::SandboxId { .. })));
            assert_eq!(store.free(text).unwrap(), Vec::<IpAddr>::new());
        }
        assert!(files(directory.path()).is_empty());
    }

    #[test]
    fn crash_leftovers_are_collected_and_strangers_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let put = |name: &str, content: &[u8]| fs::write(directory.path().join(name), content).unwrap();
        put("10.0.0.2", b"");
        put("10.0.0.3", b"\xff\xfe");
        put("10.0.0.4", &[b'a'; 1 << 16]);
        put("10.0.0.5", id(7).as_bytes());
        put("10.9.9.9", id(8).as_bytes());
        put("10.0.0.02", id(9).as_bytes());
        put("notes", b"keep me");
        let store = AddressStore::open(directory.path(), &[SMALL]).unwrap();
        let left: Vec<String> = files(directory.path()).into_iter().collect();
        assert_eq!(left, ["10.0.0.02", "10.0.0.5", "10.9.9.9", "notes"]);
        // Behind the newest record of the range.
        assert_eq!(store.allocate(&id(1)).unwrap()[0].to_string(), "10.0.0.6");
        let living = id(1);
        let freed = store.reconcile(&HashSet::from([living.as_str()])).unwrap();
        assert_eq!(freed.iter().map(IpAddr::to_string).collect::<Vec<_>>(), ["10.0.0.5", "10.9.9.9"]);
        assert_eq!(store.taken(), 1);
    }

    #[test]
    fn a_store_opened_again_knows_its_owners() {
        let directory = tempfile::tempdir().unwrap();
        let before = AddressStore::open(directory.path(), &[SMALL, WIDE]).unwrap().allocate(&id(1)).unwrap();
        let store = AddressStore::open(directory.path(), &[SMALL, WIDE]).unwrap();
        assert_eq!(store.of(&id(1)), before);
        assert!(!store.allocate(&id(2)).unwrap().iter().any(|address| before.contains(address)));
    }

    #[test]
    fn a_file_that_appeared_behind_the_stores_back_is_not_given_out() {
        let directory = tempfile::tempdir().unwrap();
        let store = AddressStore::open(directory.path(), &[SMALL]).unwrap();
        fs::write(directory.path().join("10.0.0.2"), id(9)).unwrap();
        assert_eq!(store.allocate(&id(1)).unwrap()[0].to_string(), "10.0.0.3");
        assert_eq!(store.of(&id(9)).len(), 1);
    }

    #[test]
    fn eight_threads_never_share_an_address() {
        let directory = tempfile::tempdir().unwrap();
        let range = Range::Ipv4(Ipv4Addr::new(10, 0, 0, 2), Ipv4Addr::new(10, 0, 1, 254));
        let store = AddressStore::open(directory.path(), &[range, WIDE]).unwrap();
        let all: Vec<IpAddr> = std::thread::scope(|scope| {
            let store = &store;
            let workers: Vec<_> = (0..8)
                .map(|worker| {
                    scope.spawn(move || {
                        let mut kept = Vec::new();
                        for number in 0..30 {
                            let owner = id(worker * 1000 + number);
                            kept.extend(store.allocate(&owner).unwrap());
                            let passing = id(worker * 1000 + 500 + number);
                            store.allocate(&passing).unwrap();
                            store.free(&passing).unwrap();
                        }
                        kept
                    })
                })
                .collect();
            workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect()
        });
        assert_eq!(all.len(), 8 * 30 * 2);
        assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), all.len());
        assert_eq!(files(directory.path()).len(), all.len());
    }

    #[derive(Debug, Clone)]
    enum Step {
        Allocate(usize),
        Free(usize),
        Restart,
        Reconcile(Vec<usize>),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            5 => (0_usize..8).prop_map(Step::Allocate),
            3 => (0_usize..8).prop_map(Step::Free),
            1 => Just(Step::Restart),
            1 => proptest::collection::vec(0_usize..8, 0..8).prop_map(Step::Reconcile),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn disk_memory_and_model_agree_after_any_steps(steps in proptest::collection::vec(step(), 1..60)) {
            let directory = tempfile::tempdir().unwrap();
            let mut store = AddressStore::open(directory.path(), &[SMALL]).unwrap();
            let mut model: BTreeMap<usize, IpAddr> = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Allocate(number) => match store.allocate(&id(number)) {
                        Ok(addresses) => {
                            prop_assert!(SMALL.contains(addresses[0]));
                            prop_assert!(!model.values().any(|taken| *taken == addresses[0]));
                            prop_assert!(model.insert(number, addresses[0]).is_none());
                        }
                        Err(Error::Owned { .. }) => prop_assert!(model.contains_key(&number)),
                        Err(Error::Exhausted { .. }) => prop_assert_eq!(model.len(), 5),
                        Err(error) => prop_assert!(false, "{}", error),
                    },
                    Step::Free(number) => {
                        let freed = store.free(&id(number)).unwrap();
                        prop_assert_eq!(freed, model.remove(&number).into_iter().collect::<Vec<_>>());
                    }
                    Step::Restart => store = AddressStore::open(directory.path(), &[SMALL]).unwrap(),
                    Step::Reconcile(living) => {
                        let names: Vec<String> = living.iter().map(|number| id(*number)).collect();
                        store.reconcile(&names.iter().map(String::as_str).collect()).unwrap();
                        model.retain(|number, _| living.contains(number));
                    }
                }
                let expected: BTreeSet<String> = model.values().map(IpAddr::to_string).collect();
                prop_assert_eq!(files(directory.path()), expected);
                prop_assert_eq!(store.taken(), model.len());
            }
        }
    }
}
