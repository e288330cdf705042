//! `berth cp`: with the container's tar and without, and what hostile containers make of it.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::Path;
use std::process::{Output, Stdio};

use anyhow::{Context as _, Result, ensure};
use berth_cri::v1;
use berth_tests::daemon::{Daemon, rootful};
use berth_tests::pod::{Container, idle, security, shell};
use berth_tests::repeats::repeats;

fn cp(daemon: &Daemon, from: &str, to: &str) -> Result<Output> {
    daemon.berth()?.args(["cp", from, to]).output().context("running berth")
}

fn copies(daemon: &Daemon, from: &str, to: &str) -> Result<()> {
    let output = cp(daemon, from, to)?;
    ensure!(output.status.success(), "cp {from} {to}: {output:?}");
    Ok(())
}

/// A container with its own tar, and one that has none.
fn both(daemon: &Daemon) -> Result<[Container; 2]> {
    let pod = daemon.pod("web")?;
    let with = pod.idle("with")?;
    let without = pod.idle("without")?;
    without.sh("rm /bin/tar")?;
    assert!(without.exec(&["tar", "--version"]).is_err());
    Ok([with, without])
}

#[test]
fn files_and_directories_go_both_ways() -> Result<()> {
    rootful(|daemon| {
        let here = daemon.directory("here")?;
        let path = |name: &str| here.join(name).to_string_lossy().into_owned();
        let bytes: Vec<u8> = (0..1_000_000_u32).flat_map(u32::to_le_bytes).collect();
        fs::create_dir_all(here.join("tree/sub"))?;
        fs::write(here.join("tree/sub/big"), &bytes)?;
        fs::write(here.join("tree/-dash"), "dash")?;
        symlink("/etc/passwd", here.join("tree/link"))?;
        for (name, container) in ["with", "without"].iter().zip(both(daemon)?) {
            let inside = |path: &str| format!("web/{name}:{path}");
            // A directory, as a new one and into one that is there.
            copies(daemon, &path("tree"), &inside("/tmp/new"))?;
            copies(daemon, &path("tree"), &inside("/tmp"))?;
            copies(daemon, &path("tree/."), &inside("/opt"))?;
            let sum = container
                .sh("cat /tmp/new/sub/big | wc -c; md5sum </tmp/tree/sub/big; md5sum </opt/sub/big")?;
            let lines: Vec<&str> = sum.lines().collect();
            assert_eq!((lines[0], lines[1]), ("4000000", lines[2]), "{sum}");
            let owners = container
                .sh("stat -c %u:%g /tmp/new /tmp/new/sub/big; readlink /tmp/new/link; stat -c %a /tmp")?;
            assert_eq!(owners, "0:0\n0:0\n/etc/passwd\n1777\n");
            // And back.
            copies(daemon, &inside("/tmp/new"), &path(&format!("{name}-back")))?;
            let back = here.join(format!("{name}-back"));
            assert!(fs::read(back.join("sub/big"))? == bytes);
            assert_eq!(fs::read(back.join("-dash"))?, b"dash");
            assert_eq!(fs::read_link(back.join("link"))?, Path::new("/etc/passwd"));
            fs::create_dir(here.join(format!("{name}-dir")))?;
            copies(daemon, &inside("/tmp/new/."), &path(&format!("{name}-dir")))?;
            assert!(here.join(format!("{name}-dir/sub/big")).exists());
            copies(daemon, &inside("/tmp/new"), &path(&format!("{name}-dir")))?;
            assert!(here.join(format!("{name}-dir/new/sub/big")).exists());
            // One that is empty, and one that is private.
            container.sh("mkdir /tmp/empty && mkdir -m 700 /tmp/private && echo >/tmp/private/file")?;
            for (kind, mode) in [("empty", 0o755), ("private", 0o700)] {
                let to = format!("{name}-{kind}");
                copies(daemon, &inside(&format!("/tmp/{kind}")), &path(&to))?;
                assert_eq!(fs::metadata(here.join(&to))?.mode() & 0o7777, mode, "{to}");
            }
            // A file, under another name, into a directory, over one that is there, and through a
            // link.
            copies(daemon, &path("tree/-dash"), &inside("/tmp/file"))?;
            copies(daemon, &path("tree/-dash"), &inside("/tmp/new/sub"))?;
            copies(daemon, &path("tree/-dash"), &inside("/tmp/new/sub/big"))?;
            assert_eq!(container.sh("cat /tmp/file /tmp/new/sub/-dash /tmp/new/sub/big")?, "dashdashdash");
            // Not over a device.
            assert!(!cp(daemon, &path("tree/-dash"), &inside("/dev/null"))?.status.success());
            container.sh("test -c /dev/null")?;
            container.sh("ln -s /tmp/file /tmp/to-file; chmod 6755 /tmp/file")?;
            copies(daemon, &inside("/tmp/to-file"), &path(name))?;
            assert_eq!(fs::read(here.join(name))?, b"dash");
            assert_eq!(fs::metadata(here.join(name))?.mode() & 0o7777, 0o755, "no set-user-id comes out");
            // A file that something is mounted on.
            let mount = "grep ' /etc/hosts ' /proc/mounts; stat -c %u:%a /etc/hosts";
            container.sh("echo before >/etc/hosts; chown 7 /etc/hosts")?;
            let before = container.sh(mount)?;
            copies(daemon, &path("tree/-dash"), &inside("/etc/hosts"))?;
            assert_eq!(container.sh("cat /etc/hosts")?, "dash", "{name}");
            assert_eq!(container.sh(mount)?, before, "{name}");
            // An archive, out and in.
            let archive = cp(daemon, &inside("/tmp/new/sub"), "-")?;
            ensure!(archive.status.success(), "{archive:?}");
            let mut child =
                daemon.berth()?.args(["cp", "-", &inside("/opt")]).stdin(Stdio::piped()).spawn()?;
            child.stdin.take().context("stdin")?.write_all(&archive.stdout)?;
            ensure!(child.wait()?.success());
            assert_eq!(container.sh("cat /opt/-dash")?, "dash");
            // What cannot be.
            for (from, to) in [
                (inside("/none"), path("x")),
                (inside("/tmp/new"), path("tree/-dash")),
                (path("tree"), inside("/tmp/file")),
                (path("none"), inside("/tmp")),
                (path("tree"), inside("/none/new")),
                (path("tree"), path("x")),
                (inside("/tmp"), inside("/opt")),
            ] {
                let output = cp(daemon, &from, &to)?;
                ensure!(!output.status.success() && !output.stderr.is_empty(), "{from} {to}: {output:?}");
            }
            assert!(!here.join("x").exists());
        }
        Ok(())
    })
}

