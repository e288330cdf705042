//! The user of a program: the text of the image and of the request, resolved by the image's own
//! files.

use anyhow::{Context as _, Result, ensure};
use berth_cri::v1;
use berth_tests::daemon::{Daemon, rootful};
use berth_tests::forge::{Image, Layer};
use berth_tests::pod::{Pod, security, shell, volume, words};
use serde_json::json;

/// A program's view of itself: user, group, and all groups.
const IDENTITY: &str = "id -u; id -g; id -G";

/// Imports the demo image with this `User`, and returns a name for it.
fn image_of_user(daemon: &Daemon, number: usize, user: &str) -> Result<String> {
    let name = format!("localhost/users:u{number}");
    let directory = daemon.directory(&format!("users-{number}"))?;
    Image::demo()?.with("User", json!(user)).write_layout(&directory, &name)?;
    daemon.client().import(&directory)?;
    Ok(name)
}

/// Runs [`IDENTITY`], and returns its output or why it was not created.
fn identity(
    pod: &Pod,
    name: &str,
    change: impl FnOnce(&mut v1::ContainerConfig),
) -> Result<Result<String, String>> {
    let mut config = shell(name, IDENTITY);
    change(&mut config);
    match pod.create(config) {
        Ok(container) => {
            container.start()?;
            Ok(Ok(container.ended()?.stdout.trim_end().replace('\n', ",")))
        }
        Err(status) => Ok(Err(status.message().to_owned())),
    }
}

#[test]
fn an_images_user_is_resolved_by_its_own_files_and_never_becomes_root_by_mistake() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("users")?;
        // demo is 1000 with the group of that number, and a member of readers, 50; www-data is 33.
        let cases: &[(&str, Result<&str, &str>)] = &[
            ("", Ok("0,0,0")),
            ("0", Ok("0,0,0")),
            ("root", Ok("0,0,0")),
            ("1000", Ok("1000,1000,1000 50")),
            ("demo", Ok("1000,1000,1000 50")),
            ("www-data", Ok("33,33,33")),
            ("33:50", Ok("33,50,50")),
            ("www-data:readers", Ok("33,50,50")),
            ("1000:7", Ok("1000,7,7 50")),
            ("4242", Ok("4242,0,0")),
            ("4242:4343", Ok("4242,4343,4343")),
            (":50", Ok("0,50,50")),
            ("2147483647", Ok("2147483647,0,0")),
            ("2147483648", Err("2147483648")),
            ("4294967295", Err("4294967295")),
            ("4294967296", Err("4294967296")),
            ("18446744073709551616", Err("18446744073709551616")),
            ("nobody-knows", Err("no user nobody-knows")),
            ("demo:nogroup-knows", Err("no group nogroup-knows")),
            ("-1", Err("-1 has a sign")),
            ("+0", Err("+0 has a sign")),
            ("0x0", Err("no user 0x0")),
            (" 0", Err("no user  0")),
            ("root ", Err("no user root ")),
            ("demo:-1", Err("-1 has a sign")),
            ("../root", Err("no user ../root")),
            ("x:x:0:0", Err("no user x")),
        ];
        for (number, (user, expected)) in cases.iter().enumerate() {
            let image = image_of_user(daemon, number, user)?;
            let found = identity(&pod, &format!("u{number}"), |config| {
                config.image = Some(berth_tests::cri::image_spec(&image));
            })?;
            match (found, expected) {
                (Ok(found), Ok(expected)) => assert_eq!(found, *expected, "User {user:?}"),
                (Err(message), Err(words)) => assert!(message.contains(words), "User {user:?}: {message}"),
                (found, _) => panic!("User {user:?}: {found:?}, expected {expected:?}"),
            }
        }
        Ok(())
    })
}

/// Accounts of hostile images: numbers as names, numbers that do not fit, invalid lines, and files
/// that are not accounts at all.
const HOSTILE_ACCOUNTS: [(&str, &str, &str); 3] = [
    (
        "numbers as names",
        "1000:x:0:0::/:/bin/sh\n4294967296:x:0:0::/:/bin/sh\n-1:x:0:0::/:/bin/sh\n+5:x:0:0::/:/bin/sh\nuser:x:7:8::/:/bin/sh\n",
        "50:x:0:\n-1:x:0:\nstaff:x:50:\n",
    ),
    (
        "numbers that do not fit",
        "user:x:4294967296:4294967296::/:/bin/sh\nother:x:-1:-1::/:/bin/sh\nfar:x:18446744073709551616:0::/:/bin/sh\nwide:x:2147483648:0::/:\n",
        "staff:x:4294967296:\n50:x:18446744073709551616:user\n",
    ),
    (
        "lines that are none",
        ":x:0:0::/:\n::::::\nuser\nuser:x\nuser:x:\nuser:x::0\n\n#user:x:0:0::/:\n user:x:0:0::/:\nUSER:x:0:0::/:\nuser \t:x:0:0::/:",
        ":x:0:\nstaff\nstaff:x\nstaff:x:\n",
    ),
];

