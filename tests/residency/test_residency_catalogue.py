"""The catalogue's files: what is understood, what is refused, and what the catalogue answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from builtin_catalogue import CATALOGUE, FILES
from hypothesis import given, settings
from hypothesis import strategies as st

from egressd.model.errors import PolicyError, Unfit
from egressd.residency.catalogue import Catalogue
from egressd.residency.endpoints import Endpoint
from egressd.residency.places import Placement, Scope

ACME = """
clouds:
  acme:
    title: Acme Cloud
    source: https://acme.example/regions
    domains: [acme.example]
    regions: {north: NO, south: [IT, CH], space: {countries: [], note: nobody knows}}
    aliases: {n: north}
providers:
  acme-llm:
    title: Acme LLM
    also: [acme]
    cloud: acme
    source: https://acme.example/llm
    path_region: places
    endpoints:
      - hosts: ["llm.{region}.acme.example"]
        scope: region
        main: true
      - hosts: ["{resource}.llm.acme.example"]
        scope: unplaced
        declarable: true
        note: it does not say
      - {hosts: [llm.acme.example], scope: global}
"""


def loaded(*texts: str) -> Catalogue:
    return Catalogue.load((f"{number}.yaml", text.encode()) for number, text in enumerate(texts))


def problems(*texts: str) -> list[str]:
    with pytest.raises(PolicyError) as refused:
        loaded(*texts)
    return [str(problem) for problem in refused.value.problems]


# ---- what it answers


def test_the_empty_catalogue_knows_nobody() -> None:
    empty = Catalogue()

    assert empty.providers == () and empty.digest == ""
    assert empty.place(Endpoint.of_host("eu.api.openai.com")) == Placement()
    assert empty.region("openai", "eu") is None and dict(empty.regions("openai")) == {}
    assert empty.cloud_region("aws", "eu-central-1") is None and empty.host_of("openai", "eu") is None


def test_what_the_built_in_one_answers() -> None:
    assert {"openai", "azure-openai", "aws-bedrock", "bedrock", "google-vertex", "mistral", "ollama"} <= set(
        CATALOGUE.providers
    )
    assert list(CATALOGUE.providers) == sorted(CATALOGUE.providers)
    assert CATALOGUE.key("bedrock") == "aws-bedrock" == CATALOGUE.key("aws-bedrock")
    assert CATALOGUE.key("nobody") is None
    assert CATALOGUE.title("bedrock") == "Amazon Bedrock" and CATALOGUE.title("nobody") == "nobody"
    assert CATALOGUE.region("azure-openai", "francecentral") == ("FR",)
    assert CATALOGUE.region("bedrock", "eu-west-2") == ("UK",)
    assert CATALOGUE.region("bedrock", "francecentral") is None
    assert CATALOGUE.region("mistral", "global") == () and CATALOGUE.region("bedrock", "global") is None
    assert len(CATALOGUE.region("openai", "eu") or ()) == 31  # EEA and CH
    assert dict(CATALOGUE.regions("openai-compatible")) == {}
    assert CATALOGUE.regions("huggingface")["europe-west4"] == ("NL",)


@pytest.mark.parametrize(
    "cloud, region, countries",
    [
        ("aws", "eu-central-2", ("CH",)),
        ("aws", "eusc-de-east-1", ("DE",)),
        ("aws", "eu-isoe-west-1", ()),  # published nowhere
        ("aws", "GLOBAL", None),
        ("aws", "europe-west4", None),
        ("google", "europe-west2", ("UK",)),
        ("google", "global", None),
        ("azure", "switzerlandn", ("CH",)),  # as in the service tags
        ("azure", "switzerlandnorth", ("CH",)),
        ("azure", "norwaye", ("NO",)),
        ("azure", "centralfrance", ("FR",)),
        ("azure", "germanywc", ("DE",)),
        ("azure", "", None),
        ("nobody", "eu-central-1", None),
    ],
)
def test_regions_of_clouds(cloud: str, region: str, countries: tuple[str, ...] | None) -> None:
    assert CATALOGUE.cloud_region(cloud, region) == countries


@pytest.mark.parametrize(
    "provider, region, host",
    [
        ("bedrock", "eu-central-1", "bedrock-runtime.eu-central-1.amazonaws.com"),
        ("aws-bedrock", "us-gov-west-1", "bedrock-runtime.us-gov-west-1.amazonaws.com"),
        ("aws-bedrock", "cn-north-1", "bedrock-runtime.cn-north-1.amazonaws.com.cn"),
        ("aws-bedrock", "eusc-de-east-1", "bedrock-runtime.eusc-de-east-1.amazonaws.eu"),
        ("vertex", "europe-west4", "europe-west4-aiplatform.googleapis.com"),
        ("vertex", "eu", "aiplatform.eu.rep.googleapis.com"),
        ("vertex", "global", "aiplatform.googleapis.com"),
        ("openai", "eu", "eu.api.openai.com"),
        ("openai", "global", "api.openai.com"),
        ("mistral", "eu", "api.eu.mistral.ai"),
        ("stackit", "eu01", "api.openai-compat.model-serving.eu01.onstackit.cloud"),
        ("azure-openai", "francecentral", "francecentral.api.cognitive.microsoft.com"),
        ("azure-openai", "usgovvirginia", "usgovvirginia.api.cognitive.microsoft.us"),
        ("bedrock", "eu", None),
        ("bedrock", "us-iso-east-1", None),
        ("openai", "de", None),
        ("azure-ai-foundry", "francecentral", None),  # needs the resource's name
        ("huggingface", "eu-west-1", None),
        ("openai-compatible", "eu", None),
        ("nobody", "eu", None),
    ],
)
def test_the_host_of_a_region(provider: str, region: str, host: str | None) -> None:
    assert CATALOGUE.host_of(provider, region) == host
    if host is not None:
        assert CATALOGUE.place(Endpoint.of_host(host)).region == region


def test_every_host_of_a_region_is_placed_in_that_region() -> None:
    for provider in CATALOGUE.providers:
        for region, there in CATALOGUE.regions(provider).items():
            host = CATALOGUE.host_of(provider, region)
            if host is not None:
                placement = CATALOGUE.place(Endpoint.of_host(host))
                assert (placement.region, placement.countries) == (region, there), host
                assert placement.provider == CATALOGUE.key(provider)


def test_every_placement_names_its_source() -> None:
    for provider in CATALOGUE.providers:
        for region in CATALOGUE.regions(provider):
            host = CATALOGUE.host_of(provider, region)
            if host is not None:
                assert CATALOGUE.place(Endpoint.of_host(host)).source.startswith("https://")


@pytest.mark.parametrize(
    "url, note",
    [
        ("https://acme.openai.azure.com", "does not say where this one is"),
        ("https://eu.evil.openai.com", "eu.evil.openai.com is a name of OpenAI whose shape is not known"),
        ("https://s3.eu-central-1.amazonaws.com", "a name of Amazon Web Services whose shape is not known"),
        (
            "https://bedrock-runtime.eu-central-9.amazonaws.com",
            "names eu-central-9, and no region of that name",
        ),
        (
            "https://bedrock-runtime.cn-north-1.amazonaws.com",
            "names cn-north-1, which belongs to another partition",
        ),
        ("https://eu.api.openai.com:8443", "has no endpoint on port 8443 that is known"),
        (
            "https://europe-west4-aiplatform.googleapis.com/v1/projects/p/locations/us-central1",
            "is in europe-west4, and its path says 'us-central1'",
        ),
        (
            "https://bedrock-runtime.eu-central-1.amazonaws.com/model/eu.anthropic.claude-3/converse",
            "'eu.anthropic.claude-3' is a cross-region inference profile",
        ),
        (
            "https://bedrock-runtime.eu-central-1.amazonaws.com/model/abc/converse",
            "in which region 'abc' is answered, its ID does not say",
        ),
    ],
)
def test_the_reason_is_exact(url: str, note: str) -> None:
    placement = CATALOGUE.place(Endpoint.of(url))

    assert placement.scope is Scope.UNPLACED and note in placement.note


@pytest.mark.parametrize(
    "url, declarable",
    [
        ("https://acme.openai.azure.com", True),
        ("https://acme.services.ai.azure.com", True),
        ("https://oai.endpoints.kepler.ai.cloud.ovh.net", True),
        ("https://x.y.openai.azure.com", False),
        ("https://eu-west-1.api.x.ai", False),
        ("https://s3.eu-central-1.amazonaws.com", False),
        ("https://bedrock-runtime.eu-central-1.amazonaws.com/model/eu.anthropic.claude-3", False),
        ("https://acme.openai.azure.com:8443", False),
    ],
)
def test_what_a_declaration_can_settle(url: str, declarable: bool) -> None:
    assert CATALOGUE.place(Endpoint.of(url)).declarable is declarable


def test_ollama_is_known_by_its_port_on_this_machine() -> None:
    assert CATALOGUE.place(Endpoint.of("http://localhost:11434")) == Placement(Scope.LOOPBACK, "ollama")
    assert CATALOGUE.place(Endpoint.of("http://[::1]:8000")) == Placement(Scope.LOOPBACK)


# ---- files


def test_a_file_is_understood() -> None:
    acme = loaded(ACME)

    assert acme.providers == ("acme", "acme-llm")
    assert acme.place(Endpoint.of_host("llm.south.acme.example")) == Placement(
        Scope.REGION, "acme-llm", "south", ("CH", "IT"), source="https://acme.example/llm"
    )
    assert acme.place(Endpoint.of_host("llm.space.acme.example")).note == "nobody knows"
    assert acme.place(Endpoint.of_host("x.llm.acme.example")).note == "it does not say"
    assert acme.cloud_region("acme", "n") == ("NO",)
    assert acme.host_of("acme", "north") == "llm.north.acme.example"


def test_the_shape_that_says_more_is_tried_first() -> None:
    more = ACME + '      - {hosts: ["x.llm.acme.example"], scope: region, region: north}\n'
    both = loaded(more)

    assert both.place(Endpoint.of_host("x.llm.acme.example")).region == "north"
    assert both.place(Endpoint.of_host("y.llm.acme.example")).scope is Scope.UNPLACED


def test_a_later_file_replaces_an_entry_whole() -> None:
    mine = """