/// They state that they are empty, or a page long.
#[test]
fn files_of_the_kernel_are_copied_with_what_is_in_them() -> Result<()> {
    rootful(|daemon| {
        let here = daemon.directory("here")?;
        let path = |name: &str| here.join(name).to_string_lossy().into_owned();
        for (name, container) in ["with", "without"].iter().zip(both(daemon)?) {
            let inside = |path: &str| format!("web/{name}:{path}");
            // Some of them say what holds for their reader.
            let files = [
                "/proc/version",
                "/proc/sys/kernel/hostname",
                "/proc/sys/kernel/shmmni",
                "/sys/class/net/lo/mtu",
            ];
            for file in files {
                copies(daemon, &inside(file), &path("file"))?;
                let copied = fs::read_to_string(here.join("file"))?;
                assert_eq!(copied, container.sh(&format!("cat {file}"))?, "{name}: {file}");
                ensure!(!copied.is_empty(), "{name}: {file}");
                let archive = cp(daemon, &inside(file), "-")?;
                ensure!(String::from_utf8_lossy(&archive.stdout).contains(&copied), "{name}: {file}");
            }
            for (directory, file) in [("/proc/sys/net/core", "somaxconn"), ("/sys/class/net/lo", "mtu")] {
                let to = path(&format!("{name}-{file}"));
                copies(daemon, &inside(directory), &to)?;
                let copied = fs::read_to_string(Path::new(&to).join(file))?;
                assert_eq!(copied, container.sh(&format!("cat {directory}/{file}"))?, "{name}: {directory}");
            }
            // What cannot be read is skipped.
            let output = cp(daemon, &inside("/proc/1"), &path(&format!("{name}-1")))?;
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            ensure!(output.status.success() && said.contains("mem: cannot read"), "{output:?}");
            let status = fs::read_to_string(here.join(format!("{name}-1/status")))?;
            ensure!(status.starts_with("Name:"), "{name}: {status}");
            // In the container's own files they are none.
            copies(daemon, &inside("/"), &path(&format!("{name}-root")))?;
            let root = here.join(format!("{name}-root"));
            ensure!(root.join("etc/passwd").exists(), "{name}");
            assert_eq!(fs::read_dir(root.join("proc"))?.count(), 0, "{name}");
            // And in, where the length is not known before either.
            copies(daemon, "/proc/version", &inside("/tmp/version"))?;
            assert_eq!(container.sh("cat /tmp/version")?, fs::read_to_string("/proc/version")?, "{name}");
        }
        Ok(())
    })
}

