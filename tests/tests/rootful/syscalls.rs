//! The filter of system calls, probed by programs of a few instructions: one call each, by each of
//! the kernel's interfaces. x86-64 only, like the instructions.
#![cfg(target_arch = "x86_64")]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use anyhow::{Context as _, Result, ensure};
use berth_cri::v1;
use berth_tests::daemon::rootful;
use berth_tests::pod::{idle, security, volume};

/// The interface of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Interface {
    /// `syscall` with the numbers of x86-64, or of x32 when their bit is set.
    Long,
    /// `int 0x80` with the numbers of i386.
    Short,
}
use Interface::{Long, Short};

/// `__X32_SYSCALL_BIT`, <asm/unistd.h>.
const X32: u32 = 0x4000_0000;

const EPERM: i32 = 1;
const ENOSYS: i32 = 38;

/// A static ELF program that makes one call with three arguments, the others 0, and ends with the
/// error's number, or 0.
fn program(interface: Interface, number: u32, arguments: [u32; 3]) -> Vec<u8> {
    const ADDRESS: u64 = 0x40_0000;
    const HEADERS: u16 = 64 + 56;
    let mut code = vec![0xb8];
    code.extend(number.to_le_bytes());
    // mov to the registers of the interface's first three arguments, and xor for the others.
    let (registers, others): ([u8; 3], &[u8]) = match interface {
        Long => ([0xbf, 0xbe, 0xba], &[0x4d, 0x31, 0xd2, 0x4d, 0x31, 0xc0, 0x4d, 0x31, 0xc9, 0x0f, 0x05]),
        Short => ([0xbb, 0xb9, 0xba], &[0x31, 0xf6, 0x31, 0xff, 0x31, 0xed, 0xcd, 0x80]),
    };
    for (register, argument) in registers.into_iter().zip(arguments) {
        code.push(register);
        code.extend(argument.to_le_bytes());
    }
    code.extend(others);
    // test eax, eax; jns +6; neg eax; mov edi, eax; jmp +2; xor edi, edi; mov eax, 60 (exit);
    // syscall
    code.extend([
        0x85, 0xc0, 0x79, 0x06, 0xf7, 0xd8, 0x89, 0xc7, 0xeb, 0x02, 0x31, 0xff, 0xb8, 60, 0, 0, 0, 0x0f, 0x05,
    ]);
    let length = u64::from(HEADERS) + code.len() as u64;
    // elf(5): header and one segment, which is the whole file, readable and executable.
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    file.extend((ADDRESS + u64::from(HEADERS)).to_le_bytes());
    file.extend(64_u64.to_le_bytes());
    file.extend([0; 12]);
    for half in [64_u16, 56, 1, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    file.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    for word in [0, ADDRESS, ADDRESS, length, length, 0x1000] {
        file.extend(word.to_le_bytes());
    }
    file.extend(code);
    file
}

/// Calls under RuntimeDefault for a container with the usual capabilities: name, interface, number,
/// arguments, and the expected error, 0 for none.
const CALLS: &[(&str, Interface, u32, [u32; 3], i32)] = &[
    ("getpid", Long, 39, [0; 3], 0),
    ("socket(AF_INET)", Long, 41, [2, 1, 0], 0),
    ("socket(AF_ALG)", Long, 41, [38, 5, 0], EPERM),
    ("socket(AF_VSOCK)", Long, 41, [40, 1, 0], EPERM),
    ("clone(CLONE_NEWUSER)", Long, 56, [0x1000_0011, 0, 0], EPERM),
    ("ptrace(PTRACE_TRACEME)", Long, 101, [0; 3], 0),
    ("personality(0)", Long, 135, [0; 3], 0),
    ("personality(READ_IMPLIES_EXEC)", Long, 135, [0x40_0000, 0, 0], EPERM),
    ("pivot_root", Long, 155, [0; 3], EPERM),
    ("mount", Long, 165, [0; 3], EPERM),
    ("umount2", Long, 166, [0; 3], EPERM),
    ("swapon", Long, 167, [0; 3], EPERM),
    ("reboot", Long, 169, [0; 3], EPERM),
    ("iopl", Long, 172, [3, 0, 0], EPERM),
    ("init_module", Long, 175, [0; 3], EPERM),
    ("delete_module", Long, 176, [0; 3], EPERM),
    ("settimeofday", Long, 164, [0; 3], EPERM),
    ("set_mempolicy", Long, 238, [0; 3], EPERM),
    ("kexec_load", Long, 246, [0; 3], EPERM),
    ("add_key", Long, 248, [0; 3], EPERM),
    ("request_key", Long, 249, [0; 3], EPERM),
    ("keyctl", Long, 250, [0; 3], EPERM),
    ("unshare(CLONE_NEWUSER)", Long, 272, [0x1000_0000, 0, 0], EPERM),
    ("unshare(CLONE_NEWNS)", Long, 272, [0x2_0000, 0, 0], EPERM),
    ("perf_event_open", Long, 298, [0; 3], EPERM),
    ("fanotify_init", Long, 300, [0; 3], EPERM),
    ("open_by_handle_at", Long, 304, [0; 3], EPERM),
    ("setns", Long, 308, [0; 3], EPERM),
    ("process_vm_readv", Long, 310, [0; 3], EPERM),
    ("finit_module", Long, 313, [0; 3], EPERM),
    ("bpf", Long, 321, [0; 3], EPERM),
    ("userfaultfd", Long, 323, [0; 3], EPERM),
    ("io_uring_setup", Long, 425, [0; 3], EPERM),
    ("io_uring_enter", Long, 426, [0; 3], EPERM),
    ("open_tree", Long, 428, [0; 3], EPERM),
    ("move_mount", Long, 429, [0; 3], EPERM),
    ("fsopen", Long, 430, [0; 3], EPERM),
    ("clone3", Long, 435, [0; 3], ENOSYS),
    ("mount_setattr", Long, 442, [0; 3], EPERM),
    ("a call of the future", Long, 1000, [0; 3], ENOSYS),
    ("getpid of x32", Long, X32 | 39, [0; 3], ENOSYS),
    ("unshare of x32", Long, X32 | 272, [0x1000_0000, 0, 0], ENOSYS),
    ("ptrace of x32", Long, X32 | 521, [0; 3], ENOSYS),
    ("getpid of i386", Short, 20, [0; 3], 0),
    ("mount of i386", Short, 21, [0; 3], EPERM),
    ("socketcall(SYS_SOCKET) of i386", Short, 102, [1, 0, 0], ENOSYS),
    ("socket(AF_ALG) of i386", Short, 359, [38, 5, 0], EPERM),
    ("unshare(CLONE_NEWUSER) of i386", Short, 310, [0x1000_0000, 0, 0], EPERM),
    ("keyctl of i386", Short, 288, [0; 3], EPERM),
    ("io_uring_setup of i386", Short, 425, [0; 3], EPERM),
    ("clone3 of i386", Short, 435, [0; 3], ENOSYS),
    ("a call of i386's future", Short, 1000, [0; 3], ENOSYS),
];

#[test]
fn the_default_filter_answers_by_every_interface_of_the_kernel_for_program_and_exec() -> Result<()> {
    rootful(|daemon| {
        let directory = daemon.directory("calls")?;
        for (number, (_, interface, call, arguments, _)) in CALLS.iter().enumerate() {
            let path = directory.join(format!("{number:02}"));
            fs::write(&path, program(*interface, *call, *arguments))?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        }
        const ASK: &str = "for call in /calls/*; do $call; echo ${call##*/} $?; done 2>/dev/null";
        let pod = daemon.pod("calls")?;
        let answers = |filtered: bool| -> Result<[BTreeMap<usize, i32>; 2]> {
            let with = |mut config: v1::ContainerConfig| {
                config.mounts = vec![v1::Mount { readonly: true, ..volume(&directory, "/calls") }];
                if !filtered {
                    security(&mut config).seccomp = None;
                }
                config
            };
            let main = pod.start(with(idle(if filtered { "filtered" } else { "free" })))?;
            let parse = |said: &str| -> Result<BTreeMap<usize, i32>> {
                said.lines()
                    .map(|line| {
                        let (number, code) = line.split_once(' ').context("a number and a code")?;
                        Ok((number.parse()?, code.parse()?))
                    })
                    .collect()
            };
            let program = pod.script(ASK, |config| *config = with(config.clone()))?;
            Ok([parse(&program)?, parse(&main.sh(ASK)?)?])
        };
        let [program, exec] = answers(true)?;
        assert_eq!(program, exec);
        let [free, _] = answers(false)?;
        let mut by_the_filter = 0;
        for (number, (name, interface, _, _, expected)) in CALLS.iter().enumerate() {
            let (found, without) =
                (program.get(&number).context("an answer")?, free.get(&number).context("an answer")?);
            // A kernel without i386's interface kills the program.
            if *interface == Short && *without > 128 {
                continue;
            }
            assert_eq!(found, expected, "{name}; without a filter it is {without}");
            by_the_filter += usize::from(found != without);
        }
        ensure!(by_the_filter >= 12, "of {by_the_filter} calls only it is the filter that answers");
        Ok(())
    })
}