/// CVE-2016-3697, CVE-2024-40635, CVE-2026-46680, CVE-2026-30892: only the number 0 and an existing
/// name can become root.
#[test]
fn no_words_of_an_image_become_root_by_accounts_that_are_made_for_it() -> Result<()> {
    const USERS: [&str; 30] = [
        "1000",
        "1000:50",
        "4294967296",
        "4294967295",
        "2147483648",
        "18446744073709551616",
        "99999999999999999999999",
        "-1",
        "-0",
        "+5",
        "+0",
        "0x0",
        "0x3e8",
        "1e3",
        "1000.0",
        " 1000",
        "1000 ",
        "user",
        "user:staff",
        "user:50",
        "user:-1",
        "other",
        "far",
        "wide",
        "USER ",
        "user:4294967296",
        "1000:staff",
        "1000:18446744073709551616",
        "user:",
        "root",
    ];
    rootful(|daemon| {
        let pod = daemon.pod("accounts")?;
        let mut refused = 0;
        for (table, (what, passwd, group)) in HOSTILE_ACCOUNTS.iter().enumerate() {
            let accounts =
                Layer::of_files(&[("etc/passwd", passwd.as_bytes()), ("etc/group", group.as_bytes())]);
            for (number, user) in USERS.iter().enumerate() {
                let name = format!("localhost/accounts:{table}-{number}");
                let directory = daemon.directory(&format!("accounts-{table}-{number}"))?;
                Image::demo()?
                    .with("User", json!(user))
                    .on_top(accounts.clone())
                    .write_layout(&directory, &name)?;
                daemon.client().import(&directory)?;
                let image = daemon.client().image(&name)?.context("the image")?;
                let told = image.uid.map(|uid| uid.value);
                let found = identity(&pod, &format!("c{table}-{number}"), |config| {
                    config.image = Some(berth_tests::cri::image_spec(&name));
                })?;
                let what = format!("{what}, user {user:?}, told as {told:?}: {found:?}");
                ensure!(told != Some(0), "{what}");
                match &found {
                    Ok(ids) => {
                        let uid: i64 = ids.split(',').next().unwrap_or_default().parse()?;
                        // A name stays a name. Digits are not one, with a sign or without.
                        let unsigned = user.trim_start_matches(['-', '+']);
                        let digits = unsigned.bytes().all(|byte| byte.is_ascii_digit());
                        let named =
                            !digits && passwd.lines().any(|line| line.starts_with(&format!("{user}:x:0:")));
                        ensure!(uid != 0 || (named && told.is_none()), "{what}");
                        ensure!(told.is_none() || told == Some(uid), "{what}");
                        let number = user
                            .split(':')
                            .next()
                            .filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
                        ensure!(number.is_none_or(|text| text.parse() == Ok(uid)), "{what}");
                    }
                    Err(_) => refused += 1,
                }
            }
        }
        // The valid ones among them run: 1000 and its combinations, and the one user that exists.
        ensure!(refused < 3 * USERS.len() - 8, "{refused} were refused");
        Ok(())
    })
}

#[test]
fn image_status_tells_the_user_as_a_number_or_a_name() -> Result<()> {
    rootful(|daemon| {
        for (number, (user, uid, username)) in [
            ("1002", Some(1002), ""),
            ("www-data", None, "www-data"),
            ("1003:1004", Some(1003), ""),
            ("www-data:1004", None, "www-data"),
            ("", None, ""),
            ("0", Some(0), ""),
        ]
        .into_iter()
        .enumerate()
        {
            let name = image_of_user(daemon, number, user)?;
            let image = daemon.client().image(&name)?.context("the image")?;
            assert_eq!(
                (image.uid.map(|uid| uid.value), image.username.as_str()),
                (uid, username),
                "{user:?}"
            );
        }
        Ok(())
    })
}

#[test]
fn the_requests_user_and_groups_come_before_the_images() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("users")?;
        let image = image_of_user(daemon, 0, "demo")?;
        let id = |value| Some(v1::Int64Value { value });
        let strict = i32::from(v1::SupplementalGroupsPolicy::Strict);
        type Change = Box<dyn Fn(&mut v1::LinuxContainerSecurityContext)>;
        let cases: Vec<(Change, &str)> = vec![
            (Box::new(|_| {}), "1000,1000,1000 50"),
            (Box::new(move |context| context.run_as_user = id(33)), "33,33,33"),
            (Box::new(move |context| context.run_as_user = id(0)), "0,0,0"),
            (Box::new(|context| context.run_as_username = "www-data".to_owned()), "33,33,33"),
            (
                Box::new(move |context| (context.run_as_user, context.run_as_group) = (id(1000), id(5))),
                "1000,5,5 50",
            ),
            (Box::new(|context| context.supplemental_groups = vec![1234, 50]), "1000,1000,1000 50 1234"),
            (
                Box::new(move |context| {
                    context.supplemental_groups = vec![1234];
                    context.supplemental_groups_policy = strict;
                }),
                "1000,1000,1000 1234",
            ),
        ];
        for (number, (change, expected)) in cases.iter().enumerate() {
            let found = identity(&pod, &format!("c{number}"), |config| {
                config.image = Some(berth_tests::cri::image_spec(&image));
                change(security(config));
            })?;
            assert_eq!(found.as_deref(), Ok(*expected), "case {number}");
        }
        Ok(())
    })
}