#[test]
fn what_goes_in_belongs_to_the_user_of_the_container() -> Result<()> {
    rootful(|daemon| {
        let here = daemon.directory("here")?;
        fs::write(here.join("file"), "x")?;
        let pod = daemon.pod("web")?;
        let mut user = idle("user");
        security(&mut user).run_as_user = Some(v1::Int64Value { value: 1000 });
        security(&mut user).run_as_group = Some(v1::Int64Value { value: 2000 });
        let user = pod.start(user)?;
        copies(daemon, &here.join("file").to_string_lossy(), "web/user:/tmp/file")?;
        assert_eq!(user.sh("stat -c %u:%g /tmp/file")?, "1000:2000\n");
        copies(daemon, "web/user:/tmp/file", &here.join("back").to_string_lossy())?;
        assert_eq!(fs::metadata(here.join("back"))?.uid(), 0);
        // With its rights, too: root's files are not written over.
        let denied = cp(daemon, &here.join("file").to_string_lossy(), "web/user:/etc/passwd")?;
        ensure!(!denied.status.success(), "{denied:?}");
        Ok(())
    })
}

#[test]
fn links_in_a_container_lead_to_no_file_of_the_host() -> Result<()> {
    rootful(|daemon| {
        let here = daemon.directory("here")?;
        let canary = daemon.directory("canary")?;
        fs::write(canary.join("secret"), "of the host")?;
        fs::write(here.join("file"), "x")?;
        let (canary_text, file) =
            (canary.to_string_lossy(), here.join("file").to_string_lossy().into_owned());
        for (name, container) in ["with", "without"].iter().zip(both(daemon)?) {
            let up = "../".repeat(40);
            container.sh(&format!(
                "ln -s {canary_text}/secret /tmp/file; ln -s {canary_text} /tmp/dir
                 ln -s {up}{canary_text}/secret /tmp/up; ln -s /proc/1/root{canary_text} /tmp/proc"
            ))?;
            for from in ["/tmp/file", "/tmp/dir/secret", "/tmp/up", "/tmp/proc/secret", "/../../../secret"] {
                let output = cp(daemon, &format!("web/{name}:{from}"), &here.join("out").to_string_lossy())?;
                ensure!(!output.status.success(), "{from}: {output:?}");
                assert!(!here.join("out").exists(), "{from}");
            }
            for to in ["/tmp/file", "/tmp/dir", "/tmp/dir/", "/tmp/dir/new", "/tmp/up", "/tmp/proc/new"] {
                // Some of them are new files of the container.
                let _whatever = cp(daemon, &file, &format!("web/{name}:{to}"))?;
            }
            assert_eq!(fs::read(canary.join("secret"))?, b"of the host");
            assert_eq!(fs::read_dir(&canary)?.count(), 1);
        }
        Ok(())
    })
}

