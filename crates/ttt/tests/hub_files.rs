//! Single files: damaged and hostile safetensors, and writing that fails half way.

use std::fs;
use std::io::{self, Read};
use std::path::Path;

use tempfile::TempDir;
use ttt::Error;
use ttt::hub::safetensors::{Dtype, File, Source, write};
use ttt::hub::{write_atomic, write_folder};

fn file(length: u64, header: &[u8], data: usize) -> Vec<u8> {
    [&length.to_le_bytes()[..], header, &vec![0; data]].concat()
}

fn with_header(header: &str, data: usize) -> Vec<u8> {
    file(header.len() as u64, header.as_bytes(), data)
}

fn open(bytes: &[u8]) -> Result<File, String> {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("x.safetensors");
    fs::write(&path, bytes).unwrap();
    File::open(&path).map_err(|e| {
        assert!(matches!(&e, Error::Format { path: p, .. } if *p == path), "{e:?}");
        e.to_string()
    })
}

fn refused(bytes: &[u8], message: &str) {
    match open(bytes) {
        Err(error) => assert!(error.contains(message), "`{message}` is not in `{error}`"),
        Ok(_) => panic!("was read, but `{message}` was expected"),
    }
}

fn entries(dir: &Path) -> Vec<String> {
    fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn hostile_headers_are_refused() {
    refused(b"", "0 bytes are too few");
    refused(b"1234567", "7 bytes are too few");
    refused(&file(u64::MAX, b"{}", 0), "header should have 18446744073709551615 bytes");
    refused(&file(u64::MAX - 7, b"{}", 0), "header should have");
    refused(&file(1 << 40, b"{}", 100), "header should have 1099511627776 bytes");
    refused(&file(3, b"{}", 0), "header should have 3 bytes");
    refused(&file(0, b"", 0), "header is wrong");
    refused(&with_header("not json", 0), "header is wrong");
    refused(&with_header("[]", 0), "an object of tensors");
    refused(&file(2, b"\xff\xfe", 0), "header is wrong");
    refused(&with_header(&"[".repeat(100_000), 0), "header is wrong");
    refused(&with_header(&format!("{{\"a\":{}", "[".repeat(100_000)), 0), "header is wrong");
    let one = |entry: &str, data: usize| with_header(&format!("{{\"a\":{entry}}}"), data);
    refused(&one(r#"{"dtype":"F33","shape":[1],"data_offsets":[0,4]}"#, 4), "unknown variant `F33`");
    refused(&one(r#"{"shape":[1],"data_offsets":[0,4]}"#, 4), "missing field `dtype`");
    refused(&one(r#"{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}"#, 4), "header is wrong");
    refused(&one(r#"{"dtype":"F32","shape":[1],"data_offsets":[0]}"#, 4), "header is wrong");
    refused(&one(r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#, 3), "bytes 0..4 of 3");
    refused(&one(r#"{"dtype":"F32","shape":[1],"data_offsets":[0,18446744073709551615]}"#, 4), "of 4");
    refused(&one(r#"{"dtype":"F32","shape":[1],"data_offsets":[4,0]}"#, 4), "bytes 4..0 of 4");
    refused(&one(r#"{"dtype":"F32","shape":[1],"data_offsets":[4,8]}"#, 8), "leaves a gap");
    refused(&one(r#"{"dtype":"F32","shape":[2],"data_offsets":[0,4]}"#, 4), "4 bytes, which do not fit F32 [2]");
    refused(&one(r#"{"dtype":"F32","shape":[],"data_offsets":[0,8]}"#, 8), "8 bytes, which do not fit F32 []");
    refused(&one(r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#, 8), "end at byte 4 of 8");
    // 2^32 * 2^32 elements wrap to 0 in 64 bits, (2^62 + 1) * 4 bytes to 4.
    refused(&one(r#"{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}"#, 0), "do not fit");
    refused(&one(r#"{"dtype":"F32","shape":[4611686018427387905],"data_offsets":[0,4]}"#, 4), "do not fit");
    let two = |a: &str, b: &str| {
        let tensor = |name: &str, at: &str| format!(r#""{name}":{{"dtype":"F32","shape":[1],"data_offsets":{at}}}"#);
        with_header(&format!("{{{},{}}}", tensor("a", a), tensor(if b == "[0,4]" { "a" } else { "b" }, b)), 8)
    };
    refused(&two("[0,4]", "[2,6]"), "overlaps");
    refused(&two("[0,4]", "[0,4]"), "two tensors are called `a`");
    assert!(open(&two("[4,8]", "[0, 4]")).is_ok(), "the order in the header is free");
    assert!(open(&with_header("{\"__metadata__\":null}", 0)).is_ok());
    refused(&with_header("{\"__metadata__\":{\"a\":1}}", 0), "header is wrong");
}

/// Every truncation and many single damaged bytes: an error or other values, never a panic.
#[test]
fn damaged_files_never_panic() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("x.safetensors");
    let (x, ids) = ([1.0f32, -2.0, 3.5], [7u32, 8]);
    write(&path, &[("step", "3".into())], vec![Source::floats("a", Dtype::BF16, &[3, 1], &x), Source::u32s("b", &[2], &ids)])
        .unwrap();
    let good = fs::read(&path).unwrap();
    let read = |bytes: &[u8]| {
        if let Ok(file) = open(bytes) {
            for name in file.names() {
                let tensor = file.tensor(name).unwrap();
                let _ = (tensor.to_vec::<f32>(), tensor.to_u32());
            }
            true
        } else {
            false
        }
    };
    assert!(read(&good));
    for length in 0..good.len() {
        assert!(!read(&good[..length]), "cut to {length} bytes");
    }
    for at in 0..good.len() {
        for mask in [1, 2, 4, 16, 0x80, 0xff] {
            let mut bad = good.clone();
            bad[at] ^= mask;
            read(&bad);
        }
    }
}

#[test]
fn what_is_no_file_is_refused() {
    let dir = TempDir::new().unwrap();
    let error = File::open(dir.path()).map(|_| ()).unwrap_err();
    assert!(matches!(&error, Error::Io { path, .. } if path == dir.path()) && error.to_string().contains("folder"), "{error}");
    let absent = dir.path().join("absent");
    assert!(matches!(File::open(&absent), Err(Error::Io { path, .. }) if path == absent));
}

#[test]
fn values_metadata_and_layout_are_as_the_format_says() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("x.safetensors");
    let nan = f32::from_bits(0x7f80_0001);
    let (x, empty, ids) = ([1.5f32, nan, f32::NEG_INFINITY, -0.0], [0f32; 0], [-1i64, 1 << 40]);
    let sources = vec![
        Source::floats("half", Dtype::F16, &[4], &[1.0f32, f32::INFINITY, 65_504.0, 1e-7]),
        Source::floats("b", Dtype::F32, &[2, 2], &x),
        Source::floats("a", Dtype::F32, &[0, 3], &empty),
        Source::i64s("ids", &[2], &ids),
        Source::floats("scalar", Dtype::F32, &[], &x[..1]),
    ];
    write(&path, &[("step", "3".into())], sources).unwrap();
    let bytes = fs::read(&path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    assert_eq!(header % 8, 0);
    let file = File::open(&path).unwrap();
    assert_eq!(file.metadata().iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>(), ["format=pt", "step=3"]);
    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&file.tensor("b").unwrap().to_vec::<f32>().unwrap()), bits(&x));
    assert_eq!(file.tensor("half").unwrap().to_vec::<f32>().unwrap(), [1.0, f32::INFINITY, 65_504.0, 1.192_092_9e-7]);
    assert_eq!(file.tensor("ids").unwrap().to_i64().unwrap(), ids);
    assert!(file.tensor("ids").unwrap().to_u32().unwrap_err().to_string().contains("`ids` holds -1"));
    assert_eq!((file.tensor("a").unwrap().elements(), file.tensor("scalar").unwrap().elements()), (0, 1));
    // The library of the format's authors agrees.
    let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(theirs.len(), 5);
    assert_eq!(theirs.tensor("b").unwrap().data(), file.tensor("b").unwrap().bytes);
    assert_eq!(theirs.tensor("half").unwrap().shape(), [4]);
}

/// A tie decided by the low bits of an f32 must not be lost on the way to bf16.
#[test]
fn bf16_is_rounded_to_nearest_even() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("x.safetensors");
    let x = [0x3f80_8000, 0x3f80_8001, 0x3f81_8000, 0x3f80_7fff].map(f32::from_bits);
    write(&path, &[], vec![Source::floats("x", Dtype::BF16, &[4], &x)]).unwrap();
    let back = File::open(&path).unwrap().tensor("x").unwrap().to_vec::<f32>().unwrap();
    assert_eq!(back.iter().map(|x| x.to_bits() >> 16).collect::<Vec<_>>(), [0x3f80, 0x3f81, 0x3f82, 0x3f80]);
}

#[test]
#[should_panic(expected = "two tensors are called `x`")]
fn one_name_for_two_tensors_is_a_bug() {
    let dir = TempDir::new().unwrap();
    let x = || Source::floats("x", Dtype::F32, &[1], &[1.0f32]);
    let _ = write(dir.path().join("x"), &[], vec![x(), x()]);
}

#[test]
#[should_panic(expected = "bytes its shape needs")]
fn too_few_bytes_are_a_bug() {
    let dir = TempDir::new().unwrap();
    let _ = write(dir.path().join("x"), &[], vec![Source::floats("x", Dtype::F32, &[2], &[1.0f32])]);
}

#[test]
fn a_failed_write_keeps_the_old_file_and_leaves_nothing() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("x");
    write_atomic(&path, |w| w.write_all(b"old")).unwrap();
    let error = write_atomic(&path, |w| {
        w.write_all(&vec![1; 3 << 20])?;
        Err(io::Error::other("disk on fire"))
    });
    assert_eq!(error.unwrap_err().to_string(), format!("{}: disk on fire", path.display()));
    assert_eq!((fs::read(&path).unwrap(), entries(dir.path())), (b"old".to_vec(), vec!["x".to_owned()]));
    write_atomic(&path, |w| w.write_all(b"new")).unwrap();
    assert_eq!((fs::read(&path).unwrap(), entries(dir.path())), (b"new".to_vec(), vec!["x".to_owned()]));
    let nowhere = dir.path().join("no/x");
    let error = write_atomic(&nowhere, |_| panic!("there is nowhere to write to")).unwrap_err();
    assert!(matches!(error, Error::Io { path, .. } if path == nowhere));
    assert!(matches!(write_atomic(dir.path(), |_| Ok(())), Err(Error::Io { path, .. }) if path == dir.path()));
}

/// Names of the longest kind must work although the temporary name is another one.
#[test]
fn the_longest_file_name_can_be_written() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("x".repeat(255));
    write_atomic(&path, |w| w.write_all(b"y")).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"y");
}

#[cfg(unix)]
#[test]
fn links_pipes_and_modes_are_respected() {
    use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
    let dir = TempDir::new().unwrap();
    let (shared, link) = (dir.path().join("shared"), dir.path().join("link"));
    fs::write(&shared, "shared").unwrap();
    symlink(&shared, &link).unwrap();
    write_atomic(&link, |w| w.write_all(b"own")).unwrap();
    assert_eq!((fs::read(&shared).unwrap(), fs::read(&link).unwrap()), (b"shared".to_vec(), b"own".to_vec()));
    // As readable as any other new file, not as private as a temporary one.
    assert_eq!(fs::metadata(&link).unwrap().permissions().mode(), fs::metadata(&shared).unwrap().permissions().mode());
    // Renaming over a pipe or a device would destroy it.
    let pipe = dir.path().join("pipe");
    let name = std::ffi::CString::new(pipe.to_str().unwrap()).unwrap();
    // SAFETY: a plain system call on a valid string.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    let mut reader = fs::OpenOptions::new().read(true).write(true).open(&pipe).unwrap();
    write_atomic(&pipe, |w| w.write_all(b"sent")).unwrap();
    let mut sent = [0; 4];
    reader.read_exact(&mut sent).unwrap();
    assert_eq!(&sent, b"sent");
    assert!(fs::metadata(&pipe).unwrap().file_type().is_fifo());
    // Nor is a pipe waited for, when it is offered as a file to read.
    assert!(matches!(File::open(&pipe), Err(Error::Io { path, .. }) if path == pipe));
}

#[test]
fn a_folder_is_replaced_whole_or_not_at_all() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("model");
    let build = |name: &'static str| move |tmp: &Path| write_atomic(tmp.join(name), |w| w.write_all(b"x"));
    write_folder(&path, build("first")).unwrap();
    assert_eq!(entries(&path), ["first"]);
    let error = write_folder(&path, |tmp| {
        build("second")(tmp)?;
        fs::create_dir(tmp.join("sub")).unwrap();
        Err(Error::io(tmp.join("sub/file"), io::Error::other("no")))
    });
    assert_eq!(error.unwrap_err().to_string(), format!("{}: no", fs::canonicalize(&path).unwrap().join("sub/file").display()));
    assert_eq!((entries(&path), entries(dir.path())), (vec!["first".to_owned()], vec!["model".to_owned()]));
    write_folder(&path, build("third")).unwrap();
    assert_eq!((entries(&path), entries(dir.path())), (vec!["third".to_owned()], vec!["model".to_owned()]));
    let file = path.join("third");
    assert!(write_folder(&file, |_| panic!("a file is in the way")).unwrap_err().to_string().contains("this is a file"));
    assert!(matches!(write_folder(dir.path().join("no/model"), build("x")), Err(Error::Io { .. })));
}

/// The system refuses to write on: EFBIG, which stands for a full disk too. Runs in a child, because the limit cannot be raised again.
#[cfg(unix)]
#[test]
fn a_full_disk_is_an_error_and_leaves_nothing() {
    const DIR: &str = "TTT_TEST_FULL_DISK";
    if let Ok(dir) = std::env::var(DIR) {
        let limit = libc::rlimit { rlim_cur: 64 << 10, rlim_max: 64 << 10 };
        // SAFETY: plain system calls; the default action of SIGXFSZ would end the process before write returns.
        unsafe {
            assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &limit), 0);
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        }
        let path = Path::new(&dir).join("x.safetensors");
        let values = vec![1.0f32; 1 << 20];
        let error = write(&path, &[], vec![Source::floats("x", Dtype::F32, &[1 << 20], &values)]).unwrap_err();
        assert!(
            matches!(&error, Error::Io { path: p, source } if *p == path && source.raw_os_error() == Some(libc::EFBIG)),
            "{error:?}"
        );
        let folder = Path::new(&dir).join("model");
        let tensors = || vec![Source::floats("x", Dtype::BF16, &[1 << 20], &values)];
        let error = write_folder(&folder, |tmp| write(tmp.join("y"), &[], tensors())).unwrap_err();
        assert!(matches!(&error, Error::Io { path, .. } if *path == folder.join("y")), "{error:?}");
        let small = vec![Source::floats("x", Dtype::F32, &[3], &values[..3])];
        write(&path, &[], small).unwrap();
        return;
    }
    let dir = TempDir::new().unwrap();
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_full_disk_is_an_error_and_leaves_nothing", "--nocapture"])
        .env(DIR, dir.path())
        .output()
        .unwrap();
    assert!(child.status.success(), "{}{}", String::from_utf8_lossy(&child.stdout), String::from_utf8_lossy(&child.stderr));
    assert_eq!(entries(dir.path()), ["x.safetensors"]);
}