#[test]
fn the_status_says_who_it_became_and_exec_is_the_same() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("users")?;
        let mut config = berth_tests::pod::idle("main");
        security(&mut config).run_as_username = "demo".to_owned();
        security(&mut config).supplemental_groups = vec![77];
        let main = pod.start(config)?;
        let user = main.status()?.user.and_then(|user| user.linux).context("the user")?;
        assert_eq!((user.uid, user.gid, user.supplemental_groups), (1000, 1000, vec![1000, 77, 50]));
        assert_eq!(main.sh(IDENTITY)?, "1000\n1000\n1000 50 77\n");
        assert_eq!(main.sh("echo $HOME")?, "/home\n");
        Ok(())
    })
}

#[test]
fn what_cannot_be_a_user_is_refused_by_its_field() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("users")?;
        let id = |value| Some(v1::Int64Value { value });
        type Change = Box<dyn Fn(&mut v1::LinuxContainerSecurityContext)>;
        let cases: Vec<(Change, &str)> = vec![
            (Box::new(move |context| context.run_as_user = id(-1)), "run_as_user"),
            (Box::new(move |context| context.run_as_user = id(1 << 32)), "run_as_user"),
            (Box::new(move |context| context.run_as_group = id(5)), "run_as_group"),
            (Box::new(|context| context.run_as_username = "nobody-knows".to_owned()), "no user nobody-knows"),
            (Box::new(|context| context.supplemental_groups = vec![-1]), "supplemental_groups"),
            (
                Box::new(move |context| {
                    context.run_as_user = id(0);
                    context.run_as_username = "root".to_owned();
                }),
                "run_as_user",
            ),
        ];
        for (number, (change, words)) in cases.iter().enumerate() {
            let refused = identity(&pod, "main", |config| change(security(config)))?;
            let message = refused.err().with_context(|| format!("case {number} ({words}) is refused"))?;
            ensure!(message.contains(words), "case {number}: {message}");
        }
        Ok(())
    })
}

#[test]
fn masks_hide_the_accounts_from_the_program_and_not_from_berth() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("users")?;
        let mut config = shell("masked", &format!("{IDENTITY}; cat /etc/passwd /etc/group | wc -c"));
        security(&mut config).run_as_username = "demo".to_owned();
        security(&mut config).masked_paths = words(&["/etc/passwd", "/etc/group"]);
        assert_eq!(pod.run_container(config)?.stdout, "1000\n1000\n1000 50\n0\n");
        // With the whole directory hidden, the names are gone for the program only.
        let mut config = shell("hidden", &format!("{IDENTITY}; ls -A /etc | wc -l"));
        security(&mut config).run_as_username = "demo".to_owned();
        security(&mut config).masked_paths = words(&["/etc"]);
        assert_eq!(pod.run_container(config)?.stdout, "1000\n1000\n1000 50\n0\n");
        Ok(())
    })
}

#[test]
fn a_volumes_accounts_are_the_containers() -> Result<()> {
    rootful(|daemon| {
        let accounts = daemon.directory("accounts")?.join("passwd");
        std::fs::write(&accounts, "volume:x:4242:4343::/volume:/bin/sh\n")?;
        let mut config = shell("main", &format!("{IDENTITY}; echo $HOME"));
        security(&mut config).run_as_username = "volume".to_owned();
        config.mounts = vec![v1::Mount { readonly: true, ..volume(&accounts, "/etc/passwd") }];
        assert_eq!(daemon.pod("users")?.run_container(config)?.stdout, "4242\n4343\n4343\n/volume\n");
        Ok(())
    })
}

#[test]
fn as_many_groups_as_the_kernel_takes_arrive() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("users")?;
        // The primary group is one of the 65536.
        for count in [30_000, 65_535] {
            let mut config = berth_tests::pod::idle(&format!("c{count}"));
            security(&mut config).supplemental_groups =
                (0..count).map(|number| 2_000_000_000 + number).collect();
            let main = pod.start(config)?;
            let groups = main.sh("grep ^Groups: /proc/self/status | wc -w")?;
            assert_eq!(groups.trim().parse::<i64>()?, count + 2);
            let user = main.status()?.user.and_then(|user| user.linux).context("the user")?;
            assert_eq!(i64::try_from(user.supplemental_groups.len())?, count + 1);
            daemon.crash()?;
            assert_eq!(main.sh("echo alive")?, "alive\n", "a new daemon is told as many");
        }
        let mut config = berth_tests::pod::idle("too-many");
        security(&mut config).supplemental_groups = (1..=65_536).collect();
        let refused = pod.create(config).err().context("one too many")?;
        ensure!(refused.message().contains("groups"), "{refused}");
        Ok(())
    })
}
