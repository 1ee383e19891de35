//! Encrypted connections, with certificates made here: our ends and QEMU's, which is GnuTLS's.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

use crate::hostile::Client;
use crate::setup::{Server, Which, run, tool};

/// An authority's folder of certificates for both ends.
fn authority(folder: &Path, name: &str) -> PathBuf {
    let folder = folder.join(name);
    std::fs::create_dir(&folder).unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.distinguished_name.push(DnType::CommonName, name);
    let key = KeyPair::generate().unwrap();
    let certificate = params.self_signed(&key).unwrap();
    let write = |name: &str, text: String| std::fs::write(folder.join(name), text).unwrap();
    write("ca-cert.pem", certificate.pem());
    let issuer = Issuer::new(params, key);
    for (end, purpose) in [
        ("server", ExtendedKeyUsagePurpose::ServerAuth),
        ("client", ExtendedKeyUsagePurpose::ClientAuth),
    ] {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.extended_key_usages = vec![purpose];
        // QEMU looks for the second, whatever the key.
        params.key_usages = vec![
            KeyUsagePurpose::DigitalSignature,
            KeyUsagePurpose::KeyEncipherment,
        ];
        params.distinguished_name.push(DnType::CommonName, end);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &issuer).unwrap();
        write(&format!("{end}-cert.pem"), certificate.pem());
        write(&format!("{end}-key.pem"), key.serialize_pem());
    }
    folder
}

/// A client's keys as a tool takes them.
fn client_object(keys: &Path) -> String {
    format!("tls-creds-x509,id=t,endpoint=client,dir={}", keys.display())
}

/// An image that is offered, by either, to those who encrypt.
fn offered(which: Which, folder: &Path, verify: &str) -> Server {
    let path = folder.join("d.raw");
    let bytes: Vec<u8> = (0..8 << 20_u32).map(|place| (place / 7) as u8).collect();
    std::fs::write(path, bytes).unwrap();
    let object =
        format!("tls-creds-x509,id=keys,endpoint=server,dir=FOLDER/good,verify-peer={verify}");
    // Objects come first, for both.
    let arguments = [
        "--blockdev",
        "raw,node-name=d,file.driver=file,file.filename=FOLDER/d.raw",
        "--export",
        "nbd,id=e,node-name=d,writable=on",
    ];
    Server::encrypted(which, folder, &object, ",tls-creds=keys", &arguments)
}

fn options(server: &Server, more: &str) -> String {
    let path = server.socket().display();
    format!("driver=nbd,server.type=unix,server.path={path},export=d{more}")
}

#[test]
fn clients_of_others_read_and_write_encrypted() {
    let folder = tempfile::tempdir().unwrap();
    let keys = authority(folder.path(), "good");
    let server = offered(Which::Ours, folder.path(), "on");
    let object = client_object(&keys);
    let image = options(&server, ",tls-creds=t,tls-hostname=localhost");
    let words = [
        "qemu-io",
        "--object",
        &object,
        "--image-opts",
        &image,
        "-c",
        "write -P 9 1M 3M",
        "-c",
        "read -P 9 1M 3M",
        "-c",
        "write -z 5M 64k",
        "-c",
        "flush",
    ];
    run(&words);
    let copy = folder.path().join("copy");
    let uri = format!(
        "nbds+unix:///d?socket={}&tls-certificates={}",
        server.socket().display(),
        keys.display()
    );
    run(&["nbdcopy", &uri, copy.to_str().unwrap()]);
    let info = run(&["nbdinfo", &uri]);
    assert!(info.contains("newstyle-fixed with TLS"), "{info}");
    server.quit();
    let disk = std::fs::read(folder.path().join("d.raw")).unwrap();
    assert!(std::fs::read(copy).unwrap() == disk);
    assert!(disk[1 << 20..4 << 20].iter().all(|byte| *byte == 9));
}

#[test]
fn who_does_not_encrypt_or_has_other_keys_is_refused_and_soon() {
    let folder = tempfile::tempdir().unwrap();
    let (good, other) = (
        authority(folder.path(), "good"),
        authority(folder.path(), "other"),
    );
    let nameless = folder.path().join("nameless");
    std::fs::create_dir(&nameless).unwrap();
    std::fs::copy(good.join("ca-cert.pem"), nameless.join("ca-cert.pem")).unwrap();
    let server = offered(Which::Ours, folder.path(), "on");
    let began = Instant::now();
    let info = |object: Option<&str>, image: &str| {
        let mut words = vec!["qemu-img", "info", "--image-opts", image];
        if let Some(object) = object {
            words.extend(["--object", object]);
        }
        let output = tool(&words).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.success(), said)
    };
    let plain = options(&server, "");
    let (done, said) = info(None, &plain);
    assert!(!done && said.contains("TLS"), "{said}");
    let image = options(&server, ",tls-creds=t,tls-hostname=localhost");
    for keys in [&other, &nameless] {
        let (done, said) = info(Some(&client_object(keys)), &image);
        assert!(!done, "{}: {said}", keys.display());
    }
    // The server is another than the client meant.
    let elsewhere = options(&server, ",tls-creds=t,tls-hostname=elsewhere");
    let (done, said) = info(Some(&client_object(&good)), &elsewhere);
    assert!(!done, "{said}");
    let (done, said) = info(Some(&client_object(&good)), &image);
    assert!(done, "{said}");
    assert!(began.elapsed() < Duration::from_secs(30));
    server.quit();
    // One that does not ask for names takes all who trust it.
    let server = offered(Which::Ours, folder.path(), "off");
    let image = options(&server, ",tls-creds=t,tls-hostname=localhost");
    let (done, said) = info(Some(&client_object(&nameless)), &image);
    assert!(done, "{said}");
}

