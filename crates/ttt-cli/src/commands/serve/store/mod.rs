//! States that clients keep: in a folder, or in an object store that other servers use too.
//!
//! A state is two objects: its bytes under a random name, which never change, and a description that names them. The description
//! is written last and deleted first, each in one atomic step, so a server that is killed leaves the old or the new, at worst
//! bytes that nothing names, which the next server finds ([`sweep`]). Below an owner's own prefix a description's place is the hash of the state's id: no id ever becomes a
//! path, and nobody finds what another key made.

mod sweep;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::{Context, Result};
use futures_util::TryStreamExt;
use object_store::aws::AmazonS3Builder;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use ttt::state::StateHeader;

use super::auth::Owner;
use super::snapshots::{hex, private_folder};
use super::{random, seconds};
pub use sweep::AGE;

/// A state as clients see it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Description {
    /// Its id.
    pub id: String,
    /// What its owner calls it.
    pub name: Option<String>,
    /// Seconds since 1970.
    pub created: u64,
    /// Tokens that were read.
    pub tokens: u64,
    /// Tokens that were accepted but not read yet.
    pub pending: u64,
    /// Size of the state file.
    pub bytes: u64,
    /// Hash of the model that it belongs to.
    pub model: String,
    /// The state that it goes on from.
    pub parent: Option<String>,
    /// SHA-256 of the state file.
    pub sha256: String,
    /// Name of the object that holds the state file.
    data: String,
}

/// What a description takes from the header of a state file.
#[derive(Clone, Debug)]
pub struct About {
    tokens: u64,
    pending: u64,
    model: String,
}

impl From<&StateHeader> for About {
    fn from(header: &StateHeader) -> About {
        About { tokens: header.tokens, pending: header.pending.len() as u64, model: header.model.clone() }
    }
}

impl Description {
    /// For clients.
    pub fn json(&self) -> serde_json::Value {
        let mut value = serde_json::to_value(self).expect("plain data");
        let object = value.as_object_mut().expect("a struct");
        object.remove("data");
        object.insert("object".into(), "state".into());
        value
    }
}

/// Why a state could not be had.
#[derive(Debug)]
pub enum Error {
    /// There is none of that id that belongs to the owner.
    Unknown,
    /// The owner has as many as may be kept.
    Full(u64),
    /// What the store said.
    Storage(String),
}

impl From<object_store::Error> for Error {
    fn from(error: object_store::Error) -> Error {
        match error {
            object_store::Error::NotFound { .. } => Error::Unknown,
            other => Error::Storage(other.to_string()),
        }
    }
}

/// States of all owners.
pub struct Store {
    objects: Arc<dyn ObjectStore>,
    prefix: Path,
    /// Where they are, when that is a folder.
    folder: Option<PathBuf>,
    most: u64,
}

impl Store {
    /// The states in a folder, or under `s3://BUCKET/PREFIX`.
    ///
    /// # Errors
    /// A folder that cannot be made, or an address that cannot be understood.
    pub fn open(place: &str, most: u64) -> Result<Store> {
        if let Some(address) = place.strip_prefix("s3://") {
            // The only one in the tree; without a choice rustls has none.
            let _ = rustls::crypto::ring::default_provider().install_default();
            let (bucket, prefix) = address.split_once('/').unwrap_or((address, ""));
            let plain =
                ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"].iter().find_map(|name| std::env::var(name).ok());
            let plain = plain.is_some_and(|endpoint| endpoint.starts_with("http://"));
            let s3 = AmazonS3Builder::from_env().with_bucket_name(bucket).with_allow_http(plain).build();
            let s3 = s3.with_context(|| format!("--store {place}"))?;
            return Ok(Store { objects: Arc::new(s3), prefix: Path::parse(prefix)?, folder: None, most });
        }
        let folder = std::path::Path::new(place);
        let local =
            private_folder(folder).map_err(anyhow::Error::from).and_then(|()| Ok(LocalFileSystem::new_with_prefix(folder)?));
        let local = local.with_context(|| format!("cannot keep states in {place}"))?.with_fsync(true);
        Ok(Store { objects: Arc::new(local), prefix: Path::default(), folder: Some(folder.to_owned()), most })
    }

    /// Keeps a state file under a new id.
    pub async fn put(
        &self,
        owner: &Owner,
        name: Option<String>,
        parent: Option<String>,
        about: About,
        state: Vec<u8>,
    ) -> Result<Description, Error> {
        let count = self.descriptions(owner).await?.len() as u64;
        if count >= self.most {
            return Err(Error::Full(self.most));
        }
        let description = Description {
            id: format!("state-{}", hex(&random::<16>())),
            name,
            created: seconds(SystemTime::now()),
            tokens: about.tokens,
            pending: about.pending,
            bytes: state.len() as u64,
            model: about.model,
            parent,
            sha256: hex(&Sha256::digest(&state)),
            data: format!("{}.state", hex(&random::<16>())),
        };
        self.objects.put(&self.place(owner, &description.data), PutPayload::from(state)).await?;
        self.describe(owner, &description).await?;
        Ok(description)
    }

    /// The description of a state.
    pub async fn get(&self, owner: &Owner, id: &str) -> Result<Description, Error> {
        let bytes = self.objects.get(&self.description_place(owner, id)).await?.bytes().await?;
        let description: Description =
            serde_json::from_slice(&bytes).map_err(|e| Error::Storage(format!("a damaged description: {e}")))?;
        if description.id == id { Ok(description) } else { Err(Error::Unknown) }
    }

