"""The control socket: where brokers and egressctl come in.

Anyone may connect. Each connection is one client, known by its peer credentials alone; it holds at most one
lease, and the lease ends with it, unless it is we who end: then it may be resumed over another. Whatever is
not a well-formed message ends the connection, and with it only that client.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from egressd.ipc import messages
from egressd.ipc.channel import Received
from egressd.ipc.peer import Peer, PeerGone
from egressd.model.errors import Refused
from egressd.model.identities import Link, check_workspace
from egressd.model.verdicts import Reason
from egressd.policy.compiled import Guard, Policy
from egressd.processes import evidence, reports
from egressd.processes.leases import Sandbox
from egressd.processes.logins import who
from egressd.processes.members import Caller, caller_of, is_member
from egressd.processes.routing_answers import RoutingAnswers
from egressd.processes.spawn_refusals import SpawnRefusals
from egressd.processes.testifying import Said, Testifying
from egressd.processes.turns import Turns
from egressd.processes.workspaces import broken_workspaces
from egressd.ruleset import layout

if TYPE_CHECKING:
    from egressd.processes.controller import Controller

__all__ = ["ControlSocket"]

log = logging.getLogger("controller")

MAX_CLIENTS = 8192
MAX_CLIENTS_PER_USER = 4096
# Connections without a sandbox. A spawn holds one for a tenth of a second, and a thousand may begin at once.
MAX_IDLE_PER_USER = 1024
MAX_PENDING = 4  # requests of one client waiting for their turn; ours wait for each answer
MAX_THROWN_AWAY = 4  # descriptors of one account that were no namespaces, and do not let us close them
MAX_KNOWN = 256  # networks that a sandbox is told about, each a comparison for every packet to a stranger
MAX_PROOFS_PER_USER = 32  # asked for; one of them is being made
PROOFS_AT_ONCE = 2  # as many as the auditor makes (proving.Prover); each reads a journal
_RECEIPT_WAIT = 10.0  # seconds for a sandbox that is about to be closed
_ACCEPTS = 64  # per wake-up, so that a crowd at the door neither waits for ever nor holds the loop


@dataclass(slots=True, eq=False)
class Client:
    caller: Caller
    policy: Policy | None = None  # entered
    sandbox: Sandbox | None = None  # attached
    attached: bool = False  # was, at least
    behalf: Caller | None = None  # for whom it asks, where that is somebody else
    asked: int = 0
    accepted: float = field(default_factory=lambda: time.clock_gettime(time.CLOCK_BOOTTIME))
    pending: int = 0
    said: Said = field(default_factory=Said)  # put on record of the sandbox
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def asker(self) -> Caller:
        """Whose rights count for what is only read."""
        return self.behalf or self.caller


class ControlSocket:
    def __init__(self, controller: Controller, listener: socket.socket) -> None:
        self.controller = controller
        self.clients: dict[Peer, Client] = {}
        self._per_user: collections.Counter[int] = collections.Counter()
        self._idle: collections.Counter[int] = collections.Counter()
        self._thrown_away: collections.Counter[int] = collections.Counter()
        self._awaited: frozenset[int] = frozenset()  # accounts that leases waited for at the start
        self._listener = listener
        self._proofs = Turns("proofs", at_once=PROOFS_AT_ONCE, most=MAX_PROOFS_PER_USER)
        self._admins = {0, os.getuid()}
        self._exporter = _uid_of(controller, "metrics")
        self._api = _uid_of(controller, "api")
        self._refused = SpawnRefusals(controller.auditing.record, later=asyncio.get_running_loop().call_later)
        self._routes = RoutingAnswers(controller, later=asyncio.get_running_loop().call_later)
        self.testifying = Testifying(controller, later=asyncio.get_running_loop().call_later)
        for link, uid in controller.ended.askers():
            self.testifying.recall(link, uid)
        listener.setblocking(False)

    def recall(self) -> None:
        """Of sandboxes that wait to be resumed, what is not every member's to know."""
        away = self.controller.away
        self._awaited = frozenset(each.sandbox.caller.uid for each in away.values())
        for link, each in away.items():
            if each.said.request:
                self.testifying.recall(link, each.sandbox.caller.uid)

    def listen(self) -> None:
        self.recall()
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(_ACCEPTS):
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:  # the client gave up, or descriptors ran out
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    self._pause()
                    return
                continue
            self._admit(sock)

    def _pause(self) -> None:
        """Without descriptors the listener would wake us for ever, for nothing."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._listener)
        loop.call_later(0.1, self.listen)

    def _admit(self, sock: socket.socket) -> None:
        try:
            caller = caller_of(sock)
        except OSError:
            sock.close()
            return
        uid = caller.uid
        crowded = self._per_user[uid] >= MAX_CLIENTS_PER_USER or self._too_many_idle(uid)
        if crowded or len(self.clients) >= MAX_CLIENTS:
            _turn_away(sock)
            return
        peer = Peer(sock, messages.FROM_CLIENT, handler=self._heard, gone=self._gone, reads=MAX_PENDING)
        peer.channel.only_namespaces(lambda descriptor: self._throw_away(descriptor, uid))
        peer.channel.descriptors = bool(self.controller.away) and self._may_hand_over(uid)
        self.clients[peer] = Client(caller)
        self._per_user[uid] += 1
        self._idle[uid] += 1

    def _too_many_idle(self, uid: int) -> bool:
        """After a restart all brokers come back at once."""
        if self._idle[uid] < MAX_IDLE_PER_USER:
            return False
        away = sum(1 for away in self.controller.away.values() if away.sandbox.caller.uid == uid)
        return self._idle[uid] >= MAX_IDLE_PER_USER + away

    # ---- descriptors: from members alone, and from those whose leases wait

    def _may_hand_over(self, uid: int) -> bool:
        return uid in self._awaited and self._thrown_away[uid] < MAX_THROWN_AWAY

    def _throw_away(self, descriptor: int, uid: int) -> None:
        """See `Channel.only_namespaces`. Who makes us wait too often hands nothing over any more."""
        loop = asyncio.get_running_loop()

        def close() -> None:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._thrown_away.subtract, (uid,))

        self._thrown_away[uid] += 1
        threading.Thread(target=close, daemon=True).start()
        if self._thrown_away[uid] >= MAX_THROWN_AWAY:
            for peer, client in self.clients.items():
                if client.caller.uid == uid:
                    peer.channel.descriptors = False

    def _gone(self, peer: Peer, why: str) -> None:
        client = self.clients.pop(peer, None)
        if client is None:
            return
        self._per_user[client.caller.uid] -= 1
        if not client.attached:
            self._idle[client.caller.uid] -= 1
        if client.sandbox is not None:
            self.controller.background(
                self.controller.close(client.sandbox), f"closing {client.sandbox.link.device}"
            )

    # ---- requests

    def _heard(self, peer: Peer, received: Received[Any]) -> Coroutine[Any, Any, None] | None:
        """A broker's last word comes right before its end: what waits for its turn would come too late."""
        client, claim = self.clients.get(peer), _CLAIMS.get(type(received.message))
        if claim is None:
            return self._handle(peer, received)
        if client is not None and client.sandbox is not None:
            claim(self, client.sandbox, received.message)
        return None

    async def _handle(self, peer: Peer, received: Received[Any]) -> None:
        client = self.clients.get(peer)
        if client is None:  # closed since this message was read
            received.close()
            return
        client.pending += 1
        try:
            if client.pending > MAX_PENDING:
                peer.close("it sends faster than it reads")
                return
            async with client.turn:
                if not peer.closed:
                    await self._answer(peer, client, received)
        finally:
            client.pending -= 1
            received.close()

    async def _answer(self, peer: Peer, client: Client, received: Received[Any]) -> None:
        client.asked += 1
        try:
            _check_behalf(client, received.message)
            await _HANDLERS[type(received.message)](self, peer, client, received)
        except Refused as refused:
            self._refuse(peer, client, received.message, refused)
            if isinstance(received.message, messages.ForUser):
                peer.close("it may not ask for others")  # and shall not go on with rights of its own
        except PeerGone as gone:
            self._refuse(peer, client, received.message, Refused(Reason.UNAVAILABLE, str(gone)))
        except Exception as error:  # a defect of ours, too: nobody is left waiting for an answer
            log.exception("%s", type(received.message).__name__)
            self._refuse(peer, client, received.message, Refused(Reason.UNKNOWN, f"it failed: {error}"))

    def _refuse(self, peer: Peer, client: Client, message: Any, refused: Refused) -> None:
        if isinstance(message, messages.Enter | messages.Attach | messages.Resume):
            entered = client.policy.workspace if client.policy else ""
            workspace = getattr(message, "workspace", None) or entered
            self._refused.add(
                client.caller.uid,
                refused.reason.value,
                workspace if workspace in self.controller.policies else None,
                {"pid": client.caller.pid, "workspace": workspace, "text": str(refused)},
            )
        with contextlib.suppress(PeerGone):
            peer.send(messages.Refusal(reason=refused.reason.value, text=str(refused)[:4096]))

    async def enter(self, peer: Peer, client: Client, received: Received[messages.Enter]) -> None:
        if client.sandbox is not None:
            raise Refused(Reason.PROTOCOL, "this connection holds a sandbox already; make another one")
        policy = self._policy_for(client.caller, received.message.workspace)
        if not self.controller.settled.is_set():
            raise Refused(Reason.UNAVAILABLE, "the warden has just started; try again in a moment")
        client.policy = policy
        peer.channel.descriptors = self._thrown_away[client.caller.uid] < MAX_THROWN_AWAY
        peer.send(self._terms(policy))

    def _policy_for(self, caller: Caller, workspace: str) -> Policy:
        """The policy of a workspace the caller is a member of. One answer for "there is none" and for
        "not yours", except to those who may see everything."""
        policy = self.controller.policies.get(workspace)
        if policy is not None and is_member(caller, policy.members):
            return policy
        shown = repr(workspace[:64])
        if policy is None and self._may_see_all(caller):
            raise Refused(Reason.WORKSPACE, self._why_absent(workspace))
        raise Refused(
            Reason.MEMBER,
            f"uid {caller.uid} is not a member of a workspace {shown};"
            " members are listed under `members:` in its policy",
        )

    def _why_absent(self, workspace: str) -> str:
        try:
            check_workspace(workspace)
        except ValueError as error:
            return str(error)
        broken = [str(p) for p in self.controller.problems if workspace in broken_workspaces([p])]
        if broken:
            return f"the policy of workspace {workspace} is broken: " + "; ".join(broken[:5])
        directory = self.controller.config.workspaces_dir
        return f"there is no workspace {workspace}: no {workspace}.yaml in {directory}"

    def _may_see_all(self, caller: Caller) -> bool:
        return caller.uid in self._admins

    def _terms(self, policy: Policy) -> messages.Terms:
        limits = policy.limits
        return messages.Terms(
            workspace=policy.workspace,
            guard=policy.guard.value,
            policy=policy.digest,
            wall=limits.wall,
            memory=limits.memory,
            processes=limits.processes,
            services=tuple(self.controller.services(policy)),
            known=self._known(policy),
        )

    def _known(self, policy: Policy) -> tuple[str, ...] | None:
        """Where this policy can lead at all. None where nothing is refused, or where that is too much."""
        pools = self.controller.pools
        networks = [pools.synthetic4, pools.synthetic6, layout.RESOLVER4, layout.RESOLVER6]
        networks += [rule.network for rule in policy.cidrs]
        if policy.holding is not Guard.ENFORCE or len(networks) > MAX_KNOWN:
            return None
        return tuple(map(str, networks))

    async def attach(self, peer: Peer, client: Client, received: Received[messages.Attach]) -> None:
        if client.policy is None or client.sandbox is not None:
            raise Refused(Reason.PROTOCOL, "a namespace is attached once, after entering a workspace")
        # Asked again: the policy may have changed since.
        policy = self._policy_for(client.caller, client.policy.workspace)
        status = os.fstat(received.descriptor) if received.descriptor is not None else None
        sandbox = self.controller.leases.open(
            workspace=policy.workspace,
            caller=client.caller,
            command=received.message.command,
            since=time.time(),
            quota=_lower(policy.limits.egress_bytes, received.message.quota),
            digest=received.message.digest,
            policy=policy.digest,
            guard=policy.guard.value,
            connections=received.message.connections,
            closed=received.message.closed,
            namespace=(status.st_dev, status.st_ino) if status is not None else (0, 0),
        )
        descriptor = received.take()
        try:
            await self.controller.open(sandbox, descriptor)
        except BaseException:
            await self.controller.close(sandbox)
            raise
        finally:
            os.close(descriptor)
        if peer.closed:  # the broker died while we worked: nobody holds this lease
            await self.controller.close(sandbox)
            return
        client.sandbox, client.attached = sandbox, True
        self._idle[client.caller.uid] -= 1
        peer.send(
            messages.Lease(link=sandbox.link.number, address4=sandbox.address4, address6=sandbox.address6)
        )

    async def resume(self, peer: Peer, client: Client, received: Received[messages.Resume]) -> None:
        if client.policy is not None or client.sandbox is not None:
            raise Refused(Reason.PROTOCOL, "a sandbox is resumed over a connection of its own, first thing")
        away = self.controller.awaited(Link(received.message.link), client.caller)
        policy = self._policy_for(client.caller, away.sandbox.workspace)
        descriptor = received.take()
        try:
            await self.controller.resume(away, client.caller, descriptor)
        finally:
            os.close(descriptor)
        sandbox = away.sandbox
        if peer.closed:  # the broker died while we worked: nobody holds this lease
            await self.controller.close(sandbox)
            return
        client.policy, client.said = policy, away.said
        client.sandbox, client.attached = sandbox, True
        self._idle[client.caller.uid] -= 1
        peer.send(
            messages.Lease(link=sandbox.link.number, address4=sandbox.address4, address6=sandbox.address6)
        )

    async def read_spent(self, peer: Peer, client: Client, received: Received[messages.ReadSpent]) -> None:
        if client.sandbox is None:
            raise Refused(Reason.PROTOCOL, "this connection holds no sandbox")
        found = await self.controller.spent(client.sandbox)
        peer.send(messages.Spent(counters=found.counters, spent=found.spent))

    # ---- what a broker claims

    def ended(self, sandbox: Sandbox, claimed: messages.Ended) -> None:
        """Kept with the sandbox until it is closed; the first word counts, and nothing depends on it."""
        if sandbox.claims.ended is None:
            sandbox.claims.ended = claimed

    def attempt(self, sandbox: Sandbox, claimed: messages.Attempt) -> None:
        if not sandbox.claims.may_record(now=time.monotonic()):
            return
        self.controller.auditing.record(
            "attempt",
            {
                "link": sandbox.link.device,
                "workspace": sandbox.workspace,
                "protocol": claimed.protocol,
                "destination": claimed.destination,
                "port": claimed.port,
                "pid": claimed.pid,
                "executable": claimed.executable,
                # a command line may name the files that a request was shown, and members read this record
                "command": "" if self.testifying.is_of_request(sandbox.link) else claimed.command,
            },
        )

    async def testify(self, peer: Peer, client: Client, received: Received[messages.Testify]) -> None:
        if client.policy is not None and not client.attached:
            self._policy_for(client.caller, client.policy.workspace)  # still
        said = client.said
        before = said.request, len(said.events)
        try:
            await self.testifying.hear(
                received.message,
                caller=client.caller,
                workspace=None if client.policy is None else client.policy.workspace,
                sandbox=client.sandbox,
                said=said,
            )
        finally:
            if client.sandbox is not None and before != (said.request, len(said.events)):
                self.controller.save_lease(client.sandbox, said)
        peer.send(messages.Recorded())

    # ---- reading

    async def for_user(self, peer: Peer, client: Client, received: Received[messages.ForUser]) -> None:
        """From here on what the asker may see is what that user may see."""
        if client.caller.uid not in (0, self._api):
            raise Refused(Reason.MEMBER, "only root and the account of the HTTP API ask for others")
        if client.asked != 1:
            raise Refused(Reason.PROTOCOL, "for whom a connection asks is said once, before anything else")
        user = received.message
        client.behalf = Caller(client.caller.pid, user.uid, frozenset(user.gids))

    async def ask(self, peer: Peer, client: Client, received: Received[messages.Ask]) -> None:
        message, asker = received.message, client.asker
        if message.what == "metrics":
            await self._send(peer, await self._metrics(asker))
            return
        visible = self._visible(asker, message.workspace)
        everything = self._may_see_all(asker)
        if message.what == "workspaces":
            await self._send(peer, {"all": everything, "workspaces": sorted(visible)})
            return
        document = await reports.answer(self.controller, message.what, visible, everything=everything)
        await self._send(peer, document)

    async def _metrics(self, caller: Caller) -> reports.Document:
        if not self._may_see_all(caller) and caller.uid != self._exporter:
            text = "only root, the daemon's own user and the exporter's may read all metrics: use sudo"
            raise Refused(Reason.MEMBER, text)
        return await reports.metrics(self.controller)

    def _visible(self, caller: Caller, workspace: str | None) -> dict[str, Policy]:
        if workspace is not None and not self._may_see_all(caller):
            return {workspace: self._policy_for(caller, workspace)}
        if workspace is not None:
            policy = self.controller.policies.get(workspace)
            if policy is None:
                raise Refused(Reason.WORKSPACE, self._why_absent(workspace))
            return {workspace: policy}
        if self._may_see_all(caller):
            return self.controller.policies
        return {n: p for n, p in self.controller.policies.items() if is_member(caller, p.members)}

    async def why(self, peer: Peer, client: Client, received: Received[messages.Why]) -> None:
        message = received.message
        link = Link.of_device(message.subject)
        sandbox = self._sandbox_of(client.asker, link) if link else None
        workspace = sandbox.workspace if sandbox else message.workspace
        policy = self._visible(client.asker, workspace)[workspace]
        if sandbox is not None:
            await self._send(peer, reports.why_sandbox(sandbox, policy))
        else:
            await self._send(peer, await reports.why(self.controller, policy, message.subject))

    def _sandbox_of(self, caller: Caller, link: Link) -> Sandbox:
        """One answer for "there is none" and for "not of a workspace of yours"."""
        sandbox = self.controller.leases.by_link.get(link)
        if sandbox is not None and sandbox.workspace in self._visible(caller, None):
            return sandbox
        raise Refused(
            Reason.MEMBER,
            f"no sandbox of yours has the link {link.device} now: egressctl status lists those there are",
        )

    async def apply(self, peer: Peer, client: Client, received: Received[messages.Apply]) -> None:
        if not self._may_see_all(client.caller):
            raise Refused(Reason.MEMBER, "only root and the daemon's own user apply policies: use sudo")
        message = received.message
        by = who(client.caller, peer.channel.socket, accepted=client.accepted)
        document = await self.controller.apply(
            dry_run=message.dry_run, by=by, why=message.why, about=message.about
        )
        await self._send(peer, document)

    async def select_route(
        self, peer: Peer, client: Client, received: Received[messages.SelectRoute]
    ) -> None:
        message, uid = received.message, client.asker.uid
        policy = self._visible(client.asker, message.workspace)[message.workspace]
        await self._send(peer, self._routes.answer(policy, message.route, uid=uid))

    async def change_key(self, peer: Peer, client: Client, received: Received[messages.ChangeKey]) -> None:
        if not self._may_see_all(client.caller):
            raise Refused(
                Reason.MEMBER, "only root and the daemon's own user change the signing key: use sudo"
            )
        await self._send(peer, reports.journal_document(await self.controller.change_key()))

    # ---- proofs

    async def prove(self, peer: Peer, client: Client, received: Received[messages.Prove]) -> None:
        asked, uid = received.message, client.asker.uid
        self._visible(client.asker, asked.workspace)
        with self._proofs.asked(uid):
            link = await self._ended_link(client.asker, asked)
            async with self._proofs.turn(uid):
                if peer.closed:
                    return  # nobody waits for it any more
                self._visible(client.asker, asked.workspace)  # after the wait, still
                data = await evidence.prove(self.controller, asked, link=link)
        await peer.send_document(data)

    async def _ended_link(self, asker: Caller, asked: messages.Prove) -> Link | None:
        """The link of a receipt, once it is closed and on record. One answer for "there was none", for "not
        of this workspace" and for "of somebody else's request"."""
        if asked.link is None:
            return None
        link, controller = Link(asked.link), self.controller
        self._check_receipt(asker, asked.workspace, link)
        end = time.monotonic() + _RECEIPT_WAIT
        while link in controller.leases.by_link:
            if time.monotonic() > end:
                text = f"the sandbox {link.device} has not ended: end it, or prove the workspace without it"
                raise Refused(Reason.UNAVAILABLE, text)
            await asyncio.sleep(0.02)
        self._check_receipt(asker, asked.workspace, link)  # a request may have begun in it since
        return link

    def _check_receipt(self, asker: Caller, workspace: str, link: Link) -> None:
        sandbox = self.controller.leases.by_link.get(link)
        owner = sandbox.workspace if sandbox is not None else self.controller.ended.get(link)
        hidden = not self._may_see_all(asker) and not self.testifying.may_see_receipt(link, asker.uid)
        if owner != workspace or hidden:
            text = f"no sandbox of workspace {workspace} has or had the link {link.device}"
            raise Refused(Reason.MEMBER, f"{text}; links that ended before egressd was started are not known")

    async def _send(self, peer: Peer, document: Any) -> None:
        await peer.send_document(msgspec.json.encode(document))

    # ---- endings

    async def revoke(self, sandbox: Sandbox, text: str, *, why: str = "") -> None:
        """End a lease from our side: permission first, then the word to the broker. `why`: for the record."""
        await self.controller.close(sandbox, why=why)
        self.dismiss(sandbox, text)

    def dismiss(self, sandbox: Sandbox, text: str) -> None:
        """Its lease has ended: tell whoever held it."""
        for peer, client in list(self.clients.items()):
            if client.sandbox is sandbox:
                client.sandbox = None
                with contextlib.suppress(PeerGone):
                    peer.send(messages.Revoked(text=text))
                peer.close("revoked")

    async def close_all(self, text: str) -> None:
        asyncio.get_running_loop().remove_reader(self._listener)
        for sandbox in list(self.controller.leases.by_link.values()):
            await self.revoke(sandbox, text)
        self._drain()

    def leave(self) -> None:
        """No more clients, and no word to those there are: their connections end, and they come back."""
        asyncio.get_running_loop().remove_reader(self._listener)
        self._drain()

    def _drain(self) -> None:
        self._refused.drain()
        self._routes.drain()
        self.testifying.close()


