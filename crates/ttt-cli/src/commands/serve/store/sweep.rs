//! Bytes that nothing names: what a server leaves that is killed between writing the two objects of a state, or within one.

use std::collections::{BTreeMap, HashSet};
use std::path::Path as Folder;
use std::time::{Duration, SystemTime};

use futures_util::TryStreamExt;
use object_store::ObjectStoreExt;
use object_store::path::Path;

use super::{Description, Error, Store};
use crate::commands::serve::auth::Owner;
use crate::commands::serve::snapshots::unhex;

/// Bytes that are younger are left alone: another server may be about to describe them, and clocks may differ.
pub const AGE: Duration = Duration::from_secs(24 * 3600);

/// What was deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Objects, and files that were written in part.
    pub objects: usize,
    /// Their size.
    pub bytes: u64,
}

impl Store {
    /// Deletes what is older than `age` and what no description names. Servers that use the store meanwhile lose nothing: they
    /// write bytes and description right after each other, and never describe bytes again whose description was deleted.
    pub async fn sweep(&self, age: Duration) -> Result<Swept, Error> {
        let before = SystemTime::now() - age;
        let mut swept = match &self.folder {
            Some(folder) => sweep_parts(folder, before),
            None => Swept::default(),
        };
        // Bytes are listed before descriptions, so that those of old bytes have long been there.
        let mut old: BTreeMap<String, Vec<(Path, u64)>> = BTreeMap::new();
        let mut all = self.objects.list(Some(&self.prefix));
        while let Some(meta) = all.try_next().await? {
            if let Some((owner, _)) = self.bytes_of(&meta.location).filter(|_| SystemTime::from(meta.last_modified) < before) {
                old.entry(owner).or_default().push((meta.location, meta.size));
            }
        }
        for (owner, places) in old {
            let Some(named) = self.named(&Owner(owner)).await? else { continue };
            for (place, size) in places {
                if self.bytes_of(&place).is_some_and(|(_, name)| !named.contains(&name)) {
                    match self.objects.delete(&place).await {
                        Ok(()) => swept = Swept { objects: swept.objects + 1, bytes: swept.bytes + size },
                        // Another server was faster.
                        Err(object_store::Error::NotFound { .. }) => {}
                        Err(e) => return Err(e.into()),
                    }
                }
            }
        }
        Ok(swept)
    }

    /// Owner and name of a place that holds the bytes of a state; other places are not ours.
    fn bytes_of(&self, place: &Path) -> Option<(String, String)> {
        let mut parts = place.prefix_match(&self.prefix)?;
        let (owner, name) = (parts.next()?, parts.next()?);
        let name = name.as_ref().to_owned();
        let ours = parts.next().is_none() && unhex::<16>(name.strip_suffix(".state")?).is_some();
        ours.then(|| (owner.as_ref().to_owned(), name))
    }

    /// The bytes that an owner's descriptions name; none when one of them cannot be read, which may name any.
    async fn named(&self, owner: &Owner) -> Result<Option<HashSet<String>>, Error> {
        let mut named = HashSet::new();
        for place in self.descriptions(owner).await? {
            match self.objects.get(&place).await {
                Ok(found) => match serde_json::from_slice::<Description>(&found.bytes().await?) {
                    Ok(description) => drop(named.insert(description.data)),
                    Err(_) => return Ok(None),
                },
                // Another server deleted the state just now, and deletes its bytes next.
                Err(object_store::Error::NotFound { .. }) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(Some(named))
    }
}

/// Deletes the old ones of the files that a folder's store writes before it renames them (`NAME#NUMBER`), which it does not list.
fn sweep_parts(folder: &Folder, before: SystemTime) -> Swept {
    let mut swept = Swept::default();
    let owners = std::fs::read_dir(folder).into_iter().flatten().flatten();
    for entry in owners.filter_map(|owner| std::fs::read_dir(owner.path()).ok()).flatten().flatten() {
        let name = entry.file_name();
        let part = name.to_str().and_then(|name| name.rsplit_once('#'));
        let ours = part
            .is_some_and(|(name, number)| (name.ends_with(".state") || name.ends_with(".json")) && number.parse::<u32>().is_ok());
        let Some(meta) = entry.metadata().ok().filter(|meta| ours && meta.modified().is_ok_and(|at| at < before)) else { continue };
        if std::fs::remove_file(entry.path()).is_ok() {
            swept = Swept { objects: swept.objects + 1, bytes: swept.bytes + meta.len() };
        }
    }
    swept
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::serve::store::About;

    const HOUR: Duration = Duration::from_secs(3600);

    /// Writes a file that is so old.
    fn aged(path: std::path::PathBuf, age: Duration) {
        if !path.exists() {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, [1; 10]).unwrap();
        }
        std::fs::File::options().write(true).open(&path).unwrap().set_modified(SystemTime::now() - age).unwrap();
    }

    #[tokio::test]
    async fn only_old_bytes_go_that_nothing_names() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path().to_str().unwrap(), 9).unwrap();
        let [me, you] = ["aa", "bb"].map(|o| Owner(o.into()));
        let about = || About { tokens: 7, pending: 1, model: "hash".into() };
        let kept = store.put(&me, None, None, about(), vec![1; 9]).await.unwrap();
        let theirs = store.put(&you, None, None, about(), vec![2; 9]).await.unwrap();
        let place = |owner: &str, name: &str| folder.path().join(owner).join(name);
        for (owner, description) in [("aa", &kept), ("bb", &theirs)] {
            aged(place(owner, &description.data), 48 * HOUR);
        }
        let [orphan, young, foreign] =
            [format!("{}.state", "0f".repeat(16)), format!("{}.state", "1e".repeat(16)), "notes.state".to_owned()];
        aged(place("aa", &orphan), 25 * HOUR);
        aged(place("aa", &young), 23 * HOUR);
        aged(place("aa", &foreign), 48 * HOUR);
        aged(place("aa", "x.state#1"), 25 * HOUR);
        aged(place("aa", "x.json#12"), 23 * HOUR);
        // One description of this owner cannot be read: who knows what it names.
        aged(place("bb", &orphan), 25 * HOUR);
        std::fs::write(place("bb", "damaged.json"), "{\"id\": ").unwrap();

        assert_eq!(store.sweep(AGE).await.unwrap(), Swept { objects: 2, bytes: 20 });
        for (owner, name, there) in [
            ("aa", orphan.as_str(), false),
            ("aa", "x.state#1", false),
            ("aa", young.as_str(), true),
            ("aa", foreign.as_str(), true),
            ("aa", "x.json#12", true),
            ("bb", orphan.as_str(), true),
        ] {
            assert_eq!(place(owner, name).exists(), there, "{owner}/{name}");
        }
        assert_eq!(store.read(&me, &kept).await.unwrap(), [1; 9]);
        assert_eq!(store.read(&you, &theirs).await.unwrap(), [2; 9]);
        assert_eq!(store.sweep(AGE).await.unwrap(), Swept::default());
    }
}
