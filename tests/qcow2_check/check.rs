//! Checking and repairing damaged images, compared with `qemu-img check`.

use std::collections::BTreeMap;
use std::fs;

use blockcore::driver::{CheckReport, Fix};
use blockcore::io::RequestKind;
use formats::qcow2::check::check;

use super::corpus::{Base, Differs, KINDS, Kind};
use super::*;

/// What our own check says; a failure that is no report is an error.
pub(crate) fn ours(place: &Place, name: &str, repair: Fix) -> Result<CheckReport, Error> {
    on_file(&place.join(name), move |root| async move {
        let request = root.enter(RequestKind::Other, 0, 0).await;
        check(request.io(), repair, &mut |_| ()).await
    })
}

/// A check as `qemu-img` does one: after a repair, once more.
pub(crate) fn ours_as_qemu(place: &Place, name: &str, repair: Fix) -> Result<CheckReport, Error> {
    let first = ours(place, name, repair)?;
    if first.corruptions_fixed + first.leaks_fixed == 0 {
        return Ok(first);
    }
    let again = ours(place, name, Fix::None)?;
    Ok(CheckReport {
        corruptions_fixed: first.corruptions_fixed,
        leaks_fixed: first.leaks_fixed,
        ..again
    })
}

/// What `qemu-img check` says: its exit status, and its report if it gives one.
pub(crate) fn theirs(place: &Place, name: &str, repair: Fix) -> (i32, Option<CheckReport>) {
    let mut args = vec!["check", "--output=json", "-f", "qcow2"];
    match repair {
        Fix::None => {}
        Fix::Leaks => args.extend(["-r", "leaks"]),
        Fix::All => args.extend(["-r", "all"]),
    }
    args.push(name);
    let output = qemu_img(place, &args);
    let code = output.status.code().expect("it ends by itself");
    let json: Option<Value> = serde_json::from_slice(&output.stdout).ok();
    let report = json.map(|json| {
        let field = |name: &str| json.get(name).and_then(Value::as_u64).unwrap_or(0);
        CheckReport {
            corruptions: field("corruptions"),
            leaks: field("leaks"),
            check_errors: field("check-errors"),
            corruptions_fixed: field("corruptions-fixed"),
            leaks_fixed: field("leaks-fixed"),
            total_clusters: field("total-clusters"),
            allocated_clusters: field("allocated-clusters"),
            fragmented_clusters: field("fragmented-clusters"),
            compressed_clusters: field("compressed-clusters"),
            image_end_offset: field("image-end-offset"),
        }
    });
    (code, report)
}

/// The exit status that `qemu-img check` has for a report.
pub(crate) fn exit(report: &Result<CheckReport, Error>) -> i32 {
    match report {
        Err(_) => 1,
        Ok(report) if report.check_errors > 0 => 1,
        Ok(report) if report.corruptions > 0 => 2,
        Ok(report) if report.leaks > 0 => 3,
        Ok(_) => 0,
    }
}

/// Everything that differs, as text.
fn differences(kind: &Kind, place: &Place, base: &[u8]) -> Vec<String> {
    let mut all = Vec::new();
    for repair in [Fix::None, Fix::Leaks, Fix::All] {
        for name in ["ours", "theirs"] {
            kind.make(base, &place.join(name));
        }
        let before = fs::read(place.join("ours")).expect("it was made");
        let (code, report) = theirs(place, "theirs", repair);
        let mine = ours_as_qemu(place, "ours", repair);
        if repair == Fix::None && fs::read(place.join("ours")).expect("it is there") != before {
            all.push("a check without repair has written".to_owned());
        }
        let mut differ = |what: &str| {
            let name = kind.name;
            all.push(format!(
                "{name}, {repair:?}: {what}\n  {code} {report:?}\n  {mine:?}"
            ));
        };
        let mine_code = exit(&mine);
        let fails = code == 1;
        match kind.differs {
            Differs::QemuFails if fails => {}
            Differs::Repair if repair != Fix::None => {
                if mine_code > code {
                    differ("not repaired as well");
                }
            }
            _ => {
                if mine_code != code {
                    differ("another outcome");
                } else if let (Ok(mine), Some(report)) = (&mine, report)
                    && !fails
                    && *mine != report
                {
                    let end = CheckReport {
                        image_end_offset: report.image_end_offset,
                        ..*mine
                    };
                    // Where a repair puts new tables is anybody's choice.
                    if repair == Fix::None || end != report {
                        differ("another report");
                    }
                }
            }
        }
        if repair == Fix::None || mine.is_err() {
            continue;
        }
        // QEMU's verdict on what was repaired here.
        let (judged, _) = theirs(place, "ours", Fix::None);
        // Where it fails on what is left, it cannot judge.
        if judged != mine_code && !(kind.differs == Differs::QemuFails && mine_code > 0) {
            differ(&format!("QEMU says {judged} of what was repaired"));
        }
        if mine_code == 0 && code == 0 {
            // Some that a check finds nothing wrong with cannot be read all the same.
            let map = qemu_img(place, &["map", "-f", "qcow2", "theirs"]);
            let is_readable = map.status.success();
            let args = [
                "compare", "-q", "-f", "qcow2", "-F", "qcow2", "ours", "theirs",
            ];
            let output = qemu_img(place, &args);
            if is_readable && !output.status.success() {
                differ(&format!("the disk is another one: {output:?}"));
            }
        }
    }
    all
}

