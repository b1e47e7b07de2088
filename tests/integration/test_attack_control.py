"""The control socket, attacked by who may connect to it: everybody on the machine."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from integration import inside
from integration.chatter import Chatter
from integration.probe import Resident
from lab.machine import VENV, poll

MEMBER, STRANGER = 4001, 4002
POLICY = """
workspace: {name}
guard: enforce
members: [user:{member}]
allow:
  - {{host: plain.test, ports: [7/tcp], verify: address}}
"""
ATTACKERS: list[Any] = []
PROMPT = 8.0  # seconds a spawn may take while the daemon is under attack


@pytest.fixture(scope="module")
def daemon(start_module_daemon: Any) -> Any:
    return start_module_daemon(
        policies={
            "acme": POLICY.format(name="acme", member=MEMBER),
            "beta": POLICY.format(name="beta", member=STRANGER),
        }
    )


def attack(daemon: Any, text: str, *arguments: str, uid: int | None = STRANGER) -> Any:
    """Python as another user, with egressd's own client at hand; left running."""
    argv = [str(VENV / "bin" / "python"), "-I", "-c", PRELUDE + text, daemon.run_dir, *arguments]
    ATTACKERS.append(daemon.lab.start(argv, uid=uid))
    return ATTACKERS[-1]


@pytest.fixture(autouse=True)
def _attackers_end(daemon: Any) -> Iterator[None]:
    yield
    while ATTACKERS:
        ATTACKERS.pop().kill()
    poll(lambda: not daemon.json("status")["sandboxes"], what="no lease is left")


def said(process: Any, *, within: float = 20.0) -> list[Any]:
    """What the attacker prints, one JSON value a line, until it says `null`."""

    def over() -> bool:
        assert process.status() in (None, 0), process.err
        return "null\n" in process.out

    poll(over, timeout=within, what="the attack is over")
    return [json.loads(line) for line in process.out.splitlines()][:-1]


PRELUDE = '''
import ctypes, json, os, socket, sys, time
from egressd.ipc import messages
from egressd.ipc.channel import Channel
from egressd.model.errors import Refused
from egressd.sandbox.control import Control

RUN = sys.argv[1]
USER, NETWORK = 0x10000000, 0x40000000  # linux/sched.h
KEPT = []

def say(value=None):
    print(json.dumps(value), flush=True)

def raw():
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(RUN + "/control.sock")
    return sock

def network(uid=None, *, below=False):
    """A network in a user namespace made by `uid`, `below` another one of its own; the descriptor."""
    mine, theirs = socket.socketpair()
    if os.fork() == 0:
        mine.close()
        if uid is not None:
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        libc = ctypes.CDLL(None, use_errno=True)
        for flags in ((USER, USER | NETWORK) if below else (USER | NETWORK,)):
            ids = {"uid": os.getuid(), "gid": os.getgid()}
            if libc.unshare(flags):
                os._exit(1)
            if below:
                open("/proc/self/setgroups", "w").write("deny")
                for kind, number in ids.items():
                    open(f"/proc/self/{kind}_map", "w").write(f"0 {number} 1")
        socket.send_fds(theirs, [b"x"], [os.open("/proc/self/ns/net", os.O_RDONLY)])
        theirs.recv(1)
        os._exit(0)
    theirs.close()
    KEPT.append(mine)
    return socket.recv_fds(mine, 1, 1)[1][0]

def attached(workspace, descriptor, command="attack"):
    """(connection, link number) or (connection, the refusal's reason)."""
    control = Control(RUN)
    try:
        control.enter(workspace)
        control.attach(descriptor, command=command)
        return control, control.lease().link
    except Refused as refused:
        return control, str(refused.reason)
'''


def spawn_time(daemon: Any) -> float:
    began = time.monotonic()
    daemon.sandbox("acme", ["/bin/true"], timeout=60).check()
    return time.monotonic() - began


# ---- being somebody else


