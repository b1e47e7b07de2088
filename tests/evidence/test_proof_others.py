"""What others read in a proof: libraries and tools that know nothing of egressd."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import scene
from egressd.journal import dsse
from egressd.journal.keys import PrivateKey


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> scene.Story:
    return scene.usual(tmp_path_factory.mktemp("others"))


def _their_key(key: PrivateKey) -> Any:
    from securesystemslib.signer import SSlibKey

    public = key.public
    return SSlibKey(public.fingerprint, "ed25519", "ed25519", {"public": public.raw.hex()})


def test_securesystemslib_verifies_the_envelope(story: scene.Story) -> None:
    from securesystemslib.dsse import Envelope

    envelope = Envelope.from_dict(json.loads(story.proof()))
    assert envelope.payload_type == "application/vnd.in-toto+json"
    accepted = envelope.verify([_their_key(story.key)], 1)
    assert list(accepted) == [story.key.public.fingerprint]


def test_securesystemslib_refuses_what_was_changed_and_who_did_not_sign(story: scene.Story) -> None:
    from securesystemslib.dsse import Envelope
    from securesystemslib.exceptions import VerificationError

    changed = json.loads(story.proof())
    payload = base64.b64decode(changed["payload"]).replace(b"acme", b"rival")
    changed["payload"] = base64.b64encode(payload).decode()
    with pytest.raises(VerificationError):
        Envelope.from_dict(changed).verify([_their_key(story.key)], 1)
    with pytest.raises(VerificationError):
        Envelope.from_dict(json.loads(story.proof())).verify([_their_key(PrivateKey.generate())], 1)


def test_two_signatures_are_two_to_them_as_well() -> None:
    from securesystemslib.dsse import Envelope

    keys = [PrivateKey.generate(), PrivateKey.generate()]
    envelope = Envelope.from_dict(dsse.seal(dsse.IN_TOTO, b"{}", keys))
    assert len(envelope.verify([_their_key(key) for key in keys], 2)) == 2


def test_pae_is_theirs(story: scene.Story) -> None:
    from securesystemslib.dsse import Envelope

    theirs = Envelope.from_dict(json.loads(story.proof()))
    assert dsse.pae(theirs.payload_type, theirs.payload) == theirs.pae()


def test_pae_of_the_specification() -> None:
    """protocol.md, "Test Vectors"."""
    assert dsse.pae("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


def test_in_toto_reads_the_statement(story: scene.Story) -> None:
    from google.protobuf import json_format
    from in_toto_attestation.v1 import statement, statement_pb2

    payload = base64.b64decode(json.loads(story.proof())["payload"])
    found = statement.Statement.copy_from_pb(json_format.Parse(payload, statement_pb2.Statement()))
    found.validate()
    assert found.pb.predicate_type == "urn:egressd:proof:v1"
    journal, policy = found.pb.subject
    assert journal.name == f"{story.origin}@{story.file.seq}"
    assert f"sha256:{policy.digest['sha256']}" == scene.policy_of("acme").digest


def test_openssl_verifies_the_signature(story: scene.Story, tmp_path: Path) -> None:
    signed = dsse.open(dsse.decode(story.proof()))
    (_, signature), data = signed.signatures[0], dsse.pae(signed.payload_type, signed.payload)
    (tmp_path / "key.pem").write_text(story.key.public.pem())
    (tmp_path / "sig").write_bytes(signature)

    def check(data: bytes) -> int:
        (tmp_path / "data").write_bytes(data)
        words = [
            "openssl",
            "pkeyutl",
            "-verify",
            "-pubin",
            "-inkey",
            "key.pem",
            "-rawin",
            "-in",
            "data",
            "-sigfile",
            "sig",
        ]
        return subprocess.run(words, cwd=tmp_path, capture_output=True, check=False).returncode

    assert check(data) == 0
    assert check(data + b" ") != 0


def test_the_policys_digest_is_that_of_its_text(story: scene.Story) -> None:
    """sha256sum and jq are enough."""
    found = json.loads(base64.b64decode(json.loads(story.proof())["payload"]))
    text = found["predicate"]["policy"]["text"]
    assert f"sha256:{hashlib.sha256(text.encode()).hexdigest()}" == found["predicate"]["policy"]["digest"]
