"""Signed notes and checkpoints, as others write and read them."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egressd.journal import notes
from egressd.journal.keys import BadKey, PrivateKey, PublicKey, Verifier, key_hash
from egressd.journal.notes import Checkpoint, NoteError

# golang.org/x/mod/sumdb/note, note_test.go
PETER = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
PETER_SEED = base64.b64decode("AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz")[1:]
ENOCH = "EnochRoot+af0cfe78+ATtqJ7zOtqQtYqOo0CpvDXNlMhV3HeJDpjrASKGLWdop"
TEXT = "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
PETER_LINE = (
    "— PeterNeumann "
    "x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"
)
ENOCH_LINE = (
    "— EnochRoot "
    "rwz+eBzmZa0SO3NbfRGzPCpDckykFXSdeX+MNtCOXm2/5n2tiOHp+vAF1aGrQ5ovTG01oOTGwnWLox33WWd1RvMc+QQ=\n"
)
# c2sp.org/tlog-checkpoint's example text
EXAMPLE = "example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n"

ORIGIN = "box/egressd/0a1b2c3d"
OURS, NEXT, WITNESS = (PrivateKey.from_seed(bytes([number]) * 32) for number in (1, 2, 3))
CHECKPOINT = Checkpoint(ORIGIN, 7, bytes(range(32)))


# ---- keys


def test_a_verifier_key_reads_and_writes_the_same() -> None:
    for text in (PETER, ENOCH):
        assert str(Verifier.parse(text)) == text
        assert PublicKey.load(text).verifier(text.partition("+")[0]) == text


def test_every_other_spelling_of_a_verifier_key_is_refused() -> None:
    pieces = {PETER[i:j] for i in range(len(PETER)) for j in range(i + 1, len(PETER) + 1)} - {PETER}
    mangled = {PETER[:i] + chr(ord(PETER[i]) + 1) + PETER[i + 1 :] for i in range(len(PETER))}
    wrong = {  # a key too long, and an unknown algorithm, both with the hash adjusted
        "PeterNeumann+cc469956+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TWBADKEY==",
        "PeterNeumann+173116ae+ZRpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW",
    }
    for text in pieces | mangled | wrong | {"", PETER + "\n", PETER.replace("c7", "C7")}:
        with pytest.raises(BadKey):
            Verifier.parse(text)


def test_pem_both_ways() -> None:
    again = PrivateKey.load(OURS.dump())
    assert again.public == OURS.public == PublicKey.load(OURS.public.pem())
    assert again.sign(b"x") == OURS.sign(b"x")
    assert OURS.public.verify(again.sign(b"x"), b"x") and not OURS.public.verify(again.sign(b"x"), b"y")
    assert OURS.public.fingerprint.startswith("sha256:") and len(OURS.public.fingerprint) == 7 + 64


def test_what_is_no_key_is_refused_and_not_repeated() -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    foreign = ec.generate_private_key(ec.SECP256R1())
    plain = foreign.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    locked = foreign.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"x"),
    )
    for pem in (b"", b"secret words", OURS.dump()[:60], plain, locked, OURS.public.pem().encode()):
        with pytest.raises(BadKey) as caught:
            PrivateKey.load(pem)
        assert "secret" not in str(caught.value)
    public = foreign.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    for text in ("", "secret words", "-----BEGIN PUBLIC KEY-----\nx", public, OURS.dump()):
        with pytest.raises(BadKey) as caught:
            PublicKey.load(text)
        assert "secret" not in str(caught.value)
    assert "sha256:" in repr(OURS) and OURS.dump().decode().split("\n")[1] not in repr(OURS)


# ---- notes


def test_the_note_of_the_reference_implementation() -> None:
    peter = PrivateKey.from_seed(PETER_SEED)
    assert peter.public.verifier("PeterNeumann") == PETER
    assert notes._sign(TEXT, "PeterNeumann", peter).line == PETER_LINE
    assert notes.open_text(f"{TEXT}\n{PETER_LINE}", [PETER]) == (TEXT, [Verifier.parse(PETER)])


@pytest.mark.parametrize(
    ("lines", "known", "signers"),
    [
        (PETER_LINE + ENOCH_LINE, [PETER], ["PeterNeumann"]),
        (PETER_LINE + ENOCH_LINE, [PETER, ENOCH], ["PeterNeumann", "EnochRoot"]),
        (PETER_LINE * 100, [PETER], ["PeterNeumann"]),
        # the first of a known key decides; later ones, and those of unknown keys, do not count
        (PETER_LINE * 2 + ENOCH_LINE[:60] + "ABCD" + ENOCH_LINE[60:], [PETER], ["PeterNeumann"]),
        (PETER_LINE + PETER_LINE[:60] + "ABCD" + PETER_LINE[60:], [PETER], ["PeterNeumann"]),
        (PETER_LINE, [ENOCH, PETER, ENOCH], ["PeterNeumann"]),
    ],
)
def test_signatures_of_others_do_no_harm(lines: str, known: list[str], signers: list[str]) -> None:
    assert [v.name for v in notes.open_text(f"{TEXT}\n{lines}", known)[1]] == signers


@pytest.mark.parametrize(
    ("note", "known", "why"),
    [
        (f"{TEXT}\n{PETER_LINE}{ENOCH_LINE}", [], "none of the known"),
        (f"{TEXT}\n{ENOCH_LINE}", [PETER], "none of the known"),
        (f"{TEXT}\n{PETER_LINE[:60]}ABCD{PETER_LINE[60:]}", [PETER], "is wrong"),
        (f"{TEXT}\n{PETER_LINE * 101}", [PETER], "more than 100"),
        (f"{TEXT}\n{PETER_LINE}".replace("answer", "question"), [PETER], "is wrong"),
        (TEXT, [PETER], "no text, blank line"),
        (TEXT + "\n", [PETER], "no text, blank line"),
        (f"{TEXT}\n{PETER_LINE[:-1]}", [PETER], "no text, blank line"),
        (f"\x01{TEXT}\n{PETER_LINE}", [PETER], "control"),
        (f"\udcff{TEXT}\n{PETER_LINE}", [PETER], "control"),
        (f"{TEXT}\n{PETER_LINE.replace('PeterNeumann', 'Bad Name')}", [PETER], "malformed"),
        (f"{TEXT}\n{PETER_LINE.replace('PeterNeumann', 'a+b')}", [PETER], "malformed"),
        (f"{TEXT}\n{PETER_LINE}Unexpected line.\n", [PETER], "malformed"),
        (f"{TEXT}\n{PETER_LINE.replace('—', '-')}", [PETER], "malformed"),
        (f"\n\n{PETER_LINE}", [PETER], "no text"),
        ("", [PETER], "no text"),
    ],
)
def test_a_note_that_is_refused(note: str, known: list[str], why: str) -> None:
    with pytest.raises(NoteError, match=why):
        notes.open_text(note, known)


def test_two_keys_with_one_name_and_id_are_ambiguous_only_if_they_differ() -> None:
    twin = Verifier("n", PublicKey(bytes(31) + b"\x01"))
    assert notes._known([twin, str(twin)]) == {("n", key_hash("n", twin.key)): twin}


# ---- checkpoints


def test_the_example_of_the_specification_reads_and_writes_the_same() -> None:
    checkpoint = notes.parse(EXAMPLE)
    assert (checkpoint.origin, checkpoint.size) == ("example.com/behind-the-sofa", 20852163)
    assert checkpoint.text == EXAMPLE
    extended = notes.parse(EXAMPLE + "more\n")
    assert extended.extensions == ("more",) and extended.text == EXAMPLE + "more\n"


@pytest.mark.parametrize(
    "text",
    [
        "", "\n\n\n", EXAMPLE[:-1], EXAMPLE + "\n", EXAMPLE[1:].partition("\n")[2], "\n" + EXAMPLE,
        EXAMPLE.replace("2085", "02085"), EXAMPLE.replace("2085", "-2085"), EXAMPLE.replace("2085", "+2085"),
        EXAMPLE.replace("20852163", str(1 << 63)), EXAMPLE.replace("20852163", "\u0667"),
        EXAMPLE.replace("I=", "J="), EXAMPLE.replace("I=", "I"), EXAMPLE.replace("I=", "I=="),
        EXAMPLE.replace("CsUY", ""), EXAMPLE.replace("CsUY", "CsU_"), EXAMPLE.replace("CsUY", "CsU Y"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_is_refused(text: str) -> None:
    with pytest.raises(NoteError):
        notes.parse(text)


@pytest.mark.parametrize(
    "change",
    [{"origin": ""}, {"origin": "a\nb"}, {"size": -1}, {"size": True}, {"size": 1 << 63},
     {"root": b""}, {"extensions": ("",)}, {"extensions": ("a\nb",)}],
)  # fmt: skip
def test_a_checkpoint_that_cannot_be_written(change: dict) -> None:
    with pytest.raises(NoteError):
        Checkpoint(**{"origin": ORIGIN, "size": 7, "root": bytes(32), **change})


def test_the_log_signs_and_anybody_reads() -> None:
    note = notes.sign(CHECKPOINT, ORIGIN, [OURS])
    assert notes.open(note, [OURS.public.verifier(ORIGIN)]) == CHECKPOINT
    for other in (NEXT.public.verifier(ORIGIN), OURS.public.verifier("another/name")):
        with pytest.raises(NoteError, match="none of the known"):
            notes.open(note, [other])
    for name in ("", "two words", "a+b"):
        with pytest.raises(NoteError):
            notes.sign(CHECKPOINT, name, [OURS])
    with pytest.raises(NoteError):
        notes.sign(CHECKPOINT, ORIGIN, [])


def test_at_a_rotation_either_key_opens_it_and_a_broken_second_signature_refuses_it() -> None:
    both = [OURS.public.verifier(ORIGIN), NEXT.public.verifier(ORIGIN)]
    note = notes.sign(CHECKPOINT, ORIGIN, [OURS, NEXT])
    assert notes.open(note, both[:1]) == notes.open(note, both[1:]) == CHECKPOINT
    assert [str(v) for v in notes.signers(note, both)] == both
    text, (first, second) = notes.signatures(note)
    broken = f"{text}\n{first.line}{notes.Signature(second.name, second.key, first.data).line}"
    assert notes.open(broken, both[:1]) == CHECKPOINT
    with pytest.raises(NoteError, match="is wrong"):
        notes.open(broken, both)


def test_a_witness_adds_its_signature_and_the_note_stays_what_it_was() -> None:
    note = notes.sign(CHECKPOINT, ORIGIN, [OURS])
    cosignature = notes._sign(CHECKPOINT.text, "witness.example/w1", WITNESS)
    more = notes.cosigned(note, [cosignature])
    assert more == note + cosignature.line == notes.cosigned(more, [cosignature])
    assert notes.open(more, [OURS.public.verifier(ORIGIN)]) == CHECKPOINT
    assert notes.open(more, [WITNESS.public.verifier("witness.example/w1")]) == CHECKPOINT
    assert notes.split(more + "\n" + note + "\n") == [more, note]


def test_an_unfinished_note_is_no_note() -> None:
    written = [notes.sign(Checkpoint(ORIGIN, size, bytes(32)), ORIGIN, [OURS, NEXT]) for size in (1, 2, 3)]
    text = "".join(note + "\n" for note in written)
    whole = [len(note) + 1 for note in written]
    for cut in range(len(text) + 1):
        expected = [note for number, note in enumerate(written) if sum(whole[: number + 1]) <= cut]
        assert notes.split(text[:cut]) == expected


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, 10_000), byte=st.integers(1, 255))
def test_every_changed_byte_of_a_note_is_seen(at: int, byte: int) -> None:
    data = bytearray(notes.sign(CHECKPOINT, ORIGIN, [OURS]).encode())
    data[at % len(data)] ^= byte
    with pytest.raises((NoteError, UnicodeDecodeError)):
        notes.open(data.decode(), [OURS.public.verifier(ORIGIN)])