providers:
  acme-llm:
    title: Mine
    source: https://mine.example/
    domains: [mine.example]
    regions: {here: DE}
    endpoints: [{hosts: [llm.mine.example], scope: region, region: here}]
"""
    both = loaded(ACME, mine)

    assert both.providers == ("acme-llm",)
    assert both.place(Endpoint.of_host("llm.mine.example")).countries == ("DE",)
    theirs = both.place(Endpoint.of_host("llm.south.acme.example"))
    assert theirs.scope is Scope.UNPLACED and "Acme Cloud" in theirs.note


def test_a_users_file_extends_the_built_in_ones() -> None:
    extended = Catalogue.load([*FILES, ("acme.yaml", ACME.encode())])

    assert set(extended.providers) == {*CATALOGUE.providers, "acme", "acme-llm"}
    assert extended.digest != CATALOGUE.digest
    for host in ("eu.api.openai.com", "s3.eu-central-1.amazonaws.com"):
        assert extended.place(Endpoint.of_host(host)) == CATALOGUE.place(Endpoint.of_host(host))


def test_the_digest_is_of_the_content() -> None:
    plain = loaded(ACME)

    assert plain.digest.startswith("sha256:") and len(plain.digest) == 71
    assert loaded("# a comment\n" + ACME) == plain
    assert loaded(ACME.replace("[IT, CH]", "[CH, IT]")).digest == plain.digest
    for old, new in [
        ("NO", "SE"),
        ("https://acme.example/llm", "https://acme.example/m"),
        ("main: true", "main: false"),
        ("it does not say", "it says not"),
        ("path_region: places", "path_region: place"),
        ("n: north", "m: north"),
    ]:
        changed = loaded(ACME.replace(old, new))
        assert changed.digest != plain.digest and changed != plain, new


REFUSED = [
    # what is changed in ACME, to what, and the problem
    ("[IT, CH]", "[IT, XX]", "0.yaml:7: clouds.acme.regions.south[1]: 'XX' is not a jurisdiction"),
    ("north: NO", "north: GB", "did you mean UK?"),
    ("title: Acme LLM", "naming: Acme LLM", "'naming' is not known here"),
    ("    title: Acme LLM\n", "", "title: is missing"),
    ("cloud: acme", "cloud: acne", "'acne' is no cloud of the catalogue"),
    ("scope: region", "scope: regional", "'regional' is not a scope"),
    ("source: https://acme.example/llm", "source: http://acme.example", "begins with https://"),
    ("llm.{region}.acme.example", "llm.{region}.acme.example.", "canonical"),
    ("llm.{region}.acme.example", "LLM.{region}.acme.example", "canonical"),
    ("llm.{region}.acme.example", "*.{region}.acme.example", "asterisk"),
    ("llm.{region}.acme.example", "llm.{zone}.acme.example", "brace"),
    ("llm.{region}.acme.example", "{region}.{region}.acme.example", "has a region twice"),
    ("llm.{region}.acme.example", "llm.{region}{region}.acme.example", "brace"),
    ("llm.{region}.acme.example", "llm.{region}.evil.example", "is not beneath a domain of the provider"),
    ("llm.{region}.acme.example", "llm.{region}.notacme.example", "is not beneath a domain of the provider"),
    ("llm.{region}.acme.example", "llm.acme.{region}", "is not beneath a domain of the provider"),
    ("llm.{region}.acme.example", "llm.north.acme.example", "says no region"),
    ("llm.{region}.acme.example", "{resource}.{region}.acme.example", "needs more than a region"),
    ("main: true", "main: yes", "neither true nor false"),
    ("main: true", "region: north", "has a hole for a region, and region: says one"),
    ("main: true", "ports: [0]", "a port is a number"),
    ("main: true", "ports: 443", "no list"),
    ("scope: global", "scope: region, region: west", "'west' is none of its regions"),
    ("n: north", "n: west", "'west' is none of its regions"),
    ("domains: [acme.example]", "domains: [example]", "not a domain"),
    ("domains: [acme.example]", "domains: [Acme.example]", "not a domain"),
    ("also: [acme]", "also: [acme-llm]", "another entry's, too"),
    ("  acme-llm:", "  Acme_LLM:", "is not a key"),
    ("note: it does not say", "note: [a]", "no short text"),
    ("clouds:\n", "cloud:\n", "'cloud' is not known here"),
    ("providers:\n", "providers: x\nother:\n", "no mapping"),
    ("path_region: places", "path_region: &a places", "anchors"),
    ("    title: Acme LLM\n", "    title: Acme LLM\n    title: x\n", "stands here again"),
    ("{hosts: [llm.acme.example], scope: global}", '{hosts: ["{resource}.llm.acme.example"], scope: global}',
     "fits the same names as {resource}.llm.acme.example of acme-llm"),
]  # fmt: skip


@pytest.mark.parametrize("old, new, problem", REFUSED, ids=[row[1].strip() or row[2] for row in REFUSED])
def test_a_file_that_is_refused(old: str, new: str, problem: str) -> None:
    assert ACME.count(old) >= 1
    told = problems(ACME.replace(old, new, 1))
    if "scope: region" in old:
        told = problems(ACME.replace(old, new))

    assert any(problem in one for one in told), told
    assert all(one.startswith("0.yaml") for one in told)


def test_all_problems_of_all_files_are_told_with_their_lines() -> None:
    told = problems(
        "clouds: {a: {title: A, source: 'https://a.example', regions: {x: Q}}}\n",
        "providers:\n  b:\n    title: B\n    source: ftp\n    wrong: 1\n",
    )

    assert [one.partition(" ")[0] for one in told] == ["0.yaml:1:", "1.yaml:4:", "1.yaml:5:"]


def test_two_entries_may_not_share_a_name() -> None:
    other = (
        ACME.partition("providers:")[2].replace("acme-llm", "other").replace("also: [acme]", "also: [else]")
    )

    told = problems(ACME, "providers:" + other)

    assert any(
        "llm.acme.example of other fits the same names as llm.acme.example of acme-llm" in one for one in told
    )
    assert all(one.startswith("1.yaml") for one in told)


@pytest.mark.parametrize(
    ("host", "domain", "of"),
    [
        ("bedrock-runtime.us-east-1.amazonaws.com", "amazonaws.com", "aws-bedrock"),
        ("vpce-1.bedrock.us-east-1.vpce.amazonaws.com", "amazonaws.com", "aws-bedrock"),
        ("us-central1-aiplatform.googleapis.com", "googleapis.com", "google-vertex"),
        ("acme.openai.azure.com", "azure.com", "azure-openai"),
        ("us-{resource}.openai.azure.com", "openai.azure.com", "azure-openai"),
        ("{resource}.api.cognitive.microsoft.com", "api.cognitive.microsoft.com", "azure-openai"),
        ("api.openai.com", "openai.com", "openai"),
    ],
)
def test_no_new_entry_places_names_of_another_anew(host: str, domain: str, of: str) -> None:
    """Neither by saying more than the other nor by saying less."""
    mine = f"""