#[test]
fn what_is_said_in_plain_text_around_the_beginning_of_encryption_ends_the_connection() {
    const STARTTLS: u32 = 5;
    let folder = tempfile::tempdir().unwrap();
    authority(folder.path(), "good");
    let server = offered(Which::Ours, folder.path(), "off");
    // Nothing is told, of an export that there is or not, but that encryption comes first.
    let mut client = Client::greeted(&server);
    for (option, data) in [
        (3, &b""[..]),
        (6, b"\0\0\0\x01d\0\0"),
        (8, b""),
        (11, b""),
        (99, b""),
    ] {
        client.option(option, data);
        assert_eq!(client.answered(), 0x8000_0005, "option {option}");
    }
    // No record of TLS.
    client.option(STARTTLS, b"");
    assert_eq!(client.answered(), 1);
    client.say(&[0x77; 64]);
    client.is_ended();
    // What was put behind it would be taken for what was encrypted.
    let mut client = Client::greeted(&server);
    let mut both = b"IHAVEOPT\0\0\0\x05\0\0\0\0".to_vec();
    both.extend(b"IHAVEOPT\0\0\0\x03\0\0\0\0");
    client.say(&both);
    client.is_ended();
    // The old way of choosing has no answer.
    let mut client = Client::greeted(&server);
    client.option(1, b"d");
    client.is_ended();
    server.quit();
}

#[test]
fn our_client_reads_and_writes_encrypted_with_either_server() {
    for which in [Which::Ours, Which::Qemus] {
        let folder = tempfile::tempdir().unwrap();
        let keys = authority(folder.path(), "good");
        authority(folder.path(), "other");
        let far = offered(which, folder.path(), "on");
        let near = tempfile::tempdir().unwrap();
        let relay = |keys: &Path, name: &str| {
            let node = options(
                &far,
                &format!(",node-name=n,tls-creds=t,tls-hostname={name}"),
            );
            let (object, node) = (client_object(keys), node.replace("driver=", ""));
            vec![
                "--object".to_owned(),
                object,
                "--blockdev".into(),
                node,
                "--export".into(),
                "nbd,id=e,node-name=n,writable=on".into(),
            ]
        };
        let words = relay(&keys, "localhost");
        let words: Vec<_> = words.iter().map(String::as_str).collect();
        let server = Server::start(Which::Ours, near.path(), &words);
        let uri = server.uri("n");
        run(&[
            "qemu-io",
            "-f",
            "raw",
            "-c",
            "write -P 3 2M 4M",
            "-c",
            "read -P 3 2M 4M",
            "-c",
            "write -z 7M 64k",
            "-c",
            "flush",
            &uri,
        ]);
        let copy = folder.path().join("copy");
        run(&["nbdcopy", &uri, copy.to_str().unwrap()]);
        server.quit();
        let disk = std::fs::read(folder.path().join("d.raw")).unwrap();
        assert!(std::fs::read(copy).unwrap() == disk, "{which:?}");
        assert!(
            disk[2 << 20..6 << 20].iter().all(|byte| *byte == 3),
            "{which:?}"
        );
        // Not who it should be, or signed by nobody whom we know.
        for (keys, name) in [("good", "elsewhere"), ("other", "localhost")] {
            let words = relay(&folder.path().join(keys), name);
            let mut command = harness::daemon::stonework(["daemon"]);
            command.args(words);
            let refusal = harness::daemon::run(command);
            assert_eq!(refusal.code, Some(1), "{which:?}, {keys}, {name}");
            assert!(
                refusal.errors.contains("TLS handshake failed"),
                "{}",
                refusal.errors
            );
        }
        far.quit();
    }
}

#[test]
fn keys_that_cannot_be_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let keys = authority(folder.path(), "good");
    std::fs::remove_file(keys.join("server-key.pem")).unwrap();
    for (object, part) in [
        (
            "tls-creds-x509,id=t,endpoint=server,dir=FOLDER/none",
            "ca-cert.pem",
        ),
        (
            "tls-creds-x509,id=t,endpoint=server,dir=FOLDER/good",
            "server-key.pem",
        ),
        ("tls-creds-x509,id=t,endpoint=client", "'dir'"),
        (
            "tls-creds-x509,id=t,dir=FOLDER/good,priority=NORMAL",
            "'priority'",
        ),
        (
            "tls-creds-x509,id=t,dir=FOLDER/good,verify-peer=off",
            "verify-peer=off",
        ),
        ("tls-creds-psk,id=t,dir=FOLDER/good", "'tls-creds-psk'"),
    ] {
        let object = object.replace("FOLDER", folder.path().to_str().unwrap());
        let refusal =
            harness::daemon::run(harness::daemon::stonework(["daemon", "--object", &object]));
        assert!(
            refusal.code == Some(1) && refusal.errors.contains(part),
            "{}",
            refusal.errors
        );
    }
    // Each end has keys of its own.
    let client = client_object(&keys);
    let socket = format!(
        "addr.type=unix,addr.path={}/s,tls-creds=t",
        folder.path().display()
    );
    let words = ["daemon", "--object", &client, "--nbd-server", &socket];
    let refusal = harness::daemon::run(harness::daemon::stonework(words));
    assert!(
        refusal.errors.contains("server endpoint"),
        "{}",
        refusal.errors
    );
}
