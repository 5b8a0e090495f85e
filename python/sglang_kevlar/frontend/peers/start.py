"""Makes a frontend one of several, as --peers says."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

from sglang_kevlar import config
from sglang_kevlar.cluster import hosts, keys
from sglang_kevlar.frontend.kept.registry import KeptRuns
from sglang_kevlar.frontend.peers.kept import KeptPeers
from sglang_kevlar.frontend.peers.links import PeerLinks
from sglang_kevlar.frontend.peers.records import PeerRecords
from sglang_kevlar.protocol.cluster import Identity
from sglang_kevlar.protocol.launch import LaunchPlan

if TYPE_CHECKING:
    from sglang_kevlar.frontend.sessions import GroupSessions

#: of an address to listen on, that is none to be reached at
_ANY = ("0.0.0.0", "::", "[::]", "*", "")


def identity_of(plan: LaunchPlan, secure: bool) -> Identity | None:
    """Of this incarnation of this frontend; None for one that is alone. ``secure``: it serves HTTPS."""
    args = plan.kevlar
    if args.frontend_name is None or args.listen is None:
        return None
    addresses = [args.advertise, plan.host, config.address(args.listen)[0]]
    host = next((host for host in addresses if host is not None and host not in _ANY), "127.0.0.1")
    return Identity(
        kind="frontend",
        name=args.frontend_name,
        host=args.host_label or hosts.label(),
        instance=secrets.token_hex(4),
        url=f"{'https' if secure else 'http'}://{host}:{plan.port}",
    )


def start(plan: LaunchPlan, identity: Identity, sessions: GroupSessions, runs: KeptRuns, app: Any) -> KeptPeers:
    """On the event loop, when sessions have begun and before anything is served."""
    args = plan.kevlar
    assert args.peers is not None and plan.configuration is not None
    addresses = config.peer_addresses(args.peers)
    others = {name: at for name, at in addresses.items() if name != identity.name}
    memory = args.stream_memory << 20
    records = PeerRecords(identity.name, identity.instance, others, memory, args.stream_retention)
    key = keys.load(args.cluster_key_file)
    links = PeerLinks(identity, others, plan.configuration, key, sessions.listener, records)
    peers = KeptPeers(runs, records, links, app)
    records.links = sessions.links = links
    records.take_up, records.abandon = peers.take_up_all, runs.abandon
    runs.recorder, runs.elsewhere = records, peers
    links.start()
    return peers