def test_a_network_is_leased_once_and_only_to_who_made_it(daemon: Any) -> None:
    attacker = attack(daemon, '''
mine, theirs, other = network(4001), network(4002), network(4001)
os.setresgid(4001, 4001, 4001)
os.setresuid(4001, 4001, 4001)
first, link = attached("acme", mine)
say(["first", type(link).__name__])
say(["the same network, another connection", attached("acme", mine)[1]])
say(["another user's network", attached("acme", theirs)[1]])
say(["another user's workspace", attached("beta", mine)[1]])
for what, action in (
    ("a second network, the same connection", lambda: (first.attach(other), first.lease())),
    ("entering again", lambda: first.enter("acme")),
    ("entering another workspace", lambda: first.enter("beta")),
):
    try:
        action()
        say([what, "granted"])
    except Refused as refused:
        say([what, str(refused.reason)])
first.close()
end = time.monotonic() + 2
while not isinstance((again := attached("acme", mine))[1], int) and time.monotonic() < end:
    again[0].close()
say(["the same network, later", type(again[1]).__name__])
say()
''', uid=None)  # fmt: skip
    assert said(attacker) == [
        ["first", "int"],
        ["the same network, another connection", "namespace"],
        ["another user's network", "namespace"],
        ["another user's workspace", "member"],
        ["a second network, the same connection", "protocol"],
        ["entering again", "protocol"],
        ["entering another workspace", "protocol"],
        ["the same network, later", "int"],
    ]
    attacker.wait()
    poll(lambda: not daemon.json("status")["sandboxes"], what="the leases are gone")


def test_a_network_of_a_user_namespace_below_the_callers_is_the_callers(daemon: Any) -> None:
    """A user namespace within one of the caller's: still the caller's, still only what is allowed."""
    attacker = attack(daemon, """
control, link = attached("acme", network(below=True))
say(type(link).__name__)
say()
time.sleep(20)
""", uid=MEMBER)  # fmt: skip
    assert said(attacker) == ["int"]
    (sandbox,) = daemon.json("status")["sandboxes"]
    assert (sandbox["uid"], sandbox["workspace"]) == (MEMBER, "acme")
    attacker.kill()
    poll(lambda: not daemon.json("status")["sandboxes"], what="the lease is gone")


def test_nobody_sees_anothers_sandboxes_or_reaches_anothers_files(daemon: Any) -> None:
    with Resident(daemon, uid=MEMBER):
        status = json.loads(daemon.ctl("--json", "status", uid=STRANGER).out)
        assert status["sandboxes"] == [] and [w["workspace"] for w in status["workspaces"]] == ["beta"]
        for words in (
            ["counters", "acme"],
            ["policy", "explain", "acme"],
            ["why", "-w", "acme", "plain.test"],
        ):
            result = daemon.ctl(*words, uid=STRANGER)
            assert result.status != 0 and "plain.test" not in result.out, (words, result)
        (link,) = [s["link"] for s in daemon.json("status")["sandboxes"]]
        for workspace in ("beta", "acme"):
            result = daemon.ctl("why", "-w", workspace, f"eg{link}", uid=STRANGER)
            assert result.status != 0 and "198.19" not in result.out + result.err, result
    state = daemon.lab.inside(f"{daemon.directory}/state")
    for place in (f"{daemon.run_dir}/controller", f"{state}/journal"):
        for command in (["ls", place], ["touch", f"{place}/x"]):
            assert daemon.lab.run(command, uid=STRANGER).status != 0, command
    for place in (daemon.run_dir, state, "/run/netns"):
        assert daemon.lab.run(["touch", f"{place}/x"], uid=STRANGER).status != 0, place


# ---- wearing it out


def test_answers_that_are_never_read_hold_no_descriptor(daemon: Any) -> None:
    """A descriptor in flight is charged to the sender (unix(7), ETOOMANYREFS): a few readers that do not read
    would have kept the controller from handing any namespace to the warden, for ever."""
    attacker = attack(daemon, '''
for what in ("status", "counters"):
    sock = raw()
    sock.send(json.dumps({"type": "Ask", "what": what}).encode())
    data, ancillary, flags, _ = sock.recvmsg(1 << 17, 1024)
    say([what, len(ancillary), bool(data)])
say()
''')  # fmt: skip
    assert said(attacker) == [["status", 0, True], ["counters", 0, True]]


