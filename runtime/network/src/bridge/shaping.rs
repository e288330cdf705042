//! Limits of what a pod receives and sends: a token bucket (tbf, tc-tbf(8)) at each end of its
//! pair.
//!
//! The one for what it sends is on `eth0`, in the pod's namespace: only a container with
//! `CAP_NET_ADMIN` could take it away, which could change the node's network as well. Both go with
//! the pair.

use nix::libc::{AF_UNSPEC, RTM_NEWQDISC};

use super::attach::POD_INTERFACE;
use super::links::find_link;
use super::{Bridge, Error, lock};
use crate::firewall::kernel::{nest, put};
use crate::netlink::{self, Netlink, Request};

/// `TCA_KIND`, `TCA_OPTIONS` (`linux/rtnetlink.h`).
const KIND: u16 = 1;
const OPTIONS: u16 = 2;
/// `TCA_TBF_PARMS`, `TCA_TBF_RATE64`, `TCA_TBF_BURST` (`linux/pkt_sched.h`).
const PARAMETERS: u16 = 1;
const RATE64: u16 = 4;
const BURST: u16 = 6;
/// `TC_H_ROOT`: the queue of the interface itself.
const ROOT: u32 = 0xffff_ffff;
/// `TC_LINKLAYER_ETHERNET`: no table of transmission times is needed.
const ETHERNET: u8 = 1;

/// The least that is sent at once, in bytes: more than the largest segment that the kernel hands to
/// an interface in one piece.
const LEAST_BURST: u64 = 128 * 1024;

/// What may be sent at once, as a part of a second's.
const BURST_PART: u64 = 20;

/// How much may wait for its turn, as a part of a second's; the rest is dropped.
const QUEUE_PART: u64 = 40;

/// Most bits per second of a pod's traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Bandwidth {
    /// What it receives.
    pub ingress: Option<u64>,
    /// What it sends.
    pub egress: Option<u64>,
}

impl Bandwidth {
    /// Whether there is a limit.
    pub fn is_limited(self) -> bool {
        self != Self::default()
    }
}

impl Bridge {
    /// Limits the traffic of an attached pod. `inside` is as for [`Bridge::attach`].
    ///
    /// # Errors
    /// [`Error::Pod`], with `ENOENT` on a kernel without `sch_tbf`; a part may be limited then.
    pub fn shape(&self, sandbox_id: &str, bandwidth: Bandwidth, inside: &mut Netlink) -> Result<(), Error> {
        let interface = self.host_interface(sandbox_id)?;
        let pod = |source| Error::Pod { sandbox_id: sandbox_id.to_owned(), source };
        if let Some(bits) = bandwidth.ingress {
            limit(&mut lock(&self.node), "limit what the pod receives", &interface, bits).map_err(pod)?;
        }
        if let Some(bits) = bandwidth.egress {
            limit(inside, "limit what the pod sends", POD_INTERFACE, bits).map_err(pod)?;
        }
        Ok(())
    }
}

/// Limits what is sent by an interface.
fn limit(
    netlink: &mut Netlink,
    operation: &'static str,
    interface: &str,
    bits: u64,
) -> Result<(), netlink::Error> {
    let link = find_link(netlink, interface)?.ok_or(netlink::Error::Malformed { operation })?;
    netlink.request(&[bucket(operation, link.index, bits)]).map(drop)
}

/// Gives an interface a token bucket, in place of any that it has.
fn bucket(operation: &'static str, index: u32, bits: u64) -> Request {
    let rate = (bits / 8).max(1);
    let in_u32 = |bytes: u64| u32::try_from(bytes).unwrap_or(u32::MAX);
    let burst = in_u32((rate / BURST_PART).max(LEAST_BURST));
    let queue = in_u32(u64::from(burst) + rate / QUEUE_PART);
    // struct tc_tbf_qopt: two struct tc_ratespec of 12 bytes (cell_log, linklayer, overhead,
    // cell_align, mpu, rate), then limit, buffer and mtu.
    let mut parameters = [0_u8; 36];
    parameters[1] = ETHERNET;
    parameters[8..12].copy_from_slice(&in_u32(rate).to_ne_bytes());
    parameters[24..28].copy_from_slice(&queue.to_ne_bytes());
    let mut options = nest(PARAMETERS, &parameters);
    put(&mut options, RATE64, &rate.to_ne_bytes());
    put(&mut options, BURST, &burst.to_ne_bytes());
    // struct tcmsg: family and padding, then the interface, the handle, the parent, and info.
    let mut body = vec![u8::try_from(AF_UNSPEC).unwrap_or(0), 0, 0, 0];
    for word in [index, 0, ROOT, 0] {
        body.extend_from_slice(&word.to_ne_bytes());
    }
    put(&mut body, KIND, b"tbf\0");
    put(&mut body, OPTIONS, &options);
    let flags = netlink_packet_core::NLM_F_CREATE | netlink_packet_core::NLM_F_REPLACE;
    Request::raw(operation, RTM_NEWQDISC, flags, body)
}