providers:
  mine:
    title: Mine
    source: https://mine.example/
    domains: [{domain}]
    regions: {{home: DE}}
    endpoints: [{{hosts: ["{host}"], scope: region, region: home}}]
"""
    with pytest.raises(PolicyError) as refused:
        Catalogue.load([*FILES, ("mine.yaml", mine.encode())])
    told = [str(problem) for problem in refused.value.problems]
    assert all(f"{host} of mine fits the same names as" in one for one in told)
    assert any(f" of {of} (to replace it, write the whole entry {of})" in one for one in told)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_damaged_file_is_read_or_refused_with_problems(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(ACME)))
    end = data.draw(st.integers(start, min(len(ACME), start + 20)))
    middle = data.draw(st.text(st.sampled_from("{}[]:,. \n-aA1\"'&*#NO"), max_size=6))
    try:
        loaded(ACME[:start] + middle + ACME[end:])
    except PolicyError as error:
        assert error.problems


# ---- the matcher's laws

PLACED = ("region", "multi-region", "global")
HOSTS = sorted(
    {
        host
        for provider in CATALOGUE.providers
        for region in CATALOGUE.regions(provider)
        if (host := CATALOGUE.host_of(provider, region)) is not None
    }
    | {
        "acme.openai.azure.com",
        "x.eu-west-1.aws.endpoints.huggingface.cloud",
        "s3.eu-central-1.amazonaws.com",
    }
)
LABELS = st.from_regex(r"[a-z0-9]{1,8}", fullmatch=True) | st.sampled_from(
    [
        "eu",
        "us",
        "eu-central-1",
        "europe-west4",
        "westeurope",
        "evil",
        "com",
        "api",
        "bedrock-runtime",
        "localhost",
    ]
)


def placed(host: str) -> Placement | None:
    try:
        return CATALOGUE.place(Endpoint.of_host(host))
    except Unfit:
        return None


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(HOSTS), st.lists(LABELS, min_size=1, max_size=3))
def test_labels_to_the_right_make_it_somebody_elses(host: str, labels: list[str]) -> None:
    found = placed(".".join([host, *labels]))

    assert found is None or found.scope is Scope.UNKNOWN or found.scope is Scope.UNPLACED
    assert found is None or not found.countries


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(HOSTS), st.lists(LABELS, min_size=1, max_size=3))
def test_labels_to_the_left_keep_no_placement(host: str, labels: list[str]) -> None:
    """But where the longer name is written down itself: eu.openrouter.ai is not openrouter.ai."""
    name = ".".join([*labels, host])
    before, found = placed(host), placed(name)

    if name in HOSTS:
        assert found != before
        return
    assert found is None or (found.scope is Scope.UNPLACED and not found.countries)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(HOSTS), st.integers(0, 6), LABELS)
def test_a_label_in_between_keeps_no_placement(host: str, place: int, label: str) -> None:
    labels = host.split(".")
    place = min(place, len(labels) - 1)
    name = ".".join([*labels[:place], label, *labels[place:]])
    before, found = placed(host), placed(name)

    if name in HOSTS:
        assert found != before
        return
    assert found is None or found.scope in (Scope.UNPLACED, Scope.UNKNOWN)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(HOSTS), st.data())
def test_another_letter_changes_the_region_or_loses_it(host: str, data: st.DataObject) -> None:
    """One character more, less or other: never the same region by another name, but for a customer's own."""
    place = data.draw(st.integers(0, len(host) - 1))
    other = (
        host[:place]
        + data.draw(st.sampled_from(["", "x", "-", "1", ".", host[place] * 2]))
        + host[place + 1 :]
    )
    before, after = placed(host), placed(other)
    mine = host.startswith("x.") and place < 2
    if other == host or before is None or after is None or before.scope is Scope.UNPLACED or mine:
        return
    assert str(after.scope) not in PLACED or after.region != before.region


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(HOSTS), st.lists(st.booleans(), min_size=80, max_size=80), st.booleans())
def test_case_and_a_last_dot_change_nothing(host: str, upper: list[bool], dot: bool) -> None:
    written = "".join(one.upper() if up else one for one, up in zip(host, upper, strict=False))

    assert placed(written + "." * dot) == placed(host[: len(written)])


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60), st.integers(), st.sampled_from(["https", "http", "x"]))
def test_place_never_raises(host: str, path: str, port: int, scheme: str) -> None:
    """Not even for endpoints that `Endpoint.of` would not make."""
    for name in (
        host,
        f"{host}.amazonaws.com",
        f"bedrock-runtime.{host}.amazonaws.com",
        f"{host}-aiplatform.googleapis.com",
    ):
        found = CATALOGUE.place(Endpoint(scheme, name, None, port, path))
        assert str(found.scope) not in ("region", "multi-region") or found.countries


@settings(max_examples=200, deadline=None)
@given(st.lists(LABELS, min_size=1, max_size=6))
def test_a_path_never_places_what_its_host_does_not(labels: list[str]) -> None:
    for host in HOSTS[:: len(HOSTS) // 10]:
        endpoint = Endpoint.of_host(host)
        alone = CATALOGUE.place(endpoint)
        beneath = CATALOGUE.place(replace(endpoint, path="/" + "/".join(labels)))
        assert beneath == alone or beneath.scope is Scope.UNPLACED


# ---- speed


def seconds(action: Callable[[], object]) -> float:
    """The quickest of five: the machine may have other things to do."""
    found = []
    for _ in range(5):
        begin = time.perf_counter()
        action()
        found.append(time.perf_counter() - begin)
    return min(found)


def test_it_is_quick() -> None:
    """Bounds far above what is measured (loading 25 ms, placing 4 us), and far below a linear search."""
    endpoints = [Endpoint.of_host(host) for host in HOSTS]

    assert seconds(lambda: Catalogue.load(FILES)) < 0.1
    assert seconds(lambda: [CATALOGUE.place(endpoint) for endpoint in endpoints]) / len(endpoints) < 50e-6