def test_a_slow_reader_holds_nobody_up(daemon: Any) -> None:
    attacker = attack(daemon, '''
socks = [raw() for _ in range(8)]
for _ in range(50):
    for sock in socks:
        sock.setblocking(False)
        try:
            sock.send(b'{"type":"Ask","what":"counters"}')
        except OSError:
            pass
    time.sleep(0.04)
say()
time.sleep(30)
''')  # fmt: skip
    said(attacker)
    assert max(spawn_time(daemon) for _ in range(3)) < PROMPT
    attacker.kill()


@pytest.mark.parametrize("what", ['{"type":"Enter","workspace":"x"}', '{"type":"Ask","what":"status"}'])
def test_a_flood_of_requests_holds_nobody_up(daemon: Any, what: str) -> None:
    attacker = attack(daemon, '''
socks = []
try:
    for _ in range(1000):
        socks.append(raw())
        socks[-1].setblocking(False)
except OSError:
    pass
say(len(socks))
while True:
    for sock in list(socks):
        try:
            for _ in range(100):
                sock.send(sys.argv[2].encode())
        except BlockingIOError:
            pass
        except OSError:
            socks.remove(sock)
            try:
                socks.append(raw())
                socks[-1].setblocking(False)
            except OSError:
                time.sleep(0.001)
''', what)  # fmt: skip
    poll(lambda: attacker.out, timeout=20)
    time.sleep(1.0)
    try:
        assert spawn_time(daemon) < PROMPT
    finally:
        attacker.kill()
    assert spawn_time(daemon) < PROMPT


def test_thousands_of_idle_connections_leave_room_for_others(daemon: Any) -> None:
    attacker = attack(daemon, '''
import resource
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
socks = []
try:
    for _ in range(9000):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(2)
        sock.connect(RUN + "/control.sock")
        socks.append(sock)
except OSError:
    pass
say(len(socks))
say()
time.sleep(30)
''')  # fmt: skip
    assert said(attacker)[0] > 1000
    assert max(spawn_time(daemon) for _ in range(3)) < PROMPT
    attacker.kill()


# ---- what is said to be run


def test_a_command_cannot_write_to_whoever_looks(daemon: Any) -> None:
    """Escape sequences, newlines, nft syntax in what a broker calls its command."""
    command = "x\x1b]0;owned\x07\r\nworkspace beta \x9b2J\u202e {}; flush ruleset # \"'"
    attacker = attack(daemon, '''
mine = network()
control, link = attached("acme", mine, json.loads(sys.argv[2]))
say(link)
say()
time.sleep(20)
''', json.dumps(command), uid=MEMBER)  # fmt: skip
    (link,) = said(attacker)
    assert isinstance(link, int)
    for words in (["status"], ["why", "-w", "acme", f"eg{link}"], ["counters"]):
        shown = daemon.ctl(*words).check().out
        bad = [c for c in shown if c != "\n" and not c.isprintable()]
        assert not bad and "\u202e" not in shown, (words, shown)
        assert "\nworkspace beta" not in shown
    assert "flush ruleset" not in daemon.json("ruleset")["text"]
    attacker.kill()


# ---- a broker that does not behave


def test_a_broker_that_is_stopped_holds_up_nobody_but_its_own(daemon: Any) -> None:
    """It answers nobody; its workspace can be taken away all the same, at once."""
    chatter = Chatter(daemon, ["tcp4 plain.test 7", "tcp6 plain.test 7"])
    daemon.lab.signal(chatter.process.pid, signal.SIGSTOP)
    assert spawn_time(daemon) < PROMPT
    began = time.monotonic()
    daemon.policy("acme", None)
    assert time.monotonic() - began < PROMPT
    poll(lambda: not [n for n in daemon.lab.links(daemon.gateway) if n.startswith("eg")], timeout=1.0)
    for flow in ("tcp4 plain.test 7", "tcp6 plain.test 7"):
        chatter.wait_for_failure(flow)
    daemon.lab.signal(chatter.process.pid, signal.SIGCONT)
    assert chatter.process.wait(5) == 125
    daemon.policy("acme", POLICY.format(name="acme", member=MEMBER))