    /// The state file of a description.
    pub async fn read(&self, owner: &Owner, description: &Description) -> Result<Vec<u8>, Error> {
        let bytes = self.objects.get(&self.place(owner, &description.data)).await?.bytes().await?;
        if hex(&Sha256::digest(&bytes)) != description.sha256 {
            return Err(Error::Storage(format!("the file of state {} is damaged", description.id)));
        }
        Ok(bytes.to_vec())
    }

    /// All of an owner's states, the newest first.
    pub async fn list(&self, owner: &Owner) -> Result<Vec<Description>, Error> {
        let mut all = Vec::new();
        for place in self.descriptions(owner).await? {
            match self.objects.get(&place).await {
                Ok(found) => {
                    let bytes = found.bytes().await?;
                    all.extend(serde_json::from_slice::<Description>(&bytes).ok());
                }
                // Another server deleted it just now.
                Err(object_store::Error::NotFound { .. }) => {}
                Err(e) => return Err(e.into()),
            }
        }
        all.sort_by(|a, b| b.created.cmp(&a.created).then_with(|| a.id.cmp(&b.id)));
        Ok(all)
    }

    /// Gives a state another name.
    pub async fn rename(&self, owner: &Owner, id: &str, name: Option<String>) -> Result<Description, Error> {
        let description = Description { name, ..self.get(owner, id).await? };
        self.describe(owner, &description).await?;
        Ok(description)
    }

    /// Deletes a state.
    pub async fn delete(&self, owner: &Owner, id: &str) -> Result<(), Error> {
        let description = self.get(owner, id).await?;
        self.objects.delete(&self.description_place(owner, id)).await?;
        match self.objects.delete(&self.place(owner, &description.data)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    async fn describe(&self, owner: &Owner, description: &Description) -> Result<(), Error> {
        let bytes = serde_json::to_vec(description).expect("plain data");
        self.objects.put(&self.description_place(owner, &description.id), PutPayload::from(bytes)).await?;
        Ok(())
    }

    async fn descriptions(&self, owner: &Owner) -> Result<Vec<Path>, Error> {
        let prefix = self.prefix.clone().join(owner.0.as_str());
        let all: Vec<_> = self.objects.list(Some(&prefix)).map_ok(|meta| meta.location).try_collect().await?;
        Ok(all.into_iter().filter(|place| place.extension() == Some("json")).collect())
    }

    fn description_place(&self, owner: &Owner, id: &str) -> Path {
        self.place(owner, &format!("{}.json", hex(&Sha256::digest(id))))
    }

    fn place(&self, owner: &Owner, name: &str) -> Path {
        self.prefix.clone().join(owner.0.as_str()).join(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn about() -> About {
        About { tokens: 7, pending: 1, model: "hash".into() }
    }

    #[tokio::test]
    async fn states_belong_to_their_owners_and_ids_are_no_paths() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path().join("s").to_str().unwrap(), 3).unwrap();
        let [me, you] = ["aa", "bb"].map(|o| Owner(o.into()));
        let mine = store.put(&me, Some("book".into()), None, about(), vec![1; 9]).await.unwrap();
        assert_eq!(store.get(&me, &mine.id).await.unwrap(), mine);
        assert_eq!(store.read(&me, &mine).await.unwrap(), [1; 9]);
        assert!(matches!(store.get(&you, &mine.id).await, Err(Error::Unknown)));
        assert!(matches!(store.delete(&you, &mine.id).await, Err(Error::Unknown)));
        assert!(store.list(&you).await.unwrap().is_empty());
        for id in ["../aa", "/etc/passwd", "", "..", "state-", "a/b\0c"] {
            assert!(matches!(store.get(&me, id).await, Err(Error::Unknown)), "{id}");
        }
        let renamed = store.rename(&me, &mine.id, Some("../x".into())).await.unwrap();
        assert_eq!((renamed.name.as_deref(), renamed.id == mine.id), (Some("../x"), true));
        for _ in 0..2 {
            store.put(&me, None, None, about(), vec![2]).await.unwrap();
        }
        assert!(matches!(store.put(&me, None, None, about(), vec![2]).await, Err(Error::Full(3))));
        assert_eq!(store.list(&me).await.unwrap().len(), 3);
        store.delete(&me, &mine.id).await.unwrap();
        assert!(matches!(store.get(&me, &mine.id).await, Err(Error::Unknown)));
        // Bytes that do not fit their description are refused.
        let left = &store.list(&me).await.unwrap()[0];
        std::fs::write(folder.path().join("s/aa").join(&left.data), [9]).unwrap();
        assert!(matches!(store.read(&me, left).await, Err(Error::Storage(_))));
    }

    #[tokio::test]
    async fn bytes_without_a_description_are_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path().to_str().unwrap(), 3).unwrap();
        let me = Owner("aa".into());
        // What a server leaves that is killed between the two writes, or within one.
        std::fs::create_dir(folder.path().join("aa")).unwrap();
        std::fs::write(folder.path().join("aa/00.state"), [1]).unwrap();
        std::fs::write(folder.path().join("aa/00.json#1"), "{\"id\":").unwrap();
        assert!(store.list(&me).await.unwrap().is_empty());
        store.put(&me, None, None, about(), vec![1]).await.unwrap();
        assert_eq!(store.list(&me).await.unwrap().len(), 1);
    }
}