def _uid_of(controller: Controller, role: str) -> int | None:
    """The account of a process that may ask more than others, if there is one: who tells metrics may read all
    of them, who answers HTTP may ask for others."""
    try:
        account = controller.config.accounts().get(role)
    except KeyError:
        return None
    return None if account is None else account.uid


def _check_behalf(client: Client, message: Any) -> None:
    """For others one reads, and no more: a list of what is permitted."""
    if client.behalf is not None and not isinstance(message, _FOR_OTHERS):
        raise Refused(Reason.PROTOCOL, f"{type(message).__name__} is not asked for somebody else")


_FOR_OTHERS = messages.Ask | messages.Why | messages.SelectRoute | messages.Prove


def _lower(one: int | None, other: int | None) -> int | None:
    bounds = [bound for bound in (one, other) if bound is not None]
    return min(bounds, default=None)


def _turn_away(sock: socket.socket) -> None:
    data = msgspec.json.encode(
        messages.Refusal(reason=Reason.LIMIT.value, text="too many connections to egressd; end some first")
    )
    with sock, contextlib.suppress(OSError):
        sock.setblocking(False)
        sock.send(data)


# Never answered, and done at once.
_CLAIMS: dict[type, Any] = {
    messages.Ended: ControlSocket.ended,
    messages.Attempt: ControlSocket.attempt,
}
_HANDLERS: dict[type, Any] = {
    messages.Enter: ControlSocket.enter,
    messages.Attach: ControlSocket.attach,
    messages.Resume: ControlSocket.resume,
    messages.ReadSpent: ControlSocket.read_spent,
    messages.Testify: ControlSocket.testify,
    messages.ForUser: ControlSocket.for_user,
    messages.Ask: ControlSocket.ask,
    messages.Why: ControlSocket.why,
    messages.SelectRoute: ControlSocket.select_route,
    messages.Apply: ControlSocket.apply,
    messages.Prove: ControlSocket.prove,
    messages.ChangeKey: ControlSocket.change_key,
}