def test_the_end_of_the_connection_is_the_end_of_the_link_under_traffic(daemon: Any) -> None:
    """The broker lives on, its connection does not."""
    text = '''
from egressd.sandbox import launch
wish = launch.Wish(workspace="acme", command=("/usr/bin/python3", "-I", "-c", sys.argv[2]), run_dir=RUN)
import tempfile
out = open("/tmp/hostile-" + str(os.getpid()), "wb+")
os.unlink(out.name)
running = launch.start(wish, stdio=(0, out.fileno(), 2))
time.sleep(0.5)
running.control.channel.socket.shutdown(socket.SHUT_RDWR)
began = time.monotonic()
say(os.fstat(out.fileno()).st_size > 0)
time.sleep(1.0)
size = os.fstat(out.fileno()).st_size
time.sleep(0.3)
say(os.fstat(out.fileno()).st_size == size)
say()
running.destroy()
'''  # fmt: skip
    talk = (
        "import socket\ns = socket.create_connection(('plain.test', 7), timeout=60)\n"
        "while s.send(b'x') and s.recv(9): print('beat', flush=True)\n"
    )
    attacker = attack(daemon, text, talk, uid=MEMBER)
    assert said(attacker) == [True, True]
    attacker.wait()
    assert inside.counters(daemon, "acme")["balance"]["balanced"]


# ---- a file whose close(2) waits for the attacker, who serves its file system

FUSE = '''
import array, signal, struct
INIT, GETATTR, OPEN, FLUSH = 26, 3, 14, 25  # linux/fuse.h
ATTRIBUTES = struct.pack("=QII", 1, 0, 0)
ATTRIBUTES += struct.pack("=QQQQQQIIIIIIIIII", 1, *(0,) * 8, 0o100644, 1, *(0,) * 5)
ANSWERS = {
    INIT: struct.pack("=IIIIHHIIHHI", 7, 31, 65536, 0, 12, 9, 65536, 1, 1, 0, 0) + bytes(24),
    GETATTR: ATTRIBUTES,
    OPEN: struct.pack("=QII", 1, 0, 0),
}

def serve(device, started):
    """Nobody who closes the file goes on until we end: then the kernel lets everybody go."""
    signal.alarm(12)
    while True:
        _, what, unique, *_ = struct.unpack_from("=IIQ", os.read(device, 1 << 20))
        if what == FLUSH:
            os.write(started, b"!")
            continue
        body = ANSWERS.get(what)
        error, body = (0, body) if body is not None else (-38, b"")
        os.write(device, struct.pack("=IiQ", 16 + len(body), error, unique) + body)

def sticky():
    import tempfile
    libc, uid, gid = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    if libc.unshare(USER | 0x20000):
        raise OSError(ctypes.get_errno(), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as stream:
            stream.write(text)
    _, place = tempfile.mkstemp()
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=100000,user_id=0,group_id=0"
    if libc.mount(b"x", place.encode(), b"fuse", 6, options.encode()):
        raise OSError(ctypes.get_errno(), "mount")
    reading, writing = os.pipe()
    if os.fork() == 0:
        serve(device, writing)
    os.close(device)
    return os.open(place, os.O_RDONLY), reading

try:
    descriptor, closing = sticky()
except OSError as error:
    say(str(error))
    say()
    time.sleep(60)

def hand_over(message, *, workspace=None):
    connection = raw()
    if workspace:
        connection.send(json.dumps({"type": "Enter", "workspace": workspace}).encode())
        connection.recv(100_000)
    rights = array.array("i", [descriptor])
    with __import__("contextlib").suppress(OSError):
        connection.sendmsg([json.dumps(message).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    KEPT.append(connection)
'''
HANDED = {
    "a stranger, with any message": 'hand_over({"type": "Ask", "what": "status"})',
    "a stranger, for no lease": 'hand_over({"type": "Resume", "link": 1})',
    "a member": 'hand_over({"type": "Attach"}, workspace="beta")',
    "a member, again and again": 'for _ in range(40): hand_over({"type": "Attach"}, workspace="beta")',
}


@pytest.mark.parametrize("what", HANDED)
def test_nobody_waits_for_a_file_system_of_the_attackers(daemon: Any, what: str) -> None:
    attacker = attack(daemon, FUSE + HANDED[what] + "\nsay(True); say(); time.sleep(60)")
    (held,) = said(attacker)
    if held is not True:
        pytest.skip(f"no FUSE in user namespaces here: {held}")
    began = time.monotonic()
    for _ in range(3):
        daemon.json("status")
    assert time.monotonic() - began < PROMPT
    assert spawn_time(daemon) < PROMPT