#[test]
fn damaged_images_are_counted_and_repaired_as_qemu_does() {
    let place = Place::new();
    let wanted = std::env::var("STONEWORK_KIND").ok();
    let mut bases: BTreeMap<Base, Vec<u8>> = BTreeMap::new();
    let mut all = Vec::new();
    for kind in KINDS {
        if wanted.as_ref().is_some_and(|wanted| wanted != kind.name) {
            continue;
        }
        let base = bases
            .entry(kind.base)
            .or_insert_with(|| kind.base.make(&place));
        all.extend(differences(kind, &place, base));
    }
    assert!(
        all.is_empty(),
        "{} differences:\n{}",
        all.len(),
        all.join("\n")
    );
    assert!(KINDS.len() >= 60, "{}", KINDS.len());
}

/// What repairs do to these takes every way that there is.
pub(crate) const REPAIRED: &[&str] = &[
    "no refcount block",
    "the second refcount block is gone",
    "all counts zero",
    "all counts high",
    "ten L2 entries without their flags",
    "an unaligned zero entry",
    "a snapshot without extra data",
    "a snapshot with too much extra data",
    "a refcount block on data",
    "a bitmap's entry with reserved bits",
    "unknown autoclear feature",
    "dirty with counts that were never written",
];

/// Repairs all, where the write that comes after `writes` others fails.
fn interrupted(place: &Place, name: &str, writes: usize) -> Result<CheckReport, Error> {
    let mut options = format!(
        "driver=blkdebug,image.driver=file,image.filename={},image.locking=off,\
         inject-error.0.event=pwritev,inject-error.0.iotype=write,inject-error.0.state={}",
        place.join(name).display(),
        writes + 1,
    );
    for state in 0..writes {
        options.push_str(&format!(
            ",set-state.{state}.event=pwritev,set-state.{state}.state={},set-state.{state}.new_state={}",
            state + 1,
            state + 2,
        ));
    }
    on_node(&options, |root| async move {
        let request = root.enter(RequestKind::Other, 0, 0).await;
        check(request.io(), Fix::All, &mut |_| ()).await
    })
}

#[test]
fn a_repair_that_is_interrupted_anywhere_leaves_an_image_that_can_be_repaired() {
    let place = Place::new();
    let mut interruptions = 0;
    for kind in KINDS.iter().filter(|kind| REPAIRED.contains(&kind.name)) {
        let base = kind.base.make(&place);
        kind.make(&base, &place.join("whole"));
        let whole = ours_as_qemu(&place, "whole", Fix::All);
        assert_eq!(exit(&whole), 0, "{}: {whole:?}", kind.name);
        for writes in 0.. {
            kind.make(&base, &place.join("part"));
            let first = interrupted(&place, "part", writes);
            if first.is_ok() {
                break;
            }
            interruptions += 1;
            let at = format!("{} after {writes} writes", kind.name);
            let left = ours(&place, "part", Fix::None);
            let again = ours_as_qemu(&place, "part", Fix::All);
            assert_eq!(exit(&again), 0, "{at}: {again:?}, was left as {left:?}");
            assert_eq!(theirs(&place, "part", Fix::None).0, 0, "{at}");
            let args = [
                "compare", "-q", "-f", "qcow2", "-F", "qcow2", "part", "whole",
            ];
            let output = qemu_img(&place, &args);
            assert!(
                output.status.success(),
                "{at}: the disk is another one: {output:?}"
            );
            assert!(writes < 1000, "{at}");
        }
    }
    assert!(interruptions > REPAIRED.len(), "{interruptions}");
}

/// A check as an operator has it: through a node that is opened for it.
fn checked(place: &Place, name: &str, fix: Fix) -> Result<CheckReport, Error> {
    let context = IoContext::new(make(EngineChoice::Auto)?);
    let control = Control::new(Graph::new(formats::drivers()), Rc::clone(&context));
    let read_only = if fix == Fix::None { "on" } else { "off" };
    let options = format!(
        "driver=qcow2,read-only={read_only},file.driver=file,file.filename={}",
        place.join(name).display()
    );
    let options = Options::parse(&options, None)?;
    let report = context.block_on(async move { control.check_image(options, fix).await });
    context.abandon();
    report
}

#[test]
fn an_image_that_nobody_can_use_is_opened_to_be_checked_and_repaired() {
    let place = Place::new();
    let wanted = [
        "corrupt bit",
        "dirty and leaking",
        "no refcount table",
        "backing image",
    ];
    for kind in KINDS.iter().filter(|kind| wanted.contains(&kind.name)) {
        let base = kind.base.make(&place);
        kind.make(&base, &place.join("disk"));
        // What is beside the image is of no interest.
        fs::remove_file(place.join("base")).expect("it was made");
        let direct = ours(&place, "disk", Fix::None);
        let report = checked(&place, "disk", Fix::None);
        assert_eq!(
            report.expect("it can be checked"),
            direct.expect("it can be checked"),
            "{}",
            kind.name
        );
        checked(&place, "disk", Fix::All).expect("it can be repaired");
        let report = checked(&place, "disk", Fix::None).expect("it can be checked");
        assert!(report.is_clean(), "{}: {report:?}", kind.name);
        // QEMU wants what is beside it.
        place.sparse("base", 8 << 20);
        assert_eq!(theirs(&place, "disk", Fix::None).0, 0, "{}", kind.name);
    }
    place.file("disk", b"QFI\xfb\0\0\0\x04 and so on, of another version");
    let error = checked(&place, "disk", Fix::None).unwrap_err();
    assert!(error.report().contains("version 4"), "{}", error.report());
}