/// The container's tar says what it likes.
#[test]
fn a_hostile_tar_writes_only_what_was_asked_for() -> Result<()> {
    rootful(|daemon| {
        let here = daemon.directory("here")?;
        let canary = daemon.directory("canary")?;
        fs::write(canary.join("secret"), "of the host")?;
        let main = daemon.pod("web")?.idle("main")?;
        let outside = canary.to_string_lossy();
        let archive = |entries: &[(tar::EntryType, &str, &str)]| -> Vec<u8> {
            let mut bytes = Vec::new();
            for (kind, path, rest) in entries {
                let mut header = tar::Header::new_gnu();
                let gnu = header.as_gnu_mut().expect("a GNU header");
                gnu.name[..path.len()].copy_from_slice(path.as_bytes());
                gnu.linkname[..rest.len()].copy_from_slice(rest.as_bytes());
                header.set_entry_type(*kind);
                header.set_mode(0o6777);
                header.set_size(0);
                header.set_cksum();
                bytes.extend_from_slice(header.as_bytes());
            }
            bytes
        };
        let (file, dir, link, hard) = (
            tar::EntryType::Regular,
            tar::EntryType::Directory,
            tar::EntryType::Symlink,
            tar::EntryType::Link,
        );
        main.sh("mkdir /data; touch /data/file; mv /bin/tar /bin/real")?;
        for (number, entries) in [
            vec![(file, "../canary/secret", "")],
            vec![(file, "./../../canary/secret", "")],
            vec![(link, "./l", &*outside), (file, "./l/secret", "")],
            vec![(link, ".", &*outside), (file, "./secret", "")],
            vec![(hard, "./h", "../canary/secret"), (file, "./h", "")],
            vec![(link, "./l", &*outside), (hard, "./h", "./l/secret")],
            vec![(dir, "./d", ""), (link, "./d", &*outside)],
        ]
        .into_iter()
        .enumerate()
        {
            let planted = daemon.directory("planted")?.join("archive");
            fs::write(&planted, archive(&entries))?;
            // A tar that says what is planted: first with the real one, which is there under
            // another name.
            main.sh("cp /bin/real /bin/tar")?;
            copies(daemon, &planted.to_string_lossy(), "web:/data/archive")?;
            main.sh("rm /bin/tar; echo '#!/bin/sh' >/bin/tar; echo 'cat /data/archive' >>/bin/tar; chmod 755 /bin/tar")?;
            for (from, to) in [("/data", "out"), ("/data/.", "."), ("/data/file", "one")] {
                let output = cp(daemon, &format!("web:{from}"), &here.join(to).to_string_lossy())?;
                ensure!(!output.status.success(), "{number}, {from}: {output:?}");
            }
            assert_eq!(fs::read(canary.join("secret"))?, b"of the host", "{number}");
            assert_eq!(fs::metadata(canary.join("secret"))?.nlink(), 1, "{number}");
            assert_eq!(fs::metadata(canary.join("secret"))?.mode() & 0o7777, 0o644, "{number}");
            assert_eq!(fs::read_dir(&canary)?.count(), 1, "{number}");
            assert!(!here.join("one").exists(), "{number}");
            for entry in fs::read_dir(&here)? {
                let path = entry?.path();
                if path.is_symlink() || path.is_file() {
                    fs::remove_file(path)?
                } else {
                    fs::remove_dir_all(path)?
                }
            }
        }
        Ok(())
    })
}

/// Exchanges a directory and a link of the same name forever.
fn exchanging(name: &str, directory: &str, link: &str) -> v1::ContainerConfig {
    shell(
        name,
        &format!(
            "mkdir -p {directory}/sub; cd {directory}
             while :; do mv sub aside; ln -s {link} sub; rm sub; mv aside sub; done"
        ),
    )
}

#[test]
fn directories_that_become_links_while_files_are_copied_lead_to_no_file_of_the_host() -> Result<()> {
    rootful(|daemon| {
        let (here, shared) = (daemon.directory("here")?, daemon.directory("shared")?);
        let canary = daemon.directory("canary")?;
        fs::write(canary.join("secret"), "of the host")?;
        let canary_text = canary.to_string_lossy();
        fs::create_dir_all(here.join("in/sub"))?;
        fs::write(here.join("in/sub/secret"), "copied")?;
        let pod = daemon.pod("web")?;
        // A directory of the host that the container shares, and one of its own.
        let mut sharing = exchanging("sharing", "/shared", &canary_text);
        sharing.mounts.push(v1::Mount {
            host_path: shared.to_string_lossy().into_owned(),
            container_path: "/shared".to_owned(),
            ..v1::Mount::default()
        });
        pod.start(sharing)?;
        for (name, has_tar) in [("with", true), ("without", false)] {
            let own = pod.start(exchanging(name, "/data", &canary_text))?;
            if !has_tar {
                own.sh("rm /bin/tar")?;
            }
            own.sh("mkdir -p /source/sub; echo copied >/source/sub/secret")?;
            for _ in 0..repeats(20)? {
                let out = tempfile::tempdir_in(&here)?;
                for (from, to) in [
                    (format!("web/{name}:/source/."), shared.to_string_lossy().into_owned()),
                    (here.join("in/.").to_string_lossy().into_owned(), format!("web/{name}:/data")),
                    (format!("web/{name}:/data/."), out.path().to_string_lossy().into_owned()),
                ] {
                    // Whether that can be done depends on what is there at the moment.
                    let _whatever = cp(daemon, &from, &to)?;
                }
                let sub = out.path().join("sub");
                if !sub.is_symlink() {
                    let copied = fs::read_to_string(sub.join("secret")).unwrap_or_default();
                    assert!(matches!(copied.as_str(), "" | "copied\n" | "copied"), "{name}: {copied}");
                }
                assert_eq!(fs::read(canary.join("secret"))?, b"of the host", "{name}");
                assert_eq!(fs::read_dir(&canary)?.count(), 1, "{name}");
            }
        }
        Ok(())
    })
}
